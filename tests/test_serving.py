"""Serving: names from strangers, immutable folders that servers share, and what each name is answered with. No engine is run here."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import hypothesis
import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorag.adapters.adapter import LoraAdapter
from lorag.bank.bank import AdapterBank
from lorag.base.names import locate
from lorag.errors import (
    ArtifactError,
    BaseModelError,
    ConfigError,
    ServedNameError,
    StorageError,
    StoreFullError,
    UnknownTaskError,
)
from lorag.files.artifacts import embedded
from lorag.generator.generate import default_generator
from lorag.serving.names import DescribedTask, Fusion, NamedExpert, alias, parse_name
from lorag.serving.resolver import AdapterResolver, ServingSettings
from lorag.serving.store import AdapterStore, StoreLimits, content_hash

KNOWN, OTHER, FAR = "summarise legal text", "which city does this travel note name?", "lorag:drive my robot arm forward, please"
HOSTILE = [
    "lorag:../../etc/passwd",
    "lorag:/etc/passwd",
    "lorag:expert/../../x",
    "lorag:expert/..",
    "lorag:expert/a/b",
    "lorag:expert/CON",
    "lorag:expert/",
    "lorag:fuse/",
    "lorag:fuse/a=1",
    "lorag:fuse/a=nan,b=1",
    "lorag:fuse/a=inf,b=1",
    "lorag:fuse/a=1e9,b=1",
    "lorag:fuse/a=-1,b=1",
    "lorag:fuse/a=0,b=1",
    "lorag:fuse/a=1,a=1",
    "lorag:fuse/../a=1,b=1",
    "lorag:fuse/" + ",".join(f"e{i}=1" for i in range(9)),
    "lorag:",
    "lorag:   ",
    "lorag:a\0b",
    "lorag:a\nb",
    "lorag:a\x1b[2Jb",
    "lorag:a\u202eb",
    "lorag:a\u2028b",
    "lorag:\ud800",
    "lorag:" + "x" * 20_000,
    "lorag:" + "\u0301" * 20_000,
    "lorag:#" + "0" * 24,
]


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_three_forms():
    """A description, an expert, a fusion; other models' names are not for lorag to answer."""
    assert parse_name("lorag:summarise legal text") == DescribedTask("summarise legal text")
    assert parse_name("lorag:expert/legal-summary_2") == NamedExpert("legal-summary_2")
    assert parse_name("lorag:fuse/b=.3,a=.7") == Fusion((("a", 0.7), ("b", 0.3)))
    assert parse_name("gpt-4") is None and parse_name("") is None and parse_name("Lorag:x") is None


def test_spellings_of_one_request_are_one():
    """Blanks, the order of a fusion, and the form of Unicode make no other request; case may."""
    same = [parse_name(name).canonical for name in ("lorag:summarise  legal text ", "lorag: summarise legal\u00a0text")]
    assert same[0] == same[1]
    assert parse_name("lorag:fuse/a=.7, b=.30").canonical == parse_name("lorag:fuse/b=0.3,a=0.70").canonical
    assert parse_name("lorag:cafe\u0301").canonical == parse_name("lorag:café").canonical


@pytest.mark.parametrize(
    "text", ["règlement d'assurance", "法律文書を要約する", "خلاصه\u200cسازی متن حقوقی", "कानूनी पाठ", "summarise 🙂", "a/b: c.d"]
)
def test_other_scripts_are_descriptions(text):
    """Descriptions may be of any script; joiners inside of words stay."""
    assert parse_name(f"lorag:{text}") == DescribedTask(text)


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE if not name.startswith(("lorag:..", "lorag:/"))], ids=lambda name: ascii(name)[:30]
)
def test_hostile_names_are_refused(name):
    """With an error of their own, whose text is short and printable."""
    with pytest.raises(ServedNameError) as caught:
        parse_name(name)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@hypothesis.given(st.text(max_size=80))
def test_any_text_is_a_request_or_a_refusal(text):
    """Nothing else comes out, and what shows in logs says nothing of the name."""
    try:
        found = parse_name(f"lorag:{text}")
    except ServedNameError:
        return
    assert (
        found is not None
        and parse_name(f"lorag:{found.canonical.partition(' ')[2]}") is not None
        or isinstance(found, NamedExpert | Fusion)
    )
    assert alias(text)[7:].isalnum() and len(alias(text)) == 31


# --- the store --------------------------------------------------------------------------------------------------------


def _write(text):
    def write(folder):
        (folder / "adapter_config.json").write_text(text)
        (folder / "adapter_model.safetensors").write_text(text * 10)

    return write


def _key(number):
    return f"{number:040x}"


def _names(folder):
    return sorted(path.name for path in (folder / "adapters").iterdir())


def test_a_folder_is_named_by_its_content(tmp_path):
    """Equal contents share a folder, whatever asked for them; a key finds it again, in this process and in the next."""
    store = AdapterStore.open(tmp_path / "store")
    first, second, other = store.add(_key(1), _write("a")), store.add(_key(2), _write("a")), store.add(_key(3), _write("b"))
    assert first == second != other and first.name == content_hash(first)
    assert AdapterStore.open(tmp_path / "store").find(_key(2)) == first
    assert store.find(_key(9)) is None
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0  # descriptions of users stand in lorag.json


def test_what_was_written_is_never_written_again(tmp_path):
    """Asking again leaves inode and times as they are; a folder that somebody changed is an error, not served."""
    store = AdapterStore.open(tmp_path)
    folder = store.add(_key(1), _write("a"))
    before = (folder / "adapter_config.json").stat()
    store.add(_key(2), _write("a"))
    after = (folder / "adapter_config.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (folder / "adapter_config.json").write_text("c")
    with pytest.raises(ArtifactError, match="was changed"):
        AdapterStore.open(tmp_path).find(_key(1))


def test_limits_refuse_and_leave_nothing(tmp_path):
    """Beyond the number or the bytes there is a clear error; what is there is still found."""
    few = AdapterStore.open(tmp_path / "few", StoreLimits(adapters=2))
    found = [few.add(_key(i), _write(str(i))) for i in range(2)]
    for attempt in (lambda: few.add(_key(2), _write("2")), few.check_room):
        with pytest.raises(StoreFullError, match="fewer than 2"):
            attempt()
    assert few.add(_key(5), _write("1")) == found[1]  # it is there already
    assert few.find(_key(0)) == found[0] and len(_names(tmp_path / "few")) == 2
    small = AdapterStore.open(tmp_path / "small", StoreLimits(bytes=20))
    small.add(_key(0), _write("a"))
    with pytest.raises(StoreFullError, match="at most 20"):
        small.add(_key(1), _write("b"))
    assert len(_names(tmp_path / "small")) == 1 and small.usage().bytes == 11


def test_a_full_disk_is_a_named_error(tmp_path, monkeypatch):
    """Whichever write fails, nothing half-written is left, and the next request succeeds."""
    store = AdapterStore.open(tmp_path)

    def full(folder):
        (folder / "adapter_config.json").write_text("a")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        store.add(_key(1), full)
    assert _names(tmp_path) == [] and store.find(_key(1)) is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match="No space left on device"):
            store.add(_key(1), _write("a"))
    assert _names(tmp_path) == []
    assert store.add(_key(1), _write("a")).is_dir()


@pytest.mark.parametrize("key", ["../x", "", "A" * 40, "0" * 39])
def test_a_key_is_a_hash(tmp_path, key):
    """Nothing else becomes a file's name."""
    with pytest.raises(ArtifactError):
        AdapterStore.open(tmp_path).find(key)


_WORKER = """
import json, sys
from pathlib import Path
from lorag.errors import StoreFullError
from lorag.serving.store import AdapterStore, StoreLimits
store, found = AdapterStore.open(sys.argv[1], StoreLimits(adapters=6)), []
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    def write(folder):
        (folder / "adapter_config.json").write_text(str(number) * 1000)
    try:
        found.append(store.add(f"{number:040x}", write).name)
    except StoreFullError:
        found.append(None)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_several_servers_share_a_folder(tmp_path):
    """Three processes that write the same ten adapters at once end with exactly as many as the limit allows, all of them sound."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path)], **pipes) for _ in range(3)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    found = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    named = {name for one in found for name in one if name is not None}
    assert sorted(named) == _names(tmp_path) and len(named) == 6
    assert all(content_hash(tmp_path / "adapters" / name) == name for name in named)
    assert all(len({one[number] for one in found} - {None}) <= 1 for number in range(10))


# --- from a name to a folder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    return default_generator()


@pytest.fixture(scope="module")
def bank():
    return AdapterBank.from_pretrained(embedded("data/sandbox/bank"))


@pytest.fixture
def resolver(tmp_path, generator, bank):
    return AdapterResolver(generator, AdapterStore.open(tmp_path / "store"), bank)


@pytest.mark.slow
def test_a_description_is_answered_with_its_adapter(resolver, generator, bank):
    """The folder holds what the generator makes of it; the same description gives the same folder, as does a new server."""
    folder = resolver.resolve(f"lorag:{OTHER}")
    made, direct = LoraAdapter.from_pretrained(folder), generator.generate(OTHER, on_unknown="raise", bank=bank)
    assert all(torch.equal(made.factors[name][0], direct.factors[name][0]) for name in direct.factors)
    assert resolver.resolve(f"lorag:  {OTHER} ") == folder
    again = AdapterResolver(generator, AdapterStore.open(resolver.store.folder), bank)
    assert again.find(parse_name(f"lorag:{OTHER}")) == folder
    assert resolver.store.usage().adapters == 1 and resolver.resolve("some-model") is None


def test_experts_and_fusions(resolver, bank):
    """An expert's ΔW is the bank's; a fusion is Σ w ΔW, cut to the engine's rank."""
    one, other = bank.names[:2]
    expert = LoraAdapter.from_pretrained(resolver.resolve(f"lorag:expert/{one}"))
    module = expert.layout.names[0]
    torch.testing.assert_close(expert.delta(module), bank.adapter(one).delta(module))
    fused = LoraAdapter.from_pretrained(resolver.resolve(f"lorag:fuse/{one}=.7,{other}=.3"))
    whole = 0.7 * bank.adapter(one).delta(module) + 0.3 * bank.adapter(other).delta(module)
    assert fused.rank <= resolver.settings.max_rank
    assert (fused.delta(module) - whole).norm() < 0.35 * whole.norm()
    with pytest.raises(ServedNameError, match="no such expert"):
        resolver.resolve("lorag:expert/nobody")
    with pytest.raises(ServedNameError, match="no such expert"):
        resolver.resolve(f"lorag:fuse/{one}=.5,nobody=.5")


def test_without_a_bank_experts_are_refused(tmp_path, generator):
    """With a remedy."""
    bare = AdapterResolver(generator, AdapterStore.open(tmp_path))
    with pytest.raises(ServedNameError, match="has no bank"):
        bare.resolve("lorag:expert/legal-summarise-plain")


@pytest.mark.slow
def test_the_gate_decides(tmp_path, generator, caplog):
    """A refused description is an error that names the nearest tasks; as a fallback, all of them get one adapter that changes nothing."""
    strict = AdapterResolver(generator, AdapterStore.open(tmp_path / "strict"))
    with pytest.raises(UnknownTaskError, match="nearest tasks"):
        strict.resolve(FAR)
    assert strict.store.usage().adapters == 0
    mild = AdapterResolver(generator, AdapterStore.open(tmp_path / "mild"), settings=ServingSettings(on_unknown="fallback"))
    with caplog.at_level(logging.INFO, "lorag"):
        folders = {mild.resolve(name) for name in (FAR, "lorag:asdf qwer zxcv", "lorag:bake me a cake of seven layers")}
    assert len(folders) == 1
    nothing = LoraAdapter.from_pretrained(folders.pop(), allow_missing=False)
    assert not any(nothing.norms().values()) and nothing.rank == 1
    assert caplog.records and not any(word in caplog.text for word in ("robot", "asdf", "cake"))


@pytest.mark.slow
def test_hostile_names_write_nothing(resolver):
    """Path tricks are descriptions, which the gate refuses, or refused at once; no file is made for any, and none outside."""
    before = sorted(resolver.store.folder.parent.rglob("*"))
    for name in HOSTILE:
        with pytest.raises((ServedNameError, UnknownTaskError)):
            resolver.resolve(name)
    assert sorted(resolver.store.folder.parent.rglob("*")) == before


def test_the_base_must_be_the_generator_s(resolver, tmp_path):
    """By name, by folder, or by weights; anything else is said."""
    resolver.check_base("sandbox-lm")
    resolver.check_base(locate("sandbox-lm"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((Path(locate("sandbox-lm")) / "model.safetensors").read_bytes())
    resolver.check_base(str(copy))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors")
    for other in (str(copy), "user/other", str(tmp_path / "hub/models--user--other/snapshots/0")):
        with pytest.raises(BaseModelError, match="is not the one of the generator"):
            resolver.check_base(other)


def test_settings_that_do_not_fit_are_refused(generator, tmp_path):
    """A generator of a larger rank than the engine takes, and values out of range."""
    with pytest.raises(ConfigError, match="--max-lora-rank 16"):
        AdapterResolver(generator, AdapterStore.open(tmp_path), settings=ServingSettings(max_rank=8))
    for wrong in ({"on_unknown": "hope"}, {"max_adapters": 0}, {"max_waiting": 0}):
        with pytest.raises(ConfigError):
            ServingSettings(**wrong)


def test_threads_make_one_adapter_of_one_description(resolver, monkeypatch):
    """Ten threads that ask at once for one description generate once."""
    made, found = [], []
    real = resolver.generator.generate
    monkeypatch.setattr(resolver.generator, "generate", lambda text, **more: made.append(text) or real(text, **more))
    threads = [threading.Thread(target=lambda: found.append(resolver.resolve(f"lorag:{OTHER}"))) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 10 and len(made) == 1


# --- the plug-in, with stand-ins for vLLM's three names ---------------------------------------------------------------


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        super().__init__(detail)
        self.status_code, self.detail = int(status_code), detail


@pytest.fixture
def plugin(tmp_path, monkeypatch, generator):
    """The plug-in with vLLM's names standing in, and settings in a YAML file."""
    registered = {}
    fakes = {
        "fastapi": {"HTTPException": HTTPException},
        "vllm": {},
        "vllm.envs": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda name, number, path: SimpleNamespace(name=name, path=path)},
        "vllm.lora.resolver": {"LoRAResolverRegistry": SimpleNamespace(register_resolver=registered.__setitem__)},
    }
    for name, values in fakes.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    monkeypatch.delitem(sys.modules, "lorag.serving.vllm", raising=False)  # a process of its own has registered nothing
    import lorag.serving.vllm as plugin

    (tmp_path / "serving.yaml").write_text(f"folder: {tmp_path / 'store'}\nmax_adapters: 2\nmax_waiting: 3\n")
    monkeypatch.setenv("LORAG_SERVING", str(tmp_path / "serving.yaml"))
    plugin.registered = registered
    level = logging.getLogger("lorag").level
    yield plugin
    logging.getLogger("lorag").setLevel(level)
    logging.getLogger("lorag").handlers.clear()
    logging.getLogger(plugin._VLLM_LOGGER).filters.clear()


def _ask(resolver, *names, base="sandbox-lm"):
    async def ask():
        return await asyncio.gather(*[resolver.resolve_lora(base, name) for name in names], return_exceptions=True)

    return asyncio.run(ask())


@pytest.mark.slow
def test_the_plugin_answers_and_refuses(plugin):
    """200 with an immutable folder, None for others' names, 400 with the reason, 429 beyond the limit, 500 for another base."""
    plugin.register()
    resolver = plugin.registered["lorag"]
    one, none, refused, hostile = _ask(resolver, f"lorag:{OTHER}", "other", FAR, "lorag:a\0b")
    assert Path(one.path).is_dir() and one.name == alias(f"lorag:{OTHER}") and none is None
    assert (refused.status_code, hostile.status_code) == (400, 400) and "nearest tasks" in refused.detail
    again, second, full = (
        _ask(resolver, name)[0] for name in (f"lorag:{OTHER}", f"lorag:{KNOWN}", "lorag:summarise travel notes in capital letters")
    )
    assert again.path == one.path != second.path
    assert full.status_code == 429 and "fewer than 2" in full.detail
    (other,) = _ask(resolver, f"lorag:{KNOWN}", base="user/other")
    assert other.status_code == 500 and "is not the one of the generator" in other.detail


def test_a_crowd_of_new_names_is_told_to_wait(plugin, monkeypatch):
    """Beyond max_waiting requests that wait for an adapter, 429; the others are answered."""
    plugin.register()
    found = _ask(plugin.registered["lorag"], *[f"lorag:{KNOWN}"] * 6)
    assert sorted(getattr(one, "status_code", 200) for one in found) == [200] * 3 + [429] * 3


@pytest.mark.slow
def test_a_full_disk_is_507(plugin, monkeypatch):
    """Not a crash, and not the client's fault."""
    plugin.register()
    resolver = plugin.registered["lorag"]
    _ask(resolver, f"lorag:{KNOWN}")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (full,) = _ask(resolver, f"lorag:{OTHER}")
    assert full.status_code == 507 and "No space left" in full.detail


def test_the_server_says_at_the_start_what_does_not_fit(plugin):
    """The right base and settings start and load the generator; another base, a small rank, or no adapters at run time stop the start."""
    plugin.register()
    start = plugin.EndpointPlugin().init_state

    def engine(base):
        return SimpleNamespace(model_config=SimpleNamespace(model=base))

    good = SimpleNamespace(enable_lora=True, max_lora_rank=16)
    asyncio.run(start(engine(locate("sandbox-lm")), None, good))
    assert plugin.registered["lorag"]._resolver is not None
    for base, args, what in (
        ("user/other", good, "is not the one of the generator"),
        ("sandbox-lm", SimpleNamespace(enable_lora=False, max_lora_rank=16), "cannot be loaded at run time"),
        ("sandbox-lm", SimpleNamespace(enable_lora=True, max_lora_rank=8), "--max-lora-rank is too small"),
    ):
        with pytest.raises((BaseModelError, ConfigError), match=what):
            asyncio.run(start(engine(base), None, args))


def test_registering(plugin, monkeypatch, tmp_path):
    """Twice is once; without the variable nothing happens; a generator by name; a wrong setting is said."""
    plugin.register()
    first = plugin.registered["lorag"]
    plugin.register()
    assert plugin.registered["lorag"] is first
    monkeypatch.delenv("LORAG_SERVING")
    assert plugin.settings_from_environment() is None
    monkeypatch.setenv("LORAG_SERVING", "user/generator")
    assert plugin.settings_from_environment() == ServingSettings(generator="user/generator")
    monkeypatch.setenv("LORAG_SERVING", "default")
    assert plugin.settings_from_environment() == ServingSettings()
    (tmp_path / "wrong.yaml").write_text("max_adapter: 3\n")
    monkeypatch.setenv("LORAG_SERVING", str(tmp_path / "wrong.yaml"))
    with pytest.raises(ConfigError, match="max_adapter"):
        plugin.settings_from_environment()


def test_vllm_s_own_lines_hide_descriptions(plugin, caplog):
    """Unless the settings ask for them."""
    plugin.register()
    with caplog.at_level(logging.INFO, plugin._VLLM_LOGGER):
        logging.getLogger(plugin._VLLM_LOGGER).info("Resolved and loaded LoRA adapter '%s' using %s", "lorag:my secret", "X")
    assert "secret" not in caplog.text and alias("lorag:my secret") in caplog.text


def test_lorag_s_lines_stand_among_vllm_s(plugin, caplog, monkeypatch):
    """Whatever handlers vLLM sets up later."""
    plugin.register()
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    logging.getLogger("vllm").addHandler(handler)
    _ask(plugin.registered["lorag"], f"lorag:{KNOWN}")
    logging.getLogger("vllm").removeHandler(handler)
    assert any("made in" in record.getMessage() for record in seen) and not any(KNOWN in record.getMessage() for record in seen)


def test_the_entry_points_lead_to_the_plugin():
    """setup.cfg names what is there."""
    import configparser

    import lorag.serving.vllm as plugin

    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parent.parent / "setup.cfg")
    for group, line in config["options.entry_points"].items():
        if group.startswith("vllm."):
            name, _, target = line.strip().partition(" = ")
            module, _, attribute = target.partition(":")
            assert name == "lorag" and module == plugin.__name__ and hasattr(plugin, attribute)
    assert config["options.extras_require"]["vllm"].strip().startswith("vllm")
