"""Orthonormal bases that a bank shares: from thin factors, never from a dense o x i matrix, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lorag.adapter import LoraAdapter

__all__ = ["Span", "reduced"]


def reduced(adapter: LoraAdapter, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of one ΔW from its factors: left (o, r), singular values (r,), right (i, r), in fp64.

    QR first, so that the only dense decomposition is of an r x r matrix.
    """
    rows, columns = adapter.factors[module]
    q_out, r_out = torch.linalg.qr(columns.double())
    q_in, r_in = torch.linalg.qr(rows.double().T)
    left, values, right = torch.linalg.svd(adapter.scaling * r_out @ r_in.T)
    return q_out @ left, values, q_in @ right.T


class Span:
    """Leading left singular vectors of many columns, in bounded memory: the buffer is compressed when it is full."""

    def __init__(self, size: int) -> None:
        self.keep = size
        self.columns: list[Tensor] = []
        self.held = 0

    def add(self, columns: Tensor) -> None:
        """Takes columns (size, any)."""
        self.columns.append(columns)
        self.held += columns.shape[1]
        if self.held > 16 * self.keep + 4096:
            left, values = self._svd()
            self.columns = [left[:, : 8 * self.keep] * values[: 8 * self.keep]]
            self.held = self.columns[0].shape[1]

    def _svd(self) -> tuple[Tensor, Tensor]:
        stacked = torch.cat(self.columns, 1)
        if stacked.shape[1] > stacked.shape[0]:  # the Gram matrix is smaller, and fp64 leaves room for squaring
            values, left = torch.linalg.eigh(stacked @ stacked.T)
            return left.flip(1), values.flip(0).clamp_min(0).sqrt()
        left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
        return left, values

    def basis(self) -> Tensor:
        """Orthonormal columns (size, k) in fp32, their signs fixed against a fixed direction."""
        left, _ = self._svd()
        left = left[:, : self.keep]
        if left.shape[1] < self.keep:  # fewer directions than k: complete them, so that all modules share one k
            rng = torch.Generator().manual_seed(0)
            extra = torch.randn(left.shape[0], self.keep, generator=rng, dtype=left.dtype)
            left = torch.linalg.qr(torch.cat([left, extra], 1))[0][:, : self.keep]
        probe = torch.randn(left.shape[0], generator=torch.Generator().manual_seed(1), dtype=left.dtype)
        signs = torch.where(probe @ left < 0, -1.0, 1.0)
        return (left * signs).float().contiguous()  # as it will be when read from a file: products round by layout
