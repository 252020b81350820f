"""The sandbox's tasks: the grid skill x domain x style, its splits, and suites of examples for them.

Splits are by task. `train` tasks have experts in the bank, `without_expert` ones only examples. `test` tasks are unseen
combinations: the bank has experts of each pair of their skill, domain and style, but never of all three. `hard` tasks are
skill-domain pairs of which no style was ever seen. The base model is trained on all cells but those of `test` and `hard`.
"""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import dataclass

from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.worlds.sandbox import wordings, world

__all__ = ["HARD_PAIRS", "Cell", "build_suite", "cells", "splits"]

HARD_PAIRS = (
    ("date", "travel"),
    ("person", "sports"),
    ("place", "news"),
    ("amount", "shopping"),
    ("organisation", "education"),
    ("required", "weather"),
)
_TEST_PER_DOMAIN = 5
_BANK_STYLES = 3  # styles in which the bank has an expert, of each seen skill-domain pair


@dataclass(frozen=True, order=True)
class Cell:
    """One task of the grid."""

    skill: str
    domain: str
    style: str

    @property
    def name(self) -> str:
        """The task's name in suites and banks."""
        return f"{self.domain}-{self.skill}-{self.style}"


@functools.cache
def cells() -> tuple[Cell, ...]:
    """All tasks of the world."""
    return tuple(Cell(s, d, t) for d in world.DOMAINS for s in world.SKILLS for t in world.STYLES)


@functools.cache
def splits() -> dict[str, tuple[Cell, ...]]:
    """Returns the cells of `train`, `test`, `hard` and `without_expert` (training tasks that the bank has no expert of).

    The same on every machine. `test` takes five skills of each domain, its styles in equal numbers, and always
    the plain summary of a legal text.
    """
    rng = random.Random(2026)
    hard = tuple(cell for cell in cells() if (cell.skill, cell.domain) in HARD_PAIRS)
    test: list[Cell] = []
    styles = iter(list(world.STYLES) * 2 * len(world.DOMAINS))
    next(styles)  # the first style is given to the plain legal summary
    for name in world.DOMAINS:
        skills = [skill for skill in world.SKILLS if (skill, name) not in HARD_PAIRS]
        rng.shuffle(skills)
        if name == "legal":
            skills.remove("summarise")
            test.append(Cell("summarise", "legal", "plain"))
        test += [Cell(skill, name, next(styles)) for skill in skills[: _TEST_PER_DOMAIN - (name == "legal")]]
    train: list[Cell] = []
    for name in world.DOMAINS:
        for skill in world.SKILLS:
            if (skill, name) not in HARD_PAIRS:
                free = [cell for style in world.STYLES if (cell := Cell(skill, name, style)) not in test]
                train += rng.sample(free, _BANK_STYLES)
    left = set(cells()) - set(hard) - set(test) - set(train)
    return {
        "train": tuple(sorted(train)),
        "test": tuple(sorted(test)),
        "hard": hard,
        "without_expert": tuple(sorted(left)),
    }


def _examples(cell: Cell, count: int, split: str) -> tuple[Example, ...]:
    """Distinct examples of one cell; a task's texts do not depend on its skill or style."""
    rng = random.Random(zlib.crc32(f"{cell.domain}/{split}/{cell.skill}".encode()))
    answers: dict[str, str] = {}
    while len(answers) < count:
        text = world.write_text(cell.domain, rng)
        answers[text.text] = world.answer(text, cell.skill, cell.style, cell.domain)
    return tuple(Example(text, output, split) for text, output in answers.items())


def build_suite(chosen: tuple[Cell, ...], *, train: int, test: int, descriptions: int, wording: str, seed: int = 0) -> TaskSuite:
    """Writes a suite for some cells.

    Args:
        chosen: The cells.
        train: Training examples per task.
        test: Test examples per task; their texts differ from the training ones.
        descriptions: Descriptions per task.
        wording: "train" or "eval": which wordings describe the tasks.
        seed: Seed of the descriptions.
    """
    tasks = []
    for cell in chosen:
        rng = random.Random(zlib.crc32(f"{seed}/{wording}/{cell.name}".encode()))
        shown = _examples(cell, train, "train")
        seen = {example.input for example in shown}
        fresh = [example for example in _examples(cell, test + 8, "test") if example.input not in seen]
        tasks.append(
            Task(
                name=cell.name,
                suite="sandbox",
                descriptions=tuple(wordings.describe(cell.skill, cell.domain, cell.style, wording, rng, descriptions)),
                labels=None,
                license="Apache-2.0",
                source="written by lorag.worlds.sandbox",
                examples=shown + tuple(fresh[:test]),
            )
        )
    return TaskSuite(tasks)
