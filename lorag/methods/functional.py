"""Functional training: the frozen base model's loss on tasks flows through generated codes into whatever made them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorag.base.objectives.base import training_examples
from lorag.errors import GeneratorError
from lorag.methods.method import draw
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.keeping import KeptTasks, Predict
    from lorag.methods.training_set import TrainingSet
    from lorag.tasks.suite import Task

__all__ = [
    "FunctionalSettings",
    "code_losses",
    "evenly",
    "mean_loss",
    "require_runner",
    "task_vectors",
    "train_functionally",
    "validation_loss",
]

_LEAST = 0.02  # running loss below which a task counts as learned; it is still drawn now and then
_NEWS = 0.3  # weight of a new loss in the running one
_VALIDATED, _EXAMPLES = 64, 8  # held-out tasks of a validation, and examples of each


# --- losses of codes --------------------------------------------------------------------------------------------------


def require_runner(name: str, data: TrainingSet, runner: Runner | None) -> Runner:
    """The base model, for a method that learns from tasks.

    Raises:
        GeneratorError: If there is no base model, or no examples.
    """
    if runner is None or not data.tasks:
        raise GeneratorError(
            f"{name} learns from examples of tasks, and there are none",
            remedy="Give their suite with tasks=PATH, or, where the method can do without, settings.functional.steps=0.",
        )
    return runner


def code_losses(runner: Runner, data: TrainingSet, codes: Tensor, indices: Sequence[int], count: int, seed: str) -> Tensor:
    """Loss (b,) of code number i, of (b, c), on `count` training examples of task `indices[i]`; differentiable."""
    return runner.losses(data.space.differentiable(codes), [data.tasks[i] for i in indices], count, seed)


def mean_loss(runner: Runner, data: TrainingSet, codes: Tensor, indices: Sequence[int], count: int, seed: str, chunk: int = 32) -> float:
    """Mean of `code_losses`, without gradients, in chunks that bound memory."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(indices), chunk):
            part = slice(start, start + chunk)
            total += code_losses(runner, data, codes[part], indices[part], count, seed).sum().item()
    return total / len(indices)


def validation_loss(runner: Runner, data: TrainingSet, predict: Callable[[Sequence[int]], Tensor]) -> Callable[[], float]:
    """The loss of codes (b, c) that are predicted for held-out tasks; of many, 64 at even distances.

    Args:
        runner: The base model.
        data: The tasks.
        predict: Codes for some tasks.
    """
    held = evenly(data.validation, _VALIDATED)

    def loss() -> float:
        with torch.no_grad():
            codes = predict(held)
        return mean_loss(runner, data, codes, held, _EXAMPLES, "validation")

    return loss


def evenly(indices: Sequence[int], most: int) -> list[int]:
    """All indices, or `most` of them at even distances."""
    count = min(most, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def task_vectors(runner: Runner, tasks: Sequence[Task], count: int = 32) -> Tensor:
    """Task vectors (b, h): the bare base model's mean hidden state over `count` training inputs of each task.

    ICM-LoRA's condition (arXiv 2501.17635), but from the base model without an adapter, as it must be at use.
    """
    return torch.stack([runner.hidden([one.input for one in training_examples(task)[:count]]).mean(0) for task in tasks])


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class FunctionalSettings:
    """Length and width of functional training.

    Attributes:
        steps: Steps through the frozen base model; 0 leaves them out.
        learning_rate: Their peak rate.
        tasks: Tasks in a step, each with its own generated adapter.
        examples: Training examples of each.
        focus: Tasks are drawn in proportion to this power of their running loss, so that hard ones come more often; with 0
            all are alike.
        balance: Tasks are drawn in proportion to this power of one over the number of training tasks of their source: 0 draws all
            tasks alike, 1 all sources, whether they have three tasks or three hundred.
        validate_every: Steps between validations.
    """

    steps: int = 600
    learning_rate: float = 1e-3
    tasks: int = 32
    examples: int = 4
    focus: float = 0.5
    balance: float = 0.0
    validate_every: int = 100


def train_functionally(
    name: str,
    network: nn.Module,
    predict: Predict,
    data: TrainingSet,
    loop: TrainingLoop,
    settings: FunctionalSettings,
    runner: Runner | None,
    kept: KeptTasks | None = None,
) -> float:
    """Trains a network through the base model, and leaves it in the state that was best on held-out tasks.

    Args:
        name: Names the stage.
        network: What is trained.
        predict: Codes (b, c) for tasks (indices) described by embeddings.
        data: The tasks with their examples.
        loop: Runs the stage.
        settings: Its length.
        runner: The base model.
        kept: Tasks of which the network says what it said before; those are not drawn.

    Returns:
        The best validation loss.

    Raises:
        GeneratorError: If there is no base model, or no examples.
    """
    if settings.steps == 0:
        return float("nan")
    runner = require_runner(name, data, runner)
    training = torch.tensor(list(data.training))
    odds = _odds([data.tasks[i].source for i in data.training], settings.balance)
    if kept:
        odds[torch.isin(training, torch.tensor(list(kept.tasks)))] = 0.0
    curriculum = _Curriculum(network, odds)

    def loss(_: nn.Module, step: int) -> Batch:
        picks = curriculum.pick(settings.tasks, settings.focus, loop.rng)
        rows = training[picks].tolist()
        drawn = draw(data, rows, loop)
        beside = kept.draw(len(rows), loop) if kept else []

        def losses(part: slice) -> Tensor:
            losses = code_losses(runner, data, predict(rows[part], drawn[part]), rows[part], settings.examples, f"{name}/{step}")
            return losses + kept.losses(predict, beside[part]) if kept else losses

        return Batch(len(rows), losses, learned=functools.partial(curriculum.remember, picks))

    validate = validation_loss(runner, data, lambda held: predict(held, [data.embeddings[i][0] for i in held]))
    steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=settings.validate_every)
    return loop.run(f"{name} functional", curriculum, loss, (lambda _: validate()) if data.validation else None, steps)


def _odds(sources: Sequence[str], balance: float) -> Tensor:
    """How often each task (n,) is drawn beside the others, by its source's number of tasks."""
    sizes = Counter(sources)
    return torch.tensor([sizes[source] for source in sources], dtype=torch.float32) ** -balance


class _Curriculum(nn.Module):
    """A network and its running loss on each task (n,), together so that an interrupted stage goes on with both.

    Args:
        network: What is trained.
        odds: How often each task (n,) is drawn beside the others of the same loss.
    """

    running: Tensor

    def __init__(self, network: nn.Module, odds: Tensor) -> None:
        super().__init__()
        self.network, self.odds = network, odds
        self.register_buffer("running", torch.ones(len(odds), device=next(network.parameters()).device))

    def pick(self, count: int, focus: float, rng: torch.Generator) -> Tensor:
        """Draws `count` different tasks, or all that have odds, by these and in proportion to a power of their losses."""
        odds = self.odds * self.running.cpu().clamp_min(_LEAST) ** focus
        return torch.multinomial(odds, min(count, int(odds.count_nonzero())), generator=rng)

    def remember(self, picks: Tensor, losses: Tensor) -> None:
        """Mixes new losses (b,) into the running ones."""
        picks = picks.to(self.running.device)
        self.running[picks] = torch.lerp(self.running[picks], losses.detach().to(self.running), _NEWS)
