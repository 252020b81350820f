"""Probes learn which texts a description is about, from the base model's averaged inputs alone: thousands of steps in a minute.

A task with two answers splits its texts in two, and where its description is about one of the halves, the probe should tell them apart.
No pass through the base model is needed, for what its modules read of each text was kept when the weight space was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.method import collate, draw
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.networks.readers import noisy

if TYPE_CHECKING:
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.factor_network import Probes
    from lorag.spaces.activation_bases import ReadTexts

__all__ = ["ProbeSettings", "train_probes"]

_LEAST = 8  # texts of a task, and a quarter of it of each answer
_WORDINGS = 6  # by which an untrained probe decides what a description is about
_NOISE, _DROPOUT = 0.2, 0.1  # on the description's vectors, and on the texts' coordinates
# Adam moves each parameter by about the learning rate, whatever its size; these are the sizes, beside that of the alignment's own values.
_FOCUS_UNIT, _ALIGNMENT_UNIT, _SCALE_UNIT = 10.0, 3.0, 10.0


@dataclass
class ProbeSettings:
    """How long probes learn before anything else does.

    Attributes:
        steps: Optimizer steps; 0 leaves the probes as they begin.
        learning_rate: Their peak rate.
        tasks: Tasks in a step.
        texts: Texts of each.
        separation: Least AUROC of an untrained probe, one way or the other, on the texts of a task that teaches.
    """

    steps: int = 600
    learning_rate: float = 1.5e-3
    tasks: int = 24
    texts: int = 32
    separation: float = 0.7


@dataclass(frozen=True)
class _Halves:
    """A task whose texts have one of two answers: their places among the texts read (n,), and which ones it is about (n,)."""

    task: int
    places: Tensor
    about: Tensor


class _Learner(nn.Module):
    """Changes to probes in units that suit one learning rate, and how sure their guesses are."""

    def __init__(self, probes: Probes) -> None:
        super().__init__()
        self.focus = nn.Parameter(torch.zeros_like(probes.focus))
        self.alignment = nn.Parameter(torch.zeros_like(probes.alignment))
        self.scale = nn.Parameter(torch.zeros(len(probes.alignment)))

    def values(self, probes: Probes) -> dict[str, Tensor]:
        """Focus (p, e) and alignment (g, e, k) of probes with the changes made."""
        focus, alignment = probes.focus.detach(), probes.alignment.detach()
        return {
            "focus": focus + _FOCUS_UNIT * self.focus,
            "alignment": alignment + _ALIGNMENT_UNIT * alignment.std() * self.alignment,
        }

    def forward(self, probes: Probes, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rows (b, g, p, k) of probes with the changes made."""
        return torch.func.functional_call(probes, self.values(probes), (tokens, mask))


def train_probes(name: str, probes: Probes, data: TrainingSet, read: ReadTexts, loop: TrainingLoop, settings: ProbeSettings) -> float:
    """Trains probes in place to tell apart the texts of two answers; leaves them as they are if no task teaches that.

    Args:
        name: Names the stage.
        probes: Aligned, on the loop's device.
        data: The tasks with their descriptions.
        read: The texts that the base model has read.
        loop: Runs the stage.
        settings: Its length.

    Returns:
        The best loss on held-out tasks, or NaN without any.
    """
    if not settings.steps:
        return float("nan")
    device = probes.focus.device
    place = {text: number for number, text in enumerate(read.texts)}
    coordinates = torch.stack([one - one.mean(0) for one in read.coordinates], 1).to(device)
    training, held = (_halves(probes, data, tasks, place, coordinates, settings.separation) for tasks in (data.training, data.validation))
    if not training:
        return float("nan")
    with loop.seeded():
        learner = _Learner(probes)

    def losses(tasks: Sequence[_Halves], rows: Tensor, count: int, rng: torch.Generator | None) -> Tensor:
        """Of each task (b,): cross-entropy of each probe's guess on its texts, whose mean lies in the middle."""
        each = []
        for task, row in zip(tasks, rows, strict=True):
            chosen = torch.arange(len(task.places)) if rng is None else torch.randperm(len(task.places), generator=rng)[:count]
            texts = F.dropout(coordinates[task.places[chosen]], _DROPOUT, rng is not None)
            guess = torch.einsum("gpk,ngk->gpn", row, texts)
            guess = (_SCALE_UNIT * learner.scale).exp()[:, None, None] * (guess - guess.mean(-1, keepdim=True))
            each.append(F.binary_cross_entropy_with_logits(guess, task.about[chosen].expand_as(guess)))
        return torch.stack(each)

    def batch(_: nn.Module, step: int) -> Batch:
        picks = torch.randperm(len(training), generator=loop.rng)[: settings.tasks].tolist()
        tasks = [training[i] for i in picks]
        drawn = draw(data, [task.task for task in tasks], loop)
        rng = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=loop.rng)))

        def part(share: slice) -> Tensor:
            _, tokens, mask = collate(drawn[share], device)
            return losses(tasks[share], learner(probes, noisy(tokens, _NOISE), mask), settings.texts, rng)

        return Batch(len(tasks), part)

    def validate(_: nn.Module) -> float:
        with torch.no_grad():
            rows = torch.cat([learner(probes, *collate([data.embeddings[task.task][0]], device)[1:]) for task in held])
            return losses(held, rows, 0, None).mean().item()

    steps = LoopSettings(settings.steps, settings.learning_rate, validate_every=100)
    best = loop.run(f"{name} probes", learner, batch, validate if held else None, steps)
    with torch.no_grad():
        for name_of, value in learner.values(probes).items():
            probes.get_parameter(name_of).copy_(value)
    return best


@torch.no_grad()
def _halves(
    probes: Probes, data: TrainingSet, tasks: Sequence[int], place: dict[str, int], coordinates: Tensor, separation: float
) -> list[_Halves]:
    """The tasks with two answers whose description, to untrained probes, is about the texts of one of them."""
    from sklearn.metrics import roc_auc_score  # takes a second to import

    halves = []
    for number in tasks:
        every = data.tasks[number].split("train")
        examples, answers = [one for one in every if one.input in place], sorted({one.output for one in every})
        if len(answers) != 2 or len(examples) < _LEAST:
            continue
        places, about = torch.tensor([place[one.input] for one in examples]), torch.tensor([one.output == answers[1] for one in examples])
        if not _LEAST // 4 <= about.sum() <= len(about) - _LEAST // 4:
            continue
        rows = probes(*collate(data.embeddings[number][:_WORDINGS], coordinates.device)[1:]).mean((0, 2))
        area = float(roc_auc_score(about, torch.einsum("gk,ngk->n", rows, coordinates[places]).cpu()))
        if max(area, 1 - area) >= separation:
            halves.append(_Halves(number, places, (about if area > 0.5 else ~about).float().to(coordinates.device)))
    return halves
