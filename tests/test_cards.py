"""Cards: what `lorag info` says of a folder is what the folder's own weights say, in lines that a terminal can show."""

import json
import re
import statistics

import pytest
from toy_world import TRAINING, make_bank, make_suite, save_base, true_adapter

from lorag.cli.info import describe_path


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_models, tokenizer):
    """Twenty-one right adapters of the toy world."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    return make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)


def _rows(card):
    """Label -> text, with what goes on below put together again."""
    rows = {}
    for line in card.splitlines():
        found = re.match(r"(\S[^:]{0,30}):\s*(.*)", line)
        if found:
            last, rows[found[1]] = found[1], found[2]
        else:
            assert line.startswith(" " * 16)
            rows[last] += " " + line.strip()
    return rows


def _norms(bank):
    return [sum(n * n for n in bank.adapter(name).norms().values()) ** 0.5 for name in bank.names]


@pytest.mark.slow
def test_a_bank_s_card(bank):
    """Sizes, kinds of modules, norms, the energy that shared directions keep, and the two experts that are most alike."""
    rows = _rows(describe_path(bank.folder))
    assert rows["kind"] == "bank" and rows["experts"].startswith(f"{len(bank)}, such as red-cat: 'paint the red cat'")
    assert rows["modules"] == "6: 2 down_proj, 2 q_proj, 2 v_proj"
    norms = _norms(bank)
    middle, low, high = (float(text) for text in re.findall(r"\d[\d.]*", rows["norm of ΔW"])[:3])
    assert (middle, low, high) == pytest.approx((statistics.median(norms), min(norms), max(norms)), rel=0.01)
    assert "of all experts" in rows["norm of ΔW"]
    kept = float(re.match(r"([\d.]+)%", rows["energy kept"])[1])
    assert 99 < kept <= 100  # ten words of rank 2 fit into 32 directions
    first, second = re.search(r"most alike (\S+) and (\S+),", rows["likeness"]).groups()
    assert set(first.split("-")) & set(second.split("-"))  # tasks that share a word share half of ΔW
    assert "lorag bank check" in rows["look closer"]


@pytest.mark.slow
def test_of_a_large_bank_some_are_looked_at(bank, tmp_path):
    """Evenly spread, 48 at most, and the card says how many."""
    twins = [(f"{name}-{n}", ["the same again"], [bank.adapter(name)]) for n in range(2) for name in bank.names]
    large = bank.copy_to(tmp_path / "large", bank.names, "float32").add(twins)
    assert len(large) == 63 and "of 32 experts" in _rows(describe_path(large.folder))["norm of ΔW"]


def test_an_adapter_s_norm_is_its_weights_own(bank, tmp_path):
    """Whatever lorag.json claims; with and without it."""
    adapter = true_adapter(bank.base.layout, "red", "dog")
    adapter.save_pretrained(tmp_path / "a")
    norm = sum(n * n for n in adapter.norms().values()) ** 0.5
    sidecar = tmp_path / "a" / "lorag.json"
    claimed = json.loads(sidecar.read_text()) | {"norm": 1e9, "norms": {"x": "y"}, "novelty": 0.25}
    sidecar.write_text(json.dumps(claimed))
    for present in (True, False):
        if not present:
            sidecar.unlink()
        rows = _rows(describe_path(tmp_path / "a"))
        assert float(rows["norm of ΔW"].split()[0]) == pytest.approx(norm, rel=0.01)
        assert ("novelty" in rows) == present


def test_a_suite_s_card(tmp_path):
    """Numbers of tasks, examples and descriptions, and what one is like."""
    make_suite(TRAINING[:3]).save(tmp_path)
    rows = _rows(describe_path(tmp_path))
    assert rows["tasks"] == "3" and rows["descriptions"] == "6, such as 'paint the red cat'"


def test_cards_fit_a_terminal():
    """No line of the embedded generator's card is longer than 120 characters; its gate is put into words."""
    from lorag.files.artifacts import embedded

    card = describe_path(embedded("checkpoints/house"))
    assert max(map(len, card.splitlines())) <= 120
    rows = _rows(card)
    assert "AUROC" in rows["gate"] and "32 directions" in rows["weight space"] and "378 experts" in rows["learned from"]
