"""Conditions: what a generator knows of a description - its embedding, the nearest experts, and the prior they give."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.text.search import MANY, NeighbourSearch

if TYPE_CHECKING:
    from lorag.text.embedding import Embedding

__all__ = ["Condition", "Conditioner", "Mixture", "mixture", "mixture_weights"]

_DIRECTIONS = 64  # in which the descriptions of a bank are taken to differ, at most; a third of the experts in small banks
_FOUND = 64  # neighbours that are found among many experts: more than any method mixes
_CHUNK = 16_384
_COMPARED = 512  # experts whose descriptions are compared with each other
_MOST_MASKED = 4096  # experts that an index is asked to pass over


@dataclass(frozen=True)
class Mixture:
    """A prior over codes: mean (c,) and variance (c,) of a weighted mixture of experts."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Condition:
    """All that a generator may use.

    Attributes:
        embedding: The description's pooled and token vectors.
        similarities: Cosine to each expert of the bank (n,); a masked one has -1, and in a bank of more than 100,000 experts
            with an index of them (extra `faiss`) so has every one that is not among the 64 nearest.
        neighbours: The nearest experts and their cosines, best first.
        distance: 1 - the best cosine; 0 only for the sole description of an expert.
        task_vector: Mean hidden state of the base model over example inputs (h,), if there were any.
        pairs: What the base model made of each of a few (input, output) pairs (p, v), if there were any and the method reads them.
    """

    embedding: Embedding
    similarities: Tensor
    neighbours: tuple[tuple[str, float], ...]
    distance: float
    task_vector: Tensor | None = None
    pairs: Tensor | None = None

    @property
    def masked(self) -> Tensor:
        """Which experts (n,) must not count, because they are masked or were not compared."""
        return self.similarities <= -1.0


class Conditioner:
    """Compares descriptions with those of the bank's experts.

    Args:
        names: The n experts.
        centroids: Mean of the unit vectors of each expert's descriptions, normalised (n, e).
    """

    def __init__(self, names: Sequence[str], centroids: Tensor) -> None:
        self.names, self.centroids = tuple(names), centroids

    @classmethod
    def fit(cls, names: Sequence[str], embeddings: Sequence[Sequence[Embedding]], size: int | None = None) -> Conditioner:
        """Averages the embeddings of each expert's descriptions; `size` is the length e of vectors where there may be no expert."""
        if not names and size is not None:
            return cls(names, torch.zeros(0, size))
        means = torch.stack([torch.stack([one.pooled for one in of_expert]).mean(0) for of_expert in embeddings])
        return cls(names, torch.nn.functional.normalize(means, dim=-1))

    def __call__(self, embedding: Embedding, *, masked: Tensor | None = None, keep: int = 8) -> Condition:
        """Builds the condition of one description.

        Args:
            embedding: The description's.
            masked: Experts (n,) that must not be seen, such as those of a training task's own group; None masks none.
            keep: Number of neighbours listed.
        """
        masked_places = [] if masked is None else masked.nonzero().flatten().tolist()
        count = min(len(self.names), max(1, min(keep, len(self.names) - len(masked_places))))
        compared = self._search_many(embedding.pooled, masked_places, count)
        similarities, cosines, places = self._compare(embedding.pooled, masked_places, count) if compared is None else compared
        neighbours = tuple((self.names[i], round(s, 4)) for s, i in zip(cosines.tolist(), places.tolist(), strict=True))
        return Condition(embedding, similarities, neighbours, max(0.0, 1.0 - cosines[0].item()) if count else 1.0)

    def _compare(self, pooled: Tensor, masked: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine to every expert (n,), and the cosines and places of the nearest (f,)."""
        similarities = self.centroids @ pooled
        if masked:
            similarities[masked] = -1.0
        best = similarities.topk(count)
        return similarities, best.values, best.indices

    def _search_many(self, pooled: Tensor, masked: list[int], count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same of the nearest alone, the others at -1; None where there are too few experts, or no index, for that."""
        if len(self.names) <= MANY or len(masked) > _MOST_MASKED or not self._search.approximate:
            return None
        cosines, places = self._search.nearest(pooled, max(_FOUND, count) + len(masked))
        kept = ~torch.isin(places, torch.tensor(masked, dtype=places.dtype))
        cosines, places = cosines[kept], places[kept]
        if len(places) < count:
            return None
        similarities = torch.full((len(self.names),), -1.0)
        similarities[places] = cosines
        return similarities, cosines[:count], places[:count]

    @functools.cached_property
    def _search(self) -> NeighbourSearch:
        return NeighbourSearch(self.centroids)

    @functools.cached_property
    def usual_similarity(self) -> float:
        """Median cosine between the descriptions of two experts, among at most 512 of them; 0 where there are fewer than two."""
        some = self.centroids[:: -(-len(self.names) // _COMPARED) or 1]
        if len(some) < 2:
            return 0.0
        pairs = torch.ones(len(some), len(some)).triu(1).bool()
        return (some @ some.T)[pairs].median().item()

    def outside(self, embedding: Embedding) -> float:
        """Share of a description, less the bank's mean, that lies outside of the directions in which the bank's differ most."""
        centre, directions = self._directions
        apart = embedding.pooled - centre
        whole = apart.square().sum().clamp_min(1e-12)
        return (1 - (directions @ apart).square().sum() / whole).clamp(0, 1).item()

    @functools.cached_property
    def _directions(self) -> tuple[Tensor, Tensor]:
        """Mean (e,) and leading directions (d, e) of the experts' descriptions."""
        centre = self.centroids.mean(0)
        if len(self.names) > MANY:  # by the (e, e) matrix of products: a decomposition of all vectors takes minutes and gigabytes
            gram = torch.zeros(len(centre), len(centre), dtype=torch.float64)
            for part in self.centroids.split(_CHUNK):
                apart = (part - centre).double()
                gram += apart.T @ apart
            return centre, torch.linalg.eigh(gram).eigenvectors.flip(1).T[:_DIRECTIONS].float()
        right = torch.linalg.svd((self.centroids - centre).double(), full_matrices=False).Vh
        return centre, right[: max(1, min(_DIRECTIONS, len(self.names) // 3))].float()


def mixture_weights(similarities: Tensor, top: int, temperature: float) -> Tensor:
    """Weights (n,) of `mixture`: a softmax over the nearest `top` experts, 0 for the others."""
    best = similarities.topk(min(top, len(similarities)))
    return torch.zeros_like(similarities).scatter(0, best.indices, torch.softmax(best.values / temperature, 0))


def mixture(similarities: Tensor, codes: Tensor, deviations: Tensor | None, *, top: int, temperature: float) -> Mixture:
    """SG-LoRA's aggregator (arXiv 2509.10535): softmax over the nearest experts, law of total variance.

    Args:
        similarities: Cosine to each expert (n,).
        codes: μ_k, codes of the experts (n, c).
        deviations: σ_k of their late checkpoints (n, c); None counts as zero.
        top: K.
        temperature: τ.
    """
    best = similarities.topk(min(top, len(similarities)))
    weights = torch.softmax(best.values / temperature, 0)[:, None]
    chosen = codes[best.indices].float()
    mean = (weights * chosen).sum(0)
    variance = (weights * (chosen - mean).square()).sum(0)
    if deviations is not None:
        variance = variance + (weights * deviations[best.indices].float().square()).sum(0)
    return Mixture(mean, variance)
