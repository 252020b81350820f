"""Modules that transformers renamed or fused: where a base model now has the modules that an older adapter changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["fused_experts", "renamed_modules"]


def renamed_modules(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Asks transformers what it calls modules of older checkpoints now, as PEFT does when it loads an adapter.

    Args:
        model: A base model, on any device, the meta device too.
        names: Paths of modules that the model does not have.

    Returns:
        Path in the model by old path. Paths that no renaming leads to a module of the model are left out, and so are those
        of which two lead to the same one.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    present = {name for name, _ in model.named_modules()}
    renamed = {name: new for name in names if (new := _new_name(model, name)) in present and new != name}
    taken = list(renamed.values())
    return {old: new for old, new in renamed.items() if taken.count(new) == 1}


def fused_experts(model: nn.Module, name: str) -> str | None:
    """The module of a base model that holds the experts of a mixture in one weight, where `name` was one of them; None if there is none.

    Args:
        model: A base model.
        name: Path of a module that the model does not have, such as "model.layers.0.mlp.experts.3.up_proj".
    """
    modules = dict(model.named_modules())
    for path in (name, _new_name(model, name)):
        parts = path.split(".")
        for end in range(len(parts) - 1, 0, -1):
            parent = modules.get(".".join(parts[:end]))
            if parent is not None:
                weights = parent.parameters(recurse=False)
                if any(weight.dim() == 3 for weight in weights):
                    return ".".join(parts[:end])
                break
    return None


def _new_name(model: Any, name: str) -> str:  # noqa: ANN401 - a model of transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not hasattr(model, "_lorag_renamings"):
        model._lorag_renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]  # noqa: SLF001
    key, _ = rename_source_key(f"{name}.weight", model._lorag_renamings, [], None, None)  # noqa: SLF001
    return str(key).removesuffix(".weight")
