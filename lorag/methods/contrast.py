"""A reader learns to tell tasks apart by their wordings, before anything asks what to do about them; a trained one learns more wordings.

Two wordings of one task should give like features, those of its nearest tasks other ones. An untrained reader's features hardly depend on
the description, and what shall be linear in them then learns slowly; a task and its twin in another answer format look the same to it.

What a trained reader says of a task on average is what the rest of the network has learned to use. A wording that it misreads has that
mean as its target, beside the means of other tasks, which it should stay away from. Where many tasks have their answers in common, such as
"yes" and "no", a new task will be none of them but something between: drawn to means, a reader takes its description for the nearest known
one. Of these tasks each wording keeps what was said of it.
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
    from collections.abc import Callable, Sequence, Set

    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.factor_network import FactorNetwork
    from lorag.text.embedding import Embedding

__all__ = ["ContrastSettings", "DistillationSettings", "distil_reader", "train_reader"]

_AT_ONCE = 256  # descriptions, outside training
_CONTRAST = 0.1  # weight of the contrast beside the squared distance, in distillation


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


@dataclass
class DistillationSettings(ContrastSettings):
    """How long the reader of a trained network learns the wordings at hand; 0 steps leave it as it is.

    Attributes:
        kept: Weight, in the steps through the base model that follow, of saying what was said before of known tasks that have their
            answers in common with many; 0 lets these learn with the others.
    """

    steps: int = 0
    learning_rate: float = 5e-4
    tasks: int = 24
    kept: float = 4.0


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
        nearest = _nearest_tasks(F.normalize(centres - centres.mean(0), dim=-1), settings)

        def loss_of(first: Sequence[Embedding], second: Sequence[Embedding]) -> Tensor:
            features = F.normalize(network.read(*collate([*first, *second], device)), dim=-1)
            alike = features[: len(first)] @ features[len(first) :].T / settings.temperature
            right = torch.arange(len(first), device=device)
            return (F.cross_entropy(alike, right, reduction="none") + F.cross_entropy(alike.T, right, reduction="none")) / 2

        def batch(_: nn.Module, step: int) -> Batch:
            tasks = [training[i] for i in _drawn_together(nearest, settings, loop)]
            pairs = [torch.randperm(len(data.embeddings[i]), generator=loop.rng)[:2].tolist() for i in tasks]
            first, second = ([data.embeddings[i][pair[side]] for i, pair in zip(tasks, pairs, strict=True)] for side in (0, 1))
            losses = loss_of(first, second)
            return Batch(len(tasks), lambda share: losses[share])

        def validate(_: nn.Module) -> float:
            with torch.no_grad():
                return loss_of(*([data.embeddings[i][side] for i in held] for side in (0, 1))).mean().item()

        best = _run_reader(f"{name} reader", network, batch, validate if held else None, loop, settings)
    was_training = network.training
    network.eval()
    with torch.no_grad():
        first = [data.embeddings[i][0] for i in data.training]
        parts = [network.read(*collate(first[start : start + _AT_ONCE], device)) for start in range(0, len(first), _AT_ONCE)]
    network.whiten(torch.cat(parts))
    network.train(was_training)
    return best


def distil_reader(
    name: str,
    network: FactorNetwork,
    data: TrainingSet,
    loop: TrainingLoop,
    settings: DistillationSettings,
    spread: Set[int] = frozenset(),
) -> float:
    """Trains a network's reader in place, with augmented wordings, towards the mean features of their tasks as it read them before.

    ```text
    loss = ‖f(x) − c_i‖² − .1 log softmax_j(cos(f(x), c_j) / .1)_i        c_i = mean of f over the wordings of task i
    loss = ‖f(x) − f₀(x)‖²                                                for a task that stays spread, f₀ being the reader before
    ```

    Args:
        name: Names the stage.
        network: Whose reader is meant, on the loop's device; how its features are whitened stays.
        data: The tasks with their descriptions.
        loop: Runs the stage.
        settings: Its length.
        spread: Tasks of which each wording keeps what was said of it.

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
        said = [network.features(*collate(data.embeddings[i], device)) for i in training]
    centres = torch.stack([some[: len(wordings)].mean(0) for some, wordings in zip(said, learned, strict=True)])
    targets = [some if i in spread else centre.expand_as(some) for i, some, centre in zip(training, said, centres, strict=True)]
    stays = torch.tensor([i in spread for i in training], device=device)
    directions = F.normalize(centres, dim=-1)
    nearest = _nearest_tasks(directions.cpu(), settings)

    def batch(_: nn.Module, step: int) -> Batch:
        places = _drawn_together(nearest, settings, loop)
        picks = torch.randint(2**31, (len(places),), generator=loop.rng).tolist()
        drawn = [(place, pick % len(learned[place])) for place, pick in zip(places, picks, strict=True)]
        features = network.whitened(network.read(*collate([learned[place][wording] for place, wording in drawn], device)))
        losses = (features - torch.stack([targets[place][wording] for place, wording in drawn])).square().sum(-1)
        alike = F.normalize(features, dim=-1) @ directions.T / settings.temperature
        apart = F.cross_entropy(alike, torch.tensor(places, device=device), reduction="none")
        losses = losses + _CONTRAST * apart.masked_fill(stays[places], 0.0)
        return Batch(len(places), lambda share: losses[share])

    def validate(_: nn.Module) -> float:
        with torch.no_grad():
            features = network.features(*collate([data.embeddings[training[place]][-1] for place in kept], device))
        return (features - torch.stack([targets[place][-1] for place in kept])).square().sum(-1).mean().item()

    network.reading.requires_grad_(True)
    return _run_reader(f"{name} distillation", network, batch, validate if kept else None, loop, settings)


def _keeps(place: int, wordings: Sequence[Embedding]) -> bool:
    """Whether the last wording of a task is kept to judge by."""
    return place % 4 == 0 and len(wordings) > 2


def _nearest_tasks(centres: Tensor, settings: ContrastSettings) -> Tensor:
    """Each task's own number and those of its nearest ones (n, neighbours + 1), by centres of unit length (n, e)."""
    return (centres @ centres.T).topk(min(settings.neighbours + 1, len(centres)), dim=1).indices


def _drawn_together(nearest: Tensor, settings: ContrastSettings, loop: TrainingLoop) -> list[int]:
    """Numbers of the tasks of a step: some at random, and those nearest to them."""
    return nearest[torch.randperm(len(nearest), generator=loop.rng)[: settings.tasks]].unique().tolist()


def _run_reader(
    stage: str,
    network: FactorNetwork,
    batch: Callable[[nn.Module, int], Batch],
    validate: Callable[[nn.Module], float] | None,
    loop: TrainingLoop,
    settings: ContrastSettings,
) -> float:
    """Runs a stage in which a network's reader alone learns, and returns its best validation."""
    steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=100)
    whole = replace(loop, shares=None)  # all losses of a step come from one reading, so that cutting it saves nothing
    return whole.run(stage, nn.ModuleList([network.reading, network.augment]), batch, validate, steps)
