"""Typing errors in training: what may be hit, what must not, and that the same seed gives the same errors."""

import random

import pytest
from toy_world import TRAINING, WordEmbedder, make_bank, save_base

from lorag.errors import ConfigError
from lorag.text.misspelling import misspell, misspell_some
from lorag.training.preparation import SpaceChoice, prepare
from lorag.training.split import SplitRule
from lorag.training.train import TrainConfig, train


def _distance(one, other):
    """Levenshtein's, with an exchange of neighbours as one step."""
    rows = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(other) + 1)}
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            found = min(rows[i - 1, j] + 1, rows[i, j - 1] + 1, rows[i - 1, j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                found = min(found, rows[i - 2, j - 2] + 1)
            rows[i, j] = found
    return rows[len(one), len(other)]


@pytest.mark.slow
def test_one_error_in_one_longer_word():
    """At most one letter is lost, doubled, exchanged or hit beside; words stay as many, and short ones stay as they are."""
    text = "sum up the Contract in a few words, as JSON {now}"
    kinds = set()
    for seed in range(200):
        made = misspell(text, random.Random(seed))
        assert _distance(text, made) <= 1 and len(made.split(" ")) == len(text.split(" "))
        pairs = [(a, b) for a, b in zip(text.split(" "), made.split(" "), strict=True) if a != b]
        assert all(len(a) >= 4 and a.isalpha() for a, _ in pairs)
        kinds |= {len(b) - len(a) for a, b in pairs}
    assert kinds == {-1, 0, 1}


def test_texts_without_a_longer_word_stay_as_they_are():
    """Nothing is invented where there is nothing to hit: short words, other scripts, no text."""
    for text in ("a bc def", "概要を書いて", "", "1234 5678"):
        assert misspell(text, random.Random(0)) == text


def test_the_first_description_is_never_hit():
    """It may be the only one; of the others about the given share is."""
    texts = [f"describe number {i} plainly" for i in range(400)]
    made = misspell_some(texts, 0.25, random.Random(0))
    assert made[0] == texts[0] and misspell_some(texts, 1.0, random.Random(0))[0] == texts[0]
    assert 0.18 < sum(a != b for a, b in zip(texts, made, strict=True)) / len(texts) < 0.3
    assert misspell_some(texts, 0.0, random.Random(0)) == texts


def test_preparation_reads_the_same_errors_with_the_same_seed(tmp_path, tiny_models, tokenizer):
    """Runs repeat; other seeds hit other words; without typos every description is read as it stands."""
    base = save_base(tmp_path / "base", tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path / "bank", base, TRAINING[:6])

    class Listening(WordEmbedder):
        def embed(self, texts, *, quiet=True):
            self.heard = list(texts)
            return super().embed(texts, quiet=quiet)

    def heard(**more):
        embedder = Listening()
        prepare(bank, embedder, space=SpaceChoice(k=8), quiet=True, **more)
        return embedder.heard

    plain = [text for expert in bank.experts for text in expert.descriptions]
    assert heard() == plain
    assert heard(typos=1.0, rule=SplitRule(seed=1)) == heard(typos=1.0, rule=SplitRule(seed=1)) != heard(typos=1.0, rule=SplitRule(seed=2))
    with pytest.raises(ConfigError, match="typos"):
        train(TrainConfig(out=str(tmp_path / "out"), typos=1.5))
