"""Orthonormal bases that a bank shares: from thin factors, never from a dense o x i matrix, in bounded memory."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from lorag.errors import GeneratorError

__all__ = ["RunningSpan", "Span", "weighted_columns"]

_EXACT = 32  # times k: up to this length a Gram matrix takes less time than compressing, and loses nothing
_FULL, _KEPT = 8, 4  # times k: columns at which a buffer is compressed, and those that are left


def weighted_columns(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns L (o, n·r) and R (i, n·r), in fp64, with LLᵀ = Σ ΔW ΔWᵀ and RRᵀ = Σ ΔWᵀ ΔW over n adapters of one module.

    ΔW ΔWᵀ = B (A Aᵀ) Bᵀ: the roots of n Gram matrices r x r take the place of n decompositions of factors.

    Args:
        rows: A (n, r, i).
        columns: B (n, o, r), scaling in it.

    Raises:
        GeneratorError: If a value is not a number.
    """
    rows, columns = rows.double(), columns.double()
    grams = torch.stack([rows @ rows.mT, columns.mT @ columns])
    if not grams.isfinite().all():
        raise GeneratorError("an expert's factors hold NaN or infinite values", remedy="Run lorag bank check.")
    values, vectors = torch.linalg.eigh(grams)
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return rearrange(columns @ roots[0], "n o r -> o (n r)"), rearrange(rows.mT @ roots[1], "n i r -> i (n r)")


class Span:
    """Leading left singular vectors of any number of columns, in memory that does not grow with their number.

    Short columns, of at most 32 k elements, add up to their Gram matrix, which is exact. Of longer ones a buffer of 8 k is
    compressed to its 4 k leading directions, with their weights, whenever it is full.

    Args:
        size: Length of the columns.
        keep: k, the number of vectors that are wanted.
    """

    def __init__(self, size: int, keep: int) -> None:
        self.size, self.keep = size, keep
        exact = size <= _EXACT * keep
        self._gram = torch.zeros(size, size, dtype=torch.float64) if exact else None
        self._columns = torch.zeros(size, 0, dtype=torch.float64)

    def add(self, columns: Tensor) -> None:
        """Takes columns (size, any) in fp64."""
        if self._gram is not None:
            self._gram.addmm_(columns, columns.T)
            return
        for part in columns.split((_FULL - _KEPT) * self.keep, 1):
            self._columns = torch.cat([self._columns, part], 1)
            if self._columns.shape[1] >= _FULL * self.keep:
                self._compress()

    def _compress(self) -> None:
        _, right = torch.linalg.eigh(self._columns.T @ self._columns)
        self._columns = self._columns @ right[:, -_KEPT * self.keep :]

    def basis(self) -> Tensor:
        """Orthonormal columns (size, k) in fp32, the leading first, their signs fixed against a fixed direction."""
        if self._gram is not None:
            left = torch.linalg.eigh(self._gram)[1].flip(1)
        else:
            if self._columns.shape[1] > _KEPT * self.keep:
                self._compress()
            left = torch.linalg.svd(self._columns, full_matrices=False)[0]
        left = left[:, : self.keep]
        if left.shape[1] < self.keep:  # fewer directions than k: complete them, so that all modules share one k
            rng = torch.Generator().manual_seed(0)
            extra = torch.randn(left.shape[0], self.keep, generator=rng, dtype=left.dtype)
            left = torch.linalg.qr(torch.cat([left, extra], 1))[0][:, : self.keep]
        probe = torch.randn(left.shape[0], generator=torch.Generator().manual_seed(1), dtype=left.dtype)
        signs = torch.where(probe @ left < 0, -1.0, 1.0)
        return (left * signs).float().contiguous()  # as it will be when read from a file: products round by layout


class RunningSpan:
    """Leading left singular vectors of columns that keep coming (Brand, "Incremental singular value decomposition", 2002).

    It forgets what lies outside of its leading directions whenever it is refitted, so that it never has to see earlier
    columns again; it keeps more directions than are asked of it, so that one that gains weight slowly is not lost.

    Args:
        size: Length of the columns.
        keep: Directions kept.
        columns: Orthogonal columns (size, at most keep) whose norms are their singular values, the largest first.
    """

    def __init__(self, size: int, keep: int, columns: Tensor | None = None) -> None:
        self.keep = min(keep, size)
        self.columns = torch.zeros(size, 0) if columns is None else columns
        self._new: list[Tensor] = []

    @property
    def waiting(self) -> int:
        """Number of columns that came since the last refit."""
        return sum(columns.shape[1] for columns in self._new)

    def add(self, columns: Tensor) -> None:
        """Takes columns (size, any)."""
        self._new.append(columns.float())

    def refit(self) -> None:
        """Works in the columns that came."""
        if not self._new:
            return
        stacked = torch.cat([self.columns, *self._new], 1).double()
        self._new = []
        # The smaller Gram matrix: fp64 leaves room for squaring what is stored in fp32.
        if stacked.shape[1] <= stacked.shape[0]:
            _, right = torch.linalg.eigh(stacked.T @ stacked)
            self.columns = (stacked @ right.flip(1))[:, : self.keep].float()
        else:
            values, left = torch.linalg.eigh(stacked @ stacked.T)
            self.columns = (left * values.clamp_min(0).sqrt()).flip(1)[:, : self.keep].float()

    def basis(self, k: int) -> Tensor:
        """At most k orthonormal columns (size, k) in fp64, as of the last refit."""
        leading = self.columns[:, :k].double()
        norms = leading.norm(dim=0)
        real = norms > 1e-5 * norms.max().clamp_min(1e-30) if len(norms) else norms > 0  # the others are rounding
        return leading[:, real] / norms[real]
