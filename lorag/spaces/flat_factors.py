"""The raw factors as a weight space: published methods are defined on it, and comparisons need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from lorag.adapters.factors import Factors, Pair, pad_pair
from lorag.errors import GeneratorError
from lorag.spaces.weight_space import AdapterStream, FactorStream, SpaceInputs, WeightSpace, no_experts

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.layout import LoraLayout

__all__ = ["FlatFactors"]


@dataclass(frozen=True)
class FlatFactors(WeightSpace):
    """Codes are raw factors with ΔW = B·A, padded to one rank, flattened and standardised.

    Attributes:
        layout: The adapters' layout.
        rank: Rank to which all are padded.
        mean: Mean of each value (c,).
        scale: Standard deviation, one value a factor, spread over it (c,).
    """

    kind = "flat_factors"
    degree = 0.5  # a factor on a code goes to both A and B

    layout: LoraLayout
    rank: int
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, adapters: Callable[[], Iterable[LoraAdapter]], layout: LoraLayout) -> FlatFactors:
        """Finds rank and normaliser from experts; `adapters` is called anew for each pass."""
        return cls.from_inputs(SpaceInputs(layout, AdapterStream(adapters)))

    @classmethod
    def from_inputs(cls, inputs: SpaceInputs) -> FlatFactors:
        """Finds rank and normaliser from experts, module by module."""
        layout = inputs.layout
        rank = max((a.shape[1] for a, _ in inputs.experts.factors(layout.names[0])), default=0)
        if rank == 0:
            raise no_experts(cls.kind)
        means, scales = [], []
        for module in layout.names:
            for values in _padded(inputs.experts, module, rank):
                mean = values.mean(0)
                spread = (values - mean).square().mean().sqrt()
                means.append(mean)
                scales.append((spread if spread > 1e-8 else torch.ones_like(spread)).expand_as(mean))
        return cls(layout, rank, torch.cat(means).float(), torch.cat(scales).float())

    @property
    def parts(self) -> list[int]:
        """Length of each module's part of a code."""
        return [self.rank * (module.in_features + module.out_features) for module in self.layout.modules]

    def best_rank(self, wanted: int) -> int:
        """The space's own."""
        return self.rank

    def encode(self, factors: Factors) -> Tensor:
        """Code (c,) of an adapter's factors."""
        if factors.rank > self.rank:
            raise GeneratorError("an adapter's rank exceeds the weight space's", got=factors.rank, expected=f"at most {self.rank}")
        padded = factors.padded(self.rank)
        values = torch.cat([factor.flatten() for name in self.layout.names for factor in padded[name]])
        return (values - self.mean) / self.scale

    def differentiable(self, codes: Tensor) -> dict[str, Pair]:
        """Factors A (b, r, i) and B (b, o, r) of codes (b, c)."""
        values = codes * self.scale + self.mean
        sizes = [self.rank * size for module in self.layout.modules for size in (module.in_features, module.out_features)]
        parts = iter(values.split(sizes, 1))
        return {
            module.name: (
                rearrange(next(parts), "b (r i) -> b r i", r=self.rank),
                rearrange(next(parts), "b (o r) -> b o r", r=self.rank),
            )
            for module in self.layout.modules
        }

    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Factors of each code; `rank` must be the space's own."""
        self.check_codes(codes)
        if rank != self.rank:
            raise GeneratorError("flat factors have a fixed rank", got=rank, expected=self.rank)
        stacked = self.differentiable(codes.detach())
        return [Factors({name: (a[i], b[i]) for name, (a, b) in stacked.items()}) for i in range(len(codes))]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FlatFactors:
        """The same space on a device; it has no bases, and its normaliser stays in fp32 whatever the dtype."""
        return FlatFactors(self.layout, self.rank, self.mean.to(device), self.scale.to(device))

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Normaliser, and rank."""
        return {"mean": self.mean, "scale": self.scale}, {"rank": self.rank}

    @classmethod
    def restored(cls, layout: LoraLayout, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> FlatFactors:
        """Puts back what `stored` gave."""
        return cls(layout, int(values["rank"]), tensors["mean"].float(), tensors["scale"].float())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Both normalisers are as long as a code."""
        return dict.fromkeys(("mean", "scale"), (self.layout.values(self.rank),))


def _padded(experts: FactorStream, module: str, rank: int) -> Iterator[Tensor]:
    """Values (n, r·i), then (n, o·r), of one module's factors, padded to one rank, in fp64."""
    stacks = [pad_pair(stack, rank) for stack in experts.factors(module)]
    for side in (0, 1):
        yield torch.cat([stack[side].double().flatten(1) for stack in stacks])
