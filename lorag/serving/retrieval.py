"""Which known task a request belongs to: by the nearest examples of each task, and by its description's words and code.

Nothing is trained but a few weights: how much each kind of likeness counts is what makes wordings and examples that are held out
of a task most probably that task's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

if TYPE_CHECKING:
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.text.conditioning import Condition
    from lorag.text.embedding import TextEmbedder

__all__ = ["DescriptionIndex", "TextIndex"]

_NEAREST = 5  # of a task's examples; their mean cosine is what speaks for it
_EXAMPLES, _MOST_EXAMPLES = range(64, 257), 8000  # kept of each task, and of all
_WORDINGS, _MOST_WORDINGS = range(4, 13), 5000  # of each task, and of all: more tell better how much wordings of one task differ
_PROJECTED = 1024  # dimensions in which codes are compared
_FEW = 2  # tasks that are not centred: of two, each would be the opposite of the other
_RIDGE = 2.0  # of the covariance of wordings, in shares of its mean variance
_WEIGHTS = (0.0, 5.0, 10.0, 20.0, 40.0)  # that cosines may have before the softmax
_UNFITTED = 10.0  # where no task has two wordings, or two examples


def _share(most: int, tasks: int, bounds: range) -> int:
    """How many of `most` each task gets, within bounds."""
    return min(max(most // max(tasks, 1), bounds.start), bounds.stop - 1)


class TextIndex:
    """Texts that each task is known by: inputs of its examples. Make one with `embed`.

    Args:
        names: The n tasks.
        vectors: Unit vectors of all texts (t, e).
        owners: Task of each text (t,).
    """

    def __init__(self, names: Sequence[str], vectors: Tensor, owners: Tensor) -> None:
        self.names, self._vectors, self._owners = tuple(names), vectors, owners
        self._means = self._view(torch.ones(len(owners), dtype=torch.bool))

    @classmethod
    def embed(cls, texts: Mapping[str, Sequence[str]], embedder: TextEmbedder, *, quiet: bool = True) -> TextIndex:
        """Embeds at most 256 texts of each task, fewer of many tasks and no fewer than 64."""
        each = _share(_MOST_EXAMPLES, len(texts), _EXAMPLES)
        kept = {name: list(dict.fromkeys(of_task))[:each] for name, of_task in texts.items()}
        embedded = embedder.embed([text for of_task in kept.values() for text in of_task], quiet=quiet)
        owners = torch.tensor([place for place, of_task in enumerate(kept.values()) for _ in of_task], dtype=torch.long)
        vectors = torch.stack([one.pooled for one in embedded]) if embedded else torch.zeros(0, embedder.size)
        return cls(list(kept), vectors, owners)

    def scores(self, queries: Tensor) -> Tensor:
        """How near each query (q, e) is to each task (q, n); -1 for a task without texts.

        The mean of two cosines: to the five nearest texts of the task, and to the mean of its texts, in directions in which texts of one
        task differ least. The first knows tasks that fall into clusters, the second what all texts of a task share.
        """
        return self._near(queries, queries @ self._vectors.T, *self._means)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Scores (q, n) of the first text of each task that has two or more, itself held out, and their tasks (q,)."""
        counts = torch.bincount(self._owners, minlength=len(self.names))
        places = (counts > 1).nonzero().flatten()
        firsts = torch.tensor([int((self._owners == place).nonzero()[0]) for place in places.tolist()], dtype=torch.long)
        cosines = self._vectors[firsts] @ self._vectors.T
        cosines[torch.arange(len(firsts)), firsts] = -1.0
        kept = torch.ones(len(self._owners), dtype=torch.bool)
        kept[firsts] = False
        return self._near(self._vectors[firsts], cosines, *self._view(kept)), places

    def _view(self, kept: Tensor) -> tuple[_View, Tensor]:
        """Tasks as means of some of their texts, and which tasks these are."""
        present, owners = self._owners[kept].unique(return_inverse=True)
        return _View(self._vectors[kept], owners, len(present)), present

    def _near(self, queries: Tensor, cosines: Tensor, means: _View, present: Tensor) -> Tensor:
        near = torch.full((len(cosines), len(self.names)), -1.0)
        for place, mean in zip(present.tolist(), means.scores(queries).T, strict=True):
            of_task = cosines[:, self._owners == place]
            near[:, place] = (of_task.topk(min(_NEAREST, of_task.shape[1]), dim=1).values.mean(1) + mean) / 2
        return near


class _View:
    """Tasks as means of their wordings' vectors, compared where wordings of one task differ least.

    Args:
        vectors: Of all wordings (t, e).
        owners: Task of each (t,); every one of the n tasks has one.
        count: n.
    """

    def __init__(self, vectors: Tensor, owners: Tensor, count: int) -> None:
        sizes = torch.bincount(owners, minlength=count)[:, None]
        means = torch.zeros(count, vectors.shape[1]).index_add_(0, owners, vectors) / sizes
        self._centre = means.mean(0) if count > _FEW else means.new_zeros(means.shape[1])
        within = vectors - means[owners]
        variance = within.square().mean()
        self._whitening: Tensor | None = None
        if len(vectors) > count and variance > 0:
            covariance = within.T @ within / (len(vectors) - count)
            ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
            self._whitening = torch.linalg.cholesky(covariance + ridge)
        self._means = self._placed(means)

    def _placed(self, vectors: Tensor) -> Tensor:
        moved = vectors - self._centre
        if self._whitening is not None:
            moved = torch.linalg.solve_triangular(self._whitening, moved.T, upper=False).T
        return normalize(moved, dim=1)

    def scores(self, vectors: Tensor) -> Tensor:
        """Cosines (q, n) of vectors (q, e) to each task."""
        return self._placed(vectors) @ self._means.T


class DescriptionIndex:
    """Tasks by their descriptions: by the words, and by the codes that the generator makes of them. Make one with `generate`.

    A generator that was trained well tells apart by code what words do not: two descriptions that differ in every word may ask for the
    same, and two that share most words may not. Of one that was not, words say more. Codes are compared in a random projection.

    Args:
        generator: Makes codes of descriptions.
        names: The n tasks.
        words: Pooled vectors of all wordings (t, e).
        codes: Their codes, projected (t, p).
        owners: Task of each (t,).
        projection: Of codes (c, p).
    """

    def __init__(
        self, generator: LoraGenerator, names: Sequence[str], words: Tensor, codes: Tensor, owners: Tensor, projection: Tensor
    ) -> None:
        self.names, self._generator, self._projection = tuple(names), generator, projection
        self._words, self._codes = _View(words, owners, len(names)), _View(codes, owners, len(names))
        counts = torch.bincount(owners, minlength=len(names))
        last = torch.zeros(len(owners), dtype=torch.bool)
        last[counts.cumsum(0)[counts > 1] - 1] = True  # wordings of a task stand together
        self._held_out = torch.zeros(0, len(names)), torch.zeros(0, dtype=torch.long)
        self.weights = _UNFITTED, _UNFITTED
        if last.any():
            views = [_View(vectors[~last], owners[~last], len(names)).scores(vectors[last]) for vectors in (words, codes)]
            pairs = [pair for pair in itertools.product(_WEIGHTS, _WEIGHTS) if any(pair)]
            self.weights = min(pairs, key=lambda pair: float(cross_entropy(pair[0] * views[0] + pair[1] * views[1], owners[last])))
            self._held_out = self.weights[0] * views[0] + self.weights[1] * views[1], owners[last]

    @classmethod
    def generate(cls, generator: LoraGenerator, descriptions: Mapping[str, Sequence[str]]) -> DescriptionIndex:
        """Embeds four to twelve descriptions of each task, fewer of many tasks, and generates their codes."""
        each = _share(_MOST_WORDINGS, len(descriptions), _WORDINGS)
        kept = {name: list(texts)[:each] for name, texts in descriptions.items() if texts}
        size = min(_PROJECTED, generator.space.size)
        projection = torch.randn(generator.space.size, size, generator=torch.Generator().manual_seed(0)) / size**0.5
        embedded = generator.embedder.embed([text for texts in kept.values() for text in texts])
        owners = torch.tensor([place for place, texts in enumerate(kept.values()) for _ in texts])
        words = torch.stack([one.pooled for one in embedded])
        codes = _codes(generator, [generator.conditioner(one) for one in embedded], projection)
        return cls(generator, list(kept), words, codes, owners, projection)

    def scores(self, descriptions: Sequence[str]) -> Tensor:
        """Logits (q, n) of each task for descriptions: both cosines times their weights.

        Raises:
            DescriptionError: If a description cannot be used.
        """
        conditions = [self._generator.condition(text) for text in descriptions]
        words = torch.stack([condition.embedding.pooled for condition in conditions])
        codes = _codes(self._generator, conditions, self._projection)
        return self.weights[0] * self._words.scores(words) + self.weights[1] * self._codes.scores(codes)

    def fit_texts(self, texts: TextIndex) -> float:
        """How much the cosine of a request's text counts beside its description's logits."""
        scores, owners = texts.held_out()
        logits, described = self._held_out
        row = {place: number for number, place in enumerate(described.tolist())}
        place_of = {name: place for place, name in enumerate(self.names)}
        columns = torch.tensor([place_of[name] for name in texts.names])
        both = [number for number, owner in enumerate(owners.tolist()) if int(columns[owner]) in row]
        if not both:
            return _UNFITTED
        by_words = logits[torch.tensor([row[int(columns[owners[number]])] for number in both])][:, columns]
        by_text, wanted = scores[torch.tensor(both)], owners[torch.tensor(both)]
        return min(_WEIGHTS, key=lambda weight: float(cross_entropy(by_words + weight * by_text, wanted)))


def _codes(generator: LoraGenerator, conditions: Sequence[Condition], projection: Tensor) -> Tensor:
    """Projected codes (q, p) of descriptions."""
    projected = []
    for condition in conditions:
        code = generator.method.generate(condition, torch.Generator().manual_seed(0))
        projected.append(code[0].float() @ projection)
    return torch.stack(projected)
