"""Codes as cores in bases that a bank shares: fitted module by module, decoded for many codes at once.

Bases of large layouts are kept in bf16 and may lie in a file that is mapped: they are read piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from lorag.adapters.factors import Factors, Pair
from lorag.adapters.spans import Span, weighted_columns
from lorag.base.row_adapters import Cores
from lorag.errors import GeneratorError
from lorag.progress import progress_bar
from lorag.spaces.weight_space import AdapterStream, FactorStream, SpaceInputs, WeightSpace, no_experts

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.layout import LoraLayout

__all__ = ["SharedSubspace"]

_LARGE = 2**23  # values of all bases beyond which they are kept in bf16
_PIECE = 2**18  # values of bases in fp32 at a time on a CPU: 1 MiB stays in its cache


@dataclass(frozen=True)
class SharedSubspace(WeightSpace):
    """Codes are standardised cores M = U_outᵀ ΔW U_in in orthonormal bases shared by all experts of a bank.

    Attributes:
        layout: The adapters' layout.
        bases_in: U_in (i, k) of each module.
        bases_out: U_out (o, k) of each module.
        mean: Mean core of the experts (m, k, k).
        scale: Standard deviation of the experts' cores, one value per module (m,).
    """

    kind = "shared_subspace"

    layout: LoraLayout
    bases_in: tuple[Tensor, ...]
    bases_out: tuple[Tensor, ...]
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, adapters: Callable[[], Iterable[LoraAdapter]], layout: LoraLayout, size: int = 32) -> SharedSubspace:
        """`fit_stream` of adapters at hand.

        Args:
            adapters: Returns an iterator over the training experts each time it is called: twice for each module.
            layout: Their layout.
            size: k, the dimensions kept on each side; less where a module is smaller.
        """
        return cls.fit_stream(AdapterStream(adapters), layout, size)

    @classmethod
    def from_inputs(cls, inputs: SpaceInputs) -> SharedSubspace:
        """`fit_stream` of a bank's experts."""
        return cls.fit_stream(inputs.experts, inputs.layout, inputs.k, quiet=inputs.quiet)

    @classmethod
    def fit_stream(
        cls, experts: FactorStream, layout: LoraLayout, size: int = 32, *, dtype: torch.dtype | None = None, quiet: bool = True
    ) -> SharedSubspace:
        """Finds bases and normaliser from experts, module by module: memory does not grow with their number.

        Args:
            experts: The training experts, read twice for each module: for its bases, then for its cores.
            layout: Their layout.
            size: k, the dimensions kept on each side; less where a module is smaller.
            dtype: Of the bases; by default fp32, and bf16 for more than 8 million values.
            quiet: No progress bar.

        Raises:
            GeneratorError: If there is no expert, or one has factors that are not numbers.
        """
        size = min([size, *(min(m.in_features, m.out_features) for m in layout.modules)])
        if dtype is None:
            dtype = torch.bfloat16 if layout.values(size) > _LARGE else torch.float32
        bases_in, bases_out, means, scales = [], [], [], []
        for module in progress_bar(layout.modules, desc="fitting the weight space", disable=quiet, leave=False):
            out_span, in_span = Span(module.out_features, size), Span(module.in_features, size)
            for rows, columns in experts.factors(module.name):
                left, right = weighted_columns(rows, columns)
                out_span.add(left)
                in_span.add(right)
            u_out, u_in = out_span.basis().to(dtype), in_span.basis().to(dtype)
            count, total, square = 0, torch.zeros(size, size, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for rows, columns in experts.factors(module.name):
                cores = (u_out.double().T @ columns.double()) @ (rows.double() @ u_in.double())
                count += len(cores)
                total += cores.sum(0)
                square += cores.square().sum()
            if count == 0:
                raise no_experts(cls.kind)
            mean = total / count
            variance = (square / count - mean.square().sum()) / size**2
            # A module that no two experts change differently, but for rounding, has nothing to standardise.
            varied = variance > 1e-10 * square / (count * size**2)
            scales.append(variance.clamp_min(0).sqrt() if varied else torch.ones_like(variance))
            means.append(mean)
            bases_in.append(u_in)
            bases_out.append(u_out)
        return cls(layout, tuple(bases_in), tuple(bases_out), torch.stack(means).float(), torch.stack(scales).float())

    @property
    def k(self) -> int:
        """Dimensions kept on each side of a module."""
        return self.mean.shape[1]

    @property
    def parts(self) -> list[int]:
        """Length of each module's part of a code."""
        return [self.k**2] * len(self.layout)

    def best_rank(self, wanted: int) -> int:
        """Any up to k."""
        return min(wanted, self.k)

    def cores(self, factors: Factors) -> Tensor:
        """Cores (m, k, k) of an adapter's factors, in fp32."""
        cores = []
        precise = torch.float64 if self.bases_in[0].dtype == torch.float32 else torch.float32  # bases in bf16 are not worth more
        for module, u_in, u_out in zip(self.layout.modules, self.bases_in, self.bases_out, strict=True):
            a, b = (factor.to(u_in.device) for factor in factors.pair(module.name, precise))
            cores.append((u_out.to(precise).T @ b) @ (a @ u_in.to(precise)))
        return torch.stack(cores).float()

    def encode(self, factors: Factors) -> Tensor:
        """Code (c,) of an adapter's factors."""
        return self.standardise(self.cores(factors))

    def standardise(self, cores: Tensor) -> Tensor:
        """Codes (..., c) of cores (..., m, k, k)."""
        return rearrange((cores - self.mean) / self.scale[:, None, None], "... m p q -> ... (m p q)")

    def restore(self, codes: Tensor) -> Tensor:
        """Cores (..., m, k, k) of codes (..., c)."""
        cores = rearrange(codes, "... (m p q) -> ... m p q", m=len(self.layout), p=self.k)
        return cores * self.scale[:, None, None] + self.mean

    def energy(self, factors: Factors) -> float:
        """Share of ‖ΔW‖² over all modules that lies in the bases, from 0 to 1."""
        whole = factors.norm() ** 2
        return min(1.0, float(self.cores(factors).double().square().sum() / whole)) if whole else 1.0

    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Best rank-r factors of each code (b, c), singular values shared evenly by A and B."""
        self.check_codes(codes)
        if not 1 <= rank <= self.k:
            raise GeneratorError("the weight space has no adapters of this rank", got=rank, expected=f"1 to {self.k}")
        # One decomposition and one product per code: a batched one may round differently with the batch, and each adapter's
        # bytes must not. What a batch shares is the reading of the bases.
        halves = []
        for code in codes.detach():
            left, values, right = torch.linalg.svd(self.restore(code))
            root = values[:, :rank].sqrt()
            halves.append((right[:, :rank] * root[:, :, None], left[:, :, :rank] * root[:, None, :]))
        factors: list[dict[int, Pair]] = [{} for _ in halves]
        for places, u_in, u_out in self._pieces():
            for pairs, (rows, columns) in zip(factors, halves, strict=True):
                both = zip(torch.bmm(rows[places], u_in.mT), torch.bmm(u_out, columns[places]), strict=True)
                pairs.update(zip(places, both, strict=True))
        return [Factors({name: pairs[place] for place, name in enumerate(self.layout.names)}) for pairs in factors]

    def _pieces(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers of g modules of one shape, with U_in (g, i, k) and U_out (g, o, k) in fp32: never all of a large space."""
        alike: dict[tuple[int, int], list[int]] = {}
        for place, module in enumerate(self.layout.modules):
            alike.setdefault((module.in_features, module.out_features), []).append(place)
        for (inner, outer), places in alike.items():
            count = max(1, _PIECE // (self.k * max(inner, outer))) if self.mean.device.type == "cpu" else len(places)
            for start in range(0, len(places), count):
                part = places[start : start + count]
                u_in, u_out = (torch.stack([bases[place] for place in part]).float() for bases in (self.bases_in, self.bases_out))
                yield part, u_in, u_out

    def differentiable(self, codes: Tensor) -> Cores:
        """The cores of codes (b, c) with the shared bases: no decomposition, so that gradients are cheap."""
        cores = self.restore(codes)
        names = self.layout.names
        return Cores(
            {name: u.to(codes.dtype) for name, u in zip(names, self.bases_in, strict=True)},
            {name: cores[:, index] for index, name in enumerate(names)},
            {name: u.to(codes.dtype) for name, u in zip(names, self.bases_out, strict=True)},
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SharedSubspace:
        """The same space on a device; with a dtype, its bases in it, so that `differentiable` need not convert them each time."""
        return SharedSubspace(
            self.layout,
            tuple(u.to(device, dtype) for u in self.bases_in),
            tuple(u.to(device, dtype) for u in self.bases_out),
            self.mean.to(device),
            self.scale.to(device),
        )

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bases, and the normaliser, from whose shape k follows."""
        tensors = {"mean": self.mean, "scale": self.scale}
        for index, (u_in, u_out) in enumerate(zip(self.bases_in, self.bases_out, strict=True)):
            tensors |= {f"bases_in.{index}": u_in, f"bases_out.{index}": u_out}
        return tensors, {}

    @classmethod
    def restored(cls, layout: LoraLayout, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> SharedSubspace:
        """Puts back what `stored` gave. Bases are not copied, so that a file that is mapped stays on the disk until it is used."""

        def bases(side: str) -> tuple[Tensor, ...]:
            loaded = [tensors[f"{side}.{index}"] for index in range(len(layout))]
            return tuple(basis if basis.dtype == torch.bfloat16 else basis.float() for basis in loaded)

        return cls(layout, bases("bases_in"), bases("bases_out"), tensors["mean"].float(), tensors["scale"].float())

    @classmethod
    def describe(cls, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """How many directions a module's sides have, and how long a code is."""
        if "mean" not in shapes:
            return cls.kind
        modules, k, _ = shapes["mean"]
        return f"{cls.kind}: {k} directions on each side of {modules} modules, codes of {modules * k * k:,} values"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Two bases of k columns a module, a mean core and one scale."""
        modules, k = self.layout.modules, self.mean.shape[-1]
        bases = {f"bases_in.{index}": (module.in_features, k) for index, module in enumerate(modules)}
        bases |= {f"bases_out.{index}": (module.out_features, k) for index, module in enumerate(modules)}
        return {"mean": (len(modules), k, k), "scale": (len(modules),), **bases}
