"""Import: any adapter in, folded to its ΔW and compared with the bank; and what would do harm refused, by name, before it is loaded."""

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from conftest import gauge
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_world import WordEmbedder

from lorag import errors
from lorag.adapters import reading
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.adapters.purpose import card_text, find_purpose
from lorag.adapters.sources import find_sources
from lorag.adapters.spans import RunningSpan
from lorag.bank import candidates, importing
from lorag.bank.bank import AdapterBank, BankBase
from lorag.bank.check import check_bank, format_findings
from lorag.bank.importing import ImportOptions, import_adapters
from lorag.bank.index import BankIndex
from lorag.bank.new_bank import NewBank, start_bank
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.names import known_name, same_model
from lorag.errors import LoragError
from lorag.files.artifacts import embedded, write_json, write_manifest
from lorag.spaces import SharedSubspace

LAYOUT = LoraLayout.from_dict(
    {
        "target_modules": ["q", "v"],
        "modules": [[f"layers.{n}.{p}", 12, o] for n in range(2) for p, o in (("q", 12), ("v", 6))],
        "fan_in_fan_out": False,
    }
)
BASE = BankBase(BaseModel("tiny-base", "causal_lm"), "sha256:0123", LAYOUT, "causal_lm", {})
KEY = "base_model.model.{}.lora_{}.weight"
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny-base",
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": ["q", "v"],
}


def tensors_of(adapter):
    """Tensors under PEFT's names."""
    return {KEY.format(n, f): t.contiguous() for n, pair in adapter.factors.tensors.items() for f, t in zip("AB", pair, strict=True)}


def write(folder, adapter, description="paint it", change=None, **config):
    """A PEFT folder; `change` may spoil its tensors, and `config` overwrite settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(adapter)
    save_file(change(tensors) if change else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": adapter.rank, "lora_alpha": adapter.alpha, **config}))
    if description:
        (folder / "description.txt").write_text(description)
    return folder


def run(bank, *places, embedder=None, **terms):
    """Imports and returns what became of each."""
    return list(import_adapters(bank.folder, find_sources([str(place) for place in places]), ImportOptions(**terms), embedder=embedder))


def opened(bank):
    return AdapterBank.from_pretrained(bank.folder)


def files_of(bank):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(bank.folder.rglob("*.safetensors")) if p.parent.name == "experts"}


@pytest.fixture
def bank(tmp_path, random_adapter):
    """Six experts of rank 2."""
    made = AdapterBank.create(tmp_path / "bank", BASE)
    words = "red green blue grey pink gold".split()
    return made.add([(word, [f"paint the {word} cat"], [random_adapter(LAYOUT, 2, 4.0, seed=i)]) for i, word in enumerate(words)])


# --- the same adapter in every disguise -------------------------------------------------------------------------------


def _padded(adapter, padding):
    """Config and adapter with the same ΔW: as it is; rank 7 with zero rows, under rsLoRA; every direction twice, at half size."""
    r, pad = adapter.rank, torch.nn.functional.pad
    if padding == "zeros":
        scale = math.sqrt(7) / 5
        factors = {n: (pad(a, (0, 0, 0, 7 - r)), pad(b * scale, (0, 7 - r))) for n, (a, b) in adapter.factors.items()}
        return {"use_rslora": True}, LoraAdapter(LAYOUT, Factors.with_alpha(factors, 5.0))
    if padding == "twice":
        factors = {n: (torch.cat([a, a]), torch.cat([b, b], 1) / 2) for n, (a, b) in adapter.factors.tensors.items()}
        return {
            "r": 1,
            "lora_alpha": 9,
            "rank_pattern": {"q": 2 * r, "layers.0.v": 2 * r, "layers.1.v": 2 * r},
            "alpha_pattern": {"q": 2 * adapter.alpha, "v": 2 * adapter.alpha},
        }, LoraAdapter(LAYOUT, Factors.with_alpha(factors, 2 * adapter.alpha))
    return {}, adapter


@pytest.mark.slow
def test_ten_gauges_and_three_paddings_give_one_core(bank, tmp_path, random_adapter):
    """The core of an added adapter depends on its ΔW alone: within 1e-5 in ten gauges and three paddings, each seen as a duplicate."""
    space = SharedSubspace.fit(bank.adapters, LAYOUT, 8)
    adapter = random_adapter(LAYOUT, 3, 6.0, seed=50)
    wanted = space.cores(adapter.factors)
    for number in range(10):
        for padding in ("none", "zeros", "twice"):
            config, disguised = _padded(gauge(adapter, number), padding)
            write(tmp_path / "in" / f"{padding}-{number}", disguised, f"task {padding} {number}", **config)
    done = run(bank, tmp_path / "in")
    assert len(done) == 30 and not any(one.error for one in done), [one.error for one in done if one.error]
    now = opened(bank)
    for one in done:
        assert (space.cores(now.adapter(one.name).factors) - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max().item()), one.name
    assert all(one.same_weights for one in done[1:]) and not done[0].same_weights


def test_missing_modules_are_zero_and_reported(bank, tmp_path, random_adapter):
    """An adapter of fewer modules has a zero core for the others, and says which."""
    adapter = random_adapter(LAYOUT, 2, 4.0, seed=9)
    (one,) = run(bank, write(tmp_path / "few", adapter, change=lambda t: {k: v for k, v in t.items() if ".q." in k}))
    assert one.missing == ("layers.0.v", "layers.1.v")
    stored = opened(bank).adapter("few")
    for name in LAYOUT.names:
        expected = adapter.delta(name) if name.endswith("q") else torch.zeros_like(adapter.delta(name))
        assert torch.allclose(stored.delta(name), expected, atol=1e-6)


def test_extra_modules_are_refused_or_left_out_with_their_share(bank, tmp_path, random_adapter):
    """Factors of other modules: an error that names them, or --ignore-extra, which says what share of the adapter is lost."""
    adapter = random_adapter(LAYOUT, 2, 4.0, seed=9)
    rows, columns = adapter.factors.tensors["layers.0.q"]
    more = {KEY.format("layers.0.o", "A"): rows * 3, KEY.format("layers.0.o", "B"): columns.clone()}
    folder = write(tmp_path / "more", adapter, change=lambda t: {**t, **more})
    (one,) = run(bank, folder)
    assert type(one.error) is errors.ExtraTensorError and "layers.0.o" in str(one.error) and "--ignore-extra" in str(one.error)
    (one,) = run(bank, folder, ignore_extra=True)
    outside = 9 * adapter.norms()["layers.0.q"] ** 2
    assert one.error is None and one.ignored == ("layers.0.o",)
    assert one.ignored_share == pytest.approx(outside / (outside + adapter.factors.norm() ** 2), rel=1e-5)
    assert torch.equal(opened(bank).adapter("more").delta("layers.0.q"), adapter.delta("layers.0.q"))
    head = write(tmp_path / "head", adapter, change=lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(3, 3)})
    (one,) = run(bank, head, ignore_extra=True)
    assert type(one.error) is errors.ExtraTensorError, "a tensor that replaces base weights cannot be left out"


# --- refusals ---------------------------------------------------------------------------------------------------------

FIRST, SECOND = KEY.format("layers.0.q", "A"), KEY.format("layers.0.q", "B")


def _config(**changes):
    return {"config": changes}


def _tensors(change):
    return {"change": change}


def _both(change):
    """Applies a change to every factor."""
    return _tensors(lambda t: {k: change(k, v) for k, v in t.items()})


REFUSED = {
    "no prefix": (errors.MissingPrefixError, _tensors(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})),
    "tensor missing": (errors.MissingTensorError, _tensors(lambda t: {k: v for k, v in t.items() if k != SECOND})),
    "no tensors": (errors.MissingTensorError, _tensors(lambda t: {})),
    "tensor extra": (errors.ExtraTensorError, _tensors(lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(2, 2)})),
    "transposed": (errors.FactorShapeError, _both(lambda k, v: v.T.contiguous())),
    "A transposed": (errors.FactorShapeError, _tensors(lambda t: {**t, FIRST: t[FIRST].T.contiguous()})),
    "not of rank r": (errors.FactorShapeError, _config(r=3)),
    "integers": (errors.FactorShapeError, _tensors(lambda t: {**t, FIRST: t[FIRST].to(torch.int8)})),
    "a vector": (errors.FactorShapeError, _tensors(lambda t: {**t, FIRST: t[FIRST].flatten()})),
    "NaN": (errors.NonFiniteError, _tensors(lambda t: {**t, SECOND: t[SECOND] * math.nan})),
    "infinite": (errors.NonFiniteError, _tensors(lambda t: {**t, FIRST: t[FIRST] / 0})),
    "NaN alpha": (errors.NonFiniteError, _config(lora_alpha=math.nan)),
    "infinite alpha": (errors.NonFiniteError, _config(lora_alpha=math.inf)),
    "NaN in alpha_pattern": (errors.NonFiniteError, _config(alpha_pattern={"q": math.nan})),
    "alpha 1e30": (errors.AlphaRangeError, _config(lora_alpha=1e30)),
    "alpha 0": (errors.AlphaRangeError, _config(lora_alpha=0)),
    "alpha text": (errors.AlphaRangeError, _config(lora_alpha="16")),
    "alpha_pattern 1e30": (errors.AlphaRangeError, _config(alpha_pattern={"nowhere": 1e30})),
    "r 200,000": (errors.RankRangeError, _config(r=200_000)),
    "r 0": (errors.RankRangeError, _config(r=0)),
    "rank_pattern 200,000": (errors.RankRangeError, _config(rank_pattern={"nowhere": 200_000})),
    "float64 beyond float32": (errors.DtypeOverflowError, _both(lambda k, v: v.double() * (1e39 if k == SECOND else 1))),
    "values beyond any use": (
        errors.NormRangeError,
        {"change": lambda t: {k: v * (1e-42 if "q.lora_A" in k else 1e36 if "q.lora_B" in k else 1) for k, v in t.items()},
         "config": {"lora_alpha": 1e6, "alpha_pattern": {"v": 4}}},
    ),
    "norm far above": (errors.NormRangeError, _both(lambda k, v: v * 10)),
    "norm far below": (errors.NormRangeError, _both(lambda k, v: v / 10)),
    "norm zero": (errors.NormRangeError, _both(lambda k, v: v * ("lora_A" in k))),
    "IA3": (errors.PeftTypeError, _config(peft_type="IA3")),
    "no type": (errors.PeftTypeError, _config(peft_type=None)),
    "DoRA": (errors.UnsupportedLoraError, _config(use_dora=True)),
    "DoRA magnitudes": (
        errors.UnsupportedLoraError,
        _tensors(lambda t: {**t, "base_model.model.layers.0.q.lora_magnitude_vector": torch.ones(12)}),
    ),
    "bias": (errors.UnsupportedLoraError, _config(bias="all")),
    "pissa": (errors.UnsupportedLoraError, _config(init_lora_weights="pissa")),
    "base name": (errors.BaseMismatchError, _config(base_model_name_or_path="other-base")),
    "base revision": (errors.BaseMismatchError, _config(revision="v2")),
    "base weights": (errors.BaseMismatchError, {"info": {"base_model": {"name": "tiny-base", "identity": "sha256:4567"}}}),
    "layout fingerprint": (errors.BaseMismatchError, {"info": {"base_model": {"identity": "sha256:0123", "layout": "0" * 16}}}),
    "base of other sizes": (
        errors.BaseMismatchError, _both(lambda k, v: torch.ones(2, 16) if "lora_A" in k else torch.ones(16, 2))),
    "base of other modules": (errors.BaseMismatchError, _tensors(lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()})),
    "lorag.json of another version": (errors.FormatVersionError, {"info": {"format": 99}}),
    "config of another version": (errors.FormatVersionError, _config(peft_version="9.1.0", use_marvel=True)),
    "no description": (errors.UndescribedError, {"description": None}),
}  # fmt: skip


def _spoil(folder, adapter, change=None, config=None, info=None, description="a task"):
    write(folder, adapter, description, change, **(config or {}))
    if info is not None:
        write_json(folder / "lorag.json", info)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_each_kind_of_harm_has_its_own_error(bank, tmp_path, random_adapter, case):
    """The list of what PEFT lets pass: refused with the named error, which names file or place, and the bank is as it was."""
    kind, spoil = REFUSED[case]
    before = files_of(bank)
    folder = _spoil(tmp_path / "spoiled", random_adapter(LAYOUT, 2, 4.0, seed=9), **spoil)
    (one,) = run(bank, folder)
    assert type(one.error) is kind, repr(one.error)
    assert one.error.got is not None or one.error.remedy is not None
    assert files_of(bank) == before and len(opened(bank)) == 6


def test_without_the_harm_the_same_folder_is_taken(bank, tmp_path, random_adapter):
    """So that no refusal above has another reason; and what only looks odd is taken: an older or newer PEFT, unset novelties."""
    adapter = random_adapter(LAYOUT, 2, 4.0, seed=9)
    info = {"format": 1, "base_model": {"name": "x", "identity": BASE.identity, "layout": LAYOUT.fingerprint}}
    for number, odd in enumerate(
        [{}, {"peft_version": "9.1.0", "use_marvel": False}, {"peft_version": "0.3", "own": 1}, {"revision": "main"}]
    ):
        (one,) = run(bank, _spoil(tmp_path / f"good{number}", adapter, config=odd, info=info, description=f"task {number}"))
        assert one.error is None, one.error


def test_another_name_of_the_base_and_a_far_norm_can_be_allowed(bank, tmp_path, random_adapter):
    """The remedies that the errors name work; nothing allows an absurd norm."""
    adapter = random_adapter(LAYOUT, 2, 4.0, seed=9)
    folder = write(tmp_path / "alias", adapter, base_model_name_or_path="models/local-copy", revision="v2")
    (one,) = run(bank, folder)
    assert "--base-alias models/local-copy" in str(one.error)
    assert run(bank, folder, base_aliases=("models/local-copy",))[0].error is None
    far = write(tmp_path / "far", adapter, change=lambda t: {k: v * 10 for k, v in t.items()})
    assert "--any-norm" in str(run(bank, far)[0].error)
    assert run(bank, far, any_norm=True)[0].error is None
    absurd = write(tmp_path / "absurd", adapter, change=lambda t: {k: v * 1e4 for k, v in t.items()})
    assert type(run(bank, absurd, any_norm=True)[0].error) is errors.NormRangeError


@pytest.mark.parametrize("most", [512, 1])
def test_a_norm_is_worked_out_and_judged_once(bank, tmp_path, random_adapter, monkeypatch, most):
    """Its size by the reader's norm, or of a huge rank once it is loaded; how far it is from the bank's norms when it is taken."""
    monkeypatch.setattr(reading, "_MOST_GRAM", most)
    judged, worked_out, norm_of = [], [], Factors.norm

    def count(module, name):
        check = getattr(module, name)
        monkeypatch.setattr(module, name, lambda norm, *more, **at: judged.append((name, norm)) or check(norm, *more, **at))

    count(candidates, "check_size")
    count(importing, "check_norm")
    monkeypatch.setattr(Factors, "norm", lambda self: worked_out.append(self) or norm_of(self))
    adapter = random_adapter(LAYOUT, 2, 4.0, seed=9)
    (source,) = find_sources([str(write(tmp_path / "one", adapter))])
    read = candidates.read_candidate((bank.base, ImportOptions()), source)
    assert read.norm == pytest.approx(norm_of(adapter.factors), rel=1e-6) and judged == [("check_size", read.norm)]
    assert len(worked_out) == (most == 1)
    judged.clear()
    assert run(bank, tmp_path / "one")[0].norm == read.norm and judged == [("check_size", read.norm), ("check_norm", read.norm)]
    absurd = write(tmp_path / "absurd", adapter, change=lambda t: {k: v * 1e4 for k, v in t.items()})
    judged.clear()
    assert "larger than any adapter" in str(run(bank, absurd)[0].error) and [said for said, _ in judged] == ["check_size"]


def test_a_bank_of_another_format_is_named_as_such(bank):
    """A manifest of a version to come is FormatVersionError, not a broken file."""
    manifest = json.loads((bank.folder / "bank.json").read_text())
    write_manifest(bank.folder, "bank.json", {**manifest, "format": 99}, sorted(manifest["files"]))
    with pytest.raises(errors.FormatVersionError, match="format 99"):
        opened(bank)


_WIDE = 2**19  # wide and of low rank: as many bytes as a square one, and little to multiply
WATCHED = """
import json, sys
from lorag.adapters.sources import find_sources
from lorag.bank.importing import ImportOptions, import_adapters
folder, places = sys.argv[1], sys.argv[2:]
sources = find_sources(places)
list(import_adapters(folder, sources[-1:]))  # what any refusal needs has been loaded
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps({one.name: type(one.error).__name__ for one in import_adapters(folder, sources)}))
"""


def _anonymous(process):
    """Bytes that a process has allocated and written to; mapped files are none."""
    with open(f"/proc/{process.pid}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_large_is_allocated_for_what_is_refused(tmp_path):
    """Adapters of hundreds of megabytes are refused by name, NaN and far norms among them, in less than 64 MiB more memory."""
    wide = LoraLayout.from_dict(
        {"target_modules": ["q", "v"], "modules": [["q", _WIDE, _WIDE], ["v", 2048, 2048]], "fan_in_fan_out": False}
    )
    bank = AdapterBank.create(tmp_path / "bank", dataclasses.replace(BASE, layout=wide))
    a, b = KEY.format("q", "A"), KEY.format("q", "B")

    def case(name, header, values=(), **config):
        """A file of zeros, which take no room on the disk, but for some (position in values, value)."""
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        end, entries = 0, {}
        for key, (dtype, shape) in header.items():
            size = math.prod(shape) * (8 if dtype == "F64" else 4)
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(entries).encode()
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            for place, value in values:
                file.seek(8 + len(text) + place)
                file.write(value)
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": 32, "lora_alpha": 16, **config}))
        (folder / "description.txt").write_text("a task")

    half, pair = 32 * _WIDE * 4, {a: ("F32", [32, _WIDE]), b: ("F32", [_WIDE, 32])}
    deep = {KEY.format("v", "A"): ("F32", [512, 2048]), KEY.format("v", "B"): ("F32", [2048, 512])}
    nan, huge = torch.tensor(math.nan).numpy().tobytes(), torch.tensor(1e39, dtype=torch.float64).numpy().tobytes()
    one, many = torch.tensor(1.0).numpy().tobytes(), torch.tensor(1e9).numpy().tobytes()
    case("a-zero", {**pair, **deep}, rank_pattern={"v": 512})
    case("b-nan", pair, [(2 * half - 4, nan)])
    case("c-far", pair, [(0, one), (half, many)])
    case("d-overflow", {a: ("F64", [32, _WIDE]), b: ("F64", [_WIDE, 32])}, [(4 * half - 8, huge)])
    case("e-rank", {a: ("F32", [200_000, 32768]), b: ("F32", [32768, 200_000])}, r=200_000)
    case("f-transposed", {a: ("F32", [_WIDE, 32]), b: ("F32", [32, _WIDE])})
    case("g-extra", {**pair, "base_model.model.lm_head.weight": ("F32", [500_000, 4096])})
    case("h-missing", {a: ("F32", [32, _WIDE])})
    case("i-prefix", {key.removeprefix("base_model.model."): value for key, value in pair.items()})
    case("j-many", {f"base_model.model.x.{n}": ("F32", [1]) for n in range(100_000)})
    case("k-base", {a: ("F32", [32, 2 * _WIDE]), b: ("F32", [2 * _WIDE, 32])})
    case("l-name", pair, base_model_name_or_path="other")
    case("m-alpha", pair, lora_alpha=1e30)
    (tmp_path / "in" / "n-config").mkdir()
    (tmp_path / "in" / "n-config" / "adapter_config.json").write_text("[" + "1," * 10_000_000 + "1]")
    command = [sys.executable, "-W", "ignore", "-c", WATCHED, str(bank.folder), str(tmp_path / "in")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        before = peak = _anonymous(process)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, _anonymous(process))
            time.sleep(0.001)
        found = json.loads(process.stdout.read())
    assert peak - before < 64 * 2**20
    expected = "NormRange NonFinite NormRange DtypeOverflow RankRange FactorShape ExtraTensor MissingTensor MissingPrefix".split()
    expected += "Artifact BaseMismatch BaseMismatch AlphaRange Artifact".split()
    assert list(found.values()) == [f"{kind}Error" for kind in expected]


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([*CONFIG, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "revision", "peft_version"]),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                                    max_leaves=4), max_size=3))  # fmt: skip
def test_no_config_ends_in_anything_but_an_adapter_or_a_named_error(tmp_path_factory, changes):
    """Whatever JSON a config holds in whatever place."""
    from lorag.adapters.reading import read_folder

    folder = tmp_path_factory.getbasetemp() / "any-config"
    if not folder.exists():
        factors = {m.name: (torch.ones(2, m.in_features), torch.ones(m.out_features, 2)) for m in LAYOUT.modules}
        write(folder, LoraAdapter(LAYOUT, Factors(factors, 2.0)))
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": 2, "lora_alpha": 4, **changes}))
    try:
        read_folder(folder, LAYOUT)
    except LoragError:
        pass


# --- descriptions -----------------------------------------------------------------------------------------------------

TEMPLATE = """---
library_name: peft
license: cc-by-4.0
---

# Model Card for Model ID

<!-- Provide a quick summary of what the model is/does. -->

## Model Details

### Model Description

<!-- Provide a longer summary of what this model is. -->

{description}

- **Developed by:** [More Information Needed]

### Direct Use

[More Information Needed]

## How to Get Started with the Model

Use the code below to get started with the model.

### Framework versions

- PEFT 0.21.0
"""
TRAINER = """# out

This model is a fine-tuned version of [x/y](https://hub/x/y) on the None dataset.
It achieves the following results on the evaluation set:
- Loss: 1.2

## Model description

More information needed

## Training procedure

It was trained with a cosine schedule and much patience.
"""


@pytest.mark.parametrize(
    ("card", "text"),
    [
        (TEMPLATE.format(description=""), None),
        (TEMPLATE.format(description="Triages **support tickets** by [urgency](https://x.y)."), "Triages support tickets by urgency."),
        (TRAINER, None),
        ("# legal\n\n![badge](x.png)\n\nSummarises contracts\nfor tenants.\n\nMore.", "Summarises contracts for tenants."),
        ("Title\n=====\n\n```python\nnot this text\n```\n\n| a | b |\n\nExtracts all dates.", "Extracts all dates."),
        ("# t\n\nThis is a LoRA adapter for x/y.\n\n## Task\n\nWrites haiku about cats.", "Writes haiku about cats."),
        ("# t\n\n<!-- never\nclosed\n\nhidden words are not shown", None),
        ("", None),
        ("# only a title", None),
        ("One sentence here. " * 60, ("One sentence here. " * 31).strip()),
    ],
)
def test_model_cards_are_read_for_what_the_task_is(card, text):
    """The first paragraph that tells something, in one line; what templates and trainers write into every card tells nothing."""
    assert card_text(card) == text


@given(st.text(alphabet="#-`<>!*[]() \nab|~=", max_size=300))
def test_any_card_is_read(text):
    """No card is an error, and what is taken from it is one line."""
    found = card_text(text)
    assert found is None or (len(found.split()) >= 3 and "\n" not in found)


def test_where_a_description_comes_from(bank, tmp_path, random_adapter):
    """--description, description.txt (one wording per line), lorag.json, README.md: the first that says something; licence likewise."""
    folder = write(tmp_path / "one", random_adapter(LAYOUT, 2, 4.0, seed=9), None)
    seen = []
    (folder / "README.md").write_text(TEMPLATE.format(description="Triages support tickets."))
    seen.append(find_purpose(folder, {}))
    seen.append(find_purpose(folder, {"description": "from lorag", "license": "mit"}))
    (folder / "description.txt").write_text("first wording\n\n  second wording \n")
    seen.append(find_purpose(folder, {"description": "from lorag"}))
    assert [one.descriptions for one in seen] == [("Triages support tickets.",), ("from lorag",), ("first wording", "second wording")]
    assert [one.origin for one in seen] == ["README.md", "lorag.json", "description.txt"]
    assert [one.licence for one in seen] == ["cc-by-4.0", "mit", "cc-by-4.0"]
    (one,) = run(bank, folder, descriptions=("as told",), licence="apache-2.0", name="told")
    entry = opened(bank)["told"]
    assert (entry.descriptions, entry.license, one.described_by) == (("as told",), "apache-2.0", "--description")


def test_links_out_of_an_adapter_are_not_followed(bank, tmp_path, random_adapter):
    """A card, a sidecar, a config or weights that are links to elsewhere: refused, and nothing of what they lead to is shown."""
    adapter = random_adapter(LAYOUT, 2, 4.0, seed=9)
    (tmp_path / "secret").write_text("the password is swordfish indeed")
    good = write(tmp_path / "good", adapter)
    for name in ("README.md", "description.txt", "adapter_config.json", "adapter_model.safetensors"):
        folder = write(tmp_path / f"bad-{name[:8].lower()}-{len(name)}", adapter, None)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(good / name if name.startswith("adapter") else tmp_path / "secret")
        (one,) = run(bank, folder)
        assert type(one.error) is errors.ArtifactError and "swordfish" not in str(one.error), name


# --- what is said of them ---------------------------------------------------------------------------------------------


def test_energy_and_neighbours_are_those_of_the_experts(bank, tmp_path, random_adapter):
    """Energy in the bases of the experts before it, the nearest by exact cosine of ΔW, the nearest by description, duplicates."""
    wide = LoraLayout.from_dict({"target_modules": ["q"], "modules": [["q", 96, 80], ["k", 96, 80]], "fan_in_fan_out": False})
    made = AdapterBank.create(tmp_path / "wide", dataclasses.replace(BASE, layout=wide))
    experts = {f"e{i}": random_adapter(wide, 3, 6.0, seed=i) for i in range(6)}
    made.add([(name, [f"paint the cat {name}"], [adapter]) for name, adapter in experts.items()])
    blend = {n: (torch.cat([experts["e1"].factors[n][0], experts["e4"].factors[n][0]]),
                 torch.cat([experts["e1"].factors[n][1] * 0.3, experts["e4"].factors[n][1]], 1)) for n in wide.names}  # fmt: skip
    inside = LoraAdapter(wide, Factors(blend))
    stranger = random_adapter(wide, 3, 6.0, seed=77)
    write(tmp_path / "in/inside", inside, "paint the cat e4 please")
    write(tmp_path / "in/stranger", stranger, "sing a dog song")
    write(tmp_path / "in/twin", gauge(stranger, 1), "Sing a  dog song.")
    embedder = WordEmbedder()
    one, two, three = run(made, tmp_path / "in", embedder=embedder)
    assert one.energy == pytest.approx(1.0, abs=1e-5)
    space = SharedSubspace.fit(lambda: iter([*experts.values(), inside]), wide, 18)
    assert two.energy == pytest.approx(space.energy(stranger.factors), abs=1e-3) and two.energy < 0.5
    assert three.energy == pytest.approx(1.0, abs=1e-4)
    assert one.by_weight[0] == ("e4", pytest.approx(inside.factors.cosine(experts["e4"].factors), abs=1e-6))
    assert one.by_weight[1][0] == "e1"
    assert one.by_description[0][0] == "e4"
    assert (one.same_weights, two.same_weights, three.same_weights) == ((), (), ("stranger",))
    assert (two.same_description, three.same_description) == ((), ("stranger",))


def test_adding_reads_few_earlier_experts_and_touches_no_file_of_theirs(bank, tmp_path, random_adapter, monkeypatch):
    """Once a bank has its index, one more adapter is compared with all of them by reading four; their files stay as they are."""
    run(bank, write(tmp_path / "first", random_adapter(LAYOUT, 2, 4.0, seed=20)))
    before = files_of(bank)
    assert (bank.folder / "index.safetensors").is_file()
    read = []
    real = AdapterBank.adapter
    monkeypatch.setattr(AdapterBank, "adapter", lambda self, name, checkpoint=-1: read.append(name) or real(self, name, checkpoint))
    (one,) = run(bank, write(tmp_path / "second", random_adapter(LAYOUT, 2, 4.0, seed=21), "another"))
    assert one.error is None and one.energy is not None and len(one.by_weight) == 3
    assert len(read) == 4
    after = files_of(bank)
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 1


def test_bases_grown_one_by_one_are_those_of_the_whole_bank(tmp_path, random_adapter):
    """Energy by incrementally refitted bases equals that of bases found from all experts at once, to half a percent."""
    wide = LoraLayout.from_dict({"target_modules": ["q"], "modules": [["q", 120, 90]], "fan_in_fan_out": False})
    rng = torch.Generator().manual_seed(0)
    turn_in, turn_out = (torch.linalg.qr(torch.randn(n, n, generator=rng))[0] * 0.93 ** torch.arange(n) for n in (120, 90))

    def expert(seed):
        rows, columns = random_adapter(wide, 4, 8.0, seed=seed).factors["q"]
        return LoraAdapter(wide, Factors({"q": (rows @ turn_in.T, turn_out @ columns)}))

    index, experts = BankIndex(wide), [expert(i) for i in range(60)]
    for number, adapter in enumerate(experts):
        index.insert(f"e{number}", "", adapter)
    space = SharedSubspace.fit(lambda: iter(experts), wide, 32)
    for adapter in (*experts[::6], expert(100), expert(101)):
        assert index.energy(adapter) == pytest.approx(space.energy(adapter.factors), abs=5e-3)


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([6, 12, 30]))
def test_running_span_keeps_the_leading_directions(seed, count, keep):
    """With room for all directions it is exact; its columns stay orthogonal and sorted whatever comes."""
    rng = torch.Generator().manual_seed(seed)
    columns = torch.randn(12, count, generator=rng)
    span = RunningSpan(12, keep)
    for start in range(0, count, 3):
        span.add(columns[:, start : start + 3])
        span.refit()
    norms = span.columns.norm(dim=0)
    assert (norms[:-1] >= norms[1:] - 1e-4).all()
    basis = span.basis(4)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-4)
    if keep >= 12:
        best = torch.linalg.svdvals(columns.double())[:4].square().sum()
        assert (basis.T @ columns.double()).square().sum() == pytest.approx(best.item(), rel=1e-4)


# --- many at a time, again, and beside others -------------------------------------------------------------------------


def test_one_bad_adapter_stops_no_other(bank, tmp_path, random_adapter):
    """A folder of folders, nested: good ones are in, bad ones are reported, names come from paths, links are not followed."""
    for number, place in enumerate(("a", "deep/er/b", "Strange Name!", "c")):
        write(tmp_path / "in" / place, random_adapter(LAYOUT, 2 + number % 2, 4.0, seed=30 + number), f"task {number}")
    write(tmp_path / "in" / "a" / "checkpoint-5", random_adapter(LAYOUT, 2, 4.0, seed=40))
    write(tmp_path / "in" / "bad", random_adapter(LAYOUT, 2, 4.0, seed=41), r=200_000)
    (tmp_path / "in" / "torn").mkdir()
    (tmp_path / "in" / "torn" / "adapter_config.json").write_text("{")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    done = {one.name: one.error for one in run(bank, tmp_path / "in", tmp_path / "nowhere")}
    good = sorted(name for name, error in done.items() if error is None)
    assert [name for name in good if not name.startswith("strange")] == ["a", "c", "deep-er-b"] and len(good) == 4
    assert type(done["bad"]) is errors.RankRangeError and type(done["torn"]) is errors.ArtifactError and len(done) == 7
    assert set(good) | set("red green blue grey pink gold".split()) == set(opened(bank).names)


def test_adding_again_adds_nothing_and_is_no_error(bank, tmp_path, random_adapter):
    """After an interruption the same command goes on: what is there is skipped; another adapter of a taken name is refused."""
    for number in range(3):
        write(tmp_path / "in" / f"t{number}", random_adapter(LAYOUT, 2, 4.0, seed=30 + number), f"task {number}")
    stopped = import_adapters(bank.folder, find_sources([str(tmp_path / "in" / "t0"), str(tmp_path / "in" / "t1")]))
    next(stopped)
    stopped.close()
    manifest = (bank.folder / "bank.json").read_bytes()
    done = run(bank, tmp_path / "in")
    assert [(one.name, one.existed, one.error) for one in done] == [("t0", True, None), ("t1", True, None), ("t2", False, None)]
    assert (bank.folder / "bank.json").read_bytes() != manifest
    manifest = (bank.folder / "bank.json").read_bytes()
    assert all(one.existed for one in run(bank, tmp_path / "in"))
    assert (bank.folder / "bank.json").read_bytes() == manifest
    for other in (
        write(tmp_path / "other" / "t0", random_adapter(LAYOUT, 2, 4.0, seed=99), "task 0"),
        write(tmp_path / "third" / "t0", random_adapter(LAYOUT, 2, 4.0, seed=30), "another task"),
    ):
        assert type(run(bank, other)[0].error) is errors.BankError


def test_what_other_processes_added_or_removed_is_seen(bank, tmp_path, random_adapter):
    """Between two of our writes another process adds an expert: it is kept, and compared with; one that is removed is forgotten."""
    ours = [write(tmp_path / f"t{n}", random_adapter(LAYOUT, 2, 4.0, seed=30 + n), f"task {n}") for n in range(2)]
    run(bank, ours[0])
    opened(bank).add([("theirs", ["their task"], [gauge(random_adapter(LAYOUT, 2, 4.0, seed=31), 3)])])
    (one,) = run(bank, ours[1])
    assert one.same_weights == ("theirs",) and len(opened(bank)) == 9
    opened(bank).remove(["theirs", "t1"])
    (one,) = run(bank, ours[1])
    assert one.same_weights == () and "theirs" not in dict(one.by_weight)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"junk"), lambda p: p.write_bytes(p.read_bytes()[:-8]), lambda p: p.unlink()])
@pytest.mark.parametrize("file", ["index.safetensors", "descriptions.safetensors"])
def test_a_damaged_index_is_made_anew(bank, tmp_path, random_adapter, caplog, damage, file):
    """What the bank remembers is no more than that: damaged or gone, the answers are the same, and damage is said."""
    run(bank, write(tmp_path / "t0", random_adapter(LAYOUT, 2, 4.0, seed=30)), embedder=WordEmbedder())
    damage(bank.folder / file)
    gone = not (bank.folder / file).exists()
    caplog.clear()
    (one,) = run(bank, write(tmp_path / "t1", gauge(random_adapter(LAYOUT, 2, 4.0, seed=30), 2), "other"), embedder=WordEmbedder())
    assert one.same_weights == ("t0",) and len(one.by_description) == 3
    assert gone or "made anew" in caplog.text


def test_processes_that_write_the_index_at_once_leave_a_whole_one(bank, tmp_path, random_adapter, monkeypatch):
    """It is written under the bank's lock, of the bank as it then is: what another process added meanwhile is in it too."""
    ours = write(tmp_path / "ours", random_adapter(LAYOUT, 2, 4.0, seed=30))
    held, real = [], BankIndex.save

    def save(self, now):
        with pytest.raises(Timeout):
            FileLock(bank.folder / ".lock", timeout=0).acquire()
        held.append(sorted(self.norms))
        real(self, now)

    monkeypatch.setattr(BankIndex, "save", save)
    done = import_adapters(bank.folder, find_sources([str(ours)]))
    assert next(done).error is None
    opened(bank).add([("theirs", ["their task"], [random_adapter(LAYOUT, 2, 4.0, seed=31)])])
    assert list(done) == []
    assert held == [sorted(opened(bank).names)] and "theirs" in held[0]


# --- a new bank -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, tiny_models):
    """Folder of the tiny Llama."""
    tiny_models["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _wild(folder, base, random_adapter, targets, seed=0, **config):
    """An adapter of the tiny Llama as a stranger would have saved it."""
    layout = LoraLayout.from_model(BaseModel(str(base), "causal_lm").skeleton(), targets)
    stated = {"base_model_name_or_path": str(base), "target_modules": list(targets), **config}
    return write(folder, random_adapter(layout, 2, 4.0, seed=seed), f"task {seed}", **stated)


def _start(folder, *places, **said):
    return start_bank(folder, find_sources([str(place) for place in places]), NewBank(**said))


@pytest.mark.slow
def test_a_folder_of_adapters_starts_a_bank(tmp_path, base, random_adapter, capsys):
    """One command: base model, kind and identity from the configs, the union of their modules, every adapter in; again adds nothing."""
    from lorag.cli import main as cli

    wild = tmp_path / "wild"
    for number, targets in enumerate((["q_proj"], ["q_proj", "v_proj"], ["down_proj"])):
        _wild(wild / f"t{number}", base, random_adapter, targets, number)
    command = ["bank", "add", str(wild), "--bank", str(tmp_path / "new"), "--embedder", "none"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    out = capsys.readouterr().out
    assert not stopped.value.code and "started" in out and "down_proj, q_proj, v_proj" in out and "1/3 added t0" in out
    made = AdapterBank.from_pretrained(tmp_path / "new")
    model = BaseModel(str(base), "causal_lm")
    whole = LoraLayout.from_model(model.skeleton(), ["q_proj", "v_proj", "down_proj"])
    assert made.base == BankBase(model, model.identity(), whole, "causal_lm", {}) and len(made) == 3
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    out = capsys.readouterr().out
    assert not stopped.value.code and "started" not in out and out.count("it is there already") == 3


def test_targets_that_name_more_than_was_trained_do_not_widen_the_layout(tmp_path, base, random_adapter):
    """Adapters of the first layer alone make a bank of the first layer's modules."""
    folder = _wild(tmp_path / "one", base, random_adapter, ["model.layers.0.self_attn.q_proj"], layers_to_transform=[0])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    assert _start(tmp_path / "new", folder).base.layout.names == ("model.layers.0.self_attn.q_proj",)


def test_what_adapters_leave_open_or_disagree_on_is_asked_for(tmp_path, base, random_adapter):
    """No base model, two of them, one that is not at hand, one without weights, a folder of other things: each error has its remedy."""
    new = tmp_path / "new"
    one = _wild(tmp_path / "a/one", base, random_adapter, ["q_proj"])
    other = _wild(tmp_path / "a/other", base, random_adapter, ["q_proj"], 1, base_model_name_or_path="me/other")
    nameless = _wild(tmp_path / "nameless", base, random_adapter, ["q_proj"], 2, base_model_name_or_path=None)
    with pytest.raises(errors.BankError, match="--base HUB_ID_OR_FOLDER"):
        _start(new, nameless)
    with pytest.raises(errors.BankError, match="different base models.*Choose one with --base"):
        _start(new, tmp_path / "a")
    with pytest.raises(errors.BaseModelError, match="not at hand.*--base HUB_ID_OR_FOLDER --base-alias me/other"):
        _start(new, other)
    with pytest.raises(errors.BaseMismatchError, match="--base-alias"):
        _start(new, other, base=str(base))
    with pytest.raises(errors.BaseMismatchError, match="right base model.*right --kind"):
        _start(new, one, kind="encoder")
    with pytest.raises(errors.ConfigError, match="objective"):
        _start(new, one, objective="prototypes")
    with pytest.raises(errors.BankError, match="holds other things"):
        _start(tmp_path / "a", one)
    assert not new.exists()
    assert len(_start(new, other, base=str(base), aliases=("me/other",)).base.layout) == 2
    assert _start(new, nameless, base=str(base)).base.model.name == str(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(errors.BaseModelError, match="no weights"):
        _start(tmp_path / "newer", one)


def test_an_empty_bank_is_begun_anew_and_a_filled_one_is_held_to_what_is_said(tmp_path, base, random_adapter):
    """If nothing was taken in at first, a second try may say otherwise; later --base and --kind must be the bank's."""
    narrow = _wild(tmp_path / "narrow", base, random_adapter, ["q_proj"])
    wide = _wild(tmp_path / "wide", base, random_adapter, ["q_proj", "v_proj"], 1)
    assert len(_start(tmp_path / "new", narrow).base.layout) == 2
    stale = AdapterBank.from_pretrained(tmp_path / "new")
    made = _start(tmp_path / "new", wide)
    assert len(made.base.layout) == 4
    with pytest.raises(errors.BankError, match="begun anew"):
        stale.add([("late", ["late"], [random_adapter(stale.base.layout, 2, 4.0)])])
    assert not [one.error for one in run(made, narrow, wide) if one.error]
    assert _start(tmp_path / "new", narrow) is None
    assert _start(tmp_path / "new", narrow, base=str(base), kind="causal_lm") is None
    with pytest.raises(errors.BankError, match="bank of another base model"):
        _start(tmp_path / "new", narrow, base="me/other")


def test_a_name_of_the_same_folder_is_the_same_base_model(tmp_path, base, random_adapter, monkeypatch):
    """Adapters that name a folder in another way, by a relative path, are of the bank's base model; shares on other hosts are not asked."""
    monkeypatch.chdir(tmp_path)
    made = _start(tmp_path / "new", _wild(tmp_path / "one", base, random_adapter, ["q_proj"]))
    again = _wild(tmp_path / "two", base, random_adapter, ["q_proj"], 1, base_model_name_or_path="./base")
    assert [one.error for one in run(made, tmp_path / "one", again)] == [None, None]
    assert known_name(str(embedded("checkpoints/sandbox-lm"))) == "sandbox-lm"
    assert not same_model(f"//{base}", str(base)) and not same_model("x" * 5000, str(base))


# --- check and remove -------------------------------------------------------------------------------------------------


def test_check_says_what_is_wrong_and_what_to_do(bank, random_adapter):
    """A table of duplicates, shared descriptions, zero and far norms, each with a remedy; sound experts are not accused."""

    def scaled(seed, by):
        adapter = random_adapter(LAYOUT, 2, 4.0, seed=seed)
        return dataclasses.replace(adapter, factors=adapter.factors.scaled(by))

    more = {"twin": (gauge(bank.adapter("red"), 1), "new"), "echo": (scaled(50, 1), "Paint the GREEN cat."),
            "zero": (scaled(51, 0), "nothing"), "far": (scaled(52, 1000), "far out")}  # fmt: skip
    bank = bank.add([(name, [text], [adapter]) for name, (adapter, text) in more.items()])
    found = {one.name: one for one in check_bank(bank)}
    assert found["twin"].problem == "same weights as red" and "lorag bank remove twin" in found["twin"].remedy
    assert found["red"].problem == "same weights as twin" and found["echo"].problem == "shares a description with green"
    assert "changes nothing" in found["zero"].problem and "far outside" in found["far"].problem
    assert {name for name, one in found.items() if one.severe} == {"zero", "far"}
    assert {name for name, one in found.items() if not one.problem} == {"blue", "grey", "pink", "gold"}
    assert found["blue"].norm == pytest.approx(bank.adapter("blue").factors.norm()) and found["blue"].nearest is not None
    table = format_findings(list(found.values())).splitlines()
    assert len(table) == 7 and table[0].split()[:4] == ["expert", "rank", "norm", "energy"]
    assert {line.split()[0] for line in table[1:3]} == {"zero", "far"}
    assert "blue" not in {line.split()[0] for line in table}
    assert len(format_findings(list(found.values()), every=True).splitlines()) == 11


def test_removed_experts_are_gone_and_no_other(bank, random_adapter):
    """Entries and shards that nobody needs are deleted; an unknown name removes nothing."""
    bank = bank.add([("alone", ["own shard"], [random_adapter(LAYOUT, 5, 10.0, seed=70)])])
    file, kept = bank.folder / bank["alone"].file, bank.adapter("blue")
    with pytest.raises(errors.BankError, match="nobody"):
        bank.remove(["alone", "nobody"])
    assert "alone" in opened(bank)
    left = bank.remove(["alone", "red"])
    assert left.names == opened(bank).names == ("green", "blue", "grey", "pink", "gold")
    assert not file.exists()
    assert all(torch.equal(opened(bank).adapter("blue").delta(n), kept.delta(n)) for n in LAYOUT.names)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bank_add_reports_each_and_fails_if_one_failed(bank, tmp_path, random_adapter, capsys):
    """Exit code 1 and one line each, with the error's name; 0 when all are in; --name is for one adapter."""
    from lorag.cli import main as cli

    def command(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bank", *(str(argument) for argument in arguments)])
        return stopped.value.code or 0, *capsys.readouterr()

    write(tmp_path / "in" / "good", random_adapter(LAYOUT, 2, 4.0, seed=30), "one task")
    write(tmp_path / "in" / "bad", random_adapter(LAYOUT, 2, 4.0, seed=31), "two task", peft_type="IA3")
    more = ("--bank", bank.folder, "--embedder", "none")
    code, out, err = command("add", tmp_path / "in", *more)
    assert code == 1 and "PeftTypeError" in out and "added good" in out and "1 of 2 adapters were not added" in err
    assert command("add", tmp_path / "in", *more, "--name", "x")[0] == 2
    code, out, err = command("add", tmp_path / "in" / "good", *more)
    assert code == 0 and "skipped good" in out
    code, out, err = command("check", bank.folder)
    assert code == 0 and "7 experts, all sound" in out and "nearest by weight" in out
    code, out, _ = command("remove", "good", "--bank", bank.folder)
    assert code == 0 and "6 experts are left" in out


@pytest.mark.slow
def test_a_refused_adapter_ends_the_command(bank, tmp_path, random_adapter):
    """What is still to be written when an error goes up is written before the interpreter ends: the command does not hang."""
    write(tmp_path / "bad", random_adapter(LAYOUT, 2, 4.0, seed=31), "two task", peft_type="IA3")
    command = [sys.executable, "-m", "lorag.cli", "bank", "add", str(tmp_path / "bad"), "--bank", str(bank.folder), "--embedder", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "IA3" in done.stderr and "Traceback" not in done.stderr
