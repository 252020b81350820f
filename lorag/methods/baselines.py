"""What every generator must beat: methods that do not learn from descriptions, or only look experts up."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.errors import GeneratorError
from lorag.methods.base import FitData, Generator, Settings
from lorag.methods.data_parallel import Batch
from lorag.methods.functional_training import require_tasks
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.text.conditioning import Condition, mixture, mixture_weights

__all__ = ["Mean", "Multitask", "Nearest", "RandomExpert", "SgMixture", "TopK"]


class _Stored(Generator):
    """A generator that keeps the experts' codes."""

    codes: Tensor
    deviations: Tensor

    def fit(self, data: FitData, loop: TrainingLoop) -> None:
        """Keeps codes and deviations of all experts."""
        self.codes, self.deviations = data.codes, data.deviations

    def tensors(self) -> dict[str, Tensor]:
        """Codes and deviations, in fp16: the bank's own precision."""
        return {"codes": self.codes.half(), "deviations": self.deviations.half()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the codes back."""
        try:
            self.codes, self.deviations = tensors["codes"].float(), tensors["deviations"].float()
        except KeyError as error:
            raise GeneratorError(f"stored tensors do not fit {self.name}", got=f"no {error}") from error


class Mean(Generator):
    """The mean of all experts, in ΔW: what a bank gives to every description alike."""

    name = "mean"
    code: Tensor

    def fit(self, data: FitData, loop: TrainingLoop) -> None:
        """Averages the codes."""
        self.code = data.codes.mean(0)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The mean code, whatever the condition."""
        return self.code.expand(count, -1).clone()

    def tensors(self) -> dict[str, Tensor]:
        """The mean code."""
        return {"code": self.code}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the mean code back."""
        if "code" not in tensors:
            raise GeneratorError(f"stored tensors do not fit {self.name}", got="no code")
        self.code = tensors["code"].float()


@dataclass
class MultitaskSettings(Settings):
    """Training of the one adapter.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Of the code.
        tasks: Tasks in a step.
        batch: Examples of each.
    """

    steps: int = 300
    learning_rate: float = 0.05
    tasks: int = 32
    batch: int = 4


class Multitask(Mean):
    """One adapter trained on all training tasks together: what data can do without a description."""

    name = "multitask"
    settings_type = MultitaskSettings
    settings: MultitaskSettings
    learns_from_tasks = True

    def fit(self, data: FitData, loop: TrainingLoop) -> None:
        """Trains one code, from the mean, with the base model's loss on all training tasks."""
        settings, functional = self.settings, require_tasks(self.name, data)
        module = _Code(data.codes[list(data.training)].mean(0))
        training = torch.tensor([*data.training, *data.without_expert])

        def loss(_: nn.Module, step: int) -> Batch:
            chosen = training[torch.randint(len(training), (settings.tasks,), generator=loop.rng)].tolist()

            def losses(part: slice) -> Tensor:
                return functional.losses(module().expand(len(chosen[part]), -1), chosen[part], settings.batch, f"multitask/{step}")

            return Batch(len(chosen), losses)

        def validate(_: nn.Module) -> float:
            indices = list(data.validation)
            return functional.loss(module().expand(len(indices), -1), indices, 8, "validation")

        steps = LoopSettings(settings.steps, settings.learning_rate, weight_decay=0.0, validate_every=50)
        loop.run(self.name, module, loss, validate if data.validation else None, steps)
        self.code = module().detach().cpu()


class _Code(nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.code = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.code


class RandomExpert(_Stored):
    """A random expert of the bank."""

    name = "random"

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Codes of `count` random experts: others for another description, though one seed serves all tasks of a ladder."""
        shift = zlib.crc32(condition.embedding.pooled.cpu().contiguous().numpy().tobytes())
        return self.codes[(torch.randint(len(self.codes), (count,), generator=rng) + shift) % len(self.codes)]


class Nearest(_Stored):
    """The expert whose descriptions are nearest."""

    name = "nearest"

    def shares(self, condition: Condition) -> Tensor:
        """All from the nearest."""
        return nn.functional.one_hot(condition.similarities.argmax(), len(self.codes)).float()

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The nearest expert's code."""
        return self.codes[int(condition.similarities.argmax())].expand(count, -1).clone()


@dataclass
class MixtureSettings(Settings):
    """Of the softmax over the nearest experts.

    Attributes:
        top: K, experts that count.
        temperature: τ of the softmax over cosines.
    """

    top: int = 4
    temperature: float = 0.05


class TopK(_Stored):
    """Softmax-weighted mean of the K nearest experts: SG-LoRA's merge (arXiv 2509.10535) without its generator."""

    name = "top_k"
    settings_type = MixtureSettings
    settings: MixtureSettings

    def shares(self, condition: Condition) -> Tensor:
        """The mixture's weights."""
        return mixture_weights(condition.similarities, self.settings.top, self.settings.temperature)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The mixture's mean."""
        found = mixture(condition.similarities, self.codes, None, top=self.settings.top, temperature=self.settings.temperature)
        return found.mean.expand(count, -1).clone()


class SgMixture(_Stored):
    """SG-LoRA's aggregator alone as a sampler: a Gaussian with the mixture's mean and total variance."""

    name = "sg_mixture"
    settings_type = MixtureSettings
    settings: MixtureSettings

    def shares(self, condition: Condition) -> Tensor:
        """The mixture's weights."""
        return mixture_weights(condition.similarities, self.settings.top, self.settings.temperature)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Samples of N(μ*, σ*²)."""
        settings = self.settings
        found = mixture(condition.similarities, self.codes, self.deviations, top=settings.top, temperature=settings.temperature)
        noise = torch.randn(count, len(found.mean), generator=rng)
        return found.mean + found.variance.sqrt() * noise
