"""The precision in which each tensor of a base model is stored, and a copy of the model written in just those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lorag.base.base_model import BaseModel, stored_config
from lorag.base.names import locate
from lorag.base.weights import weight_files
from lorag.errors import AdapterError, BaseModelError

__all__ = ["cast_files", "require_plain_weights", "stored_types"]

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def require_plain_weights(base: BaseModel) -> None:
    """Checks that a base model is stored in plain floating point, to which a ΔW can be added.

    Raises:
        BaseModelError: If its config or its files say that it is quantised.
    """
    remedy = "Merge into the model that it was quantised from: --base-model HUB_ID_OR_FOLDER."
    settings = getattr(stored_config(base.name, base.revision), "quantization_config", None)
    if settings:
        values = settings if isinstance(settings, Mapping) else settings.to_dict()
        method = str(values.get("quant_method", "unknown"))[:40]
        raise BaseModelError(f"base model {base.name!r} is quantised", got=method, expected="weights in 16 or 32 bits", remedy=remedy)
    types = stored_types(base)
    small = next((name for name, kind in sorted(types.items()) if kind.startswith(("F8", "F4", "F6"))), None)
    if small is not None:
        what = f"base model {base.name!r} is stored in {types[small].partition('_')[0][1:]}-bit floats"
        raise BaseModelError(what, got=f"{small[:100]} in {types[small]}", expected="weights in 16 or 32 bits", remedy=remedy)


def stored_types(base: BaseModel) -> dict[str, str]:
    """The type of each tensor in a base model's safetensors files, as these name it: F32, BF16; nothing where no file is at hand."""
    from safetensors import SafetensorError, safe_open

    types: dict[str, str] = {}
    for path in _files(base):
        try:
            with safe_open(path, framework="pt") as file:
                types |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - its only listing
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"{path} cannot be read", got=str(error)[:120]) from error
    return types


def _files(base: BaseModel) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    folder = Path(locate(base.name))
    if not folder.is_dir():
        for name in ("model.safetensors.index.json", "model.safetensors", "config.json"):
            cached = try_to_load_from_cache(base.name, name, revision=base.revision or "main")
            if isinstance(cached, str):
                folder = Path(cached).parent
                break
    return weight_files(folder) if folder.is_dir() else []


def cast_files(folder: Path, types: Mapping[str, str]) -> None:
    """Rewrites a model's safetensors files so that each tensor has the type that is named for it.

    Args:
        folder: Where the model was just saved.
        types: Type by tensor, as `stored_types` gives them; tensors without one stay as they are.

    Raises:
        AdapterError: If a value does not fit its type.
    """
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        cast = {name: value.to(_FLOATS.get(types.get(name, ""), value.dtype)) for name, value in tensors.items()}
        broken = next((name for name, value in cast.items() if value.is_floating_point() and not torch.isfinite(value).all()), None)
        if broken is not None:
            what = f"the merged weight {broken} is not finite in {types.get(broken)}"
            raise AdapterError(what, remedy="Merge with --dtype float32, or with a smaller --strength.")
        if any(cast[name].dtype != value.dtype for name, value in tensors.items()):
            save_file(cast, path, metadata={"format": "pt"})
