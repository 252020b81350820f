"""What an adapter format is: a file that it recognises by its content, and the way from it to PEFT's words, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorag.adapters.tensor_names import KEY
from lorag.base.layout import ModuleShape
from lorag.errors import AdapterError

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.base_model import BaseModel

__all__ = ["TIED", "AdapterFormat", "Base", "PeftForm", "Update", "peft_form"]

# What can be done with an adapter of a head that is the embeddings, too: merged, it would change both.
TIED = "Use it unmerged with PEFT or transformers, or train it again without lm_head."


@dataclass(frozen=True)
class Base:
    """What is known of an adapter's base model before the adapter is read; a format asks for no more than it needs.

    Attributes:
        model: The base model, if one is given.
        modules: The modules that an adapter may change, if they are known already.
    """

    model: BaseModel | None = None
    modules: Sequence[ModuleShape] = ()

    def linear_layers(self) -> dict[str, ModuleShape]:
        """Modules that an adapter may change, by path; of a base model alone all linear layers, from its config; else none.

        Raises:
            BaseModelError: If the base model's config cannot be had.
        """
        if self.modules or self.model is None:
            return {module.name: module for module in self.modules}
        from torch import nn

        layers = {name: layer for name, layer in self.model.skeleton().named_modules() if isinstance(layer, nn.Linear)}
        return {name: ModuleShape(name, layer.in_features, layer.out_features) for name, layer in layers.items()}


@dataclass(frozen=True)
class Update:
    """ΔW = scaling · B·A of one module.

    Attributes:
        a: A (r, i).
        b: B (o, r).
        scaling: The factor.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class PeftForm:
    """An adapter in PEFT's words.

    Attributes:
        config: What adapter_config.json says.
        tensors: What adapter_model.safetensors holds, by PEFT's names.
        info: What lorag.json says, where the file states anything of the kind.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)


class AdapterFormat(ABC):
    """A format of adapters beside PEFT's. Each one is a file here and an entry of FORMATS.

    Attributes:
        name: Its name in the registry, by which `lorag export --format` writes it.
        title: How messages call it.
        writes: What `write` makes: "file", "folder", or None where the format is only read.
        config: Name of a file beside the weights that `read` needs as well, if there is one.
        next_step: The command for what was written, in which `{out}` stands for its path.
        version: Of the way that files are read; raised when the same file is read differently.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    writes: ClassVar[str | None] = None
    config: ClassVar[str | None] = None
    next_step: ClassVar[str] = "lorag info {out}"
    version: ClassVar[int] = 1

    def __repr__(self) -> str:
        """What the result of reading a file depends on, beside the file and its base model."""
        return f"{self.name} {self.version}"

    @abstractmethod
    def weights(self, folder: Path) -> list[Path]:
        """Files of a folder that hold an adapter each, judged by their content."""

    @abstractmethod
    def recognises(self, file: Path) -> bool:
        """Whether a file is of this format, by its first bytes or its header."""

    @abstractmethod
    def read(self, file: Path, base: Base) -> PeftForm:
        """Reads a file that this format recognises.

        Args:
            file: The file.
            base: What is known of the base model.

        Raises:
            AdapterError: If it is not a plain, whole LoRA.
            ArtifactError: If it is damaged.
            BaseModelError: If the base model must be known for it, and is not.
        """

    def write(self, adapter: LoraAdapter, out: Path, base: Base) -> None:
        """Writes an adapter to an empty file or folder, which the caller then moves into place.

        Raises:
            AdapterError: If the format cannot hold it.
            BaseModelError: If the format cannot hold adapters of such a base model.
        """
        raise AdapterError(f"adapters in the format of {self.title} are read, not written", got=out)


def peft_form(
    updates: Mapping[str, Update], *, base_model: str | None = None, task_type: str | None = None, info: Mapping[str, Any] | None = None
) -> PeftForm:
    """PEFT's form of updates of any ranks and scalings.

    Args:
        updates: By the path of the module in the base model.
        base_model: The base model's name, if it is stated.
        task_type: PEFT's task type.
        info: What is known of the adapter's origin and task.
    """
    ranks = {name: update.a.shape[0] for name, update in updates.items()}
    alphas = {name: float(f"{update.scaling * ranks[name]:.12g}") for name, update in updates.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(updates),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        KEY.format(module=name, factor=factor): tensor.contiguous()
        for name, update in updates.items()
        for factor, tensor in (("A", update.a), ("B", update.b))
    }
    return PeftForm(config, tensors, dict(info or {}))
