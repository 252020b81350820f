"""How a written answer compares with its reference: ROUGE-L, and a match that forgives case and outer punctuation."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from torch import Tensor

__all__ = ["balanced_accuracy", "density", "lenient_match", "rouge_l"]

_MOST_NATS = 700.0  # a token; beyond it a perplexity is not a number any more


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of lower-case words (Lin 2004)."""
    a, b = answer.lower().split(), reference.lower().split()
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for column, other in enumerate(b, start=1):
            before, row[column] = row[column], before + 1 if word == other else max(row[column], row[column - 1])
    common = row[-1]
    return 0.0 if common == 0 else 2 * common / (len(a) + len(b))


def lenient_match(answer: str, reference: str) -> bool:
    """Whether two texts are equal but for case, blanks, and punctuation around the whole: "Yes." answers "yes"."""
    return _core(answer) == _core(reference)


def _core(text: str) -> str:
    """Lower case, single blanks, nothing but letters, digits and symbols at the ends; a text of punctuation alone stays."""
    plain = " ".join(text.casefold().split())
    places = [place for place, character in enumerate(plain) if unicodedata.category(character)[0] not in "PZ"]
    return plain[places[0] : places[-1] + 1] if places else plain


def balanced_accuracy(right: Sequence[bool], labels: Sequence[str]) -> float:
    """Mean over the labels that occur of the share of their examples that are answered right; always yes of yes and no has 0.5."""
    by_label: dict[str, list[bool]] = {}
    for hit, label in zip(right, labels, strict=True):
        by_label.setdefault(label, []).append(hit)
    return sum(sum(hits) / len(hits) for hits in by_label.values()) / len(by_label)


def density(likelihood: Tensor, examples: Sequence[str]) -> dict[str, float]:
    """Perplexity a token and bits a character, from log-likelihoods (t,) of all tokens of answers, without the end tokens."""
    lost = -likelihood.double().sum().item()
    tokens, characters = len(likelihood), sum(map(len, examples))
    if not tokens or not characters:
        return {}
    return {"perplexity": math.exp(min(lost / tokens, _MOST_NATS)), "bits_per_character": lost / math.log(2) / characters}
