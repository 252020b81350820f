"""Banks in less room: the same experts by name, in bases that they share, for every command that reads a bank."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_world import ANIMALS, COLOURS, describe, name_of, save_base, true_adapter

from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.bank.check import check_bank
from lorag.bank.compressing import compress_bank
from lorag.bank.exporting import export_arrow
from lorag.cli import main as cli
from lorag.errors import ArtifactError, BankError, ConfigError, StorageError
from lorag.files.artifacts import sha256
from lorag.spaces.shared_subspace import SharedSubspace


def _add(bank, adapters, checkpoints=2):
    """Experts as shards of a rank each."""
    for rank in sorted({adapter.rank for _, adapter in adapters}):
        chosen = [(name, adapter) for name, adapter in adapters if adapter.rank == rank]
        part = [(name, describe(*name.split("-")), [adapter.scaled(0.5), adapter][-checkpoints:]) for name, adapter in chosen]
        bank = bank.add(part, details={name: {"license": "mit", "score": 0.5} for name, _, _ in part})
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_models, tokenizer):
    """Experts of two ranks with two checkpoints each, all in the directions of ten words."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    made = []
    for colour in COLOURS:
        for animal in ANIMALS:
            adapter = true_adapter(base.layout, colour, animal)
            more = adapter.rank + (3 if animal == "cat" else 0)
            made.append((name_of(colour, animal), replace(adapter, factors=adapter.factors.padded(more))))
    return _add(AdapterBank.create(tmp_path_factory.mktemp("bank") / "bank", base), made)


@pytest.fixture(scope="module")
def small(bank, tmp_path_factory):
    """It in less room."""
    return compress_bank(bank, tmp_path_factory.mktemp("small") / "bank", keep=0.999)


def _error(one, other):
    return Factors.concatenated([one.factors, other.factors], [1.0, -1.0]).norm() / one.factors.norm()


@pytest.mark.slow
def test_experts_come_back_by_name(bank, small):
    """In fewer bytes, with entries and order as before, ΔW within what is allowed, at both checkpoints; the report is what is read."""
    opened = AdapterBank.from_pretrained(small.bank.folder)
    assert small.after < small.before and small.after == sum(path.stat().st_size for path in opened.folder.rglob("*.safetensors"))
    assert opened.names == bank.names and 1 <= small.directions[0] <= small.directions[1]
    for name in bank.names:
        entry, old = opened[name], bank[name]
        assert (entry.descriptions, entry.license, entry.score, entry.checkpoints) == (old.descriptions, "mit", 0.5, 2)
        assert entry.rank <= old.rank
        for checkpoint in (0, 1):
            assert _error(bank.adapter(name, checkpoint), opened.adapter(name, checkpoint)) ** 2 < 0.02
        assert small.energies[name] == pytest.approx(1 - _error(bank.adapter(name), opened.adapter(name)) ** 2, abs=1e-4)
    assert small.energy > 0.998 and small.energies[small.worst] == min(small.energies.values())


@pytest.mark.slow
def test_every_reader_of_a_bank_reads_it(bank, small, tmp_path):
    """Stacks that training reads, weight spaces, checks, merges, exports for Arrow, precisions, and the command line."""
    opened = AdapterBank.from_pretrained(small.bank.folder)
    module = bank.base.layout.names[1]
    deltas = [torch.cat([b @ a for a, b in one.factors(module)]) for one in (bank, opened)]
    assert torch.allclose(*deltas, atol=0.05 * deltas[0].abs().max().item())
    single = opened.adapter(opened.names[0]).delta(module)
    assert torch.allclose(deltas[1][0].float(), single, atol=1e-5)
    spaces = [SharedSubspace.fit(lambda one=one: one.adapters(), one.base.layout, 8) for one in (bank, opened)]
    own = bank.adapter(bank.names[3]).factors
    assert spaces[1].energy(own) == pytest.approx(spaces[0].energy(own), abs=0.01)
    assert not any(finding.severe for finding in check_bank(opened))
    fused = [one.fuse(list(one.names[:3]), "cat", rank=8) for one in (bank, opened)]
    assert _error(*fused) < 0.1
    assert len(list(export_arrow(opened, tmp_path / "arrow", opened.names[:2]))) == 2
    copied = opened.copy_to(tmp_path / "plain", opened.names[:3], "float32")
    assert not copied.experts[0].bases and _error(opened.adapter(opened.names[0]), copied.adapter(opened.names[0])) < 1e-5
    for command in (["bank", "list", str(opened.folder)], ["bank", "check", str(opened.folder)], ["info", str(opened.folder)]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert not stopped.value.code


def test_a_compressed_bank_takes_further_experts_and_lets_them_go(bank, tmp_path):
    """New ones lie beside it as they are; bases go with the last expert that needs them."""
    small = compress_bank(bank, tmp_path / "small", keep=0.95, precision="float32").bank
    (bases,) = {expert.bases for expert in small.experts}
    grown = small.add([("new", ["a new task"], [true_adapter(bank.base.layout, "red", "dog")])])
    assert not grown["new"].bases and (grown.folder / bases).is_file()
    left = AdapterBank.from_pretrained(grown.folder).remove(list(small.names))
    assert left.names == ("new",) and not (left.folder / bases).exists()
    assert AdapterBank.from_pretrained(left.folder).adapter("new").rank
    assert "bases" not in json.loads((left.folder / "bank.json").read_text())["experts"][0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_all_precisions_and_the_same_bytes(bank, tmp_path, precision):
    """Twice the same files; int8 keeps less."""
    made = [compress_bank(bank, tmp_path / name, keep=0.99, precision=precision) for name in "ab"]
    assert made[0].bank.files == made[1].bank.files and made[0].energy > 0.97
    assert {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()} >= {"bank.json"}


def test_it_says_when_it_does_not_pay(bank, tmp_path):
    """Experts that share nothing, and a single one; nothing is written."""
    rng = torch.Generator().manual_seed(0)
    layout = bank.base.layout
    lone = []
    for animal in ("cat", "dog", "bird"):
        sizes = {m.name: (m.in_features, m.out_features) for m in layout.modules}
        pairs = {name: (torch.randn(2, i, generator=rng), torch.randn(o, 2, generator=rng)) for name, (i, o) in sizes.items()}
        lone.append((f"red-{animal}", replace(true_adapter(layout, "red", "cat"), factors=Factors(pairs))))
    for adapters in (lone, lone[:1]):
        source = _add(AdapterBank.create(tmp_path / f"bank{len(adapters)}", bank.base), adapters, checkpoints=1)
        with pytest.raises(BankError, match="does not pay.*MB of bases and cores"):
            compress_bank(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_wishes_are_refused(bank, tmp_path, capsys):
    """Shares, precisions, folders with something in them, banks without experts; the command line in one line."""
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"keep": float("nan")}, {"precision": "int4"}):
        with pytest.raises(ConfigError, match="cannot be used"):
            compress_bank(bank, tmp_path / "out", **wrong)
    with pytest.raises(BankError, match="no expert"):
        compress_bank(AdapterBank.create(tmp_path / "empty", bank.base), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(StorageError, match="not an empty folder"):
        compress_bank(bank, tmp_path / "full")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bank", "compress", str(bank.folder), "--out", str(tmp_path / "full")])
    assert stopped.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bank", "compress", str(bank.folder), "--out", str(tmp_path / "small"), "--quiet"])
    out = capsys.readouterr().out
    assert not stopped.value.code and "25 experts in" in out and "energy kept" in out and "instead of" in out


def _tamper(folder, change):
    """Changes the bases of a bank, and its manifest so that the checksum holds."""
    manifest = json.loads((folder / "bank.json").read_text())
    name = manifest["experts"][0]["bases"]
    tensors = load_file(folder / name)
    change(tensors, manifest)
    save_file(tensors, folder / name)
    manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "bank.json").write_text(json.dumps(manifest))


TAMPERED = {
    "another size": (lambda tensors, _: tensors.update({"0.U_in": torch.zeros(3, 2)}), "bases of the layout"),
    "too many directions": (lambda tensors, _: tensors.update({"0.U_in": torch.zeros(32, 99)}), "bases of the layout"),
    "whole numbers": (lambda tensors, _: tensors.update({"1.U_out": tensors["1.U_out"].int()}), "bases of the layout"),
    "one is missing": (lambda tensors, _: tensors.pop("1.U_in"), "bases of the layout"),
    "something else": (lambda tensors, _: tensors.update({"more": torch.zeros(1)}), "more than bases"),
    "other cores": (lambda tensors, _: tensors.update({"0.U_in": tensors["0.U_in"][:, :1].contiguous()}), "does not hold what its entries"),
    "mixed": (lambda _, manifest: manifest["experts"][0].pop("bases"), "mixes"),
    "a path": (lambda _, manifest: [entry.update(bases="../x.safetensors") for entry in manifest["experts"]], "checksum|path|outside"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_bases_are_refused_on_opening(bank, tmp_path, kind):
    """With a named error, before a value is read."""
    folder = compress_bank(bank, tmp_path / "small", keep=0.9).bank.folder
    change, said = TAMPERED[kind]
    _tamper(folder, change)
    with pytest.raises((BankError, ArtifactError), match=said):
        AdapterBank.from_pretrained(folder)
