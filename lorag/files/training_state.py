"""Resumable training: parameters, optimizer moments and counters in one safetensors file, never pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorag.errors import ArtifactError
from lorag.files.artifacts import parse_json
from lorag.files.tensors import load_tensors, read_header, save_tensors

__all__ = ["load_best", "load_training_state", "save_training_state"]

_REMEDY = "Delete it to start afresh."
_ADAM, _MOMENTUM = frozenset({"step", "exp_avg", "exp_avg_sq"}), frozenset({"momentum_buffer"})
# What the next step of an optimizer reads for a parameter that it has moved before.
_STATE: dict[type[torch.optim.Optimizer], frozenset[str]] = {
    torch.optim.Adam: _ADAM,  # AdamW is a kind of Adam
    torch.optim.SGD: _MOMENTUM,
    getattr(torch.optim, "Muon", torch.optim.SGD): _MOMENTUM,  # not in older versions of torch
}


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
    path: Path,
    module: nn.Module | Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    rng: torch.Generator,
    numbers: Sequence[str] = (),
) -> dict[str, Any]:
    """Puts back what `save_training_state` wrote and returns the counters.

    Args:
        path: The file.
        module: As it was saved.
        optimizers: As they were saved: SGD with momentum, Adam, AdamW or Muon.
        rng: The loop's source of randomness.
        numbers: Counters that must be there, each a number or null.

    Raises:
        ArtifactError: If the file does not fit the module and optimizers, or lacks a part; nothing is changed then.
    """
    _, metadata = read_header(path)
    tensors = load_tensors(path)
    parameters = {name.removeprefix("parameter."): value for name, value in tensors.items() if name.startswith("parameter.")}
    named = _named(module)
    if {name: _form(value) for name, value in named.items()} != {name: _form(value) for name, value in parameters.items()}:
        raise ArtifactError(f"{path} belongs to another model or setting", remedy=_REMEDY)
    try:
        counters, stream = parse_json(metadata["counters"], path), tensors["rng"]
        moments = [_moments(tensors, f"optimizer.{number}.", optimizer) for number, optimizer in enumerate(optimizers)]
        if not isinstance(counters, dict):
            raise TypeError(f"counters {counters!r}")
        for name in numbers:
            if isinstance(counters[name], bool) or not isinstance(counters[name], int | float | None):
                raise TypeError(f"counter {name} {counters[name]!r}")
        rng.set_state(stream)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:  # ArtifactError is a ValueError
        raise ArtifactError(f"{path} holds no complete training state", got=repr(error)[:120], remedy=_REMEDY) from error
    with torch.no_grad():  # only now, so that a refused file leaves everything as it was
        for name, value in named.items():
            value.copy_(parameters[name])
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return counters


def load_best(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Reads the state of a module that `save_tensors` kept as its best.

    Raises:
        ArtifactError: If it is not the state of such a module.
    """
    tensors = load_tensors(path)
    if {name: _form(value) for name, value in module.state_dict().items()} != {name: _form(value) for name, value in tensors.items()}:
        raise ArtifactError(f"{path} belongs to another model or setting", remedy=_REMEDY)
    return tensors


def _form(value: Tensor) -> tuple[torch.Size, bool]:
    return value.shape, value.is_floating_point()


def _moments(tensors: Mapping[str, Tensor], prefix: str, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """One optimizer's state by parameter, all that its next step reads: of a parameter that there is, in its shape."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    wrapped = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds the optimizer itself
    expected = next((keys for kind, keys in _STATE.items() if isinstance(wrapped, kind)), None)
    if expected is None:
        raise TypeError(f"{type(wrapped).__name__} is not an optimizer whose state lorag knows")
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            if not 0 <= int(index) < len(shapes) or str(int(index)) != index or key not in expected:
                raise ValueError(f"{name} {tuple(value.shape)}")
            if not value.is_floating_point() or value.shape != (torch.Size() if key == "step" else shapes[int(index)]):
                raise ValueError(f"{name} {value.dtype} {tuple(value.shape)}")
            if key == "step" and not 0 <= value < 2**40:
                raise ValueError(f"{name} {value}")
            moments.setdefault(int(index), {})[key] = value
    for number, state in moments.items():
        if state.keys() != expected:
            raise ValueError(f"{prefix}{number} lacks {min(expected - state.keys())}")
    return moments
