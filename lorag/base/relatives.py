"""How alike two base models are: whether adapters of one fit the other, and how far its weights have moved."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorag.base.layout import LoraLayout
from lorag.errors import LayoutError

if TYPE_CHECKING:
    from lorag.base.base_model import BaseModel

__all__ = ["Likeness", "compare_bases"]


@dataclass(frozen=True)
class Likeness:
    """What two base models share.

    Attributes:
        fits: Whether the other one has every module of the adapters, in the same shape.
        same_tokens: Whether texts become the same tokens.
        similarity: Mean over their weight matrices of the cosine of the two; None where they were not compared.
        least: The smallest of these cosines, and the matrix it is of.
        change: ‖W' − W‖ over the modules that adapters change.
    """

    fits: bool
    same_tokens: bool
    similarity: float | None = None
    least: tuple[float, str] | None = None
    change: float | None = None


def compare_bases(one: BaseModel, other: BaseModel, layout: LoraLayout, texts: Sequence[str], *, weights: bool = True) -> Likeness:
    """Compares two base models; their weights are read only where adapters of one fit the other.

    Args:
        one: The base model that the adapters were trained for.
        other: Another one.
        layout: What the adapters change.
        texts: By which the tokenizers are compared.
        weights: Whether the weights are compared.

    Raises:
        BaseModelError: If a model cannot be had.
    """
    fits = _fits(other, layout)
    same_tokens = _tokens(one, texts) == _tokens(other, texts)
    if not fits or not weights:
        return Likeness(fits, same_tokens)
    cosines, change = _compared(one, other, {f"{name}.weight" for name in layout.names})
    least = min(cosines, key=lambda name: cosines[name])
    return Likeness(True, same_tokens, sum(cosines.values()) / len(cosines), (cosines[least], least), change)


def _fits(model: BaseModel, layout: LoraLayout) -> bool:
    """Whether PEFT finds the same modules there, in the same shapes."""
    try:
        return LoraLayout.from_model(model.skeleton(), list(layout.target_modules)).modules == layout.modules
    except LayoutError:
        return False


def _tokens(model: BaseModel, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = model.tokenizer()
    return getattr(tokenizer, "tokenizer", tokenizer)(list(texts), add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def _compared(one: BaseModel, other: BaseModel, adapted: Set[str]) -> tuple[dict[str, float], float]:
    """Cosine of each weight matrix that both models have in one shape, and the norm of what changed in some; both are held in bf16."""
    before = dict(one.load("cpu", "bfloat16").named_parameters())
    cosines, changed = {}, 0.0
    for name, weight in other.load("cpu", "bfloat16").named_parameters():
        mine = before.get(name)
        if mine is not None and mine.shape == weight.shape and weight.dim() > 1:
            a, b = mine.flatten().float(), weight.flatten().float()
            cosines[name] = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
            changed += (a - b).square().sum().item() if name in adapted else 0.0
    return cosines, math.sqrt(changed)
