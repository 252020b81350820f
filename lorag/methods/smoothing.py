"""How a trained network's features are smoothed: among which tasks, and how much, by the loss on held-out tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.methods.functional import validation_loss
from lorag.methods.method import collate
from lorag.methods.training_loop import from_main
from lorag.networks.smoothing import FeatureSmoothing
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.factor_network import FactorNetwork

__all__ = ["SmoothingSettings", "answer_sets", "go_on_smoothing", "smooth_features"]

logger = logging.getLogger(__name__)

_NEVER = -1e4  # of a set that no description is of
_INVERSE_PENALTY, _ITERATIONS = 100.0, 3000  # of the logistic regression
_SHARPNESS = 2.0  # of what it says: half of one treatment and half of the other suits no description


@dataclass
class SmoothingSettings:
    """Among which tasks features are smoothed.

    Attributes:
        least: Training tasks that a set of answers must have in common.
        widths: Of the kernel, among which the loss on held-out tasks chooses; features have a length of about one half. None leaves
            smoothing out.
    """

    least: int = 16
    widths: list[float] = field(default_factory=lambda: [0.07, 0.1, 0.14])


def smooth_features(
    network: FactorNetwork, data: TrainingSet, runner: Runner, loop: TrainingLoop, settings: SmoothingSettings
) -> tuple[int, ...]:
    """Gives a trained network the smoothing under which held-out tasks have the lowest loss; none if none lowers it.

    Args:
        network: The network, on the loop's device. What it smooths by already is of the same tasks (`go_on_smoothing`).
        data: Its tasks.
        runner: The base model.
        loop: Whose main process chooses.
        settings: What is tried.

    Returns:
        The number of tasks in each set of answers among which features are smoothed.
    """
    sets = answer_sets(data, settings.least)
    if not (sets and settings.widths and data.validation):
        return network.smoothing.counts
    network.eval()
    smoothing = network.smoothing if network.smoothing.counts else _fitted(network, data, sets)
    network.smoothing = FeatureSmoothing(len(network.middle))

    def predict(held: Sequence[int]) -> Tensor:
        return network(*collate([data.embeddings[i][0] for i in held], smoothing.width.device))

    def best_width() -> float:
        loss = validation_loss(runner, data, predict)
        losses = {0.0: loss()}
        network.smoothing = smoothing
        for width in progress_bar(settings.widths, desc="smoothing", disable=loop.quiet):
            smoothing.width.fill_(width)
            losses[width] = loss()
        shown = ", ".join(f"{value:.4f} at width {width:g}" for width, value in losses.items())
        logger.info("smoothing among %s tasks with the same answers: validation loss %s", smoothing.counts, shown)
        return min(losses, key=losses.__getitem__)

    width = from_main(loop.accelerator, best_width)
    smoothing.width.fill_(width)
    network.smoothing = smoothing if width else FeatureSmoothing(smoothing.centres.shape[1])
    return network.smoothing.counts


def go_on_smoothing(network: FactorNetwork, data: TrainingSet, settings: SmoothingSettings) -> Tensor:
    """Smooths features among the tasks of another run, as much as before; returns the number of each task's own centre (t,), or −1."""
    sets, centre_of = answer_sets(data, settings.least), torch.full((len(data.tasks),), -1)
    smoothing = _fitted(network, data, sets) if sets else FeatureSmoothing(len(network.middle))
    if sets:
        smoothing.width.copy_(network.smoothing.width)
        centre_of[[i for some in sets for i in some]] = torch.arange(len(smoothing.centres))
        centre_of[[some[0] for some in sets if len(some) == 1]] = -1  # alone in its set, it has no others to be smoothed among
    network.smoothing = smoothing
    return centre_of


def answer_sets(data: TrainingSet, least: int) -> list[list[int]]:
    """The training tasks of each set of two or more answers that at least so many of them have, the largest first."""
    tasks: dict[frozenset[str], list[int]] = {}
    for i in data.training:
        answers = frozenset(example.output for example in data.tasks[i].split("train"))
        if len(answers) > 1:
            tasks.setdefault(answers, []).append(i)
    return sorted((some for some in tasks.values() if len(some) >= least), key=len, reverse=True)


@torch.no_grad()
def _fitted(network: FactorNetwork, data: TrainingSet, sets: Sequence[Sequence[int]]) -> FeatureSmoothing:
    """The mean features of each task of the sets, and a logistic regression that tells from features which set is meant."""
    device = network.row_start.device
    features = {i: network.features(*collate(data.embeddings[i], device)) for i in data.training}
    centres = torch.stack([features[i].mean(0) for some in sets for i in some])
    smoothing = FeatureSmoothing(centres.shape[1], [len(some) for some in sets]).to(device)
    smoothing.centres.copy_(centres)
    set_of = {i: number for number, some in enumerate(sets) for i in some}
    labels = [set_of.get(i, len(sets)) for i, some in features.items() for _ in some]
    weights = [1 / len(some) for some in features.values() for _ in some]
    smoothing.bias.fill_(_NEVER)
    present = sorted(set(labels))
    smoothing.bias[present] = 0.0
    if len(present) > 1:
        from sklearn.linear_model import LogisticRegression  # takes a second to import

        regression = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_ITERATIONS)
        regression.fit(torch.cat([*features.values()]).cpu().numpy(), labels, weights)
        rows = present if len(present) > 2 else present[1:]  # of two classes, one has the numbers of both
        smoothing.weights[rows] = _SHARPNESS * torch.from_numpy(regression.coef_).to(smoothing.weights)
        smoothing.bias[rows] = _SHARPNESS * torch.from_numpy(regression.intercept_).to(smoothing.bias)
    return smoothing
