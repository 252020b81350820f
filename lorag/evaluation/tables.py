"""A report of a ladder as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorag.tables import Table, print_tables, render

__all__ = ["format_table", "interval", "print_report"]

_SHORT = {"balanced_accuracy": "balanced", "lenient_match": "lenient", "rouge_l": "ROUGE-L", "macro_f1": "macro-F1"}


def interval(row: Mapping[str, Any], sign: str = "") -> str:
    """The 95 % interval of a report's row; `sign` is "+" where a difference is meant."""
    low, high = row["ci95"]
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def format_table(report: Mapping[str, Any]) -> str:
    """The report as lines for a file or a pipe."""
    return render(*_parts(report))


def print_report(report: Mapping[str, Any]) -> None:
    """Writes the report to standard output, ruled if that is a terminal."""
    print_tables(*_parts(report))


def _parts(report: Mapping[str, Any]) -> list[Table]:
    methods, seen = report["methods"], f"{report['examples']} examples each, {report['seeds']} seeds, {report['metric']}"
    measures = [name for name in _SHORT if any(name in row.get("measures", {}) for row in methods.values())]
    tokens = any("prompt_tokens" in row for row in methods.values())
    gaps = any(row["gap_closed"] is not None for row in methods.values())
    header = ["method", "score", "95 % interval", *(["gap closed"] if gaps else [])]
    for measure in measures:
        header += [_SHORT[measure], "95 % interval"]
    rows = []
    for name, row in methods.items():
        cells = [name, f"{row['score']:.3f}", interval(row), *([_number(row["gap_closed"])] if gaps else [])]
        for measure in measures:
            one = row.get("measures", {}).get(measure)
            cells += ["", ""] if one is None else [f"{one['score']:.3f}", interval(one)]
        rows.append([*cells, *([_number(row.get("prompt_tokens"), ".0f")] if tokens else [])])
    title = f"{report['suite']}: {len(report['tasks'])} tasks, {seen}"
    generators = {name.partition(" - ")[0] for name in report["differences"]}
    parts = [Table([*header, *(["prompt tokens"] if tokens else [])], rows, title, bold=generators)]
    if report["differences"]:
        header = ["difference", report["metric"].replace("_", " "), "95 % interval"]
        for measure in measures:
            header += [_SHORT[measure], "95 % interval"]
        rows = []
        for name, row in report["differences"].items():
            cells = [name, f"{row['difference']:+.3f}", interval(row, "+")]
            for measure in measures:
                one = row.get("measures", {}).get(measure)
                cells += ["", ""] if one is None else [f"{one['difference']:+.3f}", interval(one, "+")]
            rows.append(cells)
        parts.append(Table(header, rows))
    if "reproduction" in report:
        rows = []
        for name, row in report["reproduction"].items():
            sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("bytes", "bank_bytes")]
            rows.append([name, _number(row["score_kept"]), f"{row['delta_error']:.3f}", *sizes])
        parts.append(Table(["given back", "score kept", "ΔW error", "generator", "bank"], rows))
    return parts


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"
