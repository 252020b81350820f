"""Attention over a bank's experts, for banks of a few dozen: it learns, through the base model, which of them to trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.methods.functional import FunctionalSettings, require_runner, train_functionally
from lorag.methods.method import NetworkMethod, Settings, whole
from lorag.networks.experts import ExpertAttention
from lorag.networks.readers import Augmentation

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition
    from lorag.text.embedding import Embedding

__all__ = ["Attention"]


@dataclass
class AttentionSettings(Settings):
    """Size and training.

    Attributes:
        view: Dimensions in which descriptions are compared.
        temperature: Of the softmax over experts, at the start.
        offset: Whether an offset, the same for all descriptions, is learned too.
        word_dropout: Share of a description's tokens masked in training.
        noise: Gaussian noise on its vectors in training, as a share of their own size.
        functional: Steps through the frozen base model.
    """

    view: int = 32
    temperature: float = 0.2
    offset: bool = True
    word_dropout: float = 0.1
    noise: float = 0.2
    functional: FunctionalSettings = field(default_factory=lambda: FunctionalSettings(steps=900, tasks=64, examples=2))


class _AugmentedAttention(nn.Module):
    """Attention that sees descriptions with augmentation in training."""

    def __init__(self, augmentation: Augmentation, attention: ExpertAttention) -> None:
        super().__init__()
        self.augmentation, self.attention = augmentation, attention

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor, masked: Tensor | None = None) -> Tensor:
        return self.attention(self.augmentation(pooled, tokens, mask)[0], masked)


class Attention(NetworkMethod):
    """A weighted mean of the experts' ΔW by a learned view of descriptions, with a factor per module and an offset.

    While it learns, a task sees no expert of its group, and none that is held out. At use all experts count.
    """

    name = "attention"
    settings_type = AttentionSettings
    settings: AttentionSettings

    @property
    def learns_from_tasks(self) -> bool:
        """Whether there are functional steps."""
        return self.settings.functional.steps > 0

    def build(self, shape: Mapping[str, Any]) -> _AugmentedAttention:
        """The untrained network, for lengths of `embedding` and `code`, those of the `modules`' parts, and a number of `experts`."""
        s, code, experts = self.settings, whole(shape, "code"), whole(shape, "experts")
        modules = [whole({"modules": value}, "modules", code) for value in shape["modules"]]
        keys, codes = torch.empty(experts, whole(shape, "embedding")), torch.empty(experts, code)
        attention = ExpertAttention(keys, codes, torch.empty(code), modules, width=s.view, temperature=s.temperature, offset=s.offset)
        return _AugmentedAttention(Augmentation(s.word_dropout, s.noise), attention)

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Functional training from plain similarity; it stops early on held-out tasks."""
        data.require_experts(self.name)
        if self.learns_from_tasks:
            require_runner(self.name, data, runner)
        shape = {
            "embedding": data.embedding_size,
            "code": data.space.size,
            "modules": list(data.space.parts),
            "experts": len(data.codes),
        }
        network = self.start(shape, loop)
        if isinstance(network, _AugmentedAttention):
            network.attention.hold(data.conditioner.centroids, data.codes, data.space.zero)

        def predict(tasks: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            return self.predict(embeddings, data.masked(tasks, validation=True))

        train_functionally(self.name, network, predict, data, loop, self.settings.functional, runner)
        network.eval()

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated. Experts that the condition masks do not count, as where a task of the bank is treated as unseen."""
        with torch.inference_mode():
            code = self.predict([condition.embedding], condition.masked[None] if condition.masked.any() else None)
        return code.cpu().expand(count, -1).clone()
