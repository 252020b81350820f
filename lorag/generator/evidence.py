"""What a gate goes by: numbers on one description that are there before anything is run on the base model.

How near the nearest experts are, how wide the prior over them, what share of the description lies outside of the directions
in which the bank's descriptions differ, how much the code changes when the description is put into other words or sampled
again, how large it is, and how unlike the bank's codes its modules are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lorag.methods import Generator
from lorag.spaces.weight_space import WeightSpace
from lorag.text.conditioning import Condition, Conditioner
from lorag.text.embedding import TextEmbedder

__all__ = ["FEATURES", "Describes", "Reference", "gather", "rewordings"]

# In the order of rows of evidence.
FEATURES = ("nearest", "near", "spread", "outside", "rewording", "sampling", "norm", "code_distance")
_NEAR, _PRIOR, _TEMPERATURE = 4, 16, 0.05
_SAMPLES = 4
_TINY = 1e-9


class Describes(Protocol):
    """The parts of a generator that a gate asks."""

    space: Any
    conditioner: Conditioner
    method: Generator
    embedder: TextEmbedder


def rewordings(text: str) -> list[str]:
    """The description in other words that mean the same, whatever it says."""
    bare = text.strip().rstrip(".?!") or text.strip()
    return [f"please {text}", f"task: {text}", f"{bare}, thanks", bare.lower()]


@dataclass(frozen=True)
class Reference:
    """What evidence is compared with.

    Attributes:
        size: Mean of the logarithm of each module's part of a code, over the bank's experts (m,).
        deviation: Standard deviation of the same (m,).
    """

    size: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, space: WeightSpace, codes: Tensor) -> Reference:
        """From codes (n, c) of experts."""
        sizes = _sizes(codes, space.parts)
        spread = sizes.std(0) if len(sizes) > 1 else torch.ones(sizes.shape[1])
        return cls(tuple(sizes.mean(0).tolist()), tuple(spread.clamp_min(0.05).tolist()))


def _sizes(codes: Tensor, parts: Sequence[int]) -> Tensor:
    """Logarithm of the norm of each module's part (n, m) of codes (n, c)."""
    return torch.stack([part.norm(dim=1) for part in codes.float().split(list(parts), 1)], 1).clamp_min(_TINY).log()


def gather(served: Describes, reference: Reference, text: str, condition: Condition, masked: Tensor | None = None) -> Tensor:
    """The evidence on one description, a row of `FEATURES` in fp64.

    Args:
        served: The generator.
        reference: What it is compared with.
        text: The description.
        condition: Its condition; a task vector in it counts for its rewordings too.
        masked: Experts (n,) that do not count, as when a task of the bank plays an unknown one.
    """
    conditioner = served.conditioner
    best = condition.similarities.topk(min(_PRIOR, len(conditioner.names) - (0 if masked is None else int(masked.sum())))).values
    prior = torch.softmax(best / _TEMPERATURE, 0)
    spread = -(prior * prior.clamp_min(_TINY).log()).sum() / math.log(max(2, len(prior)))
    drawn = served.method.generate(condition, torch.Generator().manual_seed(0), _SAMPLES).float()
    code = drawn[:1]
    length = code.norm().clamp_min(_TINY)
    others = [
        served.method.generate(
            replace(conditioner(one, masked=masked), task_vector=condition.task_vector), torch.Generator().manual_seed(0)
        ).float()
        for one in served.embedder.embed(rewordings(text))
    ]
    sizes = _sizes(code, served.space.parts)[0]
    offsets = (sizes - torch.tensor(reference.size)) / torch.tensor(reference.deviation)
    values = {
        "nearest": best[0].item(),
        "near": best[:_NEAR].mean().item(),
        "spread": spread.item(),
        "outside": conditioner.outside(condition.embedding),
        "rewording": (torch.cat(others) - code).norm(dim=1).mean().item() / length.item(),
        "sampling": (drawn - drawn.mean(0)).norm(dim=1).mean().item() / length.item(),
        "norm": length.log().item(),
        "code_distance": offsets.clamp(-10, 10).square().mean().sqrt().item(),
    }
    return torch.tensor([values[name] for name in FEATURES], dtype=torch.float64)
