"""A trained reader learns more wordings of its tasks, from itself: no base model runs.

What it says of a task on average is what the rest of the network has learned to use. A wording that it misreads has that mean as its
target, beside the means of other tasks, which it should stay away from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from lorag.methods.method import collate
from lorag.methods.training_loop import Batch, LoopSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.factor_network import FactorNetwork
    from lorag.text.embedding import Embedding

__all__ = ["DistillationSettings", "distil_reader"]

_CONTRAST = 0.1  # weight of the contrast beside the squared distance
_TEMPERATURE = 0.1  # of the softmax over cosines


@dataclass
class DistillationSettings:
    """How long the reader of a trained network learns the wordings at hand.

    Attributes:
        steps: Optimizer steps; 0 leaves the reader as it is.
        learning_rate: Their peak rate.
        tasks: Tasks in a step around which it is chosen.
        neighbours: Nearest tasks of each that are in the step too.
    """

    steps: int = 0
    learning_rate: float = 5e-4
    tasks: int = 24
    neighbours: int = 8


def distil_reader(name: str, network: FactorNetwork, data: TrainingSet, loop: TrainingLoop, settings: DistillationSettings) -> float:
    """Trains a network's reader in place, with augmented wordings, towards the mean features of their tasks as it read them before.

    ```text
    loss = ‖f(x) − c_i‖² − .1 log softmax_j(cos(f(x), c_j) / .1)_i        c_i = mean of f over the wordings of task i
    ```

    Args:
        name: Names the stage.
        network: Whose reader is meant, on the loop's device; how its features are whitened stays.
        data: The tasks with their descriptions.
        loop: Runs the stage.
        settings: Its length.

    Returns:
        The best mean squared distance of wordings that were kept from it, one of every fourth task, or NaN without any.
    """
    if settings.steps == 0:
        return float("nan")
    device = network.row_start.device
    training = list(data.training)
    learned = [data.embeddings[i][:-1] if _keeps(place, data.embeddings[i]) else data.embeddings[i] for place, i in enumerate(training)]
    kept = [place for place, i in enumerate(training) if _keeps(place, data.embeddings[i])]
    network.eval()
    with torch.no_grad():
        centres = torch.stack([network.features(*collate(some, device)).mean(0) for some in learned])
    directions = F.normalize(centres, dim=-1)
    nearest = torch.cat(
        [(some @ directions.T).topk(min(settings.neighbours + 1, len(training)), dim=1).indices for some in directions.split(1024)]
    ).cpu()

    def batch(_: nn.Module, step: int) -> Batch:
        places = nearest[torch.randperm(len(training), generator=loop.rng)[: settings.tasks]].unique()
        picks = torch.randint(2**31, (len(places),), generator=loop.rng).tolist()
        drawn = [learned[place][pick % len(learned[place])] for place, pick in zip(places.tolist(), picks, strict=True)]
        features = network.whitened(network.read(*collate(drawn, device)))
        right = places.to(device)
        losses = (features - centres[right]).square().sum(-1)
        alike = F.normalize(features, dim=-1) @ directions.T / _TEMPERATURE
        losses = losses + _CONTRAST * F.cross_entropy(alike, right, reduction="none")
        return Batch(len(drawn), lambda share: losses[share])

    def validate(_: nn.Module) -> float:
        with torch.no_grad():
            features = network.features(*collate([data.embeddings[training[place]][-1] for place in kept], device))
        return (features - centres[kept]).square().sum(-1).mean().item()

    steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=100)
    network.reading.requires_grad_(True)
    whole = replace(loop, shares=None)  # all losses of a step come from one reading, so that cutting it saves nothing
    return whole.run(f"{name} distillation", nn.ModuleList([network.reading, network.augment]), batch, validate if kept else None, steps)


def _keeps(place: int, wordings: Sequence[Embedding]) -> bool:
    """Whether the last wording of a task is kept to judge by."""
    return place % 4 == 0 and len(wordings) > 2
