"""Where adapters come from: a PEFT folder, a folder of such folders, or the hub; each with the name that it will have in a bank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorag.adapters.checks import CONFIG, WEIGHTS
from lorag.files.artifacts import safe_name
from lorag.files.hub import fetch

__all__ = ["Source", "find_sources"]

_DEEPEST = 4


@dataclass(frozen=True)
class Source:
    """An adapter to be read.

    Attributes:
        label: How messages call it.
        place: Its folder, or its hub id.
        name: Its name in a bank.
    """

    label: str
    place: Path | str
    name: str

    def folder(self, revision: str | None = None) -> Path:
        """Its folder, fetched from the hub where it is a hub id.

        Raises:
            ArtifactError: If there is no such folder or repository.
        """
        return fetch(self.place, "adapter", revision)


def find_sources(places: Sequence[str]) -> list[Source]:
    """Lists the adapters of some places; nothing is read or fetched yet.

    Args:
        places: PEFT folders, folders that hold PEFT folders up to four levels down, and hub ids.

    Returns:
        The adapters, those of one folder sorted by path. A folder without any is listed itself, and refused when it is read.
    """
    found: list[Source] = []
    for place in places:
        root = Path(place)
        if not root.is_dir():
            found.append(Source(place, place, safe_name(place.replace("/", "-"))))
            continue
        inside = list(_adapters(root))
        for folder in inside or [root]:
            parts = folder.relative_to(root).parts
            found.append(Source(str(folder), folder, safe_name("-".join(parts) or root.resolve().name)))
    return found


def _adapters(root: Path) -> Iterator[Path]:
    """Folders with an adapter; what lies below one, such as its earlier checkpoints, belongs to it. Links are not followed."""
    for path, folders, files in os.walk(root):
        here = Path(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if CONFIG in files or WEIGHTS in files:
            folders[:] = []
            yield here
        elif len(here.relative_to(root).parts) >= _DEEPEST:
            folders[:] = []
