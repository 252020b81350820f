"""Many descriptions to adapter folders, here or on Ray; what was made before is kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.checks import CONFIG
from lorag.adapters.reading import read_provenance
from lorag.errors import ConfigError, DescriptionError, GeneratorError, LoragError, UnknownTaskWarning
from lorag.files.artifacts import decode_text, parse_json, read_bounded, require_name, slug
from lorag.generator.generate import open_generator
from lorag.generator.lora_generator import ON_UNKNOWN
from lorag.parallel import Backend
from lorag.tasks.descriptions import check_description

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = ["AdapterRequest", "AdapterResult", "BatchSettings", "read_requests", "write_adapters"]

_MOST_BYTES = 2**28
_TOGETHER = 8  # descriptions that a local run decodes at once; an interruption loses at most so many


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter to be made: the name of its folder, and what it should do."""

    name: str
    description: str


@dataclass(frozen=True)
class BatchSettings:
    """What all adapters of a batch have in common.

    Attributes:
        generator: Name of a shipped one, folder or hub id; None is the default. Workers of other machines must find it under the
            same name.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        on_unknown: As `LoraGenerator.generate` takes it.
        rank: Rank of the adapters; None is the generator's.
    """

    generator: str | None = None
    seed: int = 0
    strength: float = 1.0
    on_unknown: str = "warn"
    rank: int | None = None


@dataclass(frozen=True)
class AdapterResult:
    """What became of one description.

    Attributes:
        request: What was asked for.
        folder: Its folder.
        existed: Whether it had been made before.
        info: Of the adapter that was made now.
        error: Why there is none, or None.
    """

    request: AdapterRequest
    folder: Path
    existed: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    error: LoragError | None = None


def read_requests(path: str | Path) -> list[AdapterRequest]:
    """Reads a file of descriptions: one per line, or JSON lines with `description` and, if it likes, `name`.

    A description without a name is named by its first words and a digest of all, whatever line it stands in.

    Raises:
        ArtifactError: If the file cannot be read, or a line or name cannot be.
        DescriptionError: If a line is not a usable description, or one that was given before.
    """
    requests: dict[str, AdapterRequest] = {}
    lines = decode_text(read_bounded(Path(path), _MOST_BYTES, named=True), path).splitlines()
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
        if name in requests:
            raise DescriptionError(f"{where}: an adapter is asked for twice", got=name, remedy="Give each line its own name.")
        requests[name] = AdapterRequest(name, text)
    if not requests:
        raise DescriptionError(f"{path} holds no description")
    return list(requests.values())


def write_adapters(
    requests: Sequence[AdapterRequest], out: str | Path, settings: BatchSettings | None = None, *, backend: Backend | None = None
) -> Iterator[AdapterResult]:
    """Makes an adapter folder for each description, each the same, byte for byte, as if made alone.

    Here several descriptions are decoded at once. On Ray each is a task of its own; adapters come back through the cluster and are
    written here as they are finished.

    Args:
        requests: Names and descriptions, which were checked.
        out: Gets a folder for each.
        settings: What they have in common.
        backend: Where adapters are generated; None is here.

    Yields:
        What became of each: first of those that existed, then of the others as they are finished. An error of one stops none
        of the others.

    Raises:
        ConfigError: If a setting cannot be used.
        GeneratorError: If the generator has no adapters of the rank.
    """
    settings, out = BatchSettings() if settings is None else settings, Path(out)
    backend = Backend() if backend is None else backend
    if settings.on_unknown not in ON_UNKNOWN:
        raise ConfigError("on_unknown cannot be used", got=repr(settings.on_unknown)[:40], expected=" or ".join(ON_UNKNOWN))
    missing = []
    for request in requests:
        folder = out / request.name
        if not (folder / CONFIG).exists():
            missing.append(request)
            continue
        same = _answers(folder, request, settings)
        error = GeneratorError(f"{folder} holds another adapter", remedy="Choose another folder, or delete it.")
        yield AdapterResult(request, folder, existed=same, error=None if same else error)
    together = _TOGETHER if backend.name == "local" else 1
    groups = [missing[start : start + together] for start in range(0, len(missing), together)]
    for outcome in backend.run(_generate, settings, groups, ordered=False):
        for request, made in zip(groups[outcome.place], outcome.result(), strict=True):
            if isinstance(made, LoragError):
                yield AdapterResult(request, out / request.name, error=made)
            else:
                yield AdapterResult(request, made.save_pretrained(out / request.name), info=made.info)


def _answers(folder: Path, request: AdapterRequest, settings: BatchSettings) -> bool:
    """Whether a folder holds what this generator makes of a description with these settings."""
    try:
        info = read_provenance(folder)
    except LoragError:
        return False
    generator = open_generator(settings.generator)
    rank = generator.rank if settings.rank is None else settings.rank
    asked = {"description": request.description, "seed": settings.seed, "strength": settings.strength, "rank": rank}
    made_by = info.get("generator")
    revision = made_by.get("revision") if isinstance(made_by, dict) else None
    return {key: info.get(key) for key in asked} == asked and revision == generator.revision


def _generate(settings: BatchSettings, requests: Sequence[AdapterRequest]) -> list[LoraAdapter | LoragError]:
    """Adapters of a few descriptions, or why there is none, on whatever worker; its process keeps the generator for the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownTaskWarning)  # `info["gate"]` says it
        made = open_generator(settings.generator).generate_each(
            [request.description for request in requests],
            seed=settings.seed,
            strength=settings.strength,
            rank=settings.rank,
            on_unknown=settings.on_unknown,
        )
        return list(made)
