"""Readers that learn from a trained one what a task's descriptions say: an ensemble of them, and one that reads examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.functional import require_runner
from lorag.methods.method import collate, draw
from lorag.methods.training_loop import Batch, LoopSettings
from lorag.networks.experts import KernelHead

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.readers import Augmentation, DescriptionNetwork, FeatureReader, PairReader
    from lorag.text.embedding import Embedding

__all__ = ["EnsembleSettings", "PairSettings", "teach_ensemble", "teach_pairs"]

_COUNTS = (1, 1, 2, 4, 8, 16)  # pairs of a task in a step, each as likely
_VALIDATED = (1, 4)  # pairs of a held-out task that validation reads


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


@dataclass
class PairSettings:
    """A reader of a few (input, output) pairs.

    Attributes:
        steps: Of training; 0 leaves it out.
        learning_rate: Peak rate.
        batch: Tasks in a step.
        examples: Training examples of each task from which pairs are drawn, at most.
    """

    steps: int = 0
    learning_rate: float = 1e-3
    batch: int = 64
    examples: int = 32


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
    teacher, members, device = _Teacher(network, data, loop), [], loop.accelerator.device
    for number in range(1, settings.count + 1):
        with loop.seeded():
            student = _Student(network.augmentation, another()).to(device)

        def distance(student: nn.Module, tasks: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            return teacher.distance(student(*collate(embeddings, device)), tasks)

        def loss(student: nn.Module, step: int) -> Batch:
            tasks = teacher.draw(settings.batch)
            drawn = draw(data, tasks, loop)
            return Batch(len(tasks), lambda share: distance(student, tasks[share], drawn[share]))

        def validate(student: nn.Module) -> float:
            with torch.no_grad():
                each = [distance(student, [i] * len(data.embeddings[i][:8]), data.embeddings[i][:8]) for i in data.validation]
            return torch.stack(each).mean().item()

        teacher.teach(f"{name} member {number}", student, loss, validate, settings.steps, settings.learning_rate)
        members.append(student.reader)
    network.readers.extend(members)
    network.requires_grad_(False).eval()


def teach_pairs(
    name: str,
    network: DescriptionNetwork,
    untrained: Callable[[int], PairReader],
    data: TrainingSet,
    loop: TrainingLoop,
    settings: PairSettings,
    runner: Runner | None,
) -> int:
    """Gives a trained network a reader of examples; all else of it stays as it is.

    It learns the features that the network reads in a task's descriptions, from a few of the task's examples as the bare base model
    reads them: no step runs the base model.

    Args:
        name: Names the stage.
        network: The trained network.
        untrained: Makes an untrained reader of pairs, given the length v of what the base model makes of one.
        data: The tasks with their examples.
        loop: Runs the stage.
        settings: Of it.
        runner: The base model.

    Returns:
        The length v.

    Raises:
        GeneratorError: If there is no base model, or no examples.
    """
    runner, held = require_runner(name, data, runner), list(data.validation)
    teacher = _Teacher(network, data, loop)
    pairs = {}
    for i in (*data.training, *held):
        examples = data.tasks[i].split("train")[: settings.examples]
        pairs[i] = runner.read_pairs([(example.input, example.output) for example in examples]).cpu()
    length = next(iter(pairs.values())).shape[1]
    with loop.seeded():
        student = untrained(length).to(loop.accelerator.device)
    student.standardise(torch.cat([pairs[i] for i in data.training]))

    def loss(student: nn.Module, step: int) -> Batch:
        tasks = teacher.draw(settings.batch)
        counts = [_COUNTS[place] for place in torch.randint(len(_COUNTS), (len(tasks),), generator=loop.rng).tolist()]
        some = [pairs[i][torch.randperm(len(pairs[i]), generator=loop.rng)[:count]] for i, count in zip(tasks, counts, strict=True)]
        return Batch(len(tasks), lambda part: teacher.distance(student(some[part]), tasks[part]))

    def validate(student: nn.Module) -> float:
        with torch.no_grad():
            each = [teacher.distance(student([pairs[i][:count] for i in held]), held) for count in _VALIDATED]
        return torch.stack(each).mean().item()

    teacher.teach(f"{name} pairs", student, loss, validate, settings.steps, settings.learning_rate)
    network.pairs = student
    network.requires_grad_(False).eval()
    return length


class _Teacher:
    """A trained network, the features of each task that it learned, and how a student is held to them."""

    def __init__(self, network: DescriptionNetwork, data: TrainingSet, loop: TrainingLoop) -> None:
        self.device, self.loop, self.data = loop.accelerator.device, loop, data
        network.to(self.device).requires_grad_(False).eval()
        self.training = torch.tensor(list(data.training))
        self.targets = {i: mean_features(network, data.averaged(i)) for i in (*data.training, *data.validation)}
        self.apart = distance_of_codes(network.head)

    def draw(self, count: int) -> list[int]:
        """Training tasks at random."""
        return self.training[torch.randint(len(self.training), (count,), generator=self.loop.rng)].tolist()

    def distance(self, features: Tensor, tasks: Sequence[int]) -> Tensor:
        """Mean squared distance between the codes of features (b, f) and of what the teacher read of b tasks."""
        return self.apart(features, torch.stack([self.targets[i] for i in tasks]))

    def teach(
        self,
        stage: str,
        student: nn.Module,
        loss: Callable[[nn.Module, int], Batch],
        validate: Callable[[nn.Module], float],
        steps: int,
        learning_rate: float,
    ) -> None:
        """Runs a stage."""
        length = LoopSettings(steps, learning_rate, validate_every=max(1, steps // 10))
        self.loop.run(stage, student, loss, validate if self.data.validation else None, length)


class _Student(nn.Module):
    """A reader that sees descriptions with augmentation in training."""

    def __init__(self, augmentation: Augmentation, reader: FeatureReader) -> None:
        super().__init__()
        self.augmentation, self.reader = augmentation, reader

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.reader(*self.augmentation(pooled, tokens, mask))


def distance_of_codes(head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
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


def mean_features(network: DescriptionNetwork, embeddings: Sequence[Embedding]) -> Tensor:
    """Mean features (f,) over descriptions of one task."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return network.features(*collate(embeddings, device)).mean(0)
