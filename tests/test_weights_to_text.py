"""What adapters do, read off their weights: the regression against its own definition, proposals, finding by text, and doubted cards."""

import dataclasses
import re

import pytest
import torch
from conftest import gauge
from test_import import BASE, LAYOUT, run, write
from toy_world import ANIMALS, COLOURS, WordEmbedder, describe, name_of, true_adapter, use_words

from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank
from lorag.bank.check import check_bank
from lorag.bank.index import BankIndex, DescriptionIndex
from lorag.bank.weights_to_text import WeightReader, describe_adapters
from lorag.cli import bank as commands
from lorag.cli.main import main
from lorag.errors import BankError, UndescribedError

CELLS = [(colour, animal) for colour in (*COLOURS, "gold") for animal in ANIMALS]
HELD_OUT = [("red", "dog"), ("gold", "fish"), ("pink", "cat")]
KNOWN = [cell for cell in CELLS if cell not in HELD_OUT]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """An expert of each colour and animal but three, each in a gauge of its own."""
    made = AdapterBank.create(tmp_path_factory.mktemp("known") / "bank", BASE)
    return made.add([(name_of(*cell), describe(*cell), [gauge(true_adapter(LAYOUT, *cell), n)]) for n, cell in enumerate(KNOWN)])


@pytest.fixture(scope="module")
def parts(bank):
    """Sketches (n, d) and description vectors (n, e)."""
    descriptions = DescriptionIndex(WordEmbedder())
    descriptions.cover(bank)
    sketches, texts = BankIndex(LAYOUT).cover(bank).sketches(), descriptions.vectors()
    return torch.stack([sketches[name] for name in bank.names]), torch.stack([texts[name] for name in bank.names])


@pytest.fixture(scope="module")
def reader(bank, parts):
    return WeightReader.fit(bank.names, *parts)


@pytest.fixture
def folders(tmp_path):
    """The three that the bank lacks, in another gauge, without a word on what they are for."""
    place = tmp_path / "unknown"
    for number, cell in enumerate(HELD_OUT):
        write(place / f"a{number}", gauge(true_adapter(LAYOUT, *cell), 50 + number), description=None, base_model_name_or_path="tiny-base")
    return place


def test_it_is_a_ridge_regression(reader, parts):
    """In the dual: what it reads off the experts themselves is that of the primal solution with the same penalty."""
    sketches, texts = parts
    x = torch.nn.functional.normalize(sketches.double(), dim=1)
    x, y = x - x.mean(0), (texts - texts.mean(0)).double()
    penalty = reader.penalty * (x @ x.T).diagonal().mean()
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    wanted = torch.nn.functional.normalize(x @ weights, dim=1)
    assert torch.allclose(reader.read(sketches), wanted.float(), atol=1e-4)


def test_leaving_out_in_closed_form_is_leaving_out(reader, bank, parts):
    """The cosine that counts for an expert is that of a reader that never saw it, neither in the regression nor in the means."""
    sketches, texts = parts
    for left in (0, 7, 20):
        others = [number for number in range(len(bank)) if number != left]
        less = WeightReader.fit([bank.names[number] for number in others], sketches[others], texts[others], (reader.penalty,))
        assert less.fits(sketches[left], texts[left]) == pytest.approx(reader.matches[left].item(), abs=0.03)


def test_an_adapter_that_nobody_described_is_read(reader, bank):
    """Its own words are nearest of all tasks, and the known ones that share its words come first; gauge and rank do not matter."""
    index, embedder = BankIndex(LAYOUT).cover(bank), WordEmbedder()
    assert reader.trusted and reader.separation > 0.97
    centroids = {cell: torch.stack([one.pooled for one in embedder.embed(describe(*cell))]).mean(0) for cell in CELLS}
    for cell in HELD_OUT:
        sketch = index.sketch(gauge(true_adapter(LAYOUT, *cell), 99))
        fits = {other: reader.fits(sketch, text) for other, text in centroids.items()}
        assert max(fits, key=fits.__getitem__) == cell
        assert all(set(name.split("-")) & set(cell) for name, _ in reader.nearest(sketch, 4))
        assert not reader.doubtful(fits[cell]) and sum(map(reader.doubtful, fits.values())) > len(CELLS) / 2


def test_weights_that_tell_nothing_are_not_believed(bank, parts):
    """With descriptions that are dealt at random nothing is proposed and nothing is doubted; of too few experts nothing is learned."""
    sketches, texts = parts
    dealt = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    shuffled = WeightReader.fit(bank.names, sketches, dealt)
    assert shuffled.separation < 0.8 and not shuffled.telling
    assert not shuffled.doubts() and not any(shuffled.doubtful(fit) for fit in (-1.0, 0.0, 1.0))
    assert WeightReader.fit(bank.names[:23], sketches[:23], texts[:23]) is None


def test_bank_add_proposes_a_description_and_doubts_a_wrong_one(bank, folders, tmp_path, capsys):
    """An adapter without one is still refused, and the error names tasks that it looks like; a card of another task is warned of."""
    copy = AdapterBank.create(tmp_path / "copy", BASE).add([(n, bank[n].descriptions, [bank.adapter(n)]) for n in bank.names])
    (refused,) = run(copy, folders / "a0", embedder=WordEmbedder())
    assert isinstance(refused.error, UndescribedError) and re.search(
        r"weights that look like those of [a-z]+-[a-z]+ 0\.\d\d", str(refused.error)
    )
    assert "red-" in str(refused.error) or "-dog" in str(refused.error)
    (right,) = run(copy, folders / "a0", embedder=WordEmbedder(), descriptions=("paint the red dog",), name="right")
    (wrong,) = run(copy, folders / "a1", embedder=WordEmbedder(), descriptions=("paint the blue horse",), name="wrong")
    assert right.error is None and right.looks_like == ()
    assert wrong.error is None and all(set(name.split("-")) & {"gold", "fish"} for name, _ in wrong.looks_like[:2])
    assert "do not fit its description" in commands._line(wrong, "") and "do not fit" not in commands._line(right, "")


@pytest.mark.slow
def test_check_finds_swapped_descriptions(bank, tmp_path):
    """Two experts with each other's words are found, and no others; without an embedder nothing is said."""
    words = {name: bank[name].descriptions for name in bank.names}
    words["red-cat"], words["blue-fish"] = words["blue-fish"], words["red-cat"]
    swapped = AdapterBank.create(tmp_path / "swapped", BASE).add([(name, words[name], [bank.adapter(name)]) for name in bank.names])
    found = {one.name for one in check_bank(swapped, embedder=WordEmbedder()) if "do not fit its description" in (one.problem or "")}
    assert found == {"red-cat", "blue-fish"}
    assert not any("do not fit" in (one.problem or "") for one in check_bank(swapped))


def test_adapters_are_found_by_text(bank, folders, monkeypatch, capsys):
    """In a folder of adapters that nothing describes, those come first whose weights fit a text; the command says the same."""
    sources = find_sources([str(folders)])
    for number, (colour, animal) in enumerate(HELD_OUT):
        first = describe_adapters(bank, sources, WordEmbedder(), find=f"{colour} {animal}")[0]
        assert first.source.endswith(f"a{number}") and first.match > 0.5 and len(first.near) == 5
    use_words(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(["bank", "describe", str(folders), "--bank", str(bank.folder), "--find", "gold fish"])
    lines = capsys.readouterr().out.splitlines()
    assert not stopped.value.code and re.match(r".*a1: fits 0\.\d\d$", lines[0]) and len(lines) == 3 * 6


def test_a_bank_that_tells_nothing_says_so(bank, folders, tmp_path):
    """Too few experts; and what cannot be read is named, and stops no other."""
    few = AdapterBank.create(tmp_path / "few", BASE).add([(n, bank[n].descriptions, [bank.adapter(n)]) for n in bank.names[:5]])
    with pytest.raises(BankError, match="5 experts"):
        describe_adapters(few, find_sources([str(folders)]), WordEmbedder())
    (folders / "a0" / "adapter_config.json").write_text("{}")
    found = describe_adapters(bank, find_sources([str(folders)]), WordEmbedder())
    assert [one.error is None for one in found] == [False, True, True]
    assert dataclasses.asdict(found[1])["near"]
