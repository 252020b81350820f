"""Make a bank and a suite ready for fitting: codes, embedded descriptions, groups and split, and the base model for their examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.methods.training_set import TrainingSet
from lorag.progress import progress_bar
from lorag.spaces import SpaceInputs, WeightSpace, fit_space
from lorag.text.conditioning import Conditioner
from lorag.text.misspelling import misspell_some
from lorag.text.spelling import Spelling
from lorag.training.split import RunTasks, Split, SplitRule

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.base.runner import Runner
    from lorag.tasks.suite import Task
    from lorag.text.embedding import Embedding, TextEmbedder

__all__ = ["Prepared", "SpaceChoice", "prepare"]


@dataclass(frozen=True)
class SpaceChoice:
    """Which weight space is fitted.

    Attributes:
        kind: One of `lorag.spaces`.
        k: Dimensions of a shared subspace on each side; input directions of activation bases.
        rank: Rank of factors in activation bases.
    """

    kind: str = "shared_subspace"
    k: int = 32
    rank: int = 16


@dataclass(frozen=True)
class Prepared:
    """A bank made ready for fitting: what all methods on it share, and the words of its descriptions."""

    bank: AdapterBank
    split: Split
    space: WeightSpace
    data: TrainingSet
    embedder: TextEmbedder
    runner: Runner | None = None
    spelling: Spelling = field(default_factory=Spelling)


def prepare(
    bank: AdapterBank,
    embedder: TextEmbedder,
    tasks: RunTasks | None = None,
    rule: SplitRule | None = None,
    *,
    runner: Runner | None = None,
    space: WeightSpace | SpaceChoice | None = None,
    wordings: int = 0,
    typos: float = 0.0,
    quiet: bool = False,
) -> Prepared:
    """Encodes a bank's experts and the descriptions of all tasks.

    Args:
        bank: The training experts, and only they; it may be empty where the weight space is given, or needs none.
        embedder: Embeds descriptions.
        tasks: The experts' tasks with examples, and tasks without an expert; by default there are neither.
        rule: What is held out; its seed also chooses typing errors and whatever the space draws.
        runner: The base model, for the tasks' examples; without it nothing is learned from them.
        space: A fitted weight space, or which one is fitted.
        wordings: Descriptions used of each expert; 0 uses all.
        typos: Share of the descriptions, other than each expert's first, that get a typing error.
        quiet: No progress bars.
    """
    tasks, rule = tasks or RunTasks(), rule or SplitRule()
    bank.base.check()
    split = rule.split(bank.names, tasks)
    if not isinstance(space, WeightSpace):
        choice = space or SpaceChoice()
        unpaired = [tasks.others[i - len(bank)] for i in split.training if i >= len(bank)]
        space = fit_space(choice.kind, SpaceInputs(bank.base.layout, bank, choice.k, choice.rank, runner, unpaired, rule.seed, quiet))
    codes, deviations = _encoded(bank, space, quiet)
    described = [*(expert.descriptions for expert in bank.experts), *(task.descriptions for task in tasks.others)]
    texts = [
        misspell_some(of_task[: wordings or None], typos, random.Random(f"typos/{rule.seed}/{i}")) for i, of_task in enumerate(described)
    ]
    flat = iter(embedder.embed([text for of_task in texts for text in of_task], quiet=quiet))
    embeddings = [[next(flat) for _ in of_task] for of_task in texts]
    examples = [] if tasks.suite is None or runner is None else [*tasks.suite.of_experts(bank.names), *tasks.others]
    data = TrainingSet(
        space=space if runner is None else space.to(runner.device, torch.float32),
        codes=codes,
        deviations=deviations,
        embeddings=embeddings,
        groups=split.groups,
        training=split.training,
        validation=split.validation,
        conditioner=_conditioner(bank, tasks.others, embeddings, split, embedder.size),
        tasks=examples,
        alignment=space.text_alignment(embedder, quiet=quiet),
    )
    spelling = Spelling.of(text for i in split.training for text in described[i])
    return Prepared(bank, split, space, data, embedder, runner, spelling)


def _encoded(bank: AdapterBank, space: WeightSpace, quiet: bool) -> tuple[Tensor, Tensor]:
    """Codes of the experts (n, c), and their standard deviations over checkpoints (n, c)."""
    codes, deviations = torch.zeros(len(bank), space.size), torch.zeros(len(bank), space.size)
    for number, expert in enumerate(progress_bar(bank.experts, desc="encoding experts", disable=quiet, leave=False)):
        checkpoints = torch.stack([space.encode(bank.adapter(expert.name, i).factors) for i in range(expert.checkpoints)])
        codes[number] = checkpoints[-1]
        if len(checkpoints) > 1:
            deviations[number] = checkpoints.std(0)
    return codes, deviations


def _conditioner(
    bank: AdapterBank, more: Sequence[Task], embeddings: Sequence[Sequence[Embedding]], split: Split, size: int
) -> Conditioner:
    """Compares descriptions with those of the experts, or, where there are none, of the training tasks."""
    if len(bank) or not more:
        return Conditioner.fit(bank.names, embeddings[: len(bank)], size)
    return Conditioner.fit([more[i].key for i in split.training], [embeddings[i] for i in split.training])
