"""Formats of adapters beside PEFT's: whatever they hold comes in as a PEFT folder, made once in lorag's cache, and goes out by name.

A format is recognised by what a file holds, never by its name alone. Everything behind this door reads PEFT's format, so that
another format is judged by the same checks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lorag import __version__
from lorag.adapters.checks import CONFIG, PROVENANCE, WEIGHTS
from lorag.adapters.formats.diffusion import Diffusion
from lorag.adapters.formats.format import AdapterFormat, Base, PeftForm
from lorag.adapters.formats.gguf import Gguf
from lorag.adapters.formats.mlx import Mlx
from lorag.adapters.formats.other_methods import OtherMethods
from lorag.adapters.reading import warn_of_side_files, weights_remedy
from lorag.base.base_model import BaseModel, is_trusted, kind_of
from lorag.base.names import locate
from lorag.errors import AdapterError, ArtifactError
from lorag.files.artifacts import is_foreign_link, read_bounded, sha256, write_json
from lorag.files.cache import cache_folder, cached_folder
from lorag.files.hub import HubPlace, fetch, fetch_adapter, hub_place, list_files, read_start
from lorag.files.tensors import save_tensors

__all__ = ["FORMATS", "Base", "adapter_files", "format_of", "hub_name", "named_base", "peft_folder"]

FORMATS: dict[str, AdapterFormat] = {one.name: one for one in (Gguf(), Mlx(), Diffusion())}

_SIDES = ("description.txt", "README.md", "LICENSE", PROVENANCE)  # that belong to the one adapter beside which they lie
_LARGEST_SIDE = 64 * 2**20
_MOST_FILES = 40  # GGUF files of a repository that are looked at


def format_of(file: Path) -> AdapterFormat | None:
    """The format that recognises a file; None for PEFT's own and for anything else.

    Raises:
        ArtifactError: If it is a damaged file of a format that is looked into.
    """
    return next((one for one in FORMATS.values() if one.recognises(file)), None)


def adapter_files(folder: Path) -> list[Path]:
    """Files of a folder that hold an adapter each, in a format other than PEFT's; of a PEFT folder none."""
    if (folder / CONFIG).is_file():
        formats = [one for one in FORMATS.values() if one.config == CONFIG]  # whose config has PEFT's name
    else:
        formats = list(FORMATS.values())
    return [] if (folder / WEIGHTS).is_file() else sorted({path for one in formats for path in one.weights(folder)})


def peft_folder(
    path: str | Path, base: Base | None = None, revision: str | None = None, *, more: Sequence[str] = (), convert: float | None = None
) -> Path:
    """A folder in PEFT's format with the adapter at a path: the one that is there, or one made from another format.

    Args:
        path: A folder, a file, or a place on the hub: an id such as user/name, one of its files as user/name/file.gguf, or an address.
        base: What is known of the base model; formats that write less down than PEFT ask for it.
        revision: Revision on the hub.
        more: Further files that are taken along where they lie beside the adapter.
        convert: Also brings adapters of PEFT's other methods, and DoRA, to LoRA, keeping this share of ‖ΔW‖² of each module; without it
            they are left as they are, which PEFT's reader refuses.

    Raises:
        AdapterError: If there are several adapters, or one that is not a plain LoRA.
        ArtifactError: If there is nothing, or a file is damaged.
        BaseModelError: If the base model must be known for it.
    """
    named = Path(path)
    place = None if isinstance(path, Path) or named.exists() else hub_place(path)
    if place is not None:
        named = _from_hub(place, revision, more)
    if named.is_file() and named.name not in (WEIGHTS, CONFIG):
        file = Path(os.path.realpath(named)) if is_foreign_link(named) else named  # a person named it, and may mean a link
        source_format = format_of(file)
        if source_format is None:
            raise ArtifactError(f"{path} cannot be read as an adapter", got=file.name, expected=_expected(), remedy=weights_remedy([file]))
    else:
        folder = named if place is not None else fetch(path, "adapter")
        other = None if convert is None else OtherMethods(convert)
        if other is not None and other.weights(folder):
            return _converted(folder / WEIGHTS, other, other.stated(folder / WEIGHTS, base or Base()), more)
        files = adapter_files(folder)
        if not files:
            return folder  # PEFT's, or nothing at all, which its reader says best
        if len(files) > 1:
            got = ", ".join(one.name for one in files[:6])
            raise AdapterError(f"{folder} holds {len(files)} adapters", got=got, expected="one", remedy="Name the file.")
        file = files[0]
        source_format = format_of(file)
        if source_format is None:
            raise AssertionError(f"{file} was recognised a moment ago")
    return _converted(file, source_format, base or Base(), more, whole=place is not None)


def hub_name(text: str) -> str | None:
    """What an adapter is called that a text names on the hub; None if there is something of that name here, or no such place there."""
    place = None if Path(text).exists() else hub_place(text)
    return None if place is None else place.name


def named_base(name: str | None, kind: str | None = None) -> Base:
    """What is known of a base model that a user names, or nothing.

    Raises:
        BaseModelError: If its config cannot be read.
    """
    return Base(None if name is None else BaseModel(name, kind or kind_of(name), None, is_trusted(name)))


def _from_hub(place: HubPlace, revision: str | None, more: Sequence[str]) -> Path:
    """The folder or file of an adapter on the hub, fetched; of GGUF files none that is a model.

    Raises:
        AdapterError: If it holds several adapters, or models alone.
        ArtifactError: If it cannot be had.
    """
    if Path(place.inside).name in (WEIGHTS, CONFIG):
        place = replace(place, inside=place.inside.rpartition("/")[0])
    repository, at, inside = place.repository, revision or place.revision or "main", place.inside
    whole = f"{repository}/{inside}".rstrip("/")
    if inside.endswith(".gguf") and inside in list_files(repository, at) and not _says_adapter(repository, at, inside):
        raise AdapterError(f"{whole} is not a LoRA adapter", got="a GGUF file of a model", expected="general.type adapter")
    fetched, commit = fetch_adapter(place, revision, more=more)
    if fetched.is_file():
        return fetched
    start = f"{inside}/" if inside else ""
    names = [name.removeprefix(start) for name in list_files(repository, commit) if name.startswith(start)]
    names = [name for name in names if "/" not in name]
    warn_of_side_files(names, whole)  # of a repository only what belongs to an adapter was fetched
    if (fetched / CONFIG).is_file() or (fetched / WEIGHTS).is_file() or adapter_files(fetched):
        return fetched
    models = [name for name in names if name.endswith(".gguf")][:_MOST_FILES]
    adapters = [name for name in models if _says_adapter(repository, commit, start + name)]
    if len(adapters) == 1:
        return fetch_adapter(HubPlace(repository, start + adapters[0], commit), more=more)[0]
    unclear = adapters or [name for name in names if name.endswith(".safetensors")]
    if unclear:
        got = ", ".join(unclear[:6])
        raise AdapterError(f"{whole} does not say which file is the adapter", got=got, remedy=f"Name the file: {whole}/{unclear[0]}")
    if models:
        raise AdapterError(
            f"{whole} holds no adapter", got=f"GGUF files of a model: {', '.join(models[:4])}", expected="general.type adapter"
        )
    return fetched


def _says_adapter(repository: str, commit: str, name: str) -> bool:
    """Whether a GGUF file on the hub is an adapter, by its start."""
    return Gguf.says_adapter(read_start(repository, commit, name, Gguf.start))


def _expected() -> str:
    return f"PEFT's folder, or a file of {', '.join(one.title for one in FORMATS.values())}"


def _converted(file: Path, source_format: AdapterFormat, base: Base, more: Sequence[str], *, whole: bool = False) -> Path:
    """The folder that a file was converted to; `whole`: texts beside it are about all adapters there, as those of a repository are."""
    sides = dict(_beside(file, more)) if whole or len(adapter_files(file.parent)) < 2 else {}
    digest = hashlib.sha256(repr([source_format, sha256(file), sorted(sides.items()), *_stated(base, source_format)]).encode())
    if source_format.config is not None and (file.parent / source_format.config).is_file():
        digest.update(sha256(file.parent / source_format.config).encode())
    name = f"adapters/{source_format.name}-{digest.hexdigest()[:24]}"
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    form = source_format.read(file, base)  # before the cache is touched: a refused file leaves nothing there

    def write(into: Path) -> None:
        _write(form, source_format, file, into)
        for side in sides:
            if not (into / side).exists():
                (into / side).write_bytes(read_bounded(file.parent / side, _LARGEST_SIDE))

    return cached_folder(name, write)


def _write(form: PeftForm, source_format: AdapterFormat, file: Path, into: Path) -> None:
    save_tensors(into / WEIGHTS, form.tensors, {"format": "pt"})
    write_json(into / CONFIG, form.config)
    if form.info or not (file.parent / PROVENANCE).is_file():
        write_json(into / PROVENANCE, {"kind": "adapter", "lorag": __version__, "converted_from": source_format.title, **form.info})


def _beside(file: Path, more: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and digest of the texts beside an adapter."""
    for name in dict.fromkeys((*_SIDES, *more)):
        path = file.parent / name
        if path.is_file() and not is_foreign_link(path) and path.stat().st_size <= _LARGEST_SIDE:
            yield name, sha256(path)


def _stated(base: Base, source_format: AdapterFormat) -> list[object]:
    """What tells one base model from another, as far as reading an adapter depends on it."""
    config = None if base.model is None else Path(locate(base.model.name, base.model.revision)) / "config.json"
    local = sha256(config) if config is not None and config.is_file() else None
    weights = base.model.identity() if base.model is not None and isinstance(source_format, OtherMethods) else None
    return [
        weights,
        base.model and (base.model.name, base.model.revision),
        local,
        [(m.name, m.in_features, m.out_features) for m in base.modules],
    ]
