"""A few examples, if there are some: which adapter makes them likelier, and gradient steps on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.adapters.factors import Factors
from lorag.bank.experts import ExpertConfig, train_group
from lorag.errors import TaskError
from lorag.tasks.suite import Example, Task

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import Runner
    from lorag.spaces import WeightSpace

__all__ = ["check_examples", "likelier", "refine", "refine_tasks"]

# Peak rates of Adam as shares of the factors' root mean square. What one example can teach is learned once the steps'
# rates add up to about 0.6, in few steps or in many; going on forgets the description. More examples bear a longer way.
_WAY, _MOST = 0.6, 0.1
_BATCH = 8
_WEIGHED = 16  # examples by which adapters are compared, at most


def check_examples(examples: Sequence[tuple[str, str]], refine_steps: int, least: int = 0) -> list[tuple[str, str]]:
    """Checked examples.

    Raises:
        TaskError: If one is not a pair of texts, if there are fewer than the least, or if steps are asked for without examples.
    """
    if refine_steps < 0:
        raise TaskError("refine_steps must not be negative", got=refine_steps)
    if isinstance(examples, str | bytes):
        raise TaskError("examples must be a list of (input, output)", got=type(examples).__name__)
    for number, pair in enumerate(examples):
        fits = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        if not fits:
            raise TaskError(f"examples[{number}] cannot be used", got=repr(pair)[:80], expected='("an input", "its output")')
    if refine_steps and not examples:
        raise TaskError("refine_steps needs examples", remedy="Give examples=[(input, output), …], or refine_steps=0.")
    if len(examples) < least:
        raise TaskError("no example to read", got=len(examples), remedy="Give examples=[(input, output), …], or a description.")
    return [(text, answer) for text, answer in examples]


def likelier(runner: Runner, space: WeightSpace, codes: Tensor, examples: Sequence[tuple[str, str]]) -> int:
    """The number of the code, of (n, c), under whose adapter the outputs of examples are likeliest."""
    adapters = space.to(runner.device, torch.float32).differentiable(codes.to(runner.device))
    return int(runner.likelihoods(adapters, len(codes), examples[:_WEIGHED]).argmax())


def refine(
    runner: Runner,
    adapter: LoraAdapter,
    examples: Sequence[tuple[str, str]],
    steps: int,
    seed: int = 0,
    learning_rate: float | None = None,
) -> LoraAdapter:
    """Trains an adapter further on a few examples, carefully: it holds what the description said, they are few.

    Args:
        runner: The base model and its objective.
        adapter: Where to start.
        examples: (input, output) of the task. For encoders an output is a label; the labels are those that occur.
        steps: Gradient steps.
        seed: Seed of sampling.
        learning_rate: Peak rate of Adam. By default a share of the size of the adapter's own factors, so that it suits any
            base model: the smaller, the more steps there are, and the larger, by a square root, the more examples.

    Returns:
        The refined adapter; the very same adapter if it answers all examples word for word already.

    Raises:
        TaskError: If an encoder's examples hold too few classes to learn from.
    """
    examples_once = tuple(Example(text, answer, "train") for text, answer in dict.fromkeys(examples))
    labels = tuple(dict.fromkeys(example.output for example in examples_once)) if runner.objective.closed_labels else None
    task = Task("examples", "user", ("a few examples",), labels, "unknown", "the user", examples_once)
    return refine_tasks(runner, [adapter], [task], steps, seed, learning_rate)[0]


def refine_tasks(
    runner: Runner,
    adapters: Sequence[LoraAdapter],
    tasks: Sequence[Task],
    steps: int,
    seed: int = 0,
    learning_rate: float | None = None,
) -> list[LoraAdapter]:
    """Refines adapter number i, all of one rank, on the training examples of task number i; all tasks have as many.

    An adapter that gives every example's answer word for word comes back as it is: they have nothing to teach it, and steps on a
    few of them would only forget the description.
    """
    if steps < 1:
        return list(adapters)
    for task in tasks:
        runner.objective.check_examples(task)
    left = [place for place, answered in enumerate(_answered(runner, adapters, tasks)) if not answered]
    refined = list(adapters)
    if left:
        trained = _train(runner, [adapters[i] for i in left], [tasks[i] for i in left], steps, seed, learning_rate)
        for place, adapter in zip(left, trained, strict=True):
            refined[place] = adapter
    return refined


def _train(
    runner: Runner,
    adapters: Sequence[LoraAdapter],
    tasks: Sequence[Task],
    steps: int,
    seed: int,
    learning_rate: float | None,
) -> list[LoraAdapter]:
    most = max(len(task.split("train")) for task in tasks)
    if learning_rate is None:
        learning_rate = _size(adapters) * min(_MOST, _WAY * most**0.5 / steps)
    config = ExpertConfig(steps=steps, batch=min(_BATCH, most), learning_rate=learning_rate, checkpoints=1, seed=seed)
    refined = [checkpoints[-1] for checkpoints in train_group(runner, tasks, adapters[0].rank, config, start=adapters)]
    return [replace(start, factors=end.factors, info={}) for start, end in zip(adapters, refined, strict=True)]


def _answered(runner: Runner, adapters: Sequence[LoraAdapter], tasks: Sequence[Task]) -> list[bool]:
    """Which of the adapters give the outputs of all their examples; classes chosen from few do not prove it."""
    if not runner.objective.word_for_word:
        return [False] * len(tasks)
    as_tests = [replace(task, examples=tuple(replace(example, split="test") for example in task.split("train"))) for task in tasks]
    stacked = Factors.stack([adapter.factors for adapter in adapters], runner.device)
    scores = runner.scores(stacked, as_tests, limit=max(len(task.examples) for task in as_tests))
    return [score[runner.objective.metric] == 1 for score in scores]


def _size(adapters: Sequence[LoraAdapter]) -> float:
    """Root mean square of all factors as they are trained, scaling folded in."""
    stacked = Factors.stack([adapter.factors for adapter in adapters])
    values = torch.cat([factor.flatten() for pair in stacked.values() for factor in pair])
    return values.square().mean().sqrt().item()
