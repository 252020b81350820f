"""The page docs/benchmarks.md: tables that are kept until they are measured again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorag.files.atomic import write_bytes

__all__ = ["Table", "read_page", "write_page"]

_DEVICES = {"cpu": "CPU", "cuda": "GPU"}

_HEAD = """# Benchmarks

Medians and ratios, each table from one run: `python -m benchmarks` writes this page, `python -m benchmarks NAME …` renews some of its
tables. A GPU is used where there is one, and has tables of its own. What a table ran on, and what bounds its figures, stands with it.
"""

_STUDIES = """## Longer studies

They take long or need arguments, and print their own tables; figures: [results](results.md), [history](results-history.md).

| command | what it measures |
|---|---|
| `python -m benchmarks.imports` | time and memory of importing many adapters into a bank |
| `python -m benchmarks.examples` | what a few examples add to a description |
| `python -m benchmarks.fusion` | fusing experts, against every closed-form merge |
| `python -m benchmarks.sg_controls` | what SG-LoRA's merge gives without its VAE |
| `python -m benchmarks.gate` | how well refusals and the expected gap closed hold |
| `python -m benchmarks.oracles` | what adapters trained on SmolLM2's held-out tasks score, the upper end of its ladder |
| `python -m benchmarks.choice` | SmolLM2's detectors where the answer must be one of the labels |
| `python -m benchmarks.fuzz` | spoiled files of every kind |
| `python -m benchmarks.kills` | `kill -9` at random moments |
| `python -m benchmarks.page_pictures` | waiting times of the web page, and its pictures |
"""


@dataclass(frozen=True)
class Table:
    """One benchmark's rows on one kind of device.

    Attributes:
        name: Of the module.
        device: "cpu" or "cuda".
        title: Heading.
        ran: What it ran on.
        bounds: What bounds the figures, from the module's docstring.
        rows: Column names to values; a row may lack columns.
    """

    name: str
    device: str
    title: str
    ran: str
    bounds: str
    rows: Sequence[Mapping[str, str | float]]

    @property
    def key(self) -> tuple[str, str]:
        """What it replaces when it is measured again."""
        return self.device, self.name

    def lines(self) -> list[str]:
        """The table in Markdown."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        cells = [[_cell(row.get(column, "")) for column in columns] for row in self.rows]
        return [_line(columns), "|" + "---|" * len(columns), *map(_line, cells)]

    def section(self) -> str:
        """Heading, table and words in Markdown, after a comment from which `read_page` gets all of it back."""
        kept = json.dumps({field: getattr(self, field) for field in self.__dataclass_fields__}, ensure_ascii=False)
        # "--" would end the comment early in some readers; JSON can spell a hyphen otherwise.
        comment = "<!-- table " + kept.replace("--", r"-\u002d") + " -->"
        command = f"`python -m benchmarks {self.name}`"
        return "\n".join([f"### {self.title}", "", comment, "", *self.lines(), "", f"{command}, {self.ran}", "", self.bounds.strip(), ""])


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def read_page(path: Path) -> dict[tuple[str, str], Table]:
    """Tables of a page by device and name; none if there is no page yet."""
    if not path.exists():
        return {}
    kept = re.findall(r"^<!-- table (\{.*\}) -->$", path.read_text(encoding="utf-8"), re.M)
    tables = [Table(**json.loads(text)) for text in kept]
    return {table.key: table for table in tables}


def write_page(path: Path, tables: Mapping[tuple[str, str], Table], order: Sequence[str]) -> None:
    """Writes the page: devices, then benchmarks in order."""
    parts = [_HEAD]
    for kind, heading in _DEVICES.items():
        own = [tables[kind, name] for name in order if (kind, name) in tables]
        parts += [f"## {heading}\n"] * bool(own) + [table.section() for table in own]
    write_bytes(path, "\n".join([*parts, _STUDIES]).encode())
