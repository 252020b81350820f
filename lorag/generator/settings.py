"""What may be said beside a description when an adapter is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank

__all__ = ["ON_UNKNOWN", "GenerateSettings"]

ON_UNKNOWN = ("warn", "raise", "fallback", "ignore")


class GenerateSettings(TypedDict, total=False):
    """What `LoraGenerator.generate` takes beside the description.

    Attributes:
        seed: Seed of methods that sample; the same seed gives the same bytes. By default 0.
        strength: Factor on ΔW, on top of the generator's own.
        rank: Rank of the adapter; by default the generator's, or its own if an expert is served. A smaller one keeps the largest
            singular values.
        examples: (input, output) of the task, if there are some, for methods that can use them. Where they are read (`settings.pairs`),
            the adapter is the description's or that of the examples alone, whichever makes the examples likelier
            (`info["made_from"]`).
        refine_steps: Gradient steps on the examples, from the generated adapter; 0 takes it as generated, and so does an
            adapter that answers them all already (`info["refine_steps"]` says how many were taken).
        on_unknown: What becomes of a description that the gate refuses: "warn", the default, generates and warns, "raise" raises,
            "fallback" gives the adapter that changes nothing, "ignore" does not ask the gate at all.
        bank: The experts, so that a known task gets its own and a close one a fusion; without them both are generated.
        details: More texts on the task, such as the pieces of a skill's file: those that are nearer to the description than the
            bank's tasks are to each other are read with it, and stand in `info["details"]`.
        wordings: The same task in other words, one description each: the code is the mean over all of them.
    """

    seed: int
    strength: float
    rank: int | None
    examples: Sequence[tuple[str, str]]
    refine_steps: int
    on_unknown: str
    bank: AdapterBank | None
    details: Sequence[str]
    wordings: Sequence[str]
