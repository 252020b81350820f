"""Derive a suite from labelled suites: subsets of large label sets as tasks of their own, and a split by source."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from lorag.errors import ConfigError, TaskError
from lorag.files.artifacts import slug
from lorag.tasks.suite import Task, TaskSuite, connected

__all__ = ["derive", "hold_out_groups"]

_LARGE = 6  # a label set of this size can be cut into subsets that are tasks of their own
_LEAST_TEST = 12
_PATTERNS = (
    "{task} Only tell apart: {labels}.",
    "{task} The classes are {labels}.",
    "Which of {labels} is it? {task}",
)


def derive(
    source: Path,
    out: Path,
    *,
    names: Path | None = None,
    subsets: int = 1,
    without_expert: int = 0,
    held_out: float = 0.3,
    by: str = "source",
    seed: int = 0,
) -> Mapping[str, int]:
    """Writes a suite of labelled tasks with a splits.json.

    Tasks that share texts fall on the same side of the split. By default all tasks of one source data set do: they share
    ways of writing, which flatters every method.

    Args:
        source: A suite, or a folder of suites.
        out: Folder of the new suite.
        names: JSON list of the tasks to start with; by default all with labels.
        subsets: Tasks made of each label set of six or more.
        without_expert: More of them, of training tasks alone, as the split of tasks that teach without an expert.
        held_out: Share of the tasks held out, about.
        by: "source" or "texts": what keeps tasks together.
        seed: Seed of subsets and split.

    Returns:
        Number of tasks of each split.
    """
    suite = TaskSuite.from_folder(source)
    if names is not None:
        suite = suite.select(json.loads(names.read_text(encoding="utf-8")))
    rng = random.Random(seed)
    if by not in ("source", "texts"):
        raise ConfigError("--by cannot be used", got=repr(by), expected="source or texts")
    tasks: list[Task] = []
    whole: list[Task] = []  # with label sets that can be cut
    for task in suite:
        if not task.labels or not task.split("test"):
            continue
        tasks.append(task)
        if len(task.labels) >= _LARGE:
            whole.append(task)
            tasks += [subset for _ in range(subsets) if (subset := _subset(task, rng)) is not None]
    if not tasks:
        raise TaskError(f"{source} has no task with labels and test examples")
    marks = [{task.source} if by == "source" else {example.input for example in task.examples} for task in tasks]
    chosen = hold_out_groups(tasks, marks, held_out, rng)
    splits = {"train": [t.name for t in tasks if t.name not in chosen], "test": [t.name for t in tasks if t.name in chosen]}
    more: dict[str, Task] = {}
    for task in [one for one in whole if one.name not in chosen] * without_expert:
        subset = _subset(task, rng)
        if subset is not None and subset.name not in splits["train"]:
            more[subset.name] = subset
    if more:
        splits["without_expert"] = sorted(more)
    TaskSuite([*tasks, *more.values()], splits).save(out)
    return {name: len(members) for name, members in splits.items()}


def hold_out_groups(tasks: Sequence[Task], marks: Sequence[Set[str]], share: float, rng: random.Random) -> set[str]:
    """Names of tasks to hold out: whole groups of tasks that share marks, as many as fit into a fifth more than the share."""
    groups = connected(marks)
    rng.shuffle(groups)
    held: set[str] = set()
    for group in groups:
        if len(held) + len(group) <= 1.2 * share * len(tasks):
            held |= {tasks[index].name for index in group}
    return held


def _subset(task: Task, rng: random.Random) -> Task | None:
    labels = sorted(rng.sample(task.labels or (), rng.randint(3, 5)))
    examples = tuple(example for example in task.examples if example.output in labels)
    if sum(example.split == "test" for example in examples) < _LEAST_TEST:
        return None
    listed = ", ".join(labels[:-1]) + " or " + labels[-1]
    descriptions = tuple(
        rng.choice(_PATTERNS).format(task=text if text.endswith((".", "?", "!")) else f"{text}.", labels=listed)
        for text in task.descriptions
    )
    name = slug(f"{task.name} {' '.join(labels)}")
    return replace(task, name=name, labels=tuple(labels), examples=examples, descriptions=descriptions)
