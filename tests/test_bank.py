"""Banks: what was added is read back, whoever adds beside it and whenever it is interrupted, and nothing else is read."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, BankBase
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.errors import ArtifactError, BankError, BaseModelError, DescriptionError, DtypeOverflowError, LoragError, NonFiniteError
from lorag.files import artifacts
from lorag.files import tensors as tensor_files
from lorag.files.atomic import locked

LAYOUT = LoraLayout.from_dict(
    {
        "target_modules": ["q", "v"],
        "modules": [[f"layers.{n}.{p}", 12, o] for n in range(2) for p, o in (("q", 12), ("v", 6))],
        "fan_in_fan_out": False,
    }
)
BASE = BankBase(BaseModel("tiny-base", "causal_lm"), "sha256:0123", LAYOUT, "causal_lm", {"max_length": 64})


@pytest.fixture
def bank(tmp_path, random_adapter):
    """A bank of two shards: two experts of rank 2 with three late checkpoints each, one of rank 5 with one."""
    bank = AdapterBank.create(tmp_path / "bank", BASE)
    late = [[random_adapter(LAYOUT, 2, 4.0, seed=10 * i + j) for j in range(3)] for i in range(2)]
    details = {"one": {"suite": "demo", "license": "MIT", "score": 0.5, "examples": 9}}
    bank = bank.add([("one", ["first task", "task no. 1"], late[0]), ("two", ["second task"], late[1])], details=details)
    return bank.add([("three", ["third task"], [random_adapter(LAYOUT, 5, 10.0, seed=77)])])


def _equal(a, b):
    return all(torch.equal(x, y) for n in LAYOUT.names for x, y in zip(a.factors[n], b.factors[n], strict=True))


def _files(bank):
    return {path: path.read_bytes() for path in sorted(bank.folder.rglob("*")) if path.is_file() and path.name != ".lock"}


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_experts_are_read_back_exactly(bank, random_adapter):
    """Every checkpoint of every expert, in fp32, to the bit; the final one by default."""
    opened = AdapterBank.from_pretrained(bank.folder)
    assert opened.names == bank.names == ("one", "two", "three")
    assert opened.experts == bank.experts and opened.base == BASE
    for i, name in enumerate(("one", "two")):
        for j in (0, 1, 2, -1):
            assert _equal(opened.adapter(name, j), random_adapter(LAYOUT, 2, 4.0, seed=10 * i + j % 3))
        assert _equal(opened.adapter(name), opened.adapter(name, 2))
    assert [a.rank for a in opened.adapters()] == [2, 2, 5]
    assert [a.info["expert"] for a in opened.adapters(["three", "one"])] == ["three", "one"]
    adapter = opened.adapter("one")
    assert (adapter.base_model, adapter.task_type, adapter.info["license"]) == ("tiny-base", "CAUSAL_LM", "MIT")
    entry = opened["one"]
    assert (entry.descriptions, entry.suite, entry.score, entry.examples) == (("first task", "task no. 1"), "demo", 0.5, 9)
    assert len(opened) == 3 and "one" in opened and "four" not in opened
    with pytest.raises(BankError, match="four"):
        opened.adapter("four")


@pytest.mark.parametrize(("precision", "error"), [("float16", 1e-3), ("int8", 1e-2)])
def test_small_precisions_stay_close(bank, tmp_path, precision, error):
    """Each factor within 1 % (int8) or 0.1 % (float16), however unequal its rows; and the files are smaller."""
    for scale in (1.0, 1e-3):
        name = f"{precision}-{scale:g}"
        late = [
            dataclasses.replace(a, factors=Factors({n: (x * scale, y / scale) for n, (x, y) in a.factors.items()}))
            for a in bank.adapters(["one"])
        ]
        small = AdapterBank.create(tmp_path / name, BASE).add([("one", ["task"], late)], precision=precision)
        back = AdapterBank.from_pretrained(small.folder).adapter("one")
        for module in LAYOUT.names:
            for x, y in zip(back.factors[module], late[0].factors[module], strict=True):
                assert (x.float() - y).norm() < error * y.norm()
            assert (back.delta(module) - late[0].delta(module)).norm() < 2 * error * late[0].delta(module).norm()


def test_copy_keeps_entries_and_is_smaller(bank, tmp_path):
    """copy_to writes the chosen experts, of any ranks, with their details and checkpoints."""
    copy = bank.copy_to(tmp_path / "copy", ["three", "one"], "int8")
    assert sorted(copy.names) == ["one", "three"]
    for name in copy.names:
        old, new = dataclasses.asdict(bank[name]), dataclasses.asdict(copy[name])
        assert {k: v for k, v in old.items() if k not in ("file", "index")} == {k: v for k, v in new.items() if k not in ("file", "index")}
    for j in range(3):
        assert (copy.adapter("one", j).delta("layers.0.q") - bank.adapter("one", j).delta("layers.0.q")).norm() < 0.1
    with pytest.raises(DtypeOverflowError, match="overflow"):
        huge = dataclasses.replace(bank.adapter("three"), factors=bank.adapter("three").factors.scaled(1e6))
        copy.add([("huge", ["task"], [huge])], precision="float16")
    assert "huge" not in AdapterBank.from_pretrained(copy.folder)


def test_same_experts_give_the_same_bytes(bank, tmp_path):
    """Two banks built alike are alike to the byte."""
    first, second = (bank.copy_to(tmp_path / name, ["one", "three"], "float32") for name in "ab")
    assert list(_files(first).values()) == list(_files(second).values())


def test_descriptions_can_be_replaced(bank):
    """describe() changes the named experts and no other, for good."""
    bank.describe({"two": ["better words", "  and more "]})
    opened = AdapterBank.from_pretrained(bank.folder)
    assert opened["two"].descriptions == ("better words", "and more")
    assert opened["one"] == bank["one"]
    assert _equal(opened.adapter("two"), bank.adapter("two"))


def test_check_finds_what_is_wrong(bank, random_adapter):
    """check() reads every expert: a zero adapter is reported, the others are fine."""
    zero = random_adapter(LAYOUT).scaled(0.0)
    bank = bank.add([("zero", ["does nothing"], [zero])])
    found = {expert.name: problem for expert, problem in bank.check()}
    assert list(found) == ["one", "two", "three", "zero"]
    assert [found[name] for name in ("one", "two", "three")] == [None] * 3
    assert "zero" in found["zero"]


def test_check_finds_poison_in_a_shard(bank):
    """NaN in a shard and a monstrous alpha, in a bank made elsewhere with right checksums, are reported, not raised."""
    file = bank["three"].file
    tensors = tensor_files.load_tensors(bank.folder / file)
    tensors["0.A"][0, 0, 0, 0] = float("nan")
    tensor_files.save_tensors(bank.folder / file, tensors)
    _rewrite(bank, _first(alpha=1e30))
    found = {expert.name: problem for expert, problem in AdapterBank.from_pretrained(bank.folder).check()}
    assert "NaN" in found["three"] and "lora_alpha" in found["one"] and found["two"] is None


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "../evil"}, ArtifactError),
        ({"name": "Upper"}, ArtifactError),
        ({"name": ""}, ArtifactError),
        ({"name": "one"}, BankError),
        ({"descriptions": []}, BankError),
        ({"descriptions": [" "]}, DescriptionError),
        ({"descriptions": ["bad \0 text"]}, DescriptionError),
        ({"late": []}, BankError),
        ({"precision": "int4"}, BankError),
        ({"twice": True}, BankError),
        ({"details": {"new": {"colour": "red"}}}, BankError),
        ({"none": True}, BankError),
    ],
    ids=str,
)
def test_experts_that_cannot_be_added_leave_the_bank_as_it_was(bank, random_adapter, change, error):
    """Unsafe or taken names, no or unusable descriptions, no checkpoints: refused, and every file is as before."""
    before = _files(bank)
    one = (change.get("name", "new"), change.get("descriptions", ["task"]), change.get("late", [random_adapter(LAYOUT)]))
    experts = [] if "none" in change else [one, one] if "twice" in change else [one]
    with pytest.raises(error):
        bank.add(experts, precision=change.get("precision", "float32"), details=change.get("details"))
    assert _files(bank) == before


def test_adapters_that_do_not_fit_are_refused(bank, random_adapter, llama_layout):
    """Another layout; ranks or numbers of checkpoints that differ within one shard; values that are not numbers. Other alphas fit."""
    plain, before = random_adapter(LAYOUT), _files(bank)
    other = dataclasses.replace(LAYOUT, modules=LAYOUT.modules[::-1])
    for late in ([random_adapter(llama_layout)], [random_adapter(other)]):
        with pytest.raises(BankError, match="layout"):
            bank.add([("new", ["task"], late)])
    for more in ([random_adapter(LAYOUT, rank=3)], [plain, plain]):
        with pytest.raises(BankError, match="share rank"):
            bank.add([("new", ["task"], [plain]), ("newer", ["task"], more)])
    with pytest.raises(NonFiniteError, match="layers"):
        bank.add([("new", ["task"], [dataclasses.replace(plain, factors=plain.factors.scaled(float("nan")))])])
    assert _files(bank) == before
    quiet = random_adapter(LAYOUT, alpha=1.0, seed=1)
    mixed = bank.add([("new", ["task"], [plain]), ("newer", ["task"], [quiet])])
    assert _equal(mixed.adapter("new"), plain) and _equal(mixed.adapter("newer"), quiet)


def test_a_folder_holds_one_base(bank):
    """create() opens what is there, and refuses another base model, layout or objective."""
    assert AdapterBank.create(bank.folder, BASE).names == bank.names
    for change in ({"identity": "sha256:4567"}, {"objective": "prototypes"}, {"settings": {}}, {"model": BaseModel("other", "causal_lm")}):
        with pytest.raises(BankError, match="another base"):
            AdapterBank.create(bank.folder, dataclasses.replace(BASE, **change))


def test_changed_base_model_is_refused(tmp_path):
    """The bank knows its base model by its weights, not by its name."""
    tensor_files.save_tensors(tmp_path / "base" / "model.safetensors", {"w": torch.zeros(3)})
    model = BaseModel(str(tmp_path / "base"), "causal_lm")
    base = dataclasses.replace(BASE, model=model, identity=model.identity())
    base.check()
    tensor_files.save_tensors(tmp_path / "base" / "model.safetensors", {"w": torch.ones(3)})
    with pytest.raises(BaseModelError, match="has changed"):
        base.check()


def _rewrite(bank, change):
    """Rewrites the manifest with right checksums, as somebody who means harm would."""
    manifest = json.loads((bank.folder / "bank.json").read_text())
    files = sorted(manifest.pop("files"))
    artifacts.write_manifest(bank.folder, "bank.json", change(manifest), files)


def _first(**changes):
    return lambda manifest: {**manifest, "experts": [{**manifest["experts"][0], **changes}, *manifest["experts"][1:]]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        _first(name="two"),
        _first(name="../../evil"),
        _first(name=3),
        _first(file="../elsewhere.safetensors"),
        _first(file="/etc/passwd"),
        _first(file=3),
        _first(file="bank.json"),
        _first(index=2),
        _first(index=-1),
        _first(index="0"),
        _first(index=0.5),
        _first(rank=3),
        _first(rank="2"),
        _first(checkpoints=2),
        _first(alpha="high"),
        _first(descriptions=None),
        _first(descriptions="text"),
        _first(descriptions=[]),
        _first(descriptions=[1]),
        _first(colour="red"),
        lambda m: {**m, "experts": [3]},
        lambda m: {**m, "experts": None},
        lambda m: {k: v for k, v in m.items() if k != "experts"},
        lambda m: {k: v for k, v in m.items() if k != "base"},
        lambda m: {**m, "base": 3},
        lambda m: {**m, "base": {**m["base"], "layout": {}}},
        lambda m: {**m, "base": {**m["base"], "model": {"name": "x", "kind": "robot"}}},
        lambda m: {**m, "kind": "generator"},
        lambda m: {**m, "format": 99},
    ],
)
def test_manifests_that_contradict_their_shards_are_refused(bank, change):
    """Right checksums do not make a bank: names, paths, indices, ranks and types are checked on opening."""
    _rewrite(bank, change)
    with pytest.raises(LoragError):
        AdapterBank.from_pretrained(bank.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if k != "0.A"},
        lambda t: {**t, "0.A": t["0.A"][:, :, :1].contiguous()},
        lambda t: {**t, "0.A": t["0.A"][0].contiguous()},
        lambda t: {**t, "0.A": t["0.A"].to(torch.int8)},
        lambda t: {**t, "0.A": t["0.A"].to(torch.int64)},
        lambda t: {**t, "0.A.scale": torch.ones(2, 3)},
    ],
)
def test_shards_that_do_not_hold_their_experts_are_refused(bank, change):
    """A missing, misshapen or unscaled factor, with a right checksum, is found on opening."""
    path = bank.folder / bank["one"].file
    tensor_files.save_tensors(path, change(tensor_files.load_tensors(path)))
    _rewrite(bank, lambda manifest: manifest)
    with pytest.raises(BankError):
        AdapterBank.from_pretrained(bank.folder)


def test_unlisted_shards_are_refused(bank):
    """A shard that the manifest gives no checksum for is not trusted."""
    manifest = json.loads((bank.folder / "bank.json").read_text())
    manifest["files"].pop(bank["three"].file)
    artifacts.write_json(bank.folder / "bank.json", manifest)
    with pytest.raises((BankError, ArtifactError), match="three"):
        AdapterBank.from_pretrained(bank.folder)


def test_tampered_files_are_refused(bank):
    """One flipped bit in a shard, a shard gone, a manifest gone or cut: ArtifactError."""
    shard, manifest = bank.folder / bank["one"].file, bank.folder / "bank.json"
    for path in (shard, manifest):
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[-1] ^= 1
        for spoil in (lambda f=flipped, p=path: p.write_bytes(f), lambda g=good, p=path: p.write_bytes(g[:-3]), path.unlink):
            spoil()
            with pytest.raises(ArtifactError, match=path.name):
                AdapterBank.from_pretrained(bank.folder)
            path.write_bytes(good)
    assert AdapterBank.from_pretrained(bank.folder).names == bank.names


def test_adding_blesses_no_damage(bank, random_adapter):
    """A shard that was damaged before an expert was added is still found afterwards: checksums are carried over, not made anew."""
    path = bank.folder / bank["one"].file
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    bank.add([("four", ["task"], [random_adapter(LAYOUT, seed=4)])])
    with pytest.raises(ArtifactError, match=path.name):
        AdapterBank.from_pretrained(bank.folder)


def test_few_shards_are_open_at_once(tmp_path, random_adapter):
    """A bank of many shards is read without keeping them all open, in any order, and reads right."""
    bank = AdapterBank.create(tmp_path / "bank", BASE)
    for number in range(12):
        bank = bank.add([(f"e{number}", ["task"], [random_adapter(LAYOUT, seed=number)])])
    for number in (*range(12), 0, 11, 5):
        assert _equal(bank.adapter(f"e{number}"), random_adapter(LAYOUT, seed=number))
        assert not [path for path in Path("/proc/self/fd").iterdir() if "experts" in os.path.realpath(path)]


def test_missing_bank_is_refused(tmp_path):
    """A folder without a bank, and no folder at all."""
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(ArtifactError):
            AdapterBank.from_pretrained(path)


# --- interruptions and company ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["save_tensors", "write_manifest"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["interrupted", "disk full"])
def test_interrupted_add_leaves_the_old_bank(bank, random_adapter, monkeypatch, moment, error):
    """Stopped before the shard, or between shard and manifest: the old bank opens, and adding again succeeds."""
    experts = [("four", ["task"], [random_adapter(LAYOUT, seed=4)])]
    with monkeypatch.context() as patch:
        patch.setattr(f"lorag.bank.bank.{moment}", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            bank.add(experts)
    opened = AdapterBank.from_pretrained(bank.folder)
    assert opened.names == ("one", "two", "three")
    assert _equal(opened.adapter("one"), bank.adapter("one"))
    again = opened.add(experts)
    assert again.names == ("one", "two", "three", "four")
    assert _equal(again.adapter("four"), experts[0][2][0])


ADD = """
import sys, time
import torch
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, BankBase
folder, who = sys.argv[1:]
base = AdapterBank.from_pretrained(folder).base
print("ready", flush=True)
sys.stdin.readline()
bank = AdapterBank.create(folder, base)
for number in range(5):
    factors = {m.name: (torch.ones(2, m.in_features), torch.full((m.out_features, 2), float(number + 1))) for m in base.layout.modules}
    if who == "killed" and number == 2:
        import lorag.bank.bank, os
        lorag.bank.bank.write_manifest = lambda *_: os._exit(9)
    bank.add([(f"{who}-{number}", ["task"], [LoraAdapter(base.layout, Factors(factors))])])
"""


@pytest.mark.slow
def test_processes_adding_at_once_lose_nothing(bank):
    """Two processes add five experts each; a third dies between shard and manifest, holding the lock. All others are there."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(bank.folder), who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for who in ("left", "right", "killed")
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    codes = [process.wait(timeout=300) for process in started]
    for process in started:
        process.stdin.close()
        process.stdout.close()
    assert codes == [0, 0, 9]
    opened = AdapterBank.from_pretrained(bank.folder)
    expected = {f"{who}-{n}" for who in ("left", "right") for n in range(5)} | {f"killed-{n}" for n in range(2)} | set(bank.names)
    assert set(opened.names) == expected and len(opened) == len(expected)
    for who in ("left", "right"):
        for number in range(5):
            assert opened.adapter(f"{who}-{number}").delta("layers.0.q").unique().tolist() == [2.0 * (number + 1)]


@pytest.mark.slow
def test_creating_a_bank_beside_another_process_keeps_its_experts(tmp_path, random_adapter):
    """Of two processes that start one bank, the slower finds the bank made and filled while it waited for the lock."""
    quick, folder = AdapterBank.create(tmp_path / "quick", BASE), tmp_path / "bank"
    quick.add([("first", ["task"], [random_adapter(LAYOUT)])])
    with ThreadPoolExecutor() as pool:
        with locked(folder / ".lock", 10, "Wait."):
            slow = pool.submit(AdapterBank.create, folder, BASE)
            time.sleep(0.5)
            assert not slow.done()
            shutil.copytree(quick.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        assert slow.result().names == ("first",)
    assert AdapterBank.from_pretrained(folder).names == ("first",)


def test_a_bank_cannot_be_where_a_file_is(bank, tmp_path):
    """BankError names the folder; the file stays as it was."""
    (tmp_path / "taken").write_text("mine")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "bank"):
        with pytest.raises(BankError, match="taken"):
            AdapterBank.create(folder, bank.base)
    assert (tmp_path / "taken").read_text() == "mine"
