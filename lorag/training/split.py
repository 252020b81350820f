"""The tasks of a training run, and which of them are held out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from lorag.errors import ConfigError, TaskError
from lorag.tasks.finding import TRAIN, VALIDATION, WITHOUT_EXPERT, find_tasks
from lorag.tasks.suite import connected

if TYPE_CHECKING:
    from lorag.tasks.suite import Task, TaskSuite

__all__ = ["RunTasks", "Split", "SplitRule"]

_GROUPS = ("task", "texts", "source")


@dataclass(frozen=True)
class RunTasks:
    """The tasks of a run beside a bank, whose experts' tasks are counted first.

    Attributes:
        suite: All tasks with their examples, the experts' among them; None without examples.
        without_expert: More training tasks, which have examples but no expert.
        held_out: Tasks for validation, which have no expert; if there are none, a share of the tasks is held out.
    """

    suite: TaskSuite | None = None
    without_expert: Collection[Task] = ()
    held_out: Collection[Task] = ()

    @classmethod
    def named(cls, name: str | None, experts: int) -> Self:
        """The tasks of a suite by name, for a bank of so many experts; without any expert all training tasks are without one.

        Raises:
            TaskError: If there is no expert, and the suite has splits but none to learn from.
        """
        if name is None:
            return cls()
        suite = find_tasks(name)
        if experts:
            return cls(suite, suite.select(suite.splits.get(WITHOUT_EXPERT, ())))
        if not suite.splits:
            return cls(suite, suite)
        if not suite.splits.get(TRAIN):
            raise TaskError(f"tasks: {name} has no split {TRAIN!r} to learn from", expected="it in splits.json, or no splits.json")
        return cls(suite, suite.of_split(TRAIN), suite.select(suite.splits.get(VALIDATION, ())))

    @property
    def others(self) -> list[Task]:
        """The tasks without an expert, those to learn from first."""
        return [*self.without_expert, *self.held_out]


@dataclass(frozen=True)
class Split:
    """Which tasks are learned from, and which are held out: numbers, first those of the experts' tasks, then of `RunTasks.others`.

    Attributes:
        groups: Group of each task: the number of the group's first member.
        training: Tasks that may be learned from, ascending.
        validation: Held-out tasks, whole groups, ascending.
    """

    groups: list[int]
    training: list[int]
    validation: list[int]


@dataclass(frozen=True)
class SplitRule:
    """How a run's tasks are divided.

    Attributes:
        groups: What makes a group, which is held out as a whole: "task", "texts" or "source" (see `TrainConfig`).
        validation: Share of the tasks that is held out.
        seed: Chooses which.
    """

    groups: str = "task"
    validation: float = 0.1
    seed: int = 0

    @classmethod
    def stated(cls, config: Mapping[str, Any]) -> Self:
        """The rule that the settings of a finished run state."""
        return cls(str(config.get("groups", "task")), float(config.get("validation", 0.1)), int(config.get("seed", 0)))

    def split(self, experts: Sequence[str], tasks: RunTasks) -> Split:
        """Divides the tasks of some experts, and those without one.

        The share is held out of the experts' groups and, apart from them, of the groups without any expert, so that tasks without an
        expert change nothing about which experts are held out.

        Args:
            experts: Names of the experts.
            tasks: The tasks of the run.

        Raises:
            ConfigError: If there is no such rule of grouping, or it needs a suite.
        """
        if self.groups not in _GROUPS or (self.groups != "task" and tasks.suite is None):
            expected = " or ".join(_GROUPS)
            raise ConfigError(
                "groups cannot be used", got=repr(self.groups), expected=expected, remedy="Other than task, it needs tasks=PATH."
            )
        names = [*experts, *(task.key for task in tasks.others)]
        group_of = self._groups(names, tasks.suite)
        if tasks.held_out and not experts:
            first = len(names) - len(tasks.held_out)
            return Split(group_of, list(range(first)), list(range(first, len(names))))
        members: dict[int, list[int]] = {}
        for number, group in enumerate(group_of):
            members.setdefault(group, []).append(number)
        held: set[int] = set()
        rng = torch.Generator().manual_seed(self.seed)
        for without_expert in (False, True):
            candidates = [group for group in members.values() if (group[0] >= len(experts)) == without_expert]
            sizes = [len([i for i in group if without_expert or i < len(experts)]) for group in candidates]
            most, count = int(self.validation * sum(sizes)), 0
            for place in torch.randperm(len(candidates), generator=rng).tolist():
                if count + sizes[place] <= most:
                    held.update(candidates[place])
                    count += sizes[place]
        return Split(group_of, [i for i in range(len(names)) if i not in held], sorted(held))

    def _groups(self, names: Sequence[str], suite: TaskSuite | None) -> list[int]:
        """Group of each task: the tasks that an unseen task like it would not have beside it."""
        tasks = {task.key: task for task in suite or ()}
        marks: list[set[str]] = []
        for name in names:
            if self.groups == "source":
                marks.append({tasks[name].source})
            elif self.groups == "texts":
                marks.append({name} | {example.input for example in tasks[name].split("train")})
            else:
                marks.append({name})
        group_of = {number: group[0] for group in connected(marks) for number in group}
        return [group_of[number] for number in range(len(names))]
