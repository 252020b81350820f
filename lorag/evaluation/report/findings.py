"""What a report shows, as plain numbers: what `gathering` finds, `figures` draw and `chapters` put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorag.generator.calibration import RiskCoverage

__all__ = ["Absent", "Curves", "Distances", "Findings", "Norms", "Pairs", "MethodScore", "Selective", "Stage", "Tasks"]


@dataclass(frozen=True)
class Absent:
    """Why there is nothing to draw.

    Attributes:
        reason: A sentence that says what is missing, and what would supply it.
    """

    reason: str


@dataclass(frozen=True)
class MethodScore:
    """One method of the ladder.

    Attributes:
        name: The method.
        role: "bound" (base, oracle), "baseline", "generator" or "control".
        score: Mean over tasks.
        low: Lower end of the 95 % interval.
        high: Upper end.
        gap: Share of the gap between base and oracle closed; None without oracles.
    """

    name: str
    role: str
    score: float
    low: float
    high: float
    gap: float | None


@dataclass(frozen=True)
class Pairs:
    """Scores of the same tasks with their own description and with another task's.

    Attributes:
        method: The generator.
        names: The n tasks.
        matched: Score with its own description (n,).
        shuffled: Score with another's (n,).
        difference: Mean of matched − shuffled.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
    """

    method: str
    names: tuple[str, ...]
    matched: tuple[float, ...]
    shuffled: tuple[float, ...]
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Distances:
    """How far tasks lie from the bank, and what was reached.

    Attributes:
        names: The n tasks.
        distance: 1 − cosine to the nearest expert's descriptions, mean over the descriptions shown (n,).
        gap_closed: Share of the gap closed (n,), cut off at −1 and 1.
        bins: Groups of tasks of rising distance, all about as many: mean distance, mean gap closed, ends of its 95 % interval.
    """

    names: tuple[str, ...]
    distance: tuple[float, ...]
    gap_closed: tuple[float, ...]
    bins: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Tasks:
    """The map: principal directions of the descriptions' embeddings.

    Attributes:
        experts: Where the bank's tasks lie (n, 2).
        names: The evaluated tasks (t).
        points: Where they lie (t, 2).
        gap_closed: Share of the gap closed (t,); None where it is not known.
        kept: Share of the experts' variance that the two directions hold.
    """

    experts: tuple[tuple[float, float], ...]
    names: tuple[str, ...]
    points: tuple[tuple[float, float], ...]
    gap_closed: tuple[float | None, ...]
    kept: float


@dataclass(frozen=True)
class Selective:
    """Risk, the share of the gap that stays open, when only the tasks with the highest expected gap closed are served.

    Attributes:
        held_out: Of the evaluated tasks: the gate's order.
        held_out_best: The order of somebody who knows the risks.
        with_unknown: The same among descriptions that the bank cannot serve, each a risk of 1.
        with_unknown_best: The order of somebody who knows.
        tasks: Number of evaluated tasks.
        unknown: Number of the others.
        expected: Mean expected gap closed of the evaluated tasks.
        realised: Mean gap closed.
    """

    held_out: RiskCoverage
    held_out_best: RiskCoverage
    with_unknown: RiskCoverage
    with_unknown_best: RiskCoverage
    tasks: int
    unknown: int
    expected: float
    realised: float


@dataclass(frozen=True)
class Norms:
    """‖ΔW‖_F of each module, or of each kind of module: 5th, 50th and 95th percentile over adapters.

    Attributes:
        modules: Labels of the m rows.
        real: Of the bank's experts, a triple per row.
        generated: Of the generated adapters, a triple per row.
        experts: Number of experts.
        adapters: Number of generated adapters.
        grouped: Whether a row stands for all modules of its kind: root mean square over them.
    """

    modules: tuple[str, ...]
    real: tuple[tuple[float, float, float], ...]
    generated: tuple[tuple[float, float, float], ...]
    experts: int
    adapters: int
    grouped: bool


@dataclass(frozen=True)
class Stage:
    """One stage of training: steps with their loss, and those that were validated."""

    name: str
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    validated: tuple[int, ...]
    validation: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """The stages of a training run, in order."""

    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Findings:
    """All of a report.

    Attributes:
        subject: The generator that the report is about.
        facts: What was evaluated, for people: label to text.
        metric: Name of the score.
        tasks: Number of tasks.
        examples: Most examples of each.
        seeds: Number of seeds.
        ladder: The methods.
        pairs: Each generator with its shuffled control.
        distances: Gap closed by distance to the bank.
        map: The map of tasks.
        selective: Risk and coverage.
        norms: Sizes of adapters.
        curves: Training.
    """

    subject: str
    facts: Mapping[str, str]
    metric: str
    tasks: int
    examples: int
    seeds: int
    ladder: tuple[MethodScore, ...]
    pairs: tuple[Pairs, ...] | Absent
    distances: Distances | Absent
    map: Tasks | Absent
    selective: Selective | Absent
    norms: Norms | Absent
    curves: Curves | Absent
