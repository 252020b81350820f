"""The house method: read the description's tokens, reconstruct experts, then learn from the base model's own loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.functional import TaskLoss
from lorag.generators.base import FitData, NetworkGenerator, Settings
from lorag.generators.reconstruction import reconstruct, start_network
from lorag.models.code_networks import TokenNetwork
from lorag.training_loop import LoopSettings, TrainingLoop

__all__ = ["House"]

logger = logging.getLogger(__name__)


@dataclass
class HouseSettings(Settings):
    """Size and training.

    Attributes:
        width: Of the transformer that reads the description.
        queries: Learned queries whose answers make the code.
        layers: Of the transformer.
        heads: Of its attention.
        hidden: Of the layer before the code.
        dropout: In the transformer and before the code.
        steps: Steps of reconstruction.
        learning_rate: Peak rate of reconstruction.
        batch: Descriptions in a step of reconstruction.
        functional_steps: Steps through the frozen base model; 0 leaves them out.
        functional_rate: Their peak rate.
        tasks: Tasks in a functional step.
        examples: Examples of each.
    """

    width: int = 192
    queries: int = 8
    layers: int = 2
    heads: int = 4
    hidden: int = 384
    dropout: float = 0.1
    steps: int = 120
    learning_rate: float = 1e-3
    batch: int = 64
    functional_steps: int = 600
    functional_rate: float = 1e-3
    tasks: int = 32
    examples: int = 4


class House(NetworkGenerator):
    """Ours. Its parts come from measurements in docs/results.md: shared-subspace codes, token conditions, functional loss."""

    name = "house"
    settings_type = HouseSettings
    settings: HouseSettings

    def build(self, embedding: int, code: int) -> nn.Module:
        """The untrained network."""
        s = self.settings
        return TokenNetwork(
            embedding, code, width=s.width, queries=s.queries, layers=s.layers, heads=s.heads, hidden=s.hidden, dropout=s.dropout
        )

    def fit(self, data: FitData, loop: TrainingLoop) -> None:
        """Reconstruction, then functional training; each stage stops early on held-out training tasks."""
        network = start_network(self, data, loop)
        reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)
        if not self.settings.functional_steps:
            return
        if data.functional is None:
            logger.warning("house: no examples of the experts' tasks (tasks=PATH), so reconstruction is all of the training")
        else:
            self._train_functionally(network, data, loop, data.functional)

    def _train_functionally(self, network: nn.Module, data: FitData, loop: TrainingLoop, functional: TaskLoss) -> None:
        settings = self.settings
        training = torch.tensor(list(data.training))

        def loss(_: nn.Module, step: int) -> Tensor:
            order = torch.randperm(len(training), generator=loop.rng)[: settings.tasks]
            rows = training[order].tolist()
            picks = torch.randint(2**31, (len(rows),), generator=loop.rng).tolist()
            chosen = [data.embeddings[i][pick % len(data.embeddings[i])] for i, pick in zip(rows, picks, strict=True)]
            return functional.losses(self.predict(chosen), rows, settings.examples, f"house/{step}").mean()

        def validate(_: nn.Module) -> float:
            indices = list(data.validation)
            with torch.no_grad():
                codes = torch.cat([self.predict([data.embeddings[i][0]]) for i in indices])
            return functional.loss(codes, indices, 8, "validation")

        steps = LoopSettings(settings.functional_steps, settings.functional_rate, validate_every=100)
        loop.run("house functional", network, loss, validate if data.validation else None, steps)
