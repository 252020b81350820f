"""The layout of an adapter: which modules of a base model it changes, in model order, and their sizes.

PEFT itself decides which modules a target names: it is asked on a copy of the base model on the meta device, so no
weight is allocated and no module path is taken apart for it. `LoraLayout.places` alone reads paths.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import FailFast, Field, Strict

from lorag.errors import LayoutError
from lorag.files.stored import Count, Stored, Text, Texts

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LoraLayout", "ModulePlace", "ModuleShape"]


@dataclass(frozen=True)
class ModuleShape:
    """One adapted module: its path in the base model and the sizes of its weight."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModulePlace:
    """Where a module stands in its base model.

    Attributes:
        kind: Its path without the numbers, such as "model.layers.self_attn.q_proj": what it does, in which stack.
        depth: The numbers, from the outermost: the layer, then a layer's part, an expert or the like.
    """

    kind: str
    depth: tuple[int, ...]


class _StoredLayout(Stored):
    target_modules: Texts
    modules: Annotated[tuple[tuple[Text, Count, Count], ...], FailFast(), Field(min_length=1)]
    fan_in_fan_out: Annotated[bool, Strict()]


@dataclass(frozen=True)
class LoraLayout:
    """The ordered modules that adapters of a bank change.

    Attributes:
        target_modules: The names given to PEFT, sorted; for an expression, the full paths that it matched.
        modules: All modules that these names match, in the order of the base model.
        fan_in_fan_out: Whether some of the base's weights are stored as (in, out), as GPT-2's are. PEFT looks at each layer
            itself, and so does a merge.
    """

    target_modules: tuple[str, ...]
    modules: tuple[ModuleShape, ...]
    fan_in_fan_out: bool = False

    @classmethod
    def from_model(cls, model: nn.Module, target_modules: Sequence[str] | str, layers: Sequence[int] | None = None) -> LoraLayout:
        """Asks PEFT which modules of a base model the targets name.

        Args:
            model: A base model, on any device; it is not changed.
            target_modules: PEFT's target names, a regular expression, or "all-linear".
            layers: The layers whose modules count, as PEFT's `layers_to_transform`; None takes all.

        Raises:
            LayoutError: If nothing matches, or something other than a linear layer does.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        skeleton = _without_weights(model)
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        try:
            with warnings.catch_warnings():
                # PEFT warns that it corrects fan_in_fan_out for Conv1D; the corrected value is recorded below.
                warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
                config = LoraConfig(r=1, target_modules=targets, layers_to_transform=None if layers is None else list(layers))
                wrapped = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
        except ValueError as error:
            raise LayoutError(
                f"no module of {type(model).__name__} can be adapted as asked",
                got=f"target_modules {target_modules!r}{'' if layers is None else f', layers {list(layers)}'}: {str(error)[:160]}",
                remedy="Name linear layers of the base model, such as q_proj and v_proj.",
            ) from error
        modules, transposed = [], set()
        bare: Any = wrapped.get_base_model()
        for name, module in bare.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if "default" not in module.lora_A:
                raise LayoutError(
                    f"module {name} is not a linear layer", got=type(module).__name__, expected="Linear or Conv1D layers only"
                )
            rows: Any = module.lora_A["default"].weight
            columns: Any = module.lora_B["default"].weight
            if rows.dim() != 2:
                raise LayoutError(f"module {name} is a convolution", expected="Linear or Conv1D layers only")
            modules.append(ModuleShape(name, int(rows.shape[1]), int(columns.shape[0])))
            transposed.add(bool(getattr(module, "fan_in_fan_out", False)))
        named: Any = config.target_modules
        # An expression would be taken literally in the list of names that adapters are saved with, and bare names match all layers.
        whole = isinstance(named, str) or layers is not None
        names = sorted([module.name for module in modules] if whole else named)
        return cls(tuple(names), tuple(modules), True in transposed)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths in order."""
        return tuple(module.name for module in self.modules)

    @property
    def places(self) -> tuple[ModulePlace, ...]:
        """Kind and depth of each module, in order, from its path.

        Lists of layers are `ModuleList`s in every model of transformers, so that the numbers of a path are its depth, and
        encoder and decoder, or the towers of a model of text and images, keep kinds of their own.
        """
        parts = [module.name.split(".") for module in self.modules]
        return tuple(
            ModulePlace(".".join(p for p in path if not p.isdecimal()), tuple(int(p) for p in path if p.isdecimal())) for path in parts
        )

    def values(self, rank: int) -> int:
        """Number of values in an adapter of this layout."""
        return sum(rank * (module.in_features + module.out_features) for module in self.modules)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that any change of module names, order or sizes alters."""
        return hashlib.sha256(json.dumps(self.to_dict()["modules"]).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "target_modules": list(self.target_modules),
            "modules": [[m.name, m.in_features, m.out_features] for m in self.modules],
            "fan_in_fan_out": self.fan_in_fan_out,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LoraLayout:
        """Reads the JSON form.

        Raises:
            LayoutError: If a part is missing or wrong.
        """
        stored = _StoredLayout.read(value, "a stored layout cannot be read", LayoutError)
        layout = cls(stored.target_modules, tuple(ModuleShape(*one) for one in stored.modules), stored.fan_in_fan_out)
        if len(set(layout.names)) != len(layout):
            raise LayoutError("a stored layout repeats a module")
        return layout

    def check_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Checks that there are factors A (r, i) and B (o, r) for each module and nothing else.

        Raises:
            LayoutError: Naming the first module that does not fit.
        """
        extra, missing = set(factors) - set(self.names), [name for name in self.names if name not in factors]
        if extra or missing:
            raise LayoutError(
                "an adapter's modules differ from the layout's",
                got=f"missing {missing[:3]}, extra {sorted(extra)[:3]}",
                expected=f"{len(self)} modules",
            )
        for module in self.modules:
            rows, columns = factors[module.name]
            rank = rows.shape[0] if rows.dim() == 2 else -1
            if tuple(rows.shape) != (rank, module.in_features) or tuple(columns.shape) != (module.out_features, rank):
                raise LayoutError(
                    f"factors of {module.name} have the wrong shape",
                    got=f"A {tuple(rows.shape)}, B {tuple(columns.shape)}",
                    expected=f"A (r, {module.in_features}), B ({module.out_features}, r)",
                )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model's modules on the meta device: no weight is allocated."""
    import torch

    weights: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        weights[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty
    return copy.deepcopy(model, weights)
