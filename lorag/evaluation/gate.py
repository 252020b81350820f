"""Measure a gate on tasks and descriptions that it was not fitted on: does it know what it cannot do, and what it can?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.bank.bank import AdapterBank
from lorag.errors import GeneratorError
from lorag.generator.calibration import RiskCoverage, auroc, calibration_error, risk_coverage
from lorag.progress import progress_bar
from lorag.tables import Table, render
from lorag.tasks.unknown import unknown_tasks
from lorag.training.calibrate import gap_closed_by

if TYPE_CHECKING:
    from lorag.evaluation.oracles import Oracles
    from lorag.generator.gate import Verdict
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.tasks.suite import TaskSuite

__all__ = ["format_gate", "measure_gate"]


def measure_gate(
    generator: LoraGenerator,
    tasks: TaskSuite,
    oracles: Oracles | None,
    *,
    unknown: Mapping[str, Sequence[str]] | None = None,
    wordings: int = 2,
    limit: int = 16,
    quiet: bool = True,
) -> dict[str, Any]:
    """Judges descriptions of held-out tasks and unknown ones, and compares what was expected with what came out.

    Args:
        generator: With a fitted gate.
        tasks: Held-out tasks with test examples.
        oracles: Experts of these very tasks; without them, or with their scores alone, the gap closed is not measured.
        unknown: Descriptions that the bank cannot serve, by kind; by default the shipped ones for testing.
        wordings: Descriptions of each task.
        limit: Most test examples of each.
        quiet: No progress bar.

    Returns:
        `novelty`: AUROC, share refused of each kind, calibration error of the probability; `gap_closed`, where oracles are given:
        mean expected and realised, calibration error, share of intervals that held it; `selective`: risk-coverage of the
        held-out tasks alone, ranked by expected gap closed, and of these with the unknown descriptions, which close none of it;
        `judged`: each description with its evidence and what came of it.

    Raises:
        GeneratorError: If the generator has no gate.
    """
    if generator.gate is None:
        raise GeneratorError("the generator has no gate", remedy="Fit one: lorag gate fit GENERATOR.")
    listed = unknown or unknown_tasks("test")
    rows = [(task.key, text) for task in tasks for text in task.descriptions[:wordings]]
    strange = [(kind, text) for kind, texts in listed.items() for text in texts]
    texts = [text for _, text in (*rows, *strange)]
    gathered = [generator.gather(text) for text in progress_bar(texts, desc="judging", disable=quiet, leave=False)]
    verdicts = [generator.gate.decide(evidence) for evidence in gathered]
    inside, outside = verdicts[: len(rows)], verdicts[len(rows) :]
    judged: list[dict[str, Any]] = [
        {
            "task": task,
            "description": text,
            "novelty": v.novelty,
            "expected_gap_closed": v.expected_gap_closed,
            "evidence": {name: float(f"{value:.5g}") for name, value in v.evidence.items()},
        }
        for v, (task, text) in zip(verdicts, [*rows, *((None, text) for _, text in strange)], strict=True)
    ]
    report: dict[str, Any] = {
        "tasks": len(tasks),
        "descriptions": len(rows),
        "unknown": len(strange),
        "novelty": _novelty(rows, inside, strange, outside),
        "judged": judged,
    }
    if not isinstance(oracles, AdapterBank) or generator.gate.gap_closed is None:
        return report
    codes = torch.cat([evidence.code for evidence in gathered[: len(rows)]]).float()
    closed = gap_closed_by(generator, codes, [task for task, _ in rows], oracles, {task.key: task for task in tasks}, limit)
    for row, share in zip(judged, closed.tolist(), strict=False):
        row["gap_closed"] = None if math.isnan(share) else round(share, 4)
    return report | _expected_and_realised(inside, outside, closed)


def _novelty(
    rows: Sequence[tuple[str, str]], inside: Sequence[Verdict], strange: Sequence[tuple[str, str]], outside: Sequence[Verdict]
) -> dict[str, Any]:
    """How well novelty tells descriptions of tasks (task, text) from unknown ones (kind, text), and what was refused."""
    low, high = (torch.tensor([float(v.novelty or 0.0) for v in part], dtype=torch.float64) for part in (inside, outside))
    labels = torch.cat([torch.zeros(len(low)), torch.ones(len(high))])
    kinds = dict.fromkeys(kind for kind, _ in strange)
    return {
        "auroc": round(auroc(low, high), 4),
        "calibration_error": round(calibration_error(torch.cat([low, high]), labels), 4),
        "refused_known": _refused(inside),
        "refused_unknown": _refused(outside),
        "refused_by_kind": {kind: _refused([v for v, (other, _) in zip(outside, strange, strict=True) if other == kind]) for kind in kinds},
        "not_refused": [text for v, (_, text) in zip(outside, strange, strict=True) if v.decision != "refuse"],
        "taken_for_known": sorted({task for v, (task, _) in zip(inside, rows, strict=True) if v.decision == "expert"}),
    }


def _expected_and_realised(inside: Sequence[Verdict], outside: Sequence[Verdict], closed: Tensor) -> dict[str, Any]:
    """What was expected of tasks' descriptions beside the gap that they closed (u,), NaN where nobody can tell."""
    sure = closed.isfinite()
    expected, lost = (torch.tensor([float(v.expected_gap_closed or 0.0) for v in part], dtype=torch.float64) for part in (inside, outside))
    ends = torch.tensor([v.interval or (0.0, 0.0) for v in inside], dtype=torch.float64)[sure]
    expected, closed = expected[sure], closed[sure]
    return {
        "gap_closed": {
            "expected": round(expected.mean().item(), 4),
            "realised": round(closed.mean().item(), 4),
            "calibration_error": round(calibration_error(expected, closed), 4),
            "interval_held": round(((closed >= ends[:, 0]) & (closed <= ends[:, 1])).double().mean().item(), 4),
            "interval_width": round((ends[:, 1] - ends[:, 0]).mean().item(), 4),
        },
        "selective": {
            "held_out": _curve(risk_coverage(expected, 1 - closed)),
            "with_unknown": _curve(risk_coverage(torch.cat([expected, lost]), torch.cat([1 - closed, torch.ones(len(lost))]))),
        },
    }


def _refused(verdicts: Sequence[Verdict]) -> float:
    """Share of verdicts that refuse."""
    refused: Tensor = torch.tensor([v.decision == "refuse" for v in verdicts], dtype=torch.float64)
    return round(refused.mean().item(), 4)


def _curve(curve: RiskCoverage) -> dict[str, Any]:
    full = curve.risk[-1]
    return {
        "aurc": round(curve.area, 4),
        "aurc_best": round(curve.best, 4),
        "risk": round(full, 4),
        "risk_at_half": round(curve.at(0.5), 4),
        "half_to_full": round(curve.at(0.5) / full, 4) if full > 0 else None,
        "coverage": [round(v, 4) for v in curve.coverage],
        "risks": [round(v, 4) for v in curve.risk],
    }


def format_gate(report: Mapping[str, Any], *, terminal: bool = False) -> str:
    """The report as lines, its table ruled for a terminal."""
    novelty = report["novelty"]
    lines = [
        f"{report['tasks']} held-out tasks, {report['descriptions']} descriptions; {report['unknown']} of nothing that the bank does",
        "",
        f"known against unknown: AUROC {novelty['auroc']:.3f}, calibration error of the novelty {novelty['calibration_error']:.3f}",
        f"refused: {novelty['refused_known']:.1%} of the known, {novelty['refused_unknown']:.1%} of the unknown ("
        + ", ".join(f"{kind} {share:.0%}" for kind, share in novelty["refused_by_kind"].items())
        + ")",
    ]
    if novelty["not_refused"]:
        lines.append("not refused: " + "; ".join(novelty["not_refused"]))
    if "gap_closed" in report:
        closed = report["gap_closed"]
        lines += [
            f"gap closed: {closed['expected']:.3f} expected, {closed['realised']:.3f} realised, "
            f"calibration error {closed['calibration_error']:.3f}",
            f"the interval held {closed['interval_held']:.1%} of what was realised; its width is {closed['interval_width']:.2f} on average",
            "",
        ]
        header = ("ranked by expected gap closed", "AURC", "(best)", "risk", "at half", "ratio")
        rows = []
        for name, row in report["selective"].items():
            values = (row[key] for key in ("aurc", "aurc_best", "risk", "risk_at_half", "half_to_full"))
            what = name.replace("_", " ").replace("held out", "held-out tasks")
            rows.append([what, *("" if value is None else f"{value:.3f}" for value in values)])
        lines.append(render(Table(header, rows), terminal=terminal))
    return "\n".join(lines)
