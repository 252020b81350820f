"""The house method: read the description's tokens, reconstruct experts, then learn from the base model's own loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lorag.generators.base import FitData, NetworkGenerator, Settings
from lorag.generators.functional_training import FunctionalSettings, require_tasks, train_functionally
from lorag.generators.reconstruction import reconstruct, start_network
from lorag.models.code_networks import TokenNetwork
from lorag.training_loop import TrainingLoop

__all__ = ["House"]


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
        functional: Steps through the frozen base model.
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
    functional: FunctionalSettings = field(default_factory=FunctionalSettings)


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
        if self.settings.functional.steps:
            require_tasks(self.name, data)  # before time is spent on reconstruction
        network = start_network(self, data, loop)
        reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)
        train_functionally(self.name, network, lambda _, embeddings: self.predict(embeddings), data, loop, self.settings.functional)
