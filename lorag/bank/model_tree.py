"""All adapters that the hub lists for a base model, looked at before any of their weights is fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorag.adapters.checks import CONFIG, PROVENANCE, WEIGHTS, check_config
from lorag.adapters.purpose import CARD, SIDECAR, find_purpose
from lorag.adapters.reading import read_provenance
from lorag.adapters.sources import Source
from lorag.errors import BankError, LoragError, UndescribedError
from lorag.files.artifacts import read_json, safe_name
from lorag.files.hub import OTHER_WEIGHTS, fetch_small, hub_place, list_adapters
from lorag.progress import progress_bar

__all__ = ["Listed", "chosen", "survey", "survey_lines"]

_MAX_CONFIG = 2**20


@dataclass(frozen=True)
class Listed:
    """An adapter on the hub, by what lies beside its weights.

    Attributes:
        repository: Its hub id.
        size: Bytes of its weights.
        licence: As its repository states it, or "unknown".
        rank: Its rank; None if its config cannot be read or does not say it.
        description: What it is for; None if nothing says it.
        problem: Why it cannot be added as it is, or None.
    """

    repository: str
    size: int
    licence: str
    rank: int | None = None
    description: str | None = None
    problem: str | None = None


def survey(base: str, *, limit: int = 100, quiet: bool = True) -> list[Listed]:
    """Looks at the adapters in a base model's tree on the hub: file sizes, config and card, no weights.

    Args:
        base: The base model's hub id.
        limit: Most adapters, those with the most downloads first.
        quiet: No progress bar.

    Raises:
        BankError: If the id cannot be one.
        ArtifactError: If the hub cannot be asked.
    """
    place = hub_place(base)
    if place is None or place.inside:
        raise BankError("the base model cannot be looked up on the hub", got=base[:80], expected="a hub id such as user/name")
    listed = list_adapters(place.repository, limit)
    return [_look(one) for one in progress_bar(listed, desc="looking at adapters", disable=quiet, leave=False)]


def _look(repository: str) -> Listed:
    """One repository: what its file list, config, card and lorag.json say."""
    size, licence = 0, "unknown"
    try:
        folder, sizes, licence = fetch_small(repository, [CONFIG, CARD, SIDECAR, PROVENANCE])
        size = sizes.get(WEIGHTS) or _foreign(sizes)
        if not size:
            return Listed(repository, 0, licence, problem=f"no {WEIGHTS}")
        rank = check_config(_config(folder), Path(repository) / CONFIG).rank if WEIGHTS in sizes else None
    except LoragError as error:
        return Listed(repository, size, licence, problem=str(error)[:200])
    try:
        said = find_purpose(folder, read_provenance(folder)).descriptions[0]
    except UndescribedError:
        return Listed(repository, size, licence, rank, problem="nothing says what it is for")
    except LoragError as error:
        return Listed(repository, size, licence, rank, problem=str(error)[:200])
    return Listed(repository, size, licence, rank, said)


def _foreign(sizes: Mapping[str, int]) -> int:
    """Bytes of an adapter in another format than PEFT's, where the names of a repository's files leave no doubt which it is."""
    files = [name for name in sizes if name in OTHER_WEIGHTS or ("/" not in name and name.endswith(".gguf"))]
    return sizes[files[0]] if len(files) == 1 else 0


def _config(folder: Path) -> Any:  # noqa: ANN401 - JSON
    if not (folder / CONFIG).is_file():
        raise BankError(f"no {CONFIG}")
    return read_json(folder / CONFIG, _MAX_CONFIG)


def chosen(listed: Sequence[Listed], most_bytes: int | None = None) -> list[Source]:
    """The adapters that can be added, in order, as long as all of them together take no more than some bytes."""
    sources, total = [], 0
    for one in listed:
        if one.problem is None and (most_bytes is None or total + one.size <= most_bytes):
            total += one.size
            sources.append(Source(one.repository, one.repository, safe_name(one.repository.replace("/", "-"))))
    return sources


def survey_lines(listed: Sequence[Listed], most_bytes: int | None = None) -> list[str]:
    """What was found, in a few lines, with the reasons of those that cannot be added."""
    usable = [one for one in listed if one.problem is None]
    taken = {source.label for source in chosen(listed, most_bytes)}
    size = sum(one.size for one in usable if one.repository in taken)
    lines = [f"{len(listed)} adapters are listed; {len(usable)} can be added"]
    if len(taken) < len(usable):
        lines[0] += f", the first {len(taken)} of them within --max-bytes {most_bytes}"
    lines[0] += f": {size / 1e6:.4g} MB to fetch"
    lines.append(f"with a description: {sum(one.description is not None for one in listed)}")
    lines.append(f"ranks: {_counted(str(one.rank) for one in listed if one.rank is not None)}")
    lines.append(f"licences: {_counted(one.licence for one in listed)}")
    return lines + [f"  not {one.repository}: {one.problem}" for one in listed if one.problem is not None]


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(12)) or "none"
