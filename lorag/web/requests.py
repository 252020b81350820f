"""What passes between the page and its session: what is asked for, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorag.errors import ConfigError
from lorag.tasks.descriptions import check_description

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.text.task_map import TaskMap

__all__ = ["MOST_INPUT", "MOST_INPUTS", "MOST_SAMPLES", "Answers", "Preview", "Request", "Result"]

MOST_SAMPLES, MOST_INPUTS, MOST_INPUT = 4, 8, 2000
_MOST_SEED, _MOST_STRENGTH = 2**31 - 1, 10.0


@dataclass(frozen=True)
class Request:
    """What a user asked for; the same request gives the same adapters.

    Attributes:
        description: Of the task.
        methods: Labels of generators.
        seed: Of the first sample; each further sample takes the next.
        strength: Factor on ΔW.
        samples: Adapters of each generator.
        anyway: Whether to generate where the gate would refuse.
    """

    description: str
    methods: tuple[str, ...]
    seed: int = 0
    strength: float = 1.0
    samples: int = 1
    anyway: bool = False

    def __post_init__(self) -> None:
        check_description(self.description)
        if not self.methods:
            raise ConfigError("no generator is chosen", remedy="Tick at least one.")
        for name, value, least, most in (
            ("seed", self.seed, 0, _MOST_SEED),
            ("strength", self.strength, 0, _MOST_STRENGTH),
            ("samples", self.samples, 1, MOST_SAMPLES),
        ):
            whole = name != "strength"
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most
            if not fits or whole and value != int(value):
                kind = "whole number" if whole else "number"
                raise ConfigError(f"{name} cannot be used", got=repr(value)[:40], expected=f"a {kind} from {least} to {most}")


@dataclass(frozen=True)
class Preview:
    """What a description looks like from a bank, before an adapter is decoded.

    Attributes:
        neighbours: The nearest experts and their cosines, best first.
        place: Where it lies on the map of tasks.
        tasks: The map.
        verdict: What the gate says of it, in the form of `adapter.info["gate"]`.
    """

    neighbours: tuple[tuple[str, float], ...]
    place: tuple[float, float]
    tasks: TaskMap
    verdict: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One adapter of a request: its label on the page, the generator's label, its seed, and how long it took in seconds."""

    label: str
    method: str
    seed: int
    adapter: LoraAdapter
    seconds: float
    repeats: str | None = None  # label of the sample whose very bytes it has


@dataclass(frozen=True)
class Answers:
    """Answers to inputs, side by side: columns are ("base", answers), then one for each adapter."""

    inputs: tuple[str, ...]
    columns: tuple[tuple[str, tuple[str, ...]], ...]
