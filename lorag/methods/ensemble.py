"""More readers for a network that has learned: each, from a start of its own, learns to read what the first one reads.

Weights are seldom what is wrong with a generated adapter; a wording that was misread is. Readers that start apart misread different
wordings, and teaching one costs no pass through the base model: the teacher's mean features over a task's descriptions are
what every single description of it should give. (Ensembles of networks that differ by their start alone: Lakshminarayanan et al.,
arXiv 1612.01474; learning from a trained network's outputs: Hinton et al., arXiv 1503.02531.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.network_method import collate, draw
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.networks.experts import KernelHead

if TYPE_CHECKING:
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.readers import Augmentation, DescriptionNetwork, FeatureReader
    from lorag.text.embedding import Embedding

__all__ = ["EnsembleSettings", "teach_ensemble"]

_DESCRIPTIONS = 16  # of a task, over which the teacher's features are averaged


@dataclass
class EnsembleSettings:
    """Readers beside the first one.

    Attributes:
        count: How many; 0 leaves them out.
        steps: Of training, each.
        learning_rate: Peak rate.
        batch: Descriptions in a step.
    """

    count: int = 2
    steps: int = 1200
    learning_rate: float = 1e-3
    batch: int = 64


def teach_ensemble(
    name: str,
    network: DescriptionNetwork,
    another: Callable[[], FeatureReader],
    data: TrainingSet,
    loop: TrainingLoop,
    settings: EnsembleSettings,
) -> None:
    """Gives a trained network more readers, trained one after the other; its first reader and its head stay as they are.

    They learn on the tasks that the teacher learned on, and stop at the state that is best on held-out tasks.

    Args:
        name: Names the stages.
        network: The trained network, with one reader.
        another: Makes an untrained reader of the same sizes.
        data: The tasks.
        loop: Runs the stages.
        settings: Of each stage.
    """
    if not settings.count:
        return
    device = loop.accelerator.device
    network.to(device).requires_grad_(False).eval()
    training = torch.tensor(list(data.training))
    targets = {i: _mean_features(network, data.embeddings[i][:_DESCRIPTIONS]) for i in [*training.tolist(), *data.validation]}
    apart, members = _distance_of_codes(network.head), []
    for number in range(1, settings.count + 1):
        with loop.seeded():
            student = _Student(network.augmentation, another()).to(device)

        def distance(student: nn.Module, tasks: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            return apart(student(*collate(embeddings, device)), torch.stack([targets[i] for i in tasks]))

        def loss(student: nn.Module, step: int) -> Batch:
            tasks = training[torch.randint(len(training), (settings.batch,), generator=loop.rng)].tolist()
            drawn = draw(data, tasks, loop)
            return Batch(len(tasks), lambda share: distance(student, tasks[share], drawn[share]))

        def validate(student: nn.Module) -> float:
            with torch.no_grad():
                each = [distance(student, [i] * len(data.embeddings[i][:8]), data.embeddings[i][:8]) for i in data.validation]
            return torch.stack(each).mean().item()

        length = LoopSettings(settings.steps, settings.learning_rate, validate_every=max(1, settings.steps // 10))
        loop.run(f"{name} member {number}", student, loss, validate if data.validation else None, length)
        members.append(student.reader)
    network.readers.extend(members)
    network.requires_grad_(False).eval()


class _Student(nn.Module):
    """A reader that sees descriptions with augmentation in training."""

    def __init__(self, augmentation: Augmentation, reader: FeatureReader) -> None:
        super().__init__()
        self.augmentation, self.reader = augmentation, reader

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.reader(*self.augmentation(pooled, tokens, mask))


def _distance_of_codes(head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared distance between the codes that a head makes of two (b, f) features, without making them where that is possible."""
    before: Callable[[Tensor], Tensor]
    if isinstance(head, nn.Linear):
        before, last = nn.Identity(), head.weight.T
    elif isinstance(head, KernelHead):
        before, last = head.similarities, head.weights
    else:
        return lambda one, other: F.mse_loss(head(one), head(other))
    gram = last @ last.T / last.shape[1]

    def distance(one: Tensor, other: Tensor) -> Tensor:
        difference = before(one) - before(other)
        return ((difference @ gram) * difference).sum(1).mean()

    return distance


def _mean_features(network: DescriptionNetwork, embeddings: Sequence[Embedding]) -> Tensor:
    """Mean features (f,) over descriptions of one task."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return network.features(*collate(embeddings, device)).mean(0)
