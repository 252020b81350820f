"""Text-to-LoRA's design as a baseline (Charakorn et al., ICML 2025): one network writes every module, by an embedding of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lorag.methods.functional import FunctionalSettings, require_runner, train_functionally
from lorag.methods.method import NetworkMethod, Settings, reconstruct, whole
from lorag.networks.modules import ModuleNetwork

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet

__all__ = ["Hypernet"]

_MOST_MODULES = 65_536


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


class Hypernet(NetworkMethod):
    """Frozen pooled text embedding and a learned embedding of each module, through residual blocks, to the module's part.

    A module's embedding stands for the paper's two, of layer and of type. The paper writes raw factors; here the weight
    space decides what a module's part is: a core, for which the loss is ‖ΔW − ΔW'‖², or factors.
    """

    name = "hypernet"
    settings_type = HypernetSettings
    settings: HypernetSettings

    def build(self, shape: Mapping[str, Any]) -> nn.Module:
        """The untrained network, for the length of the `embedding` and those of the modules' `parts` of a code."""
        parts = [whole({"parts": value}, "parts") for value in shape["parts"]]
        if not 0 < len(parts) <= _MOST_MODULES or 0 in parts:
            raise ValueError(f"{len(parts)} modules' parts of a code")
        s = self.settings
        return ModuleNetwork(whole(shape, "embedding"), parts, width=s.width, depth=s.depth, module_width=s.module_width, dropout=s.dropout)

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
        network = self.start({"embedding": data.embedding_size, "parts": list(data.space.parts)}, loop)
        reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)
        train_functionally(self.name, network, lambda _, embeddings: self.predict(embeddings), data, loop, self.settings.functional, runner)
