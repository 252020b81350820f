"""Functional training: the frozen base model's loss on the experts' tasks flows through generated codes into a generator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.errors import GeneratorError
from lorag.methods.base import FitData, draw
from lorag.methods.data_parallel import Batch
from lorag.methods.functional import TaskLoss
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.text.embedding import Embedding

__all__ = ["FunctionalSettings", "require_tasks", "train_functionally"]


_LEAST = 0.02  # running loss below which a task counts as learned; it is still drawn now and then
_NEWS = 0.3  # weight of a new loss in the running one


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
        validate_every: Steps between validations.
    """

    steps: int = 600
    learning_rate: float = 1e-3
    tasks: int = 32
    examples: int = 4
    focus: float = 0.5
    validate_every: int = 100


def require_tasks(name: str, data: FitData) -> TaskLoss:
    """The base model's loss on the experts' tasks.

    Raises:
        GeneratorError: If there are no examples of the experts' tasks.
    """
    if data.functional is None:
        raise GeneratorError(
            f"{name} learns from the experts' tasks, and there are no examples of them",
            remedy="Give their suite with tasks=PATH, or, where the method can do without, settings.functional.steps=0.",
        )
    return data.functional


def train_functionally(
    name: str,
    network: nn.Module,
    predict: Callable[[Sequence[int], Sequence[Embedding]], Tensor],
    data: FitData,
    loop: TrainingLoop,
    settings: FunctionalSettings,
) -> float:
    """Trains a network through the base model, and leaves it in the state that was best on held-out training tasks.

    Args:
        name: Names the stage.
        network: What is trained.
        predict: Codes (b, c) for tasks (indices) described by embeddings.
        data: The bank, with the tasks' examples; tasks without an expert count too.
        loop: Runs the stage.
        settings: Its length.

    Returns:
        The best validation loss.

    Raises:
        GeneratorError: If there are no examples of the experts' tasks.
    """
    if settings.steps == 0:
        return float("nan")
    functional = require_tasks(name, data)
    training = torch.tensor([*data.training, *data.without_expert])
    pupil = _Pupil(network, len(training))

    def loss(_: nn.Module, step: int) -> Batch:
        picks = pupil.pick(settings.tasks, settings.focus, loop.rng)
        rows = training[picks].tolist()
        drawn = draw(data, rows, loop)

        def losses(part: slice) -> Tensor:
            return functional.losses(predict(rows[part], drawn[part]), rows[part], settings.examples, f"{name}/{step}")

        return Batch(len(rows), losses, learned=functools.partial(pupil.remember, picks))

    def validate(_: nn.Module) -> float:
        with torch.no_grad():
            codes = torch.cat([predict([i], [data.embeddings[i][0]]) for i in data.validation])
        return functional.loss(codes, data.validation, 8, "validation")

    steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=settings.validate_every)
    return loop.run(f"{name} functional", pupil, loss, validate if data.validation else None, steps)


class _Pupil(nn.Module):
    """A network and its running loss on each task (n,), together so that an interrupted stage goes on with both."""

    running: Tensor

    def __init__(self, network: nn.Module, tasks: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("running", torch.ones(tasks, device=next(network.parameters()).device))

    def pick(self, count: int, focus: float, rng: torch.Generator) -> Tensor:
        """Draws `count` different tasks, or all if there are fewer, in proportion to a power of their losses."""
        odds = self.running.cpu().clamp_min(_LEAST) ** focus
        return torch.multinomial(odds, min(count, len(odds)), generator=rng)

    def remember(self, picks: Tensor, losses: Tensor) -> None:
        """Mixes new losses (b,) into the running ones."""
        picks = picks.to(self.running.device)
        self.running[picks] = torch.lerp(self.running[picks], losses.detach().to(self.running), _NEWS)
