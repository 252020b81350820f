"""The house method: read the description's tokens, reconstruct experts, then learn from the base model's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorag.conditions.embedding import Embedding
from lorag.errors import ConfigError
from lorag.generators.base import FitData, NetworkGenerator, Settings, collate
from lorag.generators.functional_training import FunctionalSettings, require_tasks, train_functionally
from lorag.generators.reconstruction import reconstruct, start_network
from lorag.models.code_networks import TokenNetwork
from lorag.models.expert_attention import ExpertAttention
from lorag.optimisation.training_loop import TrainingLoop

__all__ = ["House"]

_SOURCES = ("description", "experts", "both")


@dataclass
class HouseSettings(Settings):
    """Size and training.

    Attributes:
        source: What codes are made of: "description" (a network that reads it), "experts" (attention over the bank's, for
            banks of some dozen), or "both" added up.
        width: Of the transformer that reads the description.
        queries: Learned queries whose answers make the code.
        layers: Of the transformer.
        heads: Of its attention.
        hidden: Of the layer before the code.
        dropout: In the transformer and before the code.
        word_dropout: Share of a description's tokens hidden in training.
        noise: Gaussian noise on its vectors in training, as a share of their own size.
        view: Dimensions in which attention compares descriptions.
        temperature: Of the attention over experts, at the start.
        offset: Whether attention also learns an offset, the same for all descriptions.
        steps: Steps of reconstruction.
        learning_rate: Peak rate of reconstruction.
        batch: Descriptions in a step of reconstruction.
        functional: Steps through the frozen base model.
    """

    source: str = "description"
    width: int = 192
    queries: int = 8
    layers: int = 1
    heads: int = 4
    hidden: int = 256
    dropout: float = 0.1
    word_dropout: float = 0.1
    noise: float = 0.2
    view: int = 32
    temperature: float = 0.2
    offset: bool = True
    steps: int = 300
    learning_rate: float = 1e-3
    batch: int = 64
    functional: FunctionalSettings = field(default_factory=lambda: FunctionalSettings(steps=1300, tasks=64, examples=2))


class _Sum(nn.Module):
    """A network on the description, attention over experts, or both; in training it sees descriptions blurred."""

    def __init__(self, reading: TokenNetwork | None, attention: ExpertAttention | None, word_dropout: float, noise: float) -> None:
        super().__init__()
        self.reading, self.attention = reading, attention
        self.word_dropout, self.noise = word_dropout, noise

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
        if self.training:
            pooled, tokens = self._blur(pooled), self._blur(tokens)
            mask = mask & (torch.rand(mask.shape, device=mask.device) >= self.word_dropout)
        parts = [] if self.reading is None else [self.reading(pooled, tokens, mask)]
        parts += [] if self.attention is None else [self.attention(pooled, hidden)]
        return torch.stack(parts).sum(0)

    def _blur(self, vectors: Tensor) -> Tensor:
        size = vectors.square().mean(-1, keepdim=True).sqrt()
        return vectors + self.noise * size * torch.randn_like(vectors)


class House(NetworkGenerator):
    """Ours. Its parts come from measurements in docs/results.md: shared-subspace codes, token conditions, functional loss."""

    name = "house"
    settings_type = HouseSettings
    settings: HouseSettings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        if self.settings.source not in _SOURCES:
            raise ConfigError("settings.source is unknown", got=repr(self.settings.source), expected=", ".join(_SOURCES))

    def build(self, embedding: int, code: int) -> nn.Module:
        """The untrained network."""
        s = self.settings
        reading, attention = None, None
        if s.source != "experts":
            reading = TokenNetwork(
                embedding, code, width=s.width, queries=s.queries, layers=s.layers, heads=s.heads, hidden=s.hidden, dropout=s.dropout
            )
        if s.source != "description":
            keys, codes = torch.empty(self.experts, embedding), torch.empty(self.experts, code)
            attention = ExpertAttention(
                keys, codes, torch.empty(code), self.modules, width=s.view, temperature=s.temperature, offset=s.offset
            )
        return _Sum(reading, attention, s.word_dropout, s.noise)

    experts: int = 0
    modules: list[int]

    @property
    def learns_from_tasks(self) -> bool:
        """Whether there are functional steps."""
        return self.settings.functional.steps > 0

    def fit(self, data: FitData, loop: TrainingLoop) -> None:
        """Reconstruction, then functional training; each stage stops early on held-out training tasks.

        While attention learns, a task sees no expert of its kin, and validation tasks are nobody's experts: they play the
        unseen. At use all experts count.
        """
        if self.learns_from_tasks:
            require_tasks(self.name, data)  # before time is spent on reconstruction
        self.experts, self.modules = len(data.codes), list(data.modules)
        network = start_network(self, data, loop)
        if isinstance(network, _Sum) and network.attention is not None:
            device = loop.accelerator.device
            network.attention.keys, network.attention.codes = data.conditioner.centroids.to(device), data.codes.to(device)
            network.attention.zero = data.zero.to(device)
        if self.settings.source == "description":
            reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)

        def predict(rows: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            hidden = torch.zeros(len(rows), len(data.codes), dtype=torch.bool)
            hidden[:, list(data.validation)] = True
            for place, row in enumerate(rows):
                hidden[place, list(data.kin[row])] = True
            device = next(network.parameters()).device
            return network(*(part.to(device) for part in collate(embeddings)), hidden=hidden.to(device))

        train_functionally(self.name, network, predict, data, loop, self.settings.functional)

    def tensors(self) -> dict[str, Tensor]:
        """The network, and the lengths of the modules' parts."""
        found = super().tensors()
        if self.settings.source == "description":
            return found
        return found | {"modules": torch.tensor(self.modules)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Builds the network and loads it."""
        if "modules" in tensors:
            self.modules, self.experts = tensors["modules"].tolist(), len(tensors.get("attention.codes", ()))
        super().restore({name: value for name, value in tensors.items() if name != "modules"})
