"""Weight spaces: adapters to codes and back.

ΔW = B·A does not change when B becomes B·G and A becomes G⁻¹·A, so raw factors of independently trained adapters cannot
be compared, averaged or regressed. `SharedSubspace` describes an adapter by its cores U_outᵀ ΔW U_in in bases shared by
the bank, which are free of that gauge and of rank and alpha. `FlatFactors` keeps the raw factors, as published methods do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.layout import LoraLayout
from lorag.base.row_adapters import Cores
from lorag.errors import GeneratorError
from lorag.files.artifacts import parse_json
from lorag.spaces.flat_factors import FlatFactors
from lorag.spaces.shared_subspace import SharedSubspace

__all__ = ["Cores", "FlatFactors", "SharedSubspace", "WeightSpace", "weight_space_from_tensors"]


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
        """Factors of a rank for each code (b, c)."""
        ...

    def differentiable(self, codes: Tensor) -> Cores | dict[str, tuple[Tensor, Tensor]]:
        """What `RowAdapters` runs for codes (b, c); gradients reach the codes."""
        ...

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `weight_space_from_tensors` builds the space again."""
        ...


def _stored_basis(basis: Tensor) -> Tensor:
    """A basis as it is stored, in fp32 or bf16: no copy, so that a file that is mapped stays on the disk until it is used."""
    return basis if basis.dtype == torch.bfloat16 else basis.float()


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
                tuple(_stored_basis(tensors[f"bases_in.{i}"]) for i in indices),
                tuple(_stored_basis(tensors[f"bases_out.{i}"]) for i in indices),
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
