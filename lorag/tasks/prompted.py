"""What a user without an adapter would write: the description and a few examples before the input."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorag.errors import TaskError

if TYPE_CHECKING:
    from lorag.tasks.suite import Example, Task

__all__ = ["Conversation", "draw_shots", "with_description", "with_shots"]


class Conversation(str):
    """An input after examples: earlier turns where prompts are chats, and one text anywhere else.

    Attributes:
        description: What is to be done; it opens the first turn.
        shots: Inputs and outputs of the examples.
        last: The input that is to be answered.
    """

    description: str
    shots: tuple[tuple[str, str], ...]
    last: str

    def __new__(cls, description: str, shots: Sequence[tuple[str, str]], last: str) -> Conversation:  # noqa: D102 - the class says it
        parts = [description, *(f"Input: {text}\nOutput: {answer}" for text, answer in shots), f"Input: {last}\nOutput:"]
        made = super().__new__(cls, "\n\n".join(parts))
        made.description, made.shots, made.last = description, tuple(shots), last
        return made

    def __getnewargs__(self) -> tuple[str, tuple[tuple[str, str], ...], str]:  # type: ignore[override]  # copies keep the parts
        return self.description, self.shots, self.last

    @property
    def turns(self) -> list[str]:
        """What user and assistant say in turn; the user's last turn is to be answered."""
        said = [text for shot in self.shots for text in shot] + [self.last]
        return [f"{self.description}\n\n{said[0]}", *said[1:]]

    def shorter(self) -> str:
        """The same without its first example; without any left, a plain text."""
        return Conversation(self.description, self.shots[1:], self.last) if len(self.shots) > 1 else f"{self.description}\n\n{self.last}"


def with_description(task: Task, descriptions: Sequence[str]) -> Task:
    """A task whose inputs begin with a description; where there are several, examples take them in turn.

    Raises:
        TaskError: If the inputs are not texts.
    """
    _require_texts(task)
    count = len(descriptions)
    said = (replace(e, input=f"{descriptions[i % count]}\n\n{e.input}") for i, e in enumerate(task.examples))
    return replace(task, examples=tuple(said))


def draw_shots(task: Task, count: int, seed: int) -> list[Example]:
    """Training examples of a task, at most `count`: different outputs first, so that of yes and no both are shown.

    Raises:
        TaskError: If there is no training example.
    """
    drawn = list(task.split("train"))
    if not drawn:
        raise TaskError(f"task {task.name!r} has no training examples")
    random.Random(f"{seed}/{task.name}").shuffle(drawn)
    seen: dict[str, int] = {}
    turns = []
    for example in drawn:
        turns.append(seen.get(example.output, 0))
        seen[example.output] = turns[-1] + 1
    return [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: turns[i])[:count]]


def with_shots(task: Task, description: str, count: int, seed: int) -> Task:
    """A task whose test inputs come after a description and `count` training examples, the same ones before each of them.

    Raises:
        TaskError: If the inputs are not texts, or there is no training example.
    """
    _require_texts(task)
    shots = [(shot.input, shot.output) for shot in draw_shots(task, count, seed)]
    test = (replace(example, input=Conversation(description, shots, example.input)) for example in task.split("test"))
    return replace(task, examples=tuple(test))


def _require_texts(task: Task) -> None:
    if task.inputs != "text":
        raise TaskError(f"no description can be put before the inputs of task {task.name!r}", got=task.inputs, expected="text")
