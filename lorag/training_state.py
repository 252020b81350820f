"""Resumable training: parameters, optimizer moments and counters in one safetensors file, never pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorag.errors import ArtifactError
from lorag.tensor_files import load_tensors, read_header, save_tensors

__all__ = ["load_training_state", "save_training_state"]

_REMEDY = "Delete it to start afresh."


def save_training_state(
    path: Path,
    module: nn.Module | Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    rng: torch.Generator,
    counters: Mapping[str, object],
) -> None:
    """Writes everything that a loop needs to go on as if it had not stopped.

    Args:
        path: The file.
        module: The module, or named tensors, being trained.
        optimizers: Their per-parameter tensors are written; their hyperparameters belong to the config.
        rng: The loop's source of randomness.
        counters: JSON values: step, best score, a fingerprint of the settings.
    """
    tensors = {f"parameter.{name}": value for name, value in _named(module).items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["rng"] = rng.get_state()
    save_tensors(path, tensors, {"counters": json.dumps(counters, sort_keys=True)})


def _named(module: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers; tied ones once, because a safetensors file holds no shared memory."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())} if isinstance(module, nn.Module) else dict(module)


def load_training_state(
    path: Path, module: nn.Module | Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], rng: torch.Generator
) -> dict[str, Any]:
    """Puts back what `save_training_state` wrote and returns the counters.

    Raises:
        ArtifactError: If the file does not fit the module and optimizers, or lacks a part; nothing is changed then.
    """
    _, metadata = read_header(path)
    tensors = load_tensors(path)
    parameters = {name.removeprefix("parameter."): value for name, value in tensors.items() if name.startswith("parameter.")}
    own = _named(module)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in parameters.items()}:
        raise ArtifactError(f"{path} belongs to another model or setting", remedy=_REMEDY)
    try:
        counters, stream = json.loads(metadata["counters"]), tensors["rng"]
        moments = [_moments(tensors, f"optimizer.{number}.", optimizer) for number, optimizer in enumerate(optimizers)]
        if not isinstance(counters, dict):
            raise TypeError(f"counters {counters!r}")
        rng.set_state(stream)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError(f"{path} holds no complete training state", got=repr(error)[:120], remedy=_REMEDY) from error
    with torch.no_grad():  # only now, so that a refused file leaves everything as it was
        for name, value in own.items():
            value.copy_(parameters[name])
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return counters


def _moments(tensors: Mapping[str, Tensor], prefix: str, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """One optimizer's state by parameter; each must be of a parameter that there is, and have its shape or be a number."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            if not 0 <= int(index) < len(shapes) or value.shape not in (shapes[int(index)], torch.Size()):
                raise ValueError(f"{name} {tuple(value.shape)}")
            found.setdefault(int(index), {})[key] = value
    keys = {frozenset(state) for state in found.values()}
    if len(keys) > 1:
        raise ValueError(f"{prefix}* differ between parameters")
    return found
