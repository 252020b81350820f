"""The lower rungs of the ladder: from which cosine a description is a known task's, and from which experts are fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorag.bank.bank import AdapterBank
from lorag.generator.gate import digest
from lorag.generator.lora_generator import LoraGenerator
from lorag.text.embedding import Embedding

__all__ = ["bank_wordings", "fusing_cosine", "naming_cosine"]

_PRECISION, _LEAST_CLAIMS, _COMPARED = 0.95, 20, 3
_LEAST_TASKS, _LEAST_GAIN = 3, 0.5  # that fusing must have shown


def fusing_cosine(nearest: Tensor, fused: Tensor, generated: Tensor) -> float | None:
    """The cosine from which fused experts gained as much as generated codes; None if there is no such cosine.

    Args:
        nearest: Cosine of each held-out task to its nearest expert (n,).
        fused: Gain of fused experts on it (n,); NaN counts for neither.
        generated: Gain of what was generated (n,).
    """
    for cosine in sorted(nearest.tolist()):
        near = (nearest >= cosine) & fused.isfinite() & generated.isfinite()
        if near.sum() < _LEAST_TASKS:
            break
        if fused[near].mean() >= generated[near].mean() and fused[near].mean() > _LEAST_GAIN:
            return round(cosine, 4)
    return None


def naming_cosine(generator: LoraGenerator, bank: AdapterBank, nearest: Tensor, wordings: int) -> float | None:
    """The cosine from which a description names its nearest expert, right in 95 % of cases; None if there is no such cosine.

    Each wording of an expert is compared with all experts, its own without that wording; held-out tasks, `nearest` (n,) to
    some expert that is not theirs, are wrong wherever they are taken for one.
    """
    conditioner = generator.conditioner
    texts = [bank[name].descriptions[: min(max(2, wordings), _COMPARED)] for name in conditioner.names]
    flat = iter(generator.embedder.embed([text for own in texts for text in own]))
    cosines, right = [], []
    for index, own in enumerate(texts):
        vectors = [next(flat) for _ in own]
        for place, one in enumerate(vectors if len(vectors) > 1 else ()):
            cosine, best = _without(conditioner.centroids, index, vectors, place, one)
            cosines.append(cosine)
            right.append(best)
    if not cosines:
        return None
    claims = torch.tensor([*cosines, *nearest.tolist()])
    correct = torch.tensor([*right, *([False] * len(nearest))])
    weights = torch.tensor([1 / len(cosines)] * len(cosines) + [1 / len(nearest)] * len(nearest))
    for cosine in sorted(set(cosines)):
        claimed = claims >= cosine
        if claimed.sum() < _LEAST_CLAIMS:
            return None
        if (weights * correct)[claimed].sum() >= _PRECISION * weights[claimed].sum():
            return round(cosine, 4)
    return None


def _without(centroids: Tensor, index: int, vectors: Sequence[Embedding], place: int, one: Embedding) -> tuple[float, bool]:
    """Best cosine of a wording, and whether that is its own expert's, whose centroid is made from its other wordings."""
    others = torch.stack([other.pooled for number, other in enumerate(vectors) if number != place]).mean(0)
    similarities = centroids @ one.pooled
    similarities[index] = torch.nn.functional.normalize(others, dim=-1) @ one.pooled
    return similarities.max().item(), int(similarities.argmax()) == index


def bank_wordings(bank: AdapterBank, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Digests of all wordings and the experts that they belong to; a wording of several experts names none."""
    owners: dict[int, set[int]] = {}
    for index, name in enumerate(names):
        for text in bank[name].descriptions:
            owners.setdefault(digest(text), set()).add(index)
    sole = sorted((mark, next(iter(own))) for mark, own in owners.items() if len(own) == 1)
    return torch.tensor([m for m, _ in sole], dtype=torch.int64), torch.tensor([o for _, o in sole], dtype=torch.int32)
