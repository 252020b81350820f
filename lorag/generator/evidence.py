"""Evidence on one description: gathered once, before an adapter is decoded, with the code that was generated from it.

How near the nearest experts are, how wide the prior over them, what share of the description lies outside of the directions
in which the bank's descriptions differ, how much the code changes when the description is put into other words or sampled
again, how large it is, and how unlike the bank's codes its modules are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorag.methods import Method
    from lorag.spaces.weight_space import WeightSpace
    from lorag.text.conditioning import Condition, Conditioner
    from lorag.text.embedding import Embedding, TextEmbedder

__all__ = ["FEATURES", "Evidence", "Reference", "gather", "rewordings"]

# In the order of rows of features.
FEATURES = ("nearest", "near", "spread", "outside", "rewording", "sampling", "norm", "code_distance")
_NEAR, _PRIOR, _TEMPERATURE = 4, 16, 0.05
_SAMPLES = 4
_TINY = 1e-9


class _Parts(Protocol):
    """The parts of a generator that evidence is gathered from."""

    @property
    def space(self) -> WeightSpace: ...  # noqa: D102
    @property
    def conditioner(self) -> Conditioner: ...  # noqa: D102
    @property
    def method(self) -> Method: ...  # noqa: D102
    @property
    def embedder(self) -> TextEmbedder: ...  # noqa: D102


def rewordings(text: str) -> list[str]:
    """The description in other words that mean the same, whatever it says."""
    bare = text.strip().rstrip(".?!") or text.strip()
    return [f"please {text}", f"task: {text}", f"{bare}, thanks", bare.lower()]


@dataclass(frozen=True)
class Reference:
    """The sizes of the bank's own codes, which a generated one is compared with.

    Attributes:
        size: Mean of the logarithm of each module's part of a code, over the bank's experts (m,).
        deviation: Standard deviation of the same (m,).
    """

    size: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, space: WeightSpace, codes: Tensor) -> Reference:
        """From codes (n, c) of experts, or of training tasks where there are no experts."""
        sizes = _sizes(codes, space.parts)
        spread = sizes.std(0) if len(sizes) > 1 else torch.ones(sizes.shape[1])
        return cls(tuple(sizes.mean(0).tolist()), tuple(spread.clamp_min(0.05).tolist()))


def _sizes(codes: Tensor, parts: Sequence[int]) -> Tensor:
    """Logarithm of the norm of each module's part (n, m) of codes (n, c)."""
    return torch.stack([part.norm(dim=1) for part in codes.float().split(list(parts), 1)], 1).clamp_min(_TINY).log()


@dataclass(frozen=True)
class Evidence:
    """What is known of one description before its adapter is decoded.

    Attributes:
        text: The description.
        condition: Its condition.
        tasks: Names of the tasks that it was compared with, in the bank's order.
        code: What the method made of it (1, c).
        features: Each of `FEATURES` that was measured, by name; empty where no gate asked for any.
        details: Further texts on the task that the condition holds as well.
        wordings: The task in other words; the code is the mean over the description and them, the features are the description's.
        read: The description as it was read, if typing errors were corrected; otherwise empty.
        made_from: What the code was made from, if examples were read too: "description" or "examples".
    """

    text: str
    condition: Condition
    tasks: tuple[str, ...]
    code: Tensor
    features: Mapping[str, float] = field(default_factory=dict)
    details: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()
    read: str = ""
    made_from: str = ""

    def row(self) -> Tensor:
        """The features (f,) in the order of `FEATURES`, in fp64; 0 for those that were not measured."""
        return torch.tensor([self.features.get(name, 0.0) for name in FEATURES], dtype=torch.float64)


def gather(
    parts: _Parts,
    text: str,
    condition: Condition,
    *,
    seed: int = 0,
    reference: Reference | None = None,
    needed: Collection[str] = FEATURES,
    condition_of: Callable[[Embedding], Condition] | None = None,
) -> Evidence:
    """Generates the code of a description, once, and measures what a gate goes by.

    Samples and rewordings take more codes, and are made only where they are needed. They are drawn with a seed of their own, so
    that a gate decides the same whatever the seed of the adapter.

    Args:
        parts: A generator, or what has its parts.
        text: The description.
        condition: Its condition; a task vector in it counts for its rewordings too.
        seed: Of the code.
        reference: Sizes of the bank's codes; without it nothing is measured.
        needed: The features that a gate needs.
        condition_of: Conditions of rewordings; by default the conditioner's, which sees all experts.
    """
    code = parts.method.generate(condition, torch.Generator().manual_seed(seed))
    if reference is None:
        return Evidence(text, condition, parts.conditioner.names, code)
    probe, sampling = code.float(), 0.0
    if "sampling" in needed:
        drawn = parts.method.generate(condition, torch.Generator().manual_seed(0), _SAMPLES).float()
        probe, sampling = drawn[:1], (drawn - drawn.mean(0)).norm(dim=1).mean().item()
    length = probe.norm().clamp_min(_TINY)
    seen = condition.similarities[~condition.masked]
    best = seen.topk(min(_PRIOR, len(seen))).values
    prior = torch.softmax(best / _TEMPERATURE, 0)
    sizes = _sizes(probe, parts.space.parts)[0]
    offsets = (sizes - torch.tensor(reference.size)) / torch.tensor(reference.deviation)
    features = {
        "nearest": best[0].item(),
        "near": best[:_NEAR].mean().item(),
        "spread": (-(prior * prior.clamp_min(_TINY).log()).sum() / math.log(max(2, len(prior)))).item(),
        "outside": parts.conditioner.outside(condition.embedding),
        "sampling": sampling / length.item(),
        "norm": length.log().item(),
        "code_distance": offsets.clamp(-10, 10).square().mean().sqrt().item(),
    }
    if "rewording" in needed:
        others = [
            parts.method.generate(
                replace((condition_of or parts.conditioner)(one), task_vector=condition.task_vector), torch.Generator().manual_seed(0)
            ).float()
            for one in parts.embedder.embed(rewordings(text))
        ]
        features["rewording"] = (torch.cat(others) - probe).norm(dim=1).mean().item() / length.item()
    return Evidence(text, condition, parts.conditioner.names, code, features)
