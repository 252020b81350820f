"""NOTICE of the task suite: whose texts it holds, under which licence, and what was done to them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING

from lorag.worlds.smollm2.files import read

if TYPE_CHECKING:
    from lorag.worlds.smollm2.sources import Source

__all__ = ["notice"]


def notice(sources: Iterable[Source]) -> str:
    """What notice.txt says of all, and one entry a family: its source, its licence, its owners where known, and the tasks made of it."""
    families: dict[str, list[Source]] = {}
    for source in sources:
        families.setdefault(source.family, []).append(source)
    entries = []
    for family, members in sorted(families.items()):
        origins = dict.fromkeys(f"{source.task.source} ({source.task.license})" for source in members)
        owners = read("sources")["families"][family].get("copyright")
        tasks = ", ".join(source.task.name for source in members)
        entries.append(
            "\n".join([family, *(f"  {origin}" for origin in origins), *([f"  {owners}"] if owners else []), f"  tasks: {tasks}"])
        )
    head, texts = resources.files("lorag.worlds.smollm2").joinpath("notice.txt").read_text(encoding="utf-8").split("SOURCES\n")
    return head + "\n\n".join(entries) + "\n" + texts
