"""The source tasks that are taken, cut to what the base model reads at once, each text on one side of every split; and their notice."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from lorag.errors import TaskError
from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.worlds.smollm2.files import read

__all__ = ["SIDES", "Source", "notice", "read_sources", "sample", "size"]

SIDES = ("train", "validation", "unseen_task")
_MOST_IN, _MOST_IN_LONG = 110, 200  # of `size`; the base's tokenizer gives about as many tokens
_MOST_OUT, _MOST_OUT_LONG = 40, 52
_PIECE = re.compile(r"[A-Za-z]{1,5}|\d|[^\sA-Za-z\d]")


@dataclass(frozen=True)
class Source:
    """One source task with the examples that fit."""

    task: Task
    family: str
    side: str
    noun: str


def size(text: str) -> int:
    """About the number of tokens of a text; needs no tokenizer, so that the tasks are the same wherever they are built."""
    return len(_PIECE.findall(text))


def read_sources(folder: Path) -> list[Source]:
    """Reads what sources.yaml takes from a folder of suites.

    Examples that are too long are left out. A text that is a test input of any task is one everywhere.

    Raises:
        TaskError: If a task is missing.
    """
    chosen = read("sources")
    suite = TaskSuite.from_folder(folder)
    tested = {example.input for about in chosen["families"].values() for name in about["tasks"] for example in suite[name].split("test")}
    sources = []
    for family, about in chosen["families"].items():
        if about["side"] not in SIDES:
            raise TaskError(f"sources.yaml: family {family} stands on no side", got=about["side"], expected=" or ".join(SIDES))
        for task in (suite[name] for name in about["tasks"]):
            long, free = task.name in chosen["long"], task.name in chosen["free_text"]
            kept = tuple(
                replace(example, split="test" if example.input in tested else "train")
                for example in task.examples
                if size(example.input) <= (_MOST_IN_LONG if long else _MOST_IN)
                and size(example.output) <= (_MOST_OUT_LONG if free else _MOST_OUT)
            )
            sources.append(Source(replace(task, examples=kept, free_text=free), family, about["side"], about["noun"]))
    return sources


def sample(examples: Iterable[Example], train: int, test: int, name: str) -> tuple[Example, ...]:
    """Draws examples of both splits, the outputs of a closed set evenly; which ones depends on the task's name alone."""
    rows = list(examples)
    rng = random.Random(zlib.crc32(name.encode()))
    drawn: list[Example] = []
    for split, most in (("train", train), ("test", test)):
        drawn += _evenly([row for row in rows if row.split == split], most, rng)
    return tuple(drawn)


def _evenly(rows: list[Example], most: int, rng: random.Random) -> Iterator[Example]:
    """Takes one of each output in turn; with outputs that hardly repeat, that is a random choice."""
    rng.shuffle(rows)
    by_output: dict[str, list[Example]] = {}
    seen: set[str] = set()
    for row in rows:
        if row.input not in seen:
            by_output.setdefault(row.output, []).append(row)
            seen.add(row.input)
    groups = list(by_output.values())
    rng.shuffle(groups)
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            if turn < len(group) and most > 0:
                most -= 1
                yield group[turn]


def notice(sources: Iterable[Source]) -> str:
    """Whose texts the suite holds and what was done to them: what notice.txt says of all, then an entry per family.

    An entry names the family's sources, their licence, their owners where known, and the tasks made of them.
    """
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
