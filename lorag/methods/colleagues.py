"""More readers for a network that has learned: each, from a start of its own, learns to understand what the first one understands.

Weights are seldom what is wrong with a generated adapter; a wording that was misread is. Readers that start apart misread different
wordings, and teaching one costs no pass through the base model: the first reader's mean features over a task's descriptions are
what every single description of it should give. (Ensembles of networks that differ by their start alone: Lakshminarayanan et al.,
arXiv 1612.01474; learning from a trained network's outputs: Hinton et al., arXiv 1503.02531.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.base import collate, draw
from lorag.methods.data_parallel import Batch
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.code_networks import Blur, Reading, TokenNetwork
from lorag.networks.expert_kernel import KernelHead
from lorag.text.embedding import Embedding

__all__ = ["ColleagueSettings", "teach_colleagues"]

_DESCRIPTIONS = 16  # of a task, over which the first reader's features are averaged


@dataclass
class ColleagueSettings:
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


def teach_colleagues(
    name: str, network: TokenNetwork, blur: Blur, data: TrainingSet, loop: TrainingLoop, settings: ColleagueSettings
) -> None:
    """Gives a trained network colleagues, trained one after the other; its first reader and its head stay as they are.

    They learn on the tasks that the first one learned on, and stop at the state that is best on held-out training tasks.

    Args:
        name: Names the stages.
        network: The trained network, still without colleagues.
        blur: Of descriptions in training.
        data: The bank.
        loop: Runs the stages.
        settings: Of each stage.
    """
    if not settings.count:
        return
    device = loop.accelerator.device
    network.to(device).requires_grad_(False).eval()
    known = torch.tensor(list(data.training))
    right = {i: _understood(network, data.embeddings[i][:_DESCRIPTIONS]) for i in [*known.tolist(), *data.validation]}
    apart, taught = _distance_of_codes(network.head), []
    for number in range(1, settings.count + 1):
        with loop.seeded():
            pupil = _Pupil(blur, network.another_reader()).to(device)

        def distance(pupil: nn.Module, rows: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            return apart(pupil(*collate(embeddings, device)), torch.stack([right[i] for i in rows]))

        def loss(pupil: nn.Module, step: int) -> Batch:
            rows = known[torch.randint(len(known), (settings.batch,), generator=loop.rng)].tolist()
            drawn = draw(data, rows, loop)
            return Batch(len(rows), lambda part: distance(pupil, rows[part], drawn[part]))

        def validate(pupil: nn.Module) -> float:
            with torch.no_grad():
                each = [distance(pupil, [i] * len(data.embeddings[i][:8]), data.embeddings[i][:8]) for i in data.validation]
            return torch.stack(each).mean().item()

        length = LoopSettings(settings.steps, settings.learning_rate, validate_every=max(1, settings.steps // 10))
        loop.run(f"{name} colleague {number}", pupil, loss, validate if data.validation else None, length)
        taught.append(pupil.reading)
    network.colleagues.extend(taught)
    network.requires_grad_(False).eval()


class _Pupil(nn.Module):
    """A reader that sees descriptions blurred in training."""

    def __init__(self, blur: Blur, reading: Reading) -> None:
        super().__init__()
        self.blur, self.reading = blur, reading

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.reading(*self.blur(pooled, tokens, mask))


def _distance_of_codes(head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared distance between the codes that a head makes of two (b, f) features, without making them where that is possible."""
    before: Callable[[Tensor], Tensor]
    if isinstance(head, nn.Linear):
        before, last = nn.Identity(), head.weight.T
    elif isinstance(head, KernelHead):
        before, last = head.similarities, head.shares
    else:
        return lambda one, other: F.mse_loss(head(one), head(other))
    gram = last @ last.T / last.shape[1]

    def distance(one: Tensor, other: Tensor) -> Tensor:
        difference = before(one) - before(other)
        return ((difference @ gram) * difference).sum(1).mean()

    return distance


def _understood(network: TokenNetwork, embeddings: Sequence[Embedding]) -> Tensor:
    """Mean features (f,) over descriptions of one task."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return network.features(*collate(embeddings, device)).mean(0)
