"""Weight spaces: adapters to codes and back.

ΔW = B·A does not change when B becomes B·G and A becomes G⁻¹·A, so raw factors of independently trained adapters cannot
be compared, averaged or regressed. `SharedSubspace` describes an adapter by its cores U_outᵀ ΔW U_in in bases shared by
the bank, which are free of that gauge and of rank and alpha. `FlatFactors` keeps the raw factors, as published methods do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import Factors
from lorag.base_models.layout import LoraLayout
from lorag.errors import GeneratorError
from lorag.files.artifacts import parse_json
from lorag.weights.flat_factors import Adapters, FlatFactors
from lorag.weights.shared_bases import Span, reduced

__all__ = ["Cores", "FlatFactors", "SharedSubspace", "WeightSpace", "weight_space_from_tensors"]


@dataclass(frozen=True)
class Cores:
    """ΔW of n adapters in shared bases: module -> U_in (i, k), M (n, k, k), U_out (o, k), with ΔW = U_out M U_inᵀ."""

    bases_in: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    bases_out: Mapping[str, Tensor]


class WeightSpace(Protocol):
    """Maps adapters of one layout to flat vectors and back."""

    @property
    def layout(self) -> LoraLayout:
        """Layout of the adapters."""
        ...

    @property
    def size(self) -> int:
        """Length c of a code."""
        ...

    @property
    def zero(self) -> Tensor:
        """Code (c,) of the adapter that changes nothing."""
        ...

    @property
    def parts(self) -> list[int]:
        """Length of each module's part of a code, in the layout's order."""
        ...

    def encode(self, adapter: LoraAdapter) -> Tensor:
        """Code (c,) of an adapter, in fp32."""
        ...

    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Factors for ΔW = B·A (scaling 1) of each code (b, c)."""
        ...

    def differentiable(self, codes: Tensor) -> Cores | dict[str, tuple[Tensor, Tensor]]:
        """What `RowAdapters` runs for codes (b, c); gradients reach the codes."""
        ...

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `weight_space_from_tensors` builds the space again."""
        ...


@dataclass(frozen=True)
class SharedSubspace:
    """Codes are standardised cores M = U_outᵀ ΔW U_in in orthonormal bases shared by all experts of a bank.

    Attributes:
        layout: The adapters' layout.
        bases_in: U_in (i, k) of each module.
        bases_out: U_out (o, k) of each module.
        mean: Mean core of the experts (m, k, k).
        scale: Standard deviation of the experts' cores, one value a module (m,).
    """

    layout: LoraLayout
    bases_in: tuple[Tensor, ...]
    bases_out: tuple[Tensor, ...]
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, adapters: Adapters, layout: LoraLayout, size: int = 32) -> SharedSubspace:
        """Finds bases and normaliser from experts, module by module, without holding the bank.

        Args:
            adapters: Returns an iterator over the training experts each time it is called.
            layout: Their layout.
            size: k, the dimensions kept on each side; less where a module is smaller.
        """
        size = min([size, *(min(m.in_features, m.out_features) for m in layout.modules)])
        spans = [(Span(size), Span(size)) for _ in layout.modules]
        count = 0
        for adapter in adapters():
            count += 1
            for module, (out_span, in_span) in zip(layout.modules, spans, strict=True):
                left, values, right = reduced(adapter, module.name)
                out_span.add(left * values)
                in_span.add(right * values)
        if count == 0:
            raise GeneratorError("a weight space needs at least one expert", got="an empty bank")
        bases_out = tuple(out_span.basis() for out_span, _ in spans)
        bases_in = tuple(in_span.basis() for _, in_span in spans)
        bare = cls(layout, bases_in, bases_out, torch.zeros(len(layout), size, size), torch.ones(len(layout)))
        total, square = torch.zeros(len(layout), size, size, dtype=torch.float64), torch.zeros(len(layout), dtype=torch.float64)
        for adapter in adapters():
            cores = bare.cores(adapter).double()
            total += cores
            square += cores.square().sum((1, 2))
        mean = total / count
        variance = (square / count - mean.square().sum((1, 2))) / size**2
        # A module that no two experts change differently, but for rounding, has nothing to standardise.
        varied = variance > 1e-10 * square / (count * size**2)
        scale = torch.where(varied, variance.clamp_min(0).sqrt(), torch.ones_like(variance))
        return cls(layout, bases_in, bases_out, mean.float(), scale.float())

    @property
    def k(self) -> int:
        """Dimensions kept on each side of a module."""
        return self.mean.shape[1]

    @property
    def size(self) -> int:
        """Length c = m·k² of a code."""
        return self.mean.numel()

    @property
    def zero(self) -> Tensor:
        """Code (c,) of the adapter that changes nothing."""
        return self.standardise(torch.zeros_like(self.mean))

    @property
    def parts(self) -> list[int]:
        """Length of each module's part of a code."""
        return [self.k**2] * len(self.layout)

    def cores(self, adapter: LoraAdapter) -> Tensor:
        """Cores (m, k, k) of an adapter, in fp32."""
        found = []
        for module, u_in, u_out in zip(self.layout.modules, self.bases_in, self.bases_out, strict=True):
            rows, columns = (factor.to(u_in.device).double() for factor in adapter.factors[module.name])
            found.append(adapter.scaling * (u_out.double().T @ columns) @ (rows @ u_in.double()))
        return torch.stack(found).float()

    def encode(self, adapter: LoraAdapter) -> Tensor:
        """Code (c,) of an adapter."""
        return self.standardise(self.cores(adapter))

    def standardise(self, cores: Tensor) -> Tensor:
        """Codes (..., c) of cores (..., m, k, k)."""
        return rearrange((cores - self.mean) / self.scale[:, None, None], "... m p q -> ... (m p q)")

    def restore(self, codes: Tensor) -> Tensor:
        """Cores (..., m, k, k) of codes (..., c)."""
        cores = rearrange(codes, "... (m p q) -> ... m p q", m=len(self.layout), p=self.k)
        return cores * self.scale[:, None, None] + self.mean

    def energy(self, adapter: LoraAdapter) -> float:
        """Share of ‖ΔW‖² over all modules that lies in the bases, from 0 to 1."""
        whole = sum(norm**2 for norm in adapter.norms().values())
        return min(1.0, float(self.cores(adapter).double().square().sum() / whole)) if whole else 1.0

    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Best rank-r factors of each code (b, c), singular values shared evenly by A and B."""
        if codes.dim() != 2 or codes.shape[1] != self.size:
            raise GeneratorError("codes do not fit the weight space", got=tuple(codes.shape), expected=f"(b, {self.size})")
        if not 1 <= rank <= self.k:
            raise GeneratorError("the weight space has no adapters of this rank", got=rank, expected=f"1 to {self.k}")
        # One decomposition a code: a batched one may round differently with the batch, and each adapter's bytes must not.
        factors: list[Factors] = []
        for code in codes.detach():
            left, values, right = torch.linalg.svd(self.restore(code))
            root = values[:, :rank].sqrt()
            columns, rows = left[:, :, :rank] * root[:, None, :], right[:, :rank] * root[:, :, None]
            factors.append(
                {
                    module.name: (rows[index] @ u_in.T, u_out @ columns[index])
                    for index, (module, u_in, u_out) in enumerate(zip(self.layout.modules, self.bases_in, self.bases_out, strict=True))
                }
            )
        return factors

    def differentiable(self, codes: Tensor) -> Cores:
        """The cores of codes (b, c) with the shared bases: no decomposition, so that gradients are cheap."""
        cores = self.restore(codes)
        names = self.layout.names
        return Cores(
            dict(zip(names, self.bases_in, strict=True)),
            {name: cores[:, index] for index, name in enumerate(names)},
            dict(zip(names, self.bases_out, strict=True)),
        )

    def to(self, device: torch.device | str) -> SharedSubspace:
        """The same space on a device."""
        return SharedSubspace(
            self.layout,
            tuple(u.to(device) for u in self.bases_in),
            tuple(u.to(device) for u in self.bases_out),
            self.mean.to(device),
            self.scale.to(device),
        )

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which the space can be built again."""
        tensors = {"mean": self.mean, "scale": self.scale}
        for index, (u_in, u_out) in enumerate(zip(self.bases_in, self.bases_out, strict=True)):
            tensors |= {f"bases_in.{index}": u_in, f"bases_out.{index}": u_out}
        return tensors, {"kind": "shared_subspace", "layout": self.layout.to_dict()}


def weight_space_from_tensors(tensors: Mapping[str, Tensor], values: Mapping[str, Any] | str) -> SharedSubspace | FlatFactors:
    """Builds a stored weight space again.

    Raises:
        GeneratorError: If kind, names or shapes are not those of a weight space.
    """
    space: SharedSubspace | FlatFactors
    try:
        values = parse_json(values, "a stored weight space") if isinstance(values, str) else values
        layout = LoraLayout.from_dict(values["layout"])
        if values["kind"] == "flat_factors":
            space = FlatFactors(layout, int(values["rank"]), tensors["mean"].float(), tensors["scale"].float())
            fits = space.mean.shape == space.scale.shape == (layout.values(space.rank),)
        elif values["kind"] == "shared_subspace":
            indices = range(len(layout))
            space = SharedSubspace(
                layout,
                tuple(tensors[f"bases_in.{i}"].float() for i in indices),
                tuple(tensors[f"bases_out.{i}"].float() for i in indices),
                tensors["mean"].float(),
                tensors["scale"].float(),
            )
            k = space.mean.shape[-1]
            fits = space.mean.shape == (len(layout), k, k) and space.scale.shape == (len(layout),)
            for module, u_in, u_out in zip(layout.modules, space.bases_in, space.bases_out, strict=True):
                fits = fits and u_in.shape == (module.in_features, k) and u_out.shape == (module.out_features, k)
        else:
            raise KeyError(f"kind {values['kind']!r}")
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:  # LayoutError and ArtifactError are ValueErrors
        raise GeneratorError("a stored weight space cannot be read", got=repr(error)[:120]) from error
    if not fits:
        raise GeneratorError("a stored weight space has tensors that do not fit its layout")
    if not (space.mean.isfinite().all() and space.scale.isfinite().all() and (space.scale > 0).all()):
        raise GeneratorError("a stored weight space has a mean or scale that is no number, or a scale of 0")
    return space
