"""A few examples of each of several tasks: what one adapter for all of them may learn from, and whether it can exist."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lorag.adapters.factors import Factors
from lorag.base.objectives.base import task_rng, training_examples

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import Runner
    from lorag.tasks.suite import Task

__all__ = ["Reduction", "minimise", "few_examples", "learn_weights", "shared_inputs", "told_apart", "warn_of_shared_inputs"]

logger = logging.getLogger(__name__)

Reduction = Literal["sum", "worst"]
Losses = Callable[[str, int], Tensor]  # of each task (n,), from a draw's name and its number of examples
_BATCH = 8
_PROBED = 32  # inputs of each task by which tasks are told apart
_APART = 3.0


def few_examples(task: Task, most: int, seed: int) -> Task:
    """The task with at most so many of its training examples, and no others."""
    examples = training_examples(task)
    return replace(task, examples=tuple(task_rng(task, f"support/{seed}").sample(examples, min(most, len(examples)))))


def told_apart(runner: Runner, tasks: Sequence[Task]) -> Tensor:
    """Which pairs of tasks (n, n) their inputs tell apart; no task is told apart from itself.

    They are not if training inputs are the same, or if the base model's hidden states of them look like two samples of
    one distribution: the squared distance of two means of N states each is then about (s² + s'²) / N, with s² their
    spread. Pairs below three times that count as one (sandbox: at most 1.7 within a domain, at least 8 between domains, where
    cosines of task vectors are .96 to 1 and .25 to .74).
    """
    means, noise, owners = [], [], defaultdict(list)
    for number, task in enumerate(tasks):
        inputs = [example.input for example in training_examples(task)]
        states = runner.hidden(inputs[:_PROBED]).double().cpu()
        means.append(states.mean(0))
        noise.append((states - means[-1]).square().sum() / max(1, len(states) - 1) / len(states))
        for text in set(inputs):
            owners[text].append(number)
    middle, spread = torch.stack(means), torch.stack(noise)
    distances = torch.cdist(middle, middle, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart = distances >= _APART * (spread[:, None] + spread[None])
    for sharing in (torch.tensor(numbers) for numbers in owners.values() if len(numbers) > 1):
        apart[sharing[:, None], sharing] = False
    return apart.fill_diagonal_(False)


def shared_inputs(runner: Runner, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Pairs of tasks whose inputs do not tell them apart, by name."""
    apart = told_apart(runner, tasks)
    return [(one.name, other.name) for (i, one), (j, other) in itertools.combinations(enumerate(tasks), 2) if not apart[i, j]]


def warn_of_shared_inputs(runner: Runner, tasks: Sequence[Task]) -> None:
    """Warns that one adapter cannot tell apart tasks with the same kind of input."""
    pairs = shared_inputs(runner, tasks)
    if pairs:
        shown = "; ".join(" and ".join(pair) for pair in pairs[:3])
        logger.warning("one adapter cannot tell apart tasks that share their inputs: %s (%d pairs)", shown, len(pairs))


def minimise(groups: Sequence[tuple[Sequence[Tensor], float]], losses: Losses, steps: int, reduction: Reduction) -> tuple[float, float]:
    """Lowers the sum or the worst of several tasks' losses by Adam, in place.

    Args:
        groups: Parameters and the rate of each group.
        losses: Loss of each task (n,) on some of its examples.
        steps: Gradient steps.
        reduction: "sum" or "worst".

    Returns:
        The loss on a fixed draw before, and of the state with the lowest, which is kept.
    """
    parameters = [tensor for group, _ in groups for tensor in group]
    optimizer = torch.optim.Adam([{"params": list(group), "lr": rate} for group, rate in groups], betas=(0.9, 0.98))

    def value(draw: str, count: int) -> Tensor:
        each = losses(draw, count)
        return each.mean() if reduction == "sum" else each.max()

    def check() -> float:
        with torch.no_grad():
            return value("check", 2 * _BATCH).item()

    before = best = check()
    kept = [tensor.detach().clone() for tensor in parameters]
    for step in range(steps):
        optimizer.zero_grad()
        value(str(step), _BATCH).backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            now = check()
            if now < best:
                best, kept = now, [tensor.detach().clone() for tensor in parameters]
    with torch.no_grad():
        for tensor, state in zip(parameters, kept, strict=True):
            tensor.copy_(state)
    return before, best


def learn_weights(
    runner: Runner,
    adapters: Sequence[LoraAdapter],
    tasks: Sequence[Task],
    *,
    per_module: bool = True,
    steps: int = 100,
    learning_rate: float = 0.05,
    reduction: Reduction = "sum",
    seed: int = 0,
) -> Tensor:
    """Weights of a sum of adapters, learned by the loss on a few examples of each task.

    One weight for each expert and module is CAT of LoRA Soups (arXiv 2410.13025), one for each expert what LoraHub
    (arXiv 2307.13269) searches for without gradients.

    Args:
        runner: The base model.
        adapters: n experts.
        tasks: The tasks that the sum should solve, with the few examples that are learned from.
        per_module: Whether each module has weights of its own.
        steps: Gradient steps.
        learning_rate: Of Adam.
        reduction: "sum" or "worst" of the tasks' losses.
        seed: Seed of the draws.

    Returns:
        Weights (n, m) on the CPU.
    """
    device = runner.device
    count, names = len(adapters), runner.layout.names
    summed = Factors.concatenated([adapter.factors for adapter in adapters])
    stacked = Factors.stack([summed], device)
    ranks = torch.tensor([adapter.rank for adapter in adapters], device=device)
    weights = torch.full((count, len(names) if per_module else 1), 1 / count, device=device, requires_grad=True)

    def losses(draw: str, number: int) -> Tensor:
        spread = weights.expand(-1, len(names)).repeat_interleave(ranks, 0)
        weighted = {name: (a, b * spread[:, index]) for index, (name, (a, b)) in enumerate(stacked.items())}
        return runner.losses(weighted, tasks, number, f"weights/{seed}/{draw}")

    minimise([([weights], learning_rate)], losses, steps, reduction)
    return weights.detach().expand(-1, len(names)).cpu()
