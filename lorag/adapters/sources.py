"""Where adapters come from: folders, files, folders of such, the hub, or a list; each with the name that it will have in a bank."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorag.adapters.checks import CONFIG, WEIGHTS
from lorag.adapters.formats import Base, adapter_files, hub_name, peft_folder
from lorag.errors import BankError, DescriptionError
from lorag.files.artifacts import decode_text, read_bounded, safe_name
from lorag.tasks.descriptions import check_description

__all__ = ["Source", "find_sources", "listed_sources"]

logger = logging.getLogger(__name__)

_DEEPEST = 4
_CHECKPOINT = re.compile(r"(checkpoint|step|epoch|global_step|iter)[-_]?\d+.*|checkpoint.*", re.I)
_NUMBERED = re.compile(r"((?:checkpoint|step|epoch|global_step|iter)[-_]?)(\d{1,12})", re.I)
_EPOCH = re.compile(r"(.+)-(?:\d{6}|step\d{8})")  # of a file, as kohya's trainers number what they save on the way to the last one
_MAX_LIST = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """An adapter to be read.

    Attributes:
        label: How messages call it.
        place: Its folder or file, or its place on the hub.
        name: Its name in a bank.
        descriptions: What its task is, where the list that names the adapter says so.
    """

    label: str
    place: Path | str
    name: str
    descriptions: tuple[str, ...] = ()

    def folder(self, revision: str | None = None, base: Base | None = None, convert: float | None = None) -> Path:
        """Its folder in PEFT's format: fetched from the hub where it is a hub id, made from another format where it is in one.

        Args:
            revision: Revision on the hub.
            base: What is known of its base model.
            convert: Share of ‖ΔW‖² that is kept of an adapter of another of PEFT's methods; without it such are left as they are.

        Raises:
            AdapterError, BaseModelError: If it is in another format, and cannot be read.
            ArtifactError: If there is no such folder or repository.
        """
        return peft_folder(self.place, base, revision, convert=convert)


def find_sources(places: Sequence[str]) -> list[Source]:
    """Lists the adapters of some places; nothing is read or fetched yet.

    Args:
        places: Adapter folders and files, folders that hold such up to four levels down, and places on the hub.

    Returns:
        The adapters, those of one folder sorted by path. A folder without any is listed itself, and refused when it is read.
    """
    sources: list[Source] = []
    for place in places:
        root = Path(place)
        if root.is_file():
            sources.append(Source(place, root, safe_name(root.stem)))
            continue
        if not root.is_dir():
            sources.append(Source(place, place, safe_name(hub_name(place) or place.replace("/", "-"))))
            continue
        inside = list(_adapters(root))
        for one in inside or [root]:
            parts = one.relative_to(root).parts
            parts = (*parts[:-1], one.stem) if one.is_file() else parts
            sources.append(Source(str(one), one, safe_name("-".join(parts) or root.resolve().name)))
    return sources


def listed_sources(path: Path) -> list[Source]:
    """Lists the adapters that a text file names; nothing is fetched yet.

    Each line holds a folder, a file or a place on the hub, and, after a tab each where they are wanted, a name in the bank and a
    description: names that tasks of a suite have let a generator learn from their examples too. Empty lines and those that start
    with # are passed over.

    Args:
        path: The file.

    Returns:
        The adapters in the file's order.

    Raises:
        BankError: Naming the line, if one has more parts, names neither a folder nor a place that the hub could have, or names one twice.
        ArtifactError: If the file cannot be read.
    """
    lines = decode_text(read_bounded(path, _MAX_LIST, named=True), path).splitlines()
    by_place: dict[str, Source] = {}
    for number, line in enumerate(lines, 1):
        place, *more = (part.strip() for part in line.split("\t"))
        if line.startswith("#") or not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            if len(more) > 2 or not place:
                raise BankError(f"{where} cannot be used", got=line[:80], expected="a folder or hub id, a name and a description, by tabs")
            if place in by_place:
                raise BankError(f"{where} names an adapter for the second time", got=place[:120])
            if not Path(place).exists() and hub_name(place) is None:
                raise BankError(f"{where} names neither a folder nor a place on the hub", got=place[:120], expected="such as user/name")
            texts = tuple(check_description(text) for text in more[1:])
        except (DescriptionError, ValueError) as error:
            raise error if isinstance(error, BankError) else BankError(f"{where} cannot be used: {error}", got=line[:80]) from error
        sources = find_sources([place])
        if len(sources) > 1:
            raise BankError(f"{where} names a folder of adapters", got=f"{len(sources)} in {place}", remedy="Name each of them.")
        source = sources[0]
        by_place[place] = Source(source.label, source.place, safe_name(more[0]) if more and more[0] else source.name, texts)
    return list(by_place.values())


def _adapters(root: Path) -> Iterator[Path]:
    """Folders with an adapter, also below another one, as PEFT saves several, and files with one; what is passed over is said.

    A trainer's checkpoints belong to the adapter above them, and without one to the last of them. Links are not followed: they may
    lead anywhere.
    """
    adapters: list[Path] = []
    for path, folders, files in os.walk(root):
        here = Path(path)
        visible = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in visible if (here / name).is_symlink()]
        folders[:] = [name for name in visible if name not in links]
        for name in links:
            if _is_adapter(here / name):
                logger.warning("passed over %s: it is a link; name the folder itself to take it", here / name)
        if len(here.relative_to(root).parts) >= _DEEPEST:
            for name in folders:
                if _is_adapter(here / name):
                    logger.warning("passed over %s: it lies more than %d folders deep; name it to take it", here / name, _DEEPEST)
            folders[:] = []
        if CONFIG not in files and WEIGHTS not in files:
            for name in _earlier(here, folders):
                logger.warning("passed over %s: an earlier state than the last one beside it; name it to take it", here / name)
                folders.remove(name)
            yield from _files(here) if any(name.endswith((".gguf", ".safetensors")) for name in files) else ()
            continue
        above = any(parent in adapters for parent in here.parents)
        if above and _CHECKPOINT.fullmatch(here.name):
            logger.warning("passed over %s: an earlier state of the adapter above it; name it to take it", here)
            folders[:] = []
            continue
        adapters.append(here)
        yield here


def _earlier(folder: Path, names: Sequence[str]) -> list[str]:
    """Folders with a trainer's checkpoint of an adapter, but for the last of each kind of name."""
    states = [(match[1], int(match[2]), name) for name in names if (match := _NUMBERED.fullmatch(name)) and _is_adapter(folder / name)]
    last = {kind: number for kind, number, _ in sorted(states)}
    return [name for kind, number, name in states if number < last[kind]]


def _files(folder: Path) -> Iterator[Path]:
    """Files with an adapter, without the numbered states of one that is there too."""
    files = adapter_files(folder)
    names = {path.stem for path in files}
    for path in files:
        state = _EPOCH.fullmatch(path.stem)
        if state is not None and state[1] in names:
            logger.warning("passed over %s: an earlier state of %s; name it to take it", path, folder / f"{state[1]}{path.suffix}")
        else:
            yield path


def _is_adapter(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()
    except OSError:  # a link that leads to itself
        return False
