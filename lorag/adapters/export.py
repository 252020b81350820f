"""Export: an adapter in the portable profile, in another format, or merged into its base model's weights."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag import __version__
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import PROVENANCE
from lorag.adapters.factors import MAX_RANK
from lorag.adapters.formats import FORMATS, Base, peft_folder
from lorag.adapters.provenance import base_fields, licence_of, versions
from lorag.adapters.publishing import merged_card, write_card
from lorag.adapters.purpose import find_purpose, stated_licence
from lorag.adapters.tensor_names import KEY, PREFIX
from lorag.base.base_model import DTYPES, BaseModel, is_trusted, kind_of, stored_config
from lorag.base.precision import cast_files, require_plain_weights, stored_types
from lorag.errors import AdapterError, BaseModelError, ConfigError, MissingDependencyError, StorageError, UndescribedError
from lorag.files.artifacts import require_plain, write_json
from lorag.files.atomic import write_atomically, writing
from lorag.progress import quiet_loading

if TYPE_CHECKING:
    from lorag.adapters.formats.format import PeftForm

__all__ = ["Exported", "export_as", "export_merged", "export_portable", "merge_into"]

logger = logging.getLogger(__name__)

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


# What trainers write beside an adapter and others need to use it: the tokenizer with its chat template, and the licence's text.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
_BESIDE = (*_TOKENIZER, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "description.txt")
_LARGEST_BESIDE = 2**28


def export_portable(
    path: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    kind: str | None = None,
    strength: float = 1.0,
    rank: int | None = None,
    keep: float | None = None,
) -> Exported:
    """Writes an adapter anew as a PEFT folder with one rank and one lora_alpha; ΔW stays the same, unless a rank is asked for.

    rsLoRA, rank_pattern and alpha_pattern are folded into the factors, which programs other than PEFT need, and names of a
    model that was still wrapped are put right. Its tokenizer, chat template, licence and description go along.

    Args:
        path: Adapter folder or file in any format, or hub id.
        out: A new folder.
        base_model: The base model, where the adapter does not say enough of it, or nothing.
        kind: The base model's kind.
        strength: Factor on ΔW.
        rank: Rank of the nearest ΔW that is written.
        keep: Share of ‖ΔW‖² that it must keep, instead of a rank.

    Raises:
        AdapterError: If it is not a plain, whole and finite LoRA.
        ConfigError: If rank or keep cannot be used.
        StorageError: If `out` is not empty, or writing fails.
    """
    adapter, source, _ = _opened(path, base_model, kind, strength)
    done = _truncated(adapter, rank, keep)

    def write(folder: Path) -> None:
        done.adapter.save_pretrained(folder)
        _copy_beside(source, folder)

    _into_new_folder(Path(out), write)
    return done


def export_as(
    path: str | Path,
    out: str | Path,
    name: str,
    *,
    base_model: str | None = None,
    kind: str | None = None,
    strength: float = 1.0,
    rank: int | None = None,
    keep: float | None = None,
) -> Exported:
    """Writes an adapter in another format than PEFT's, reads it back, and compares before it is moved into place.

    Args:
        path: Adapter folder or file in any format, or hub id.
        out: A new file or folder, whichever the format is.
        name: The format, one of FORMATS that are written.
        base_model: The base model, where the adapter does not say enough of it, or nothing.
        kind: The base model's kind.
        strength: Factor on ΔW.
        rank: Rank of the nearest ΔW that is written.
        keep: Share of ‖ΔW‖² that it must keep, instead of a rank.

    Raises:
        AdapterError: If it is not a plain, whole and finite LoRA, or the format cannot hold it.
        BaseModelError: If the base model's architecture is not known to the format, or nothing says what it is.
        ConfigError: If format, rank or keep cannot be used.
        MissingDependencyError: If the format needs a package that is not installed.
        StorageError: If `out` is there already, or writing fails.
    """
    known = FORMATS.get(name)
    if known is None or known.writes is None:
        written = ", ".join(one.name for one in FORMATS.values() if one.writes)
        raise ConfigError("format of adapters cannot be written", got=repr(name)[:40], expected=written)
    adapter, source, base = _opened(path, base_model, kind, strength)
    adapter.factors.check_values()
    done = _truncated(adapter, rank, keep)
    place = Path(out)

    def write(into: Path) -> None:
        known.write(done.adapter, into, Base(base))
        file = into if known.writes == "file" else known.weights(into)[0]
        _compare(done.adapter, known.read(file, Base(base)), known.title)
        if known.writes == "folder":
            write_json(into / PROVENANCE, {"kind": "adapter", "lorag": __version__, **done.adapter.info})
            _copy_beside(source, into)

    if known.writes == "folder":
        _into_new_folder(place, write)
        return done
    if place.exists() and not place.is_file() or place.is_file() and place.stat().st_size:
        raise StorageError(f"{place} is there already", remedy="Choose a new file.")
    write_atomically(place, write)
    return done


@dataclass(frozen=True)
class Exported:
    """An adapter as it was written.

    Attributes:
        adapter: With the ΔW that was written.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ of what a smaller rank lost; 0 where none was asked for.
    """

    adapter: LoraAdapter
    error: float = 0.0


def _opened(path: str | Path, base_model: str | None, kind: str | None, strength: float) -> tuple[LoraAdapter, Path, BaseModel | None]:
    """The adapter with what its folder says, times the strength; its folder in PEFT's format; the base model that was named."""
    base = None
    if base_model is not None:
        base = BaseModel(base_model, kind or kind_of(base_model), None, is_trusted(base_model))
    source = peft_folder(path, Base(base), more=_BESIDE)
    adapter = _with_purpose(LoraAdapter.from_pretrained(source, repair=True), source)
    if adapter.base_model is None and base is not None:
        adapter = replace(adapter, base_model=base.name)
    return adapter.scaled(strength), source, base


def _truncated(adapter: LoraAdapter, rank: int | None, keep: float | None) -> Exported:
    """The adapter in a rank, or in the smallest one that keeps a share of ‖ΔW‖²."""
    if rank is None and keep is None:
        return Exported(adapter)
    if rank is not None and keep is not None:
        raise ConfigError("rank and keep exclude each other", got=f"rank {rank}, keep {keep}", remedy="Give one of them.")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError("keep cannot be used", got=keep, expected="a share of ‖ΔW‖², above 0 and at most 1")
    wanted = adapter.factors.rank_for(keep) if keep is not None else int(rank or 0)
    if not 1 <= wanted <= MAX_RANK:
        raise ConfigError("rank cannot be used", got=wanted, expected=f"1 to {MAX_RANK}")
    factors, kept = adapter.factors.truncated(wanted)
    return Exported(replace(adapter, factors=factors), math.sqrt(max(0.0, 1 - kept)))


def _compare(adapter: LoraAdapter, form: PeftForm, title: str) -> None:
    """Raises AdapterError unless what was read back is what was written, value by value."""
    patterns = form.config["rank_pattern"] or form.config["alpha_pattern"]
    alpha = form.config["lora_alpha"]
    written = {
        KEY.format(module=_plain(name), factor=factor): tensor
        for name, pair in adapter.factors.tensors.items()
        for factor, tensor in zip("AB", pair, strict=True)
    }
    read = {key.replace(PREFIX + "model.language_model.", PREFIX + "model."): value for key, value in form.tensors.items()}
    same = not patterns and math.isclose(alpha, adapter.alpha, rel_tol=1e-6) and written.keys() == read.keys()
    if not same or any(not torch.equal(value.float(), read[key].float()) for key, value in written.items()):
        raise AdapterError(f"the adapter written as {title} is not read back as it was", got=f"{len(read)} tensors, alpha {alpha}")


def _plain(module: str) -> str:
    return module.replace("model.language_model.", "model.", 1) if module.startswith("model.language_model.") else module


def _with_purpose(adapter: LoraAdapter, folder: Path) -> LoraAdapter:
    """The adapter with what its folder says of its task and licence, where its lorag.json does not."""
    try:
        purpose = find_purpose(folder, adapter.info)
        found = {"description": purpose.descriptions[0], "license": purpose.licence}
    except UndescribedError:
        found = {"license": stated_licence(folder)}
    return replace(adapter, info={**{key: value for key, value in found.items() if value}, **adapter.info})


def _copy_beside(source: Path, folder: Path) -> None:
    for name in _BESIDE:
        if (source / name).is_file():
            require_plain(source / name, _LARGEST_BESIDE)
            shutil.copyfile(source / name, folder / name)


def export_merged(
    path: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    kind: str | None = None,
    strength: float = 1.0,
    dtype: str = "auto",
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

    Raises:
        AdapterError: If a sum is not finite; nothing is written then.
        BaseModelError: If the base model cannot be had, is another one, is quantised, or holds a weight in several places.
        StorageError: If `out` is not empty, or writing fails.
    """
    adapter, source, _ = _opened(path, base_model, kind, strength)
    if dtype not in DTYPES:
        raise BaseModelError("dtype is unknown", got=repr(dtype), expected=" or ".join(DTYPES))
    _require_empty(Path(out))
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

    _into_new_folder(Path(out), write)
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

        require_plain(source / "tokenizer.json", _LARGEST_BESIDE)
        try:
            size = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            logger.warning("the adapter's tokenizer.json cannot be read, so that the base model's stands: %s", str(error)[:160])
            return
        if size > vocabulary:
            logger.warning("the adapter's tokenizer has %d tokens, the base model %d: the base model's was written", size, vocabulary)
            return
    for name in _TOKENIZER:
        if (source / name).is_file():
            require_plain(source / name, _LARGEST_BESIDE)
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
            for file in (staging, *staging.rglob("*")):
                file.chmod(0o755 if file.is_dir() else 0o644)
            if out.is_dir():
                out.rmdir()
            os.replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
