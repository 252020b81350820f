"""An adapter's folder before its weights are read: what its config and header state, and which modules it changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorag.adapters.checks import CONFIG, WEIGHTS
from lorag.adapters.portability import Facts
from lorag.adapters.tensor_names import PREFIX, read_names
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.errors import AdapterError, ArtifactError
from lorag.files.artifacts import decode_text, finish_replacing, read_bounded, read_json, require_plain
from lorag.files.tensors import TensorSpec, read_header

__all__ = ["CHAT_FILES", "own_chat_template", "own_layout", "read_facts"]

CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json")  # where trainers leave the chat template that they used
_MAX_CONFIG, _MAX_CHAT = 2**20, 16 * 2**20  # a tokenizer's config lists its added tokens
# With one of these, the names in target_modules match more modules than the adapter changes.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def read_facts(folder: Path, *, values: bool = True) -> Facts:
    """Reads config and header of an adapter folder.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        values: Whether to look for NaN and infinite values too, one tensor at a time.

    Raises:
        AdapterError: If one of the files is missing.
        ArtifactError: If one cannot be read.
    """
    finish_replacing(folder, CONFIG)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is not a PEFT adapter", got=f"no {CONFIG}", remedy="Give the folder that PEFT wrote.")
    config = read_json(folder / CONFIG, _MAX_CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder} has no {WEIGHTS}", remedy="Save it with PEFT as safetensors; other weight files are never read.")
    require_plain(folder / WEIGHTS)
    spec, _ = read_header(folder / WEIGHTS)
    return Facts(config, spec, _first_broken(folder / WEIGHTS, spec) if values else None, _is_wrapper(config))


def _is_wrapper(config: Mapping[str, Any]) -> bool | None:
    """Whether the base model wraps a language model, if it is a folder here whose config says it."""
    name = config.get("base_model_name_or_path")
    path = Path(name, "config.json") if isinstance(name, str) and name and not name.startswith(("\\\\", "//")) else None
    try:
        own = read_json(path, _MAX_CONFIG) if path is not None and path.is_file() else None
    except (ArtifactError, OSError, ValueError):  # of a base model that others judge
        return None
    return None if own is None else any(key in own for key in ("vision_config", "audio_config"))


def _first_broken(path: Path, spec: TensorSpec) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(spec):
                value = file.get_tensor(name)
                if value.is_floating_point() and not torch.isfinite(value).all():
                    return name
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file", got=str(error)[:120]) from error
    return None


def own_chat_template(folder: Path) -> str | None:
    """The chat template that lies beside an adapter, with which it was trained; None if there is none.

    Raises:
        ArtifactError: If one of the files is a link, too large, not UTF-8 or not strict JSON.
    """
    written, config = (folder / name for name in CHAT_FILES)
    if written.is_file():
        return decode_text(read_bounded(written, _MAX_CONFIG), written)
    stated = read_json(config, _MAX_CHAT).get("chat_template") if config.is_file() else None
    return stated if isinstance(stated, str) and stated.strip() else None


def own_layout(config: Mapping[str, Any], spec: TensorSpec, folder: Path, *, repair: bool = False) -> LoraLayout:
    """The layout that an adapter's own tensors imply, for when no base model is at hand to ask.

    Modules come in the order of their names, numbers by value; that is the base model's order of layers, but inside a
    layer it may not be. Whether the base model has these modules, and no further ones that the targets name, is checked
    when the adapter is applied.

    Raises:
        AdapterError: If there is no pair of factors, or a factor is not a matrix.
    """
    names = read_names(spec, folder / WEIGHTS, repair=repair)
    modules = []
    for name in sorted(names.modules, key=_natural):
        a, b = (spec[key][1] for key in names.modules[name])
        if any(len(shape) != 2 or min(shape) < 1 for shape in (a, b)):
            what = f"{folder / WEIGHTS}: the factors of {name[:80]} cannot be used"
            raise AdapterError(what, got={"A": a, "B": b}, expected="A (r, i) and B (o, r)")
        modules.append(ModuleShape(name, a[1], b[0]))
    if not modules:
        got = f"{len(spec)} tensors such as {min(spec)[:80]}" if spec else "no tensor"
        raise AdapterError(f"{folder / WEIGHTS} holds no LoRA factors", got=got, expected=f"{PREFIX}…lora_A.weight")
    return LoraLayout(_targets(config, modules), tuple(modules), bool(config.get("fan_in_fan_out")))


def _targets(config: Mapping[str, Any], modules: list[ModuleShape]) -> tuple[str, ...]:
    """The config's target names, if they name just these modules as far as can be told; else the modules' full paths."""
    named = config.get("target_modules")
    full = tuple(sorted(module.name for module in modules))
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named) or any(config.get(key) for key in _NARROWING):
        return full
    used = {name for name in named for module in modules if module.name == name or module.name.endswith(f".{name}")}
    covered = all(any(module.name == name or module.name.endswith(f".{name}") for name in named) for module in modules)
    return tuple(sorted(used)) if covered else full


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]
