"""Export: an adapter in the portable profile, in a smaller rank, or in another format."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch

from lorag import __version__
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import PROVENANCE
from lorag.adapters.factors import MAX_RANK
from lorag.adapters.formats import FORMATS, Base, named_base, peft_folder
from lorag.adapters.purpose import find_purpose, stated_licence
from lorag.adapters.tensor_names import KEY, PREFIX
from lorag.errors import AdapterError, ConfigError, StorageError, UndescribedError
from lorag.files.artifacts import require_plain, write_json
from lorag.files.atomic import write_atomically, write_folder

if TYPE_CHECKING:
    from lorag.adapters.formats.format import PeftForm
    from lorag.base.base_model import BaseModel

__all__ = [
    "BESIDE",
    "LARGEST_BESIDE",
    "TOKENIZER",
    "ExportSettings",
    "Exported",
    "export_as",
    "export_portable",
    "open_adapter",
]

# What trainers write beside an adapter and others need to use it: the tokenizer with its chat template, and the licence's text.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
BESIDE = (*TOKENIZER, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "description.txt")
LARGEST_BESIDE = 2**28
_KEEP = 0.99  # of ‖ΔW‖², where nothing else is said


class ExportSettings(TypedDict, total=False):
    """What every export takes.

    Attributes:
        base_model: The base model, where the adapter does not say enough of it, or nothing.
        kind: The base model's kind.
        strength: Factor on ΔW.
        rank: Rank of the nearest ΔW that is written.
        keep: Share of ‖ΔW‖² that it must keep, instead of a rank.
        convert: Also take DoRA and adapters of PEFT's other methods, as the nearest LoRA; the base model's weights are read for it.
    """

    base_model: str | None
    kind: str | None
    strength: float
    rank: int | None
    keep: float | None
    convert: bool


def export_portable(path: str | Path, out: str | Path, **settings: Unpack[ExportSettings]) -> Exported:
    """Writes an adapter anew as a PEFT folder with one rank and one lora_alpha; ΔW stays the same, unless a rank is asked for.

    rsLoRA, rank_pattern and alpha_pattern are folded into the factors, which programs other than PEFT need, and names of a
    model that was still wrapped are put right. Its tokenizer, chat template, licence and description go along.

    Args:
        path: Adapter folder or file in any format, or hub id.
        out: A new folder.
        settings: Those of `ExportSettings`.

    Raises:
        AdapterError: If it is not a plain, whole and finite LoRA.
        ConfigError: If rank or keep cannot be used.
        StorageError: If `out` is not empty, or writing fails.
    """
    done, source, _ = _prepared(path, **settings)

    def write(folder: Path) -> None:
        done.adapter.save_pretrained(folder)
        _copy_beside(source, folder)

    write_folder(Path(out), write)
    return done


def export_as(path: str | Path, out: str | Path, name: str, **settings: Unpack[ExportSettings]) -> Exported:
    """Writes an adapter in another format than PEFT's, reads it back, and compares before it is moved into place.

    Args:
        path: Adapter folder or file in any format, or hub id.
        out: A new file or folder, whichever the format is.
        name: The format, one of FORMATS that are written.
        settings: Those of `ExportSettings`.

    Raises:
        AdapterError: If it is not a plain, whole and finite LoRA, or the format cannot hold it.
        BaseModelError: If the base model's architecture is not known to the format, or nothing says what it is.
        ConfigError: If format, rank or keep cannot be used.
        MissingDependencyError: If the format needs a package that is not installed.
        StorageError: If `out` is there already, or writing fails.
    """
    target = FORMATS.get(name)
    if target is None or target.writes is None:
        written = ", ".join(one.name for one in FORMATS.values() if one.writes)
        raise ConfigError("format of adapters cannot be written", got=repr(name)[:40], expected=written)
    done, source, base = _prepared(path, **settings)
    place = Path(out)

    def write(into: Path) -> None:
        target.write(done.adapter, into, Base(base))
        file = into if target.writes == "file" else target.weights(into)[0]
        _compare(done.adapter, target.read(file, Base(base)), target.title)
        if target.writes == "folder":
            write_json(into / PROVENANCE, {"kind": "adapter", "lorag": __version__, **done.adapter.info})
            _copy_beside(source, into)

    if target.writes == "folder":
        write_folder(place, write)
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


def _prepared(
    path: str | Path,
    *,
    base_model: str | None = None,
    kind: str | None = None,
    strength: float = 1.0,
    rank: int | None = None,
    keep: float | None = None,
    convert: bool = False,
) -> tuple[Exported, Path, BaseModel | None]:
    """What is written, with the folder in PEFT's format that it comes from, and the base model that was named."""
    adapter, source, base = open_adapter(path, base_model, kind, strength, _share(rank, keep) if convert else None)
    adapter.factors.check_values()
    return _truncated(adapter, rank, None if convert else keep), source, base


def _share(rank: int | None, keep: float | None) -> float:
    """The share of ‖ΔW‖² that is kept of an adapter of another method: all of it where a rank cuts it afterwards."""
    return 1.0 if rank is not None else _KEEP if keep is None else keep


def open_adapter(
    path: str | Path, base_model: str | None, kind: str | None, strength: float, convert: float | None = None
) -> tuple[LoraAdapter, Path, BaseModel | None]:
    """The adapter with what its folder says, times the strength; its folder in PEFT's format; the base model that was named."""
    stated = named_base(base_model, kind)
    base, source = stated.model, peft_folder(path, stated, more=BESIDE, convert=convert)
    adapter = _with_purpose(LoraAdapter.from_pretrained(source, repair=True), source)
    if adapter.base_model is None and base is not None:
        adapter = replace(adapter, base_model=base.name)
    return adapter.scaled(strength), source, base


def _truncated(adapter: LoraAdapter, rank: int | None, keep: float | None) -> Exported:
    """The adapter in a rank, or in the smallest one that keeps a share of ‖ΔW‖²."""
    if rank is None and keep is None:
        converted = adapter.info.get("converted")
        error = converted.get("error") if isinstance(converted, dict) else None
        return Exported(adapter, float(error) if isinstance(error, int | float) else 0.0)
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
        stated = {"description": purpose.descriptions[0], "license": purpose.licence}
    except UndescribedError:
        stated = {"license": stated_licence(folder)}
    return replace(adapter, info={**{key: value for key, value in stated.items() if value}, **adapter.info})


def _copy_beside(source: Path, folder: Path) -> None:
    for name in BESIDE:
        if (source / name).is_file():
            require_plain(source / name, LARGEST_BESIDE)
            shutil.copyfile(source / name, folder / name)
