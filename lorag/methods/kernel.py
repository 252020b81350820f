"""The regression over experts with a learned kernel, as a generator of its own: ours, and a control of what the others add to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorag.base.runner import Runner
from lorag.errors import GeneratorError
from lorag.methods.base import Generator
from lorag.methods.expert_regression import ExpertRegression, KernelSettings, regress_codes
from lorag.methods.training_loop import TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.text.conditioning import Condition

__all__ = ["Kernel"]


class Kernel(Generator):
    """The mean of a Gaussian process over the experts' codes, whose kernel reads descriptions. By reconstruction alone."""

    name = "kernel"
    settings_type = KernelSettings
    settings: KernelSettings
    regression: ExpertRegression | None = None
    mean: Tensor

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Learns the kernel on the training experts; at use all experts count."""
        self.regression, self.mean = regress_codes(self.name, self.settings, data, loop, held=True)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated. Experts that the condition masks do not count, as where a known task plays an unseen one."""
        if self.regression is None:
            raise GeneratorError(f"{self.name} is not fitted")
        code = self.regression([condition.embedding], condition.masked).cpu() + self.mean
        return code.expand(count, -1).clone()

    def tensors(self) -> dict[str, Tensor]:
        """Kernel, experts' features and codes (in fp16), and the codes' mean."""
        if self.regression is None:
            raise GeneratorError(f"{self.name} is not fitted")
        found = {name: value.cpu() for name, value in self.regression.tensors().items()}
        return {**found, "values": found["values"].half(), "mean": self.mean, "embedding": torch.tensor(self.regression.embedding)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        try:
            self.mean = tensors["mean"].float()
            self.regression = ExpertRegression.from_tensors(self.settings, int(tensors["embedding"]), tensors)
        except (KeyError, RuntimeError, TypeError) as error:
            raise GeneratorError(f"stored tensors do not fit {self.name}", got=str(error)[:160]) from error
