"""An adapter merged into its base model's weights, for programs that take no adapters."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.adapters.checks import PROVENANCE
from lorag.adapters.export import LARGEST_BESIDE, TOKENIZER, open_adapter
from lorag.adapters.provenance import base_fields, licence_of, versions
from lorag.adapters.publishing import merged_card, write_card
from lorag.base.base_model import DTYPES, stored_config
from lorag.base.precision import cast_files, require_plain_weights, stored_types
from lorag.errors import AdapterError, BaseModelError, MissingDependencyError
from lorag.files.artifacts import require_plain, write_json
from lorag.files.atomic import require_empty, write_folder
from lorag.progress import quiet_loading

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.base_model import BaseModel

__all__ = ["export_merged", "merge_into"]

logger = logging.getLogger(__name__)

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_merged(
    path: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    kind: str | None = None,
    strength: float = 1.0,
    dtype: str = "auto",
    convert: bool = False,
) -> LoraAdapter:
    """Adds an adapter's ΔW to its base model's weights and writes the model, its tokenizer and where they came from.

    Args:
        path: Adapter folder or file in any format, or hub id.
        out: A new folder.
        base_model: The base model, if not the one that the adapter names.
        kind: Its kind, such as "causal_lm"; by default what the adapter and the base model's config say.
        strength: Factor on ΔW.
        dtype: Precision of the written weights; "auto" is the base model's own, tensor by tensor. Sums are taken in fp32 and
            rounded once.
        convert: Also take DoRA and adapters of PEFT's other methods, whose ΔW is kept whole.

    Raises:
        AdapterError: If a sum is not finite; nothing is written then.
        BaseModelError: If the base model cannot be had, is another one, is quantised, or holds a weight in several places.
        StorageError: If `out` is not empty, or writing fails.
    """
    adapter, source, _ = open_adapter(path, base_model, kind, strength, 1.0 if convert else None)
    if dtype not in DTYPES:
        raise BaseModelError("dtype is unknown", got=repr(dtype), expected=" or ".join(DTYPES))
    require_empty(Path(out))
    base = adapter.stated_base(base_model, kind)
    require_plain_weights(base)
    identity = base.identity()
    _check_identity(adapter, base, identity)
    types = stored_types(base) if dtype == "auto" else {}
    floats = {name for name in types.values() if name in _FLOATS}
    loaded = dtype if dtype != "auto" else _FLOATS[floats.pop()] if len(floats) == 1 else "float32" if floats else _config_dtype(base)
    model: Any = base.load("cpu", loaded)
    adapter = adapter.fitted(model)
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
        if len(floats) > 1:
            cast_files(folder, types)
        _write_tokenizer(base, source, folder, model.get_input_embeddings().weight.shape[0])
        write_json(folder / PROVENANCE, info)
        write_card(folder, merged_card(info, base_model=base.name))

    write_folder(Path(out), write)
    return adapter


def _write_tokenizer(base: BaseModel, source: Path, folder: Path, vocabulary: int) -> None:
    """Writes the base model's tokenizer or processor, and over it the adapter's own, with the chat template it was trained with."""
    try:
        base.tokenizer().save_pretrained(folder)
    except (BaseModelError, MissingDependencyError) as error:
        logger.warning("the base model has no tokenizer that could be written beside the weights: %s", error)
    if not any((source / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")):
        return
    if (source / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        require_plain(source / "tokenizer.json", LARGEST_BESIDE)
        try:
            size = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            logger.warning("the adapter's tokenizer.json cannot be read, so that the base model's stands: %s", str(error)[:160])
            return
        if size > vocabulary:
            logger.warning("the adapter's tokenizer has %d tokens, the base model %d: the base model's was written", size, vocabulary)
            return
    for name in TOKENIZER:
        if (source / name).is_file():
            require_plain(source / name, LARGEST_BESIDE)
            shutil.copyfile(source / name, folder / name)


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
        if not torch.isfinite(_sum(model, weight, adapter, name)).all():
            raise AdapterError(
                f"the merged weight of {name} is not finite in {str(weight.dtype).removeprefix('torch.')}",
                remedy="Merge with --dtype float32, or with a smaller --strength; an adapter this large is probably broken.",
            )
    for name, weight in weights.items():
        weight.copy_(_sum(model, weight, adapter, name))


def _sum(model: nn.Module, weight: Tensor, adapter: LoraAdapter, module: str) -> Tensor:
    """W + ΔW, added in fp32 and rounded once; the layer's own class says which way round it stores W."""
    from transformers.pytorch_utils import Conv1D

    delta = adapter.delta(module)
    transposed = isinstance(model.get_submodule(module), Conv1D)
    return (weight.float() + (delta.T if transposed else delta).to(weight.device)).to(weight.dtype)


def _check_identity(adapter: LoraAdapter, base: BaseModel, now: str) -> None:
    """The digest of the weights that the adapter was made for, if one is known, must be that of the weights at hand."""
    stated = adapter.info.get("base_model")
    then = stated.get("identity") if isinstance(stated, dict) else None
    local = not now.startswith("revision:")
    if local and isinstance(then, str) and then.startswith(("sha256:", "tensors:")) and not base.has_identity(then):
        raise BaseModelError(
            f"{base.name} is not the base model that the adapter was made for", got=now, expected=then[:40], remedy="Give the right one."
        )


def _config_dtype(base: BaseModel) -> str:
    """The precision of a base model as its config has it; fp32 if that says nothing."""
    name = str(getattr(stored_config(base.name, base.revision), "dtype", None)).removeprefix("torch.")
    return name if name in DTYPES and name != "auto" else "float32"
