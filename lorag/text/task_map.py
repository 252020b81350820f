"""The map of tasks: descriptions' embeddings projected onto the two directions in which a bank's tasks differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorag.errors import BankError

__all__ = ["TaskMap"]


@dataclass(frozen=True)
class TaskMap:
    """Principal component analysis (Hotelling 1933) of a bank's descriptions.

    Attributes:
        names: The n tasks.
        points: Where they lie (n, 2), in units of the embedding.
        mean: Mean embedding (e,).
        axes: Orthonormal directions of the greatest variance (e, 2), first the greater.
        kept: Share of the variance that the two directions hold, from 0 to 1; what is near on the map may differ in the rest.
    """

    names: tuple[str, ...]
    points: Tensor
    mean: Tensor
    axes: Tensor
    kept: float

    @classmethod
    def fit(cls, names: Sequence[str], vectors: Tensor) -> TaskMap:
        """Finds the map.

        Args:
            names: The n tasks.
            vectors: Embedding of each (n, e), such as `Conditioner.centroids`.

        Raises:
            BankError: If there is no task, or not one vector of at least two numbers for each.
        """
        if vectors.dim() != 2 or len(vectors) != len(names) or not len(names) or vectors.shape[1] < 2:
            raise BankError("a map needs tasks", got=f"{len(names)} names and vectors {tuple(vectors.shape)}", expected="one vector each")
        values = vectors.detach().cpu().double()
        mean = values.mean(0)
        centred = values - mean
        # e x e however many tasks there are.
        spread, directions = torch.linalg.eigh(centred.T @ centred)
        axes = directions[:, [-1, -2]]
        # An eigenvector's sign is arbitrary; this one makes maps of the same bank the same.
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        total = spread.clamp_min(0).sum().item()
        kept = 0.0 if total == 0 else spread[-2:].clamp_min(0).sum().item() / total
        return cls(tuple(names), (centred @ axes).float(), mean.float(), axes.float(), kept)

    def place(self, vector: Tensor) -> tuple[float, float]:
        """Where an embedding (e,) lies on the map.

        Raises:
            BankError: If it is of another length than the bank's.
        """
        if vector.shape != self.mean.shape:
            raise BankError("an embedding does not fit the map", got=tuple(vector.shape), expected=tuple(self.mean.shape))
        x, y = ((vector.detach().cpu().float() - self.mean) @ self.axes).tolist()
        return x, y
