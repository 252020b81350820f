"""A report of a ladder as tables: with colours on a terminal, as plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["format_table", "print_report"]

_SHORT = {"balanced_accuracy": "balanced", "lenient_match": "lenient", "rouge_l": "ROUGE-L", "macro_f1": "macro-F1"}


@dataclass(frozen=True)
class _Part:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def format_table(report: Mapping[str, Any]) -> str:
    """The report as lines for a file or a pipe."""
    blocks = []
    for part in _parts(report):
        widths = [max(len(row[i]) for row in (part.header, *part.rows)) for i in range(len(part.header))]
        lines = [_line(row, widths) for row in (part.header, *part.rows)]
        blocks.append("\n".join([*([part.title, ""] if part.title else []), *lines]))
    return "\n\n".join(blocks)


def print_report(report: Mapping[str, Any]) -> None:
    """Writes the report to standard output."""
    if not sys.stdout.isatty():
        sys.stdout.write(f"{format_table(report)}\n")
        return
    console = Console()
    for part in _parts(report):
        table = Table(title=part.title or None, title_justify="left")
        for place, name in enumerate(part.header):
            table.add_column(name, justify="right" if place else "left", no_wrap=True)
        for row in part.rows:
            table.add_row(*row, style="bold" if row[0] in _generators(report) else None)
        console.print(table)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{value:<{width}}" if not place else f"{value:>{width}}" for place, (value, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _parts(report: Mapping[str, Any]) -> list[_Part]:
    methods, seen = report["methods"], f"{report['examples']} examples each, {report['seeds']} seeds, {report['metric']}"
    measures = [name for name in _SHORT if any(name in row.get("measures", {}) for row in methods.values())]
    tokens = any("prompt_tokens" in row for row in methods.values())
    gaps = any(row["gap_closed"] is not None for row in methods.values())
    header = ["method", "score", "95 % interval", *(["gap closed"] if gaps else [])]
    for measure in measures:
        header += [_SHORT[measure], "95 % interval"]
    rows = []
    for name, row in methods.items():
        cells = [name, f"{row['score']:.3f}", _interval(row), *([_number(row["gap_closed"])] if gaps else [])]
        for measure in measures:
            one = row.get("measures", {}).get(measure)
            cells += ["", ""] if one is None else [f"{one['score']:.3f}", _interval(one)]
        rows.append([*cells, *([_number(row.get("prompt_tokens"), ".0f")] if tokens else [])])
    parts = [_Part(f"{report['suite']}: {len(report['tasks'])} tasks, {seen}", [*header, *(["prompt tokens"] if tokens else [])], rows)]
    if report["differences"]:
        header = ["difference", report["metric"].replace("_", " "), "95 % interval"]
        for measure in measures:
            header += [_SHORT[measure], "95 % interval"]
        rows = []
        for name, row in report["differences"].items():
            cells = [name, f"{row['difference']:+.3f}", _interval(row, "+")]
            for measure in measures:
                one = row.get("measures", {}).get(measure)
                cells += ["", ""] if one is None else [f"{one['difference']:+.3f}", _interval(one, "+")]
            rows.append(cells)
        parts.append(_Part("", header, rows))
    if "reproduction" in report:
        rows = []
        for name, row in report["reproduction"].items():
            sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("bytes", "bank_bytes")]
            rows.append([name, _number(row["score_kept"]), f"{row['delta_error']:.3f}", *sizes])
        parts.append(_Part("", ["given back", "score kept", "ΔW error", "generator", "bank"], rows))
    return parts


def _generators(report: Mapping[str, Any]) -> set[str]:
    return {name.partition(" - ")[0] for name in report["differences"]}


def _interval(row: Mapping[str, Any], sign: str = "") -> str:
    low, high = row["ci95"]
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"
