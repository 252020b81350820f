"""What a merge that learned on examples is worth: beside an adapter trained from nothing on the same examples, scored on others.

Merging coefficients are learned on examples of the very tasks that the merge is for, so that an adapter could have been trained on them
instead; where that does better, merging was for nothing (Liu et al., arXiv 2602.12323).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lorag.adapters.factors import Factors
from lorag.bank.experts import ExpertConfig, train_group
from lorag.base.objectives.base import training_examples

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import Runner
    from lorag.tasks.suite import Task

__all__ = ["compare_with_fresh", "train_together"]

logger = logging.getLogger(__name__)

_SCORED = 16  # other examples of each task
_BATCH = 32


def compare_with_fresh(
    runner: Runner, merged: LoraAdapter, tasks: Sequence[Task], support: Sequence[Task], *, rank: int, steps: int = 100, seed: int = 0
) -> dict[str, float] | None:
    """Mean loss of a merge and of a fresh adapter on training examples that neither saw; warns where the fresh one is better.

    Args:
        runner: The base model.
        merged: What was learned on the support.
        tasks: The tasks that it is for.
        support: The same tasks with the examples that it was learned on.
        rank: Of the fresh adapter.
        steps: Its gradient steps, as many as the merge took.
        seed: Its seed, and that of the draw.

    Returns:
        Losses by "merged" and "fresh"; None where a task has no other examples.
    """
    others = []
    for task, few in zip(tasks, support, strict=True):
        seen = {example.input for example in few.examples}
        others.append(replace(task, examples=tuple(example for example in training_examples(task) if example.input not in seen)))
    if not all(task.examples for task in others):
        return None
    fresh = train_together(runner, support, rank=rank, steps=steps, seed=seed)
    losses = {}
    with torch.no_grad():
        for name, one in (("merged", merged), ("fresh", fresh)):
            stacked = Factors.stack([one.factors], runner.device)
            losses[name] = round(runner.losses(stacked, others, _SCORED, f"controls/{seed}").mean().item(), 4)
    if losses["fresh"] <= losses["merged"]:
        logger.warning(
            "an adapter of rank %d trained from nothing on the same %d examples does better than the merge: "
            "loss %.3f against %.3f on others; train one, or merge with --method regmean, which learns nothing by steps",
            rank,
            sum(len(task.examples) for task in support),
            losses["fresh"],
            losses["merged"],
        )
    return losses


def train_together(runner: Runner, support: Sequence[Task], *, rank: int, steps: int, seed: int) -> LoraAdapter:
    """One adapter trained from nothing on all examples of several tasks together."""
    mixed = replace(support[0], name="mixed", examples=tuple(example for task in support for example in task.examples))
    config = ExpertConfig(steps=steps, batch=min(_BATCH, len(mixed.examples)), checkpoints=1, seed=seed)
    return train_group(runner, [mixed], rank, config)[0][-1]
