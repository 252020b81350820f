"""Functional training: the frozen base model's loss on the experts' tasks flows through generated codes into a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.embedding import Embedding
from lorag.errors import GeneratorError
from lorag.functional import TaskLoss
from lorag.generators.base import FitData, draw
from lorag.training_loop import LoopSettings, TrainingLoop

__all__ = ["FunctionalSettings", "require_tasks", "train_functionally"]


@dataclass
class FunctionalSettings:
    """Length and width of functional training.

    Attributes:
        steps: Steps through the frozen base model; 0 leaves them out.
        learning_rate: Their peak rate.
        tasks: Tasks in a step, each with its own generated adapter.
        examples: Training examples of each.
        validate_every: Steps between validations.
    """

    steps: int = 600
    learning_rate: float = 1e-3
    tasks: int = 32
    examples: int = 4
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
        predict: Codes (b, c) for experts (indices) described by embeddings.
        data: The bank, with the tasks' examples.
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
    training = torch.tensor(list(data.training))

    def loss(_: nn.Module, step: int) -> Tensor:
        rows = training[torch.randperm(len(training), generator=loop.rng)[: settings.tasks]].tolist()
        codes = predict(rows, draw(data, rows, loop))
        return functional.losses(codes, rows, settings.examples, f"{name}/{step}").mean()

    def validate(_: nn.Module) -> float:
        with torch.no_grad():
            codes = torch.cat([predict([i], [data.embeddings[i][0]]) for i in data.validation])
        return functional.loss(codes, data.validation, 8, "validation")

    steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=settings.validate_every)
    return loop.run(f"{name} functional", network, loss, validate if data.validation else None, steps)
