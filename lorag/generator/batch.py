"""Many descriptions to adapter folders, here or on Ray; what is there already is not made again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import CONFIG
from lorag.adapters.reading import read_provenance
from lorag.errors import ConfigError, DescriptionError, GeneratorError, LoragError, UnknownTaskWarning
from lorag.files.artifacts import parse_json, require_name, slug
from lorag.files.plain import read_bounded
from lorag.generator.generate import default_generator
from lorag.generator.lora_generator import ON_UNKNOWN, LoraGenerator
from lorag.parallel import Backend
from lorag.tasks.suite import check_description

__all__ = ["BatchSettings", "Made", "Wanted", "generate_folders", "read_descriptions"]

_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Wanted:
    """An adapter to be made: the name of its folder, and what it should do."""

    name: str
    description: str


@dataclass(frozen=True)
class BatchSettings:
    """What all adapters of a batch have in common.

    Attributes:
        generator: Folder or hub id; None is the embedded one. Workers of other machines must find it under the same name.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        on_unknown: As `LoraGenerator.generate` takes it.
    """

    generator: str | None = None
    seed: int = 0
    strength: float = 1.0
    on_unknown: str = "warn"


@dataclass(frozen=True)
class Made:
    """What became of one description.

    Attributes:
        wanted: What was asked for.
        folder: Its folder.
        there: Whether it had been made before.
        info: Of the adapter that was made now.
        error: Why there is none, or None.
    """

    wanted: Wanted
    folder: Path
    there: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    error: LoragError | None = None


def read_descriptions(path: str | Path) -> list[Wanted]:
    """Reads a file of descriptions: one a line, or JSON lines with `description` and, if it likes, `name`.

    A description without a name is named by its first words and a digest of all, whatever line it stands in.

    Raises:
        ArtifactError: If the file cannot be read, or a line or name cannot be.
        DescriptionError: If a line is no usable description, or one that was given before.
    """
    found: dict[str, Wanted] = {}
    try:
        lines = read_bounded(Path(path), _MOST_BYTES, named=True).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DescriptionError(f"{path} is not UTF-8 text", got=str(error)[:80]) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, name, text = f"{path}, line {number}", None, line.strip()
        if text.startswith("{"):
            row = parse_json(text, where)
            if not isinstance(row, dict) or not isinstance(row.get("description"), str) or row.keys() - {"name", "description"}:
                raise DescriptionError(f"{where} cannot be read", got=text[:80], expected='{"name": …, "description": …}')
            name, text = row.get("name"), row["description"].strip()
        try:
            check_description(text)
        except DescriptionError as error:
            raise DescriptionError(f"{where}: {error}") from error
        name = slug(text) if name is None else require_name(name, f"{where}: name")
        if name in found:
            raise DescriptionError(f"{where}: an adapter is asked for twice", got=name, remedy="Give each line its own name.")
        found[name] = Wanted(name, text)
    if not found:
        raise DescriptionError(f"{path} holds no description")
    return list(found.values())


def generate_folders(
    wanted: Sequence[Wanted], out: str | Path, settings: BatchSettings | None = None, *, backend: Backend | None = None
) -> Iterator[Made]:
    """Makes an adapter folder for each description, each the same, byte for byte, as if made alone.

    On Ray a description is a task; adapters come back through the cluster and are written here as they are finished.

    Args:
        wanted: Names and descriptions.
        out: Gets a folder for each.
        settings: What they have in common.
        backend: Where adapters are generated; None is here.

    Yields:
        What became of each: first of those that are there, then of the others as they are finished. An error of one stops none
        of the others.

    Raises:
        ConfigError: If a setting cannot be used.
    """
    settings, out = BatchSettings() if settings is None else settings, Path(out)
    if settings.on_unknown not in ON_UNKNOWN:
        raise ConfigError("on_unknown cannot be used", got=repr(settings.on_unknown)[:40], expected=" or ".join(ON_UNKNOWN))
    left = []
    for one in wanted:
        folder = out / one.name
        if not (folder / CONFIG).exists():
            left.append(one)
            continue
        same = _is_that(folder, one, settings)
        error = GeneratorError(f"{folder} holds another adapter", remedy="Choose another folder, or delete it.")
        yield Made(one, folder, there=same, error=None if same else error)
    for outcome in (Backend() if backend is None else backend).run(_generate, settings, left, ordered=False):
        one = left[outcome.place]
        if outcome.error is not None:
            yield Made(one, out / one.name, error=outcome.error)
        else:
            adapter = outcome.result()
            yield Made(one, adapter.save_pretrained(out / one.name), info=adapter.info)


def _is_that(folder: Path, wanted: Wanted, settings: BatchSettings) -> bool:
    """Whether a folder holds what this generator makes of a description with these settings."""
    try:
        info = read_provenance(folder)
    except LoragError:
        return False
    right = {"description": wanted.description, "seed": settings.seed, "strength": settings.strength}
    made_by = info.get("generator")
    revision = made_by.get("revision") if isinstance(made_by, dict) else None
    return {key: info.get(key) for key in right} == right and revision == _opened(settings.generator).revision


_kept: dict[str | None, LoraGenerator] = {}  # the generator that this process last worked with


def _opened(name: str | None) -> LoraGenerator:
    if name not in _kept:
        _kept.clear()
        _kept[name] = default_generator() if name is None else LoraGenerator.from_pretrained(name)
    return _kept[name]


def _generate(settings: BatchSettings, wanted: Wanted) -> LoraAdapter:
    """One adapter, on whatever worker; its process keeps the generator for the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownTaskWarning)  # `info["gate"]` says it
        return _opened(settings.generator).generate(
            wanted.description, seed=settings.seed, strength=settings.strength, on_unknown=settings.on_unknown
        )
