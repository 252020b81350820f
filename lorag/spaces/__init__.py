"""Many adapters in one weight space: one file per kind, one registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorag.base.layout import LoraLayout
from lorag.errors import ConfigError, GeneratorError
from lorag.files.artifacts import parse_json
from lorag.spaces.activation_bases import ActivationBases
from lorag.spaces.flat_factors import FlatFactors
from lorag.spaces.shared_subspace import SharedSubspace
from lorag.spaces.weight_space import SpaceInputs, WeightSpace

__all__ = ["SPACES", "ActivationBases", "FlatFactors", "SharedSubspace", "SpaceInputs", "WeightSpace", "fit_space", "open_space"]

SPACES: dict[str, type[WeightSpace]] = {space.kind: space for space in (SharedSubspace, FlatFactors, ActivationBases)}


def fit_space(kind: str, inputs: SpaceInputs) -> WeightSpace:
    """Finds a weight space of a kind.

    Raises:
        ConfigError: If the kind is unknown.
        GeneratorError: If the inputs lack what it needs.
    """
    if kind not in SPACES:
        raise ConfigError("space is unknown", got=repr(kind), expected=" or ".join(SPACES))
    return SPACES[kind].from_inputs(inputs)


def open_space(tensors: Mapping[str, Tensor], values: Mapping[str, Any] | str) -> WeightSpace:
    """Builds a stored weight space again, from what its `tensors` gave.

    Raises:
        GeneratorError: If kind, names or shapes are not those of a weight space.
    """
    try:
        values = parse_json(values, "a stored weight space") if isinstance(values, str) else values
        space = SPACES[values["kind"]].restored(LoraLayout.from_dict(values["layout"]), tensors, values)
        space.check()
    except GeneratorError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:  # LayoutError and ArtifactError are ValueErrors
        raise GeneratorError("a stored weight space cannot be read", got=repr(error)[:120]) from error
    return space
