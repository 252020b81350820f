"""Make a bank and a suite ready for fitting: codes, embedded descriptions, groups and split, and the base model for their examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from lorag.base.runner import Runner
from lorag.errors import ConfigError
from lorag.methods.training_set import TrainingSet
from lorag.progress import progress_bar
from lorag.spaces import SpaceInputs, WeightSpace, fit_space
from lorag.spaces.activation_bases import ActivationBases, alignment
from lorag.tasks.finding import TRAIN, VALIDATION, WITHOUT_EXPERT, find_split, find_tasks
from lorag.tasks.suite import Task, TaskSuite, connected
from lorag.text.conditioning import Conditioner
from lorag.text.misspelling import misspell_some
from lorag.text.spelling import Spelling

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.text.embedding import Embedding, TextEmbedder

__all__ = ["Prepared", "RunTasks", "Split", "hold_out", "prepare", "tasks_of_run"]

_GROUPS = ("task", "texts", "source")


class RunTasks(TypedDict):
    """The tasks of a run, as `prepare` and `hold_out` take them.

    Attributes:
        suite: All tasks, the experts' among them; without it there are no examples, and nothing runs the base model.
        without_expert: More training tasks, which have examples but no expert.
        held_out: Tasks for validation, which have no expert; without them a share is held out.
    """

    suite: TaskSuite | None
    without_expert: TaskSuite | None
    held_out: TaskSuite | None


def tasks_of_run(name: str | None, experts: int) -> RunTasks:
    """The tasks of a suite by name, for a bank of so many experts; without any expert all training tasks are without one."""
    if name is None:
        return RunTasks(suite=None, without_expert=None, held_out=None)
    suite, more = find_tasks(name), find_split(name, WITHOUT_EXPERT if experts else TRAIN)
    return RunTasks(suite=suite, without_expert=more, held_out=None if experts else find_split(name, VALIDATION))


@dataclass(frozen=True)
class Prepared:
    """A bank made ready for fitting: what all methods on it share, and the words of its descriptions."""

    bank: AdapterBank
    space: WeightSpace
    data: TrainingSet
    embedder: TextEmbedder
    runner: Runner | None = None
    spelling: Spelling = field(default_factory=Spelling)


@dataclass(frozen=True)
class Split:
    """Which tasks are learned from, and which are held out.

    Attributes:
        groups: Group of each task, the number of its first member; the experts' tasks come first.
        training: Tasks that may be learned from.
        validation: Held-out tasks, whole groups.
    """

    groups: list[int]
    training: list[int]
    validation: list[int]


def prepare(
    bank: AdapterBank,
    embedder: TextEmbedder,
    *,
    space: WeightSpace | None = None,
    space_name: str = "shared_subspace",
    k: int = 32,
    rank: int = 16,
    wordings: int = 0,
    typos: float = 0.0,
    validation: float = 0.1,
    groups: str = "task",
    seed: int = 0,
    suite: TaskSuite | None = None,
    without_expert: TaskSuite | None = None,
    held_out: TaskSuite | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Prepared:
    """Encodes a bank's experts and the descriptions of all tasks.

    Args:
        bank: The training experts, and only they; it may be empty where the weight space is given, or needs none.
        embedder: Embeds descriptions.
        space: A fitted weight space; without one, `space_name` is fitted.
        space_name: A kind of `lorag.spaces`.
        k: Dimensions of a shared subspace; input directions of activation bases.
        rank: Rank of factors in activation bases.
        wordings: Descriptions used of each expert; 0 uses all.
        typos: Share of the descriptions, other than each expert's first, that get a typing error.
        validation: Share of the tasks held out for early stopping, of those with an expert and of the others alike.
        groups: Which tasks make a group: see `TrainConfig`.
        seed: Chooses which.
        suite: The experts' tasks; without it there are no examples, and nothing runs the base model.
        without_expert: More training tasks, which have examples but no expert.
        held_out: Tasks for validation, which have no expert; without them a share is held out.
        device: Where the base model runs.
        dtype: In which precision.
        quiet: No progress bars.
    """
    bank.base.check()
    more = [] if suite is None else [*(without_expert or ()), *(held_out or ())]
    split = hold_out(bank, suite, without_expert, groups=groups, validation=validation, seed=seed, held_out=held_out)
    layout = bank.base.layout
    runner = None if suite is None else Runner.open(bank.base, device, dtype)
    if space is None:
        training = [more[i - len(bank)] for i in split.training if i >= len(bank)]
        space = fit_space(space_name, SpaceInputs(layout, bank, k, rank, runner, training, seed, quiet))
    codes, deviations = [], []
    for expert in progress_bar(bank.experts, desc="encoding experts", disable=quiet, leave=False):
        checkpoints = torch.stack([space.encode(bank.adapter(expert.name, i).factors) for i in range(expert.checkpoints)])
        codes.append(checkpoints[-1])
        deviations.append(checkpoints.std(0) if len(checkpoints) > 1 else torch.zeros_like(checkpoints[0]))
    described = [*(expert.descriptions for expert in bank.experts), *(task.descriptions for task in more)]
    texts = [misspell_some(of_task[: wordings or None], typos, random.Random(f"typos/{seed}/{i}")) for i, of_task in enumerate(described)]
    flat = iter(embedder.embed([text for of_task in texts for text in of_task], quiet=quiet))
    embeddings = [[next(flat) for _ in of_task] for of_task in texts]
    examples, near = [], space
    if suite is not None and runner is not None:
        examples = [*suite.of_experts(bank.names), *more]
        near = space.to(runner.device, torch.float32)
    data = TrainingSet(
        space=near,
        codes=torch.stack(codes) if codes else torch.zeros(0, space.size),
        deviations=torch.stack(deviations) if deviations else torch.zeros(0, space.size),
        embeddings=embeddings,
        groups=split.groups,
        training=split.training,
        validation=split.validation,
        conditioner=_conditioner(bank, more, embeddings, split, embedder.size),
        tasks=examples,
        alignment=_alignment(space, embedder, quiet),
    )
    spelling = Spelling.of(text for i in split.training for text in described[i])
    return Prepared(bank, space, data, embedder, runner, spelling)


def _conditioner(
    bank: AdapterBank, more: Sequence[Task], embeddings: Sequence[Sequence[Embedding]], split: Split, size: int
) -> Conditioner:
    """Compares descriptions with those of the experts, or, where there are none, of the training tasks."""
    if len(bank) or not more:
        return Conditioner.fit(bank.names, embeddings[: len(bank)], size)
    return Conditioner.fit([more[i].key for i in split.training], [embeddings[i] for i in split.training])


def _alignment(space: WeightSpace, embedder: TextEmbedder, quiet: bool) -> Tensor | None:
    """The map (g, e, k) from embeddings to directions of the base model's inputs, where the space was found from texts."""
    if not isinstance(space, ActivationBases) or space.read is None:
        return None
    embeddings = torch.stack([one.pooled for one in embedder.embed(space.read.texts, quiet=quiet)])
    return alignment(space.read.coordinates, embeddings)


def hold_out(
    bank: AdapterBank,
    suite: TaskSuite | None,
    without_expert: TaskSuite | None,
    *,
    groups: str,
    validation: float,
    seed: int,
    held_out: TaskSuite | None = None,
) -> Split:
    """Groups and split of a bank's tasks and of those without an expert: those that `prepare` finds with the same arguments.

    The share is held out of the experts' groups and, apart from them, of the groups without any expert, so that tasks without an expert
    change nothing about which experts are held out.

    Raises:
        ConfigError: If there is no such rule of grouping, or it needs a suite.
    """
    if groups not in _GROUPS or groups != "task" and suite is None:
        raise ConfigError(
            "groups cannot be used", got=repr(groups), expected=" or ".join(_GROUPS), remedy="Other than task, it needs tasks=PATH."
        )
    experts, rng = len(bank), torch.Generator().manual_seed(seed)
    more = [] if suite is None else [*(without_expert or ()), *(held_out or ())]
    of = _groups([*bank.names, *(task.key for task in more)], suite, groups)
    if held_out is not None and not experts:
        first = len(of) - len(held_out)
        return Split(of, list(range(first)), list(range(first, len(of))))
    members: dict[int, list[int]] = {}
    for task, group in enumerate(of):
        members.setdefault(group, []).append(task)
    held: set[int] = set()
    for whole in (False, True):
        groups_of = [group for group in members.values() if (group[0] >= experts) == whole]
        sizes = [len([i for i in group if whole or i < experts]) for group in groups_of]
        most, count = int(validation * sum(sizes)), 0
        for place in torch.randperm(len(groups_of), generator=rng).tolist():
            if count + sizes[place] <= most:
                held.update(groups_of[place])
                count += sizes[place]
    return Split(of, [i for i in range(len(of)) if i not in held], sorted(held))


def _groups(names: Sequence[str], suite: TaskSuite | None, rule: str) -> list[int]:
    """Group of each task, the number of its first member: tasks that an unseen task like its own would not have beside it."""
    tasks = {task.key: task for task in suite or ()}
    marks: list[set[str]] = []
    for name in names:
        marks_of = {name}
        if rule == "source":
            marks_of = {tasks[name].source}
        elif rule == "texts":
            marks_of |= {example.input for example in tasks[name].split("train")}
        marks.append(marks_of)
    of = {index: group[0] for group in connected(marks) for index in group}
    return [of[index] for index in range(len(names))]
