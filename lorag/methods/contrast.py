"""A reader learns to tell tasks apart by their wordings, before anything asks what to do about them.

Two wordings of one task should give like features, those of its nearest tasks other ones. An untrained reader's features hardly depend on
the description, and what shall be linear in them then learns slowly; a task and its twin in another answer format look the same to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.method import collate
from lorag.methods.training_loop import Batch, LoopSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.factor_network import FactorNetwork
    from lorag.text.embedding import Embedding

__all__ = ["ContrastSettings", "train_reader"]

_AT_ONCE = 256  # descriptions, outside training


@dataclass
class ContrastSettings:
    """How long a reader learns from wordings alone, by InfoNCE (arXiv 1807.03748).

    Attributes:
        steps: Optimizer steps; 0 leaves the reader as it begins.
        learning_rate: Their peak rate.
        tasks: Tasks in a step around which it is chosen.
        neighbours: Nearest tasks of each that are in the step too.
        temperature: Of the softmax over cosines.
    """

    steps: int = 400
    learning_rate: float = 1e-3
    tasks: int = 20
    neighbours: int = 8
    temperature: float = 0.1


def train_reader(name: str, network: FactorNetwork, data: TrainingSet, loop: TrainingLoop, settings: ContrastSettings) -> float:
    """Trains a network's reader in place, then sets how its features are whitened; no base model runs.

    Args:
        name: Names the stage.
        network: Whose reader is meant, on the loop's device.
        data: The tasks with their descriptions; those with one wording teach nothing.
        loop: Runs the stage.
        settings: Its length.

    Returns:
        The best loss on held-out tasks, or NaN without any.
    """
    training, held = ([i for i in tasks if len(data.embeddings[i]) > 1] for tasks in (data.training, data.validation))
    device = network.row_start.device
    best = float("nan")
    if settings.steps and len(training) > 1:
        centres = torch.stack([torch.stack([one.pooled for one in data.embeddings[i]]).mean(0) for i in training])
        centres = F.normalize(centres - centres.mean(0), dim=-1)
        nearest = (centres @ centres.T).topk(min(settings.neighbours + 1, len(training)), dim=1).indices

        def loss_of(first: Sequence[Embedding], second: Sequence[Embedding]) -> Tensor:
            features = F.normalize(network.read(*collate([*first, *second], device)), dim=-1)
            alike = features[: len(first)] @ features[len(first) :].T / settings.temperature
            right = torch.arange(len(first), device=device)
            return (F.cross_entropy(alike, right, reduction="none") + F.cross_entropy(alike.T, right, reduction="none")) / 2

        def batch(_: nn.Module, step: int) -> Batch:
            anchors = torch.randperm(len(training), generator=loop.rng)[: settings.tasks]
            tasks = [training[i] for i in nearest[anchors].unique().tolist()]
            pairs = [torch.randperm(len(data.embeddings[i]), generator=loop.rng)[:2].tolist() for i in tasks]
            first, second = ([data.embeddings[i][pair[side]] for i, pair in zip(tasks, pairs, strict=True)] for side in (0, 1))
            losses = loss_of(first, second)
            return Batch(len(tasks), lambda share: losses[share])

        def validate(_: nn.Module) -> float:
            with torch.no_grad():
                return loss_of(*([data.embeddings[i][side] for i in held] for side in (0, 1))).mean().item()

        steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=100)
        whole = replace(loop, shares=None)  # each loss depends on all tasks of a step, so that cutting it saves nothing
        best = whole.run(f"{name} reader", nn.ModuleList([network.reading, network.augment]), batch, validate if held else None, steps)
    was_training = network.training
    network.eval()
    with torch.no_grad():
        first = [data.embeddings[i][0] for i in data.training]
        parts = [network.read(*collate(first[start : start + _AT_ONCE], device)) for start in range(0, len(first), _AT_ONCE)]
    network.whiten(torch.cat(parts))
    network.train(was_training)
    return best
