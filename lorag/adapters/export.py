"""Export: an adapter in the portable profile, or merged into its base model's weights, for programs that take no adapters."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import PROVENANCE
from lorag.adapters.model_card import merged_card, write_card
from lorag.adapters.provenance import base_fields, licence_of, versions
from lorag.base.base_model import DTYPES, TASK_TYPES, BaseModel, kind_of, stored_config
from lorag.errors import AdapterError, BaseModelError, StorageError
from lorag.files.artifacts import write_json
from lorag.files.atomic import writing
from lorag.progress import quiet_loading

__all__ = ["export_merged", "export_portable", "merge_into"]

logger = logging.getLogger(__name__)


def export_portable(path: str | Path, out: str | Path) -> LoraAdapter:
    """Writes an adapter anew with one rank and one lora_alpha; ΔW stays the same.

    rsLoRA, rank_pattern and alpha_pattern are folded into the factors, which programs other than PEFT need.

    Args:
        path: Adapter folder or hub id.
        out: A new folder.

    Raises:
        AdapterError: If it is not a plain, whole and finite LoRA.
        StorageError: If `out` is not empty, or writing fails.
    """
    adapter = LoraAdapter.from_pretrained(path)
    _into_new_folder(Path(out), lambda folder: _save(adapter, folder))
    return adapter


def _save(adapter: LoraAdapter, folder: Path) -> None:
    adapter.save_pretrained(folder)


def export_merged(
    path: str | Path, out: str | Path, *, base_model: str | None = None, strength: float = 1.0, dtype: str = "auto"
) -> LoraAdapter:
    """Adds an adapter's ΔW to its base model's weights and writes the model, its tokenizer and where they came from.

    Args:
        path: Adapter folder or hub id.
        out: A new folder.
        base_model: The base model, if not the one that the adapter names.
        strength: Factor on ΔW.
        dtype: Precision of the written weights; "auto" is the base model's own. Sums are taken in fp32 and rounded once.

    Raises:
        AdapterError: If a sum is not finite; nothing is written then.
        BaseModelError: If the base model cannot be had, is another one, or holds a weight in several places.
        StorageError: If `out` is not empty, or writing fails.
    """
    adapter = LoraAdapter.from_pretrained(path).scaled(strength)
    base = _base_of(adapter, base_model)
    if dtype not in DTYPES:
        raise BaseModelError("dtype is unknown", got=repr(dtype), expected=" or ".join(DTYPES))
    _require_empty(Path(out))
    identity = base.identity()
    _check_identity(adapter, base, identity)
    model: Any = base.load("cpu", _stored_dtype(base) if dtype == "auto" else dtype)
    adapter.check_base(model)
    merge_into(model, adapter)
    info = {key: value for key, value in adapter.info.items() if key not in ("kind", "lorag")}
    info |= {
        "kind": "merged",
        "base_model": base_fields(base, identity, adapter.layout),
        "merged_strength": strength,
        "license": licence_of(adapter.info).name,
        "versions": versions(),
    }

    def write(folder: Path) -> None:
        with quiet_loading():
            model.save_pretrained(folder)
        try:
            base.tokenizer().save_pretrained(folder)
        except BaseModelError as error:
            logger.warning("the base model has no tokenizer that could be written beside the weights: %s", error)
        write_json(folder / PROVENANCE, info)
        write_card(folder, merged_card(info, base_model=base.name))

    _into_new_folder(Path(out), write)
    return adapter


@torch.no_grad()
def merge_into(model: nn.Module, adapter: LoraAdapter) -> None:
    """Adds ΔW (o, i) to the weights of a bare base model, in place.

    All sums are checked before the first weight is changed, so that a refused model is as it was.

    Raises:
        AdapterError: If a sum is NaN, infinite, or overflows the weight's precision.
        BaseModelError: If a weight is quantised, or is used in another place too.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    weights: dict[str, nn.Parameter] = {}
    for module in adapter.layout.modules:
        weight: Any = model.get_submodule(module.name).weight
        if not weight.is_floating_point():
            raise BaseModelError(
                f"the weight of {module.name} is quantised", got=weight.dtype, remedy="Merge into the base model that it was made from."
            )
        also = [name for name in places.get(id(weight), []) if name != f"{module.name}.weight"]
        if also:
            raise BaseModelError(
                f"the weight of {module.name} is that of {also[0]} too",
                remedy="Use the adapter unmerged: merging would change both places.",
            )
        weights[module.name] = weight
    for name, weight in weights.items():
        if not torch.isfinite(_sum(weight, adapter, name)).all():
            raise AdapterError(
                f"the merged weight of {name} is not finite in {str(weight.dtype).removeprefix('torch.')}",
                remedy="Merge with --dtype float32, or with a smaller --strength; an adapter this large is probably broken.",
            )
    for name, weight in weights.items():
        weight.copy_(_sum(weight, adapter, name))


def _sum(weight: Tensor, adapter: LoraAdapter, module: str) -> Tensor:
    delta = adapter.delta(module)
    return (weight.float() + (delta.T if adapter.layout.fan_in_fan_out else delta).to(weight.device)).to(weight.dtype)


def _base_of(adapter: LoraAdapter, name: str | None) -> BaseModel:
    stated = adapter.info.get("base_model")
    known = stated if isinstance(stated, dict) else {}
    named = name if name is not None else adapter.base_model
    if named is None:
        raise BaseModelError("the adapter names no base model", remedy="Give it with --base-model.")
    revision = known.get("revision") if name is None else None
    kind = known.get("kind")
    return BaseModel(named, kind if kind in TASK_TYPES else kind_of(named, revision, adapter.task_type), revision)


def _check_identity(adapter: LoraAdapter, base: BaseModel, now: str) -> None:
    """The digest of the weights that the adapter was made for, if one is known, must be that of the weights at hand."""
    stated = adapter.info.get("base_model")
    then = stated.get("identity") if isinstance(stated, dict) else None
    local = not now.startswith("revision:")
    if local and isinstance(then, str) and then.startswith(("sha256:", "tensors:")) and not base.has_identity(then):
        raise BaseModelError(
            f"{base.name} is not the base model that the adapter was made for", got=now, expected=then[:40], remedy="Give the right one."
        )


def _stored_dtype(base: BaseModel) -> str:
    """The precision in which a base model is stored, as its config has it; fp32 if that says nothing."""
    name = str(getattr(stored_config(base.name, base.revision), "dtype", None)).removeprefix("torch.")
    return name if name in DTYPES and name != "auto" else "float32"


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} is there already and not empty", remedy="Choose a new folder.")


def _into_new_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a sibling and renames it, so that `out` is whole or absent."""
    _require_empty(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name[:40]}.", suffix=".tmp"))
        try:
            write(staging)
            for file in staging.iterdir():
                file.chmod(0o644)
            staging.chmod(0o755)
            if out.is_dir():
                out.rmdir()
            os.replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
