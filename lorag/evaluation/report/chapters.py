"""The chapters of a report: each asks a question, answers it in a sentence of numbers, and has a figure and its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorag.evaluation.report import figures
from lorag.evaluation.report.findings import Absent, Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorag.evaluation.report.style import Theme

__all__ = ["Chapter", "write_chapters"]

_MOST_NAMED = 5


@dataclass(frozen=True)
class Chapter:
    """A question and what was found.

    Attributes:
        name: Of its picture's file, and of its place on the page.
        heading: Of its part of the page.
        question: The figure's title.
        answer: What was found, with numbers; why there is nothing, where there is none.
        explained: How to read the figure.
        alt: What the figure shows, for people who do not see it; the numbers are in the table.
        head: Names of the table's columns.
        rows: The table.
        draw: Draws the figure, titled with the question; None where there is nothing to draw.
    """

    name: str
    heading: str
    question: str
    answer: str
    explained: str = ""
    alt: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    draw: Callable[[Theme], Figure] | None = None


def write_chapters(findings: Findings) -> list[Chapter]:
    """All chapters in their order, also those that have nothing to show."""
    return [chapter(findings) for chapter in (_ladder, _pairs, _distances, _map, _selective, _norms, _curves)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ladder(findings: Findings) -> Chapter:
    question, methods = "How far does each method get from a description alone?", findings.ladder
    rows = tuple((r.name, r.role, _number(r.score), f"{r.low:.3f} to {r.high:.3f}", _number(r.gap)) for r in methods)
    subject = next((r for r in methods if r.name == findings.subject), methods[-1])
    rivals = sorted((r for r in methods if r.role == "baseline"), key=lambda r: -r.score)
    answer = f"{subject.name} reaches {subject.score:.3f} ({subject.low:.3f} to {subject.high:.3f})"
    answer += "" if subject.gap is None else f" and closes {subject.gap:.1%} of the gap between the base model and the oracle"
    answer += f"; the best baseline, {rivals[0].name}, reaches {rivals[0].score:.3f}." if rivals else "."
    return Chapter(
        "ladder",
        "The ladder",
        question,
        answer,
        "Every method is scored on the same examples. A generator that does not beat the baselines and its own controls has "
        "learned nothing from the description. Intervals: 95 % bootstrap over tasks.",
        f"Dots with intervals for {len(methods)} methods, from {methods[0].name} to {methods[-1].name}. {answer}",
        ("method", "role", findings.metric, "95 % interval", "gap closed"),
        rows,
        lambda theme: figures.draw_ladder(theme, question, methods, findings.metric, f"n = {findings.tasks} tasks"),
    )


def _pairs(findings: Findings) -> Chapter:
    question, pairs = "Does the description matter?", findings.pairs
    if isinstance(pairs, Absent):
        return Chapter("description", "Own description and another's", question, pairs.reason)
    answers = []
    for one in pairs:
        verdict = "it matters" if one.low > 0 else "it is not shown to matter, as the interval holds 0" if one.high >= 0 else "it does harm"
        answers.append(f"{one.method} {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}): {verdict}.")
    rows = tuple((p.method, name, _number(m), _number(s)) for p in pairs for name, m, s in zip(p.names, p.matched, p.shuffled, strict=True))
    answer = "Score with a task's own description less that with another's: " + " ".join(answers)
    return Chapter(
        "description",
        "Own description and another's",
        question,
        answer,
        "Each task is served twice by the same generator: with its own description, and with that of another task. Points below the dashed "
        "line score higher with their own; on the line, the description made no difference. Larger marks stand for several tasks.",
        f"Scatter of the {findings.metric} of {findings.tasks} tasks with matched against shuffled descriptions. {answer}",
        ("generator", "task", "own description", "another's"),
        rows,
        lambda theme: figures.draw_pairs(theme, question, pairs, findings.metric, f"n = {findings.tasks} tasks"),
    )


def _distances(findings: Findings) -> Chapter:
    question, far = "Does it hold far from the bank?", findings.distances
    if isinstance(far, Absent):
        return Chapter("distance", "Distance to the bank", question, far.reason)
    near, last = far.bins[0], far.bins[-1]
    answer = f"The tasks close {near[1]:.1%} of the gap on average."
    if len(far.bins) > 1:
        answer = (
            f"The nearest tasks, {near[0]:.2f} from the bank, close {near[1]:.1%} of the gap ({near[2]:.1%} to {near[3]:.1%}); "
            f"the farthest, {last[0]:.2f} away, {last[1]:.1%} ({last[2]:.1%} to {last[3]:.1%})."
        )
    return Chapter(
        "distance",
        "Distance to the bank",
        question,
        answer,
        "Distance is 1 − the cosine between a description and the nearest expert's, the novelty before any calibration. Squares: groups of "
        "tasks of like distance. Tasks whose oracle hardly beats the base model are left out, because a share of no gap means nothing.",
        f"Scatter of the share of the gap closed by distance to the bank, {len(far.gap_closed)} tasks. {answer}",
        ("task", "distance", "gap closed"),
        tuple((name, _number(d), _number(g)) for name, d, g in zip(far.names, far.distance, far.gap_closed, strict=True)),
        lambda theme: figures.draw_distances(theme, question, far, f"n = {len(far.gap_closed)} tasks"),
    )


def _map(findings: Findings) -> Chapter:
    question, tasks = "Where do the tasks lie, and where does it fail?", findings.map
    if isinstance(tasks, Absent):
        return Chapter("map", "The map of tasks", question, tasks.reason)
    measured = [(share, name) for name, share in zip(tasks.names, tasks.gap_closed, strict=True) if share is not None]
    failed = sorted((share, name) for share, name in measured if share < figures.BAD)
    good = sum(share >= figures.GOOD for share, _ in measured)
    answer = f"{good} of {len(measured)} tasks close at least {figures.GOOD:.0%} of the gap, {len(failed)} less than {figures.BAD:.0%}"
    answer += ": " + ", ".join(name for _, name in failed[:_MOST_NAMED]) if failed else ""
    answer += f" and {len(failed) - _MOST_NAMED} more." if len(failed) > _MOST_NAMED else "."
    if not measured:
        answer = "The map shows where the tasks lie; no share of the gap is known."
    rows = tuple(
        (name, f"{x:.3f}", f"{y:.3f}", _number(g)) for name, (x, y), g in zip(tasks.names, tasks.points, tasks.gap_closed, strict=True)
    )
    return Chapter(
        "map",
        "The map of tasks",
        question,
        answer,
        f"The two directions in which the bank's descriptions differ most; they hold {tasks.kept:.0%} of the variance, so that what lies "
        "together here may differ in the rest. Rings are the bank's tasks, filled marks the evaluated ones.",
        f"Map of {len(tasks.experts)} experts and {len(tasks.names)} evaluated tasks in two principal directions. {answer}",
        ("task", "first direction", "second direction", "gap closed"),
        rows,
        lambda theme: figures.draw_map(theme, question, tasks, f"n = {len(tasks.names)} tasks; both hold {tasks.kept:.0%} of the variance"),
    )


def _selective(findings: Findings) -> Chapter:
    question, one = "Does the gate know what will fail?", findings.selective
    if isinstance(one, Absent):
        return Chapter("gate", "The gate", question, one.reason)
    parts = (("evaluated tasks", one.held_out, one.held_out_best), ("with unknown ones", one.with_unknown, one.with_unknown_best))
    half, full = one.held_out.at(0.5), one.held_out.risk[-1]
    mixed_half, mixed = one.with_unknown.at(0.5), one.with_unknown.risk[-1]
    answer = (
        f"Gap closed: expected {one.expected:.3f} on average, realised {one.realised:.3f}. Serving only the half that the gate trusts most "
        f"leaves {half:.3f} of the gap open instead of {full:.3f}; with {one.unknown} that no bank serves among them, {mixed_half:.3f} "
        f"instead of {mixed:.3f}."
    )
    rows = tuple(
        (label, *(f"{gate.at(share):.3f}" for share in (0.25, 0.5, 0.75, 1.0)), f"{gate.area:.3f}", f"{best.area:.3f}")
        for label, gate, best in parts
    )
    return Chapter(
        "gate",
        "The gate",
        question,
        answer,
        "Descriptions are served in the order of the gap closed that the gate expects, before the base model has run. Risk is the share "
        "of the gap that stays open. The nearer the solid line is to the dashed one, the better the gate knows.",
        f"Risk by coverage for {one.tasks} tasks, alone and among {one.unknown} unknown descriptions. {answer}",
        ("served", "risk at 25 %", "at 50 %", "at 75 %", "at 100 %", "AURC", "best AURC"),
        rows,
        lambda theme: figures.draw_selective(theme, question, one),
    )


def _norms(findings: Findings) -> Chapter:
    question, norms = "Are generated adapters as large as real ones?", findings.norms
    if isinstance(norms, Absent):
        return Chapter("norms", "Sizes of adapters", question, norms.reason)
    ratios = sorted((g[1] / r[1], name) for name, r, g in zip(norms.modules, norms.real, norms.generated, strict=True) if r[1] > 0)
    answer = "No expert changes anything."
    if ratios:
        answer = (
            f"In the middle module generated adapters are {ratios[len(ratios) // 2][0]:.2f} times as large as experts, by their medians; "
            f"from {ratios[0][0]:.2f} ({ratios[0][1]}) to {ratios[-1][0]:.2f} ({ratios[-1][1]})."
        )
    return Chapter(
        "norms",
        "Sizes of adapters",
        question,
        answer,
        "A generator that regresses to the mean gives adapters that are too small. Training through the base model's loss asks for no "
        "size, so that they may also grow. Experts are of the training tasks, generated adapters of the evaluated ones.",
        f"Ranges of norms for {len(norms.modules)} modules, experts beside generated adapters. {answer}",
        ("module", "experts: 5 %", "50 %", "95 %", "generated: 5 %", "50 %", "95 %"),
        tuple((m, *_three(r), *_three(g)) for m, r, g in zip(norms.modules, norms.real, norms.generated, strict=True)),
        lambda theme: figures.draw_norms(theme, question, norms),
    )


def _three(values: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in values)


def _curves(findings: Findings) -> Chapter:
    question, curves = "Had training settled?", findings.curves
    if isinstance(curves, Absent):
        return Chapter("training", "Training", question, curves.reason)
    parts, rows = [], []
    for stage in curves.stages:
        rows.append((stage.name, f"{stage.steps[-1]:,}", f"{stage.loss[-1]:.4g}", "", ""))
        if stage.validation:
            best = min(range(len(stage.validation)), key=lambda i: stage.validation[i])
            rows[-1] = (*rows[-1][:3], f"{stage.validation[best]:.4g}", f"{stage.validated[best]:,}")
            where = f"at step {stage.validated[best]:,} of {stage.steps[-1]:,}"
            parts.append(f"{stage.name}: best validation {stage.validation[best]:.4g} {where}")
    answer = "; ".join(parts) + "." if parts else "No stage was validated."
    return Chapter(
        "training",
        "Training",
        question,
        answer,
        "The state with the best validation is the one that is kept. A best at the last step may mean that longer training would help.",
        f"Loss by step in {len(curves.stages)} stages. {answer}",
        ("stage", "steps", "last loss", "best validation", "at step"),
        tuple(rows),
        lambda theme: figures.draw_curves(theme, question, curves),
    )
