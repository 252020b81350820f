"""What every method must beat: methods that do not learn from descriptions, or only look experts up."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.base.objectives.prompts import with_description
from lorag.methods.functional import code_losses, require_runner, validation_loss
from lorag.methods.method import Method, Settings, State
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.text.conditioning import Condition, mixture, mixture_weights

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_set import TrainingSet

__all__ = ["Mean", "Multitask", "Nearest", "RandomExpert", "SgMixture", "TopK"]


_START = 0.1  # of codes that are trained without an expert to start from


class _Stored(Method):
    """A method that keeps the experts' codes."""

    baseline = True
    codes: Tensor
    deviations: Tensor

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Keeps codes and deviations of all experts."""
        data.require_experts(self.name)
        self.codes, self.deviations = data.codes, data.deviations

    def state(self) -> State:
        """Codes and deviations, in fp16: the bank's own precision."""
        return State({"codes": self.codes.half(), "deviations": self.deviations.half()}, {})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts the codes back."""
        self.codes, self.deviations = tensors["codes"].float(), tensors["deviations"].float()


class Mean(Method):
    """The mean of all experts, in ΔW: what a bank gives to every description alike."""

    name = "mean"
    baseline = True
    code: Tensor

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Averages the codes."""
        data.require_experts(self.name)
        self.code = data.codes.mean(0)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The mean code, whatever the condition."""
        return self.code.expand(count, -1).clone()

    def state(self) -> State:
        """The code."""
        return State({"code": self.code}, {})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts the code back."""
        self.code = tensors["code"].float()


@dataclass
class MultitaskSettings(Settings):
    """Training of the one adapter.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Of the code.
        tasks: Tasks in a step.
        batch: Examples of each.
        prompts: Whether descriptions stand before the inputs, so that the adapter learns to follow them. It then expects them in
            every request.
    """

    steps: int = 300
    learning_rate: float = 0.05
    tasks: int = 32
    batch: int = 4
    prompts: bool = False


class Multitask(Mean):
    """One adapter trained on all training tasks together: what data can do without a description."""

    name = "multitask"
    settings_type = MultitaskSettings
    settings: MultitaskSettings
    learns_from_tasks = True

    @property
    def prompted(self) -> bool:
        """Whether descriptions stood before the inputs."""
        return self.settings.prompts

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Trains one code, from the mean of the experts or from no change, with the base model's loss on all training tasks."""
        settings, runner = self.settings, require_runner(self.name, data, runner)
        if settings.prompts:
            data = replace(data, tasks=[with_description(task, task.descriptions) for task in data.tasks])
        experts = data.training_experts
        if experts:
            start = data.codes[experts].mean(0)
        else:  # from exactly no change, codes that are factors have no way to go
            start = data.space.zero.cpu() + _START * torch.randn(data.space.size, generator=loop.rng)
        module = _Code(start)
        training = torch.tensor(list(data.training))

        def loss(_: nn.Module, step: int) -> Batch:
            chosen = training[torch.randint(len(training), (settings.tasks,), generator=loop.rng)].tolist()

            def losses(share: slice) -> Tensor:
                codes = module().expand(len(chosen[share]), -1)
                return code_losses(runner, data, codes, chosen[share], settings.batch, f"multitask/{step}")

            return Batch(len(chosen), losses)

        validate = validation_loss(runner, data, lambda held: module().expand(len(held), -1))
        steps = LoopSettings(settings.steps, settings.learning_rate, weight_decay=0.0, validate_every=50)
        loop.run(self.name, module, loss, (lambda _: validate()) if data.validation else None, steps)
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
        prior = mixture(condition.similarities, self.codes, None, top=self.settings.top, temperature=self.settings.temperature)
        return prior.mean.expand(count, -1).clone()


class SgMixture(TopK):
    """SG-LoRA's aggregator alone as a sampler: a Gaussian with the mixture's mean and total variance."""

    name = "sg_mixture"

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Samples of N(μ*, σ*²)."""
        settings = self.settings
        prior = mixture(condition.similarities, self.codes, self.deviations, top=settings.top, temperature=settings.temperature)
        noise = torch.randn(count, len(prior.mean), generator=rng)
        return prior.mean + prior.variance.sqrt() * noise
