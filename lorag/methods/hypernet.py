"""Text-to-LoRA's design as a baseline (Charakorn et al., ICML 2025): one network writes every module, told which one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorag.base.runner import Runner
from lorag.errors import GeneratorError
from lorag.methods.base import NetworkGenerator, Settings
from lorag.methods.functional import FunctionalSettings, require_runner, train_functionally
from lorag.methods.reconstruction import reconstruct, start_network
from lorag.methods.training_loop import TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.hypernet import ModuleNetwork

__all__ = ["Hypernet"]


@dataclass
class HypernetSettings(Settings):
    """Size and training. The published sizes serve base models of billions of parameters; these fit small banks.

    Attributes:
        width: Of the residual stream.
        depth: Residual blocks.
        module_width: Of the learned embedding of each adapted module.
        dropout: In each block.
        steps: Steps of reconstruction.
        learning_rate: Peak rate of reconstruction.
        batch: Descriptions in a step of reconstruction.
        functional: Steps through the frozen base model; none by default, which is the paper's reconstruction form.
    """

    width: int = 256
    depth: int = 3
    module_width: int = 64
    dropout: float = 0.1
    steps: int = 1500
    learning_rate: float = 1e-3
    batch: int = 64
    functional: FunctionalSettings = field(default_factory=lambda: FunctionalSettings(steps=0))


class Hypernet(NetworkGenerator):
    """Frozen pooled text embedding and a learned embedding of each module, through residual blocks, to the module's part.

    A module's embedding stands for the paper's two, of layer and of type. The paper writes raw factors; here the weight
    space decides what a module's part is: a core, for which the loss is ‖ΔW − ΔW'‖², or factors.
    """

    name = "hypernet"
    settings_type = HypernetSettings
    settings: HypernetSettings
    parts: tuple[int, ...]  # length of each module's part of a code

    def build(self, embedding: int, code: int) -> nn.Module:
        """The untrained network."""
        if sum(self.parts) != code:
            raise GeneratorError(f"{self.name}: the modules' parts do not make up a code", got=sum(self.parts), expected=code)
        s = self.settings
        return ModuleNetwork(embedding, self.parts, width=s.width, depth=s.depth, module_width=s.module_width, dropout=s.dropout)

    @property
    def learns_from_tasks(self) -> bool:
        """Whether there are functional steps."""
        return self.settings.functional.steps > 0

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Reconstruction, then functional steps if there are any; each stops early on held-out training tasks."""
        if not self.learns_from_tasks:
            data.require_experts(self.name)
        else:
            require_runner(self.name, data, runner)  # before time is spent on reconstruction
        self.parts = tuple(data.space.parts)
        network = start_network(self, data, loop)
        reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)
        train_functionally(self.name, network, lambda _, embeddings: self.predict(embeddings), data, loop, self.settings.functional, runner)

    def tensors(self) -> dict[str, Tensor]:
        """The network's parameters, its sizes, and the length of each module's part."""
        return {**super().tensors(), "parts": torch.tensor(self.parts)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Builds the network and loads its parameters."""
        left = dict(tensors)
        parts = left.pop("parts", None)
        if parts is None or parts.dim() != 1 or parts.dtype != torch.int64 or not (parts > 0).all():
            raise GeneratorError(f"stored tensors do not fit {self.name}", got="no usable lengths of the modules' parts")
        self.parts = tuple(parts.tolist())
        super().restore(left)
