"""The raw factors as a weight space: published methods are defined on it, and comparisons need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.layout import LoraLayout
from lorag.errors import GeneratorError

__all__ = ["FlatFactors"]

Adapters = Callable[[], Iterable[LoraAdapter]]  # called anew for each pass, so that a bank need not be held in memory


@dataclass(frozen=True)
class FlatFactors:
    """Codes are raw factors, scaled so that ΔW = B·A, padded to one rank, flattened and standardised module by module.

    Attributes:
        layout: The adapters' layout.
        rank: Rank to which all are padded.
        mean: Mean of each value (c,).
        scale: Standard deviation, one value a factor, spread over it (c,).
    """

    layout: LoraLayout
    rank: int
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, adapters: Adapters, layout: LoraLayout) -> FlatFactors:
        """Finds rank and normaliser from experts."""
        rank = max((adapter.rank for adapter in adapters()), default=0)
        if rank == 0:
            raise GeneratorError("a weight space needs at least one expert", got="an empty bank")
        bare = cls(layout, rank, torch.zeros(layout.values(rank)), torch.ones(layout.values(rank)))
        codes = torch.stack([bare.encode(adapter) for adapter in adapters()])
        mean = codes.mean(0)
        deviation = (codes - mean).square().mean(0)
        scale = torch.ones_like(mean)
        for start, end in bare._bounds():
            spread = deviation[start:end].mean().sqrt()
            scale[start:end] = spread if spread > 1e-8 else 1.0
        return cls(layout, rank, mean, scale)

    def _bounds(self) -> list[tuple[int, int]]:
        bounds, start = [], 0
        for module in self.layout.modules:
            for size in (module.in_features, module.out_features):
                bounds.append((start, start + self.rank * size))
                start += self.rank * size
        return bounds

    @property
    def size(self) -> int:
        """Length c of a code: the number of values of a rank-r adapter."""
        return self.mean.numel()

    @property
    def zero(self) -> Tensor:
        """Code (c,) of the adapter that changes nothing."""
        return -self.mean / self.scale

    @property
    def parts(self) -> list[int]:
        """Length of each module's part of a code."""
        return [self.rank * (module.in_features + module.out_features) for module in self.layout.modules]

    def encode(self, adapter: LoraAdapter) -> Tensor:
        """Code (c,) of an adapter."""
        if adapter.rank > self.rank:
            raise GeneratorError("an adapter's rank exceeds the weight space's", got=adapter.rank, expected=f"at most {self.rank}")
        padded = adapter.factors.padded(self.rank)
        values = torch.cat([factor.flatten() for name in self.layout.names for factor in padded[name]])
        return (values - self.mean) / self.scale

    def differentiable(self, codes: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors A (b, r, i) and B (b, o, r) of codes (b, c)."""
        values = codes * self.scale + self.mean
        parts = iter(values[:, start:end] for start, end in self._bounds())
        return {
            module.name: (
                rearrange(next(parts), "b (r i) -> b r i", r=self.rank),
                rearrange(next(parts), "b (o r) -> b o r", r=self.rank),
            )
            for module in self.layout.modules
        }

    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Factors of each code; `rank` must be the space's own."""
        if rank != self.rank:
            raise GeneratorError("flat factors have a fixed rank", got=rank, expected=self.rank)
        stacked = self.differentiable(codes.detach())
        return [Factors({name: (a[i], b[i]) for name, (a, b) in stacked.items()}) for i in range(len(codes))]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FlatFactors:
        """The same space on a device; it has no bases, and its normaliser stays in fp32 whatever the dtype."""
        return FlatFactors(self.layout, self.rank, self.mean.to(device), self.scale.to(device))

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which the space can be built again."""
        return {"mean": self.mean, "scale": self.scale}, {
            "kind": "flat_factors",
            "layout": self.layout.to_dict(),
            "rank": self.rank,
        }
