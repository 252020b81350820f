"""Tables: ruled on a terminal, plain lines anywhere else, of which nothing is cut off."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lorag.errors import printable

__all__ = ["Table", "print_tables", "render"]


@dataclass(frozen=True)
class Table:
    """Cells in rows and columns.

    Attributes:
        header: Names of the columns; may be empty.
        rows: Cells of each row.
        title: What stands above it.
        text: Numbers of the columns that hold text, from 0: aligned left, and folded on a narrow terminal. The others hold numbers.
        bold: First cells of the rows that stand out on a terminal.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text: Collection[int] = (0,)
    bold: Collection[str] = ()


def render(*tables: Table, terminal: bool = False) -> str:
    """Tables one below the other; control characters in cells are escaped.

    Args:
        *tables: The tables.
        terminal: Whether they are shown on a terminal, as wide as it is.
    """
    return "\n".join(map(_ruled, tables)) if terminal else "\n\n".join(map(_plain, tables))


def print_tables(*tables: Table) -> None:
    """Writes tables to standard output, ruled if that is a terminal."""
    sys.stdout.write(f"{render(*tables, terminal=sys.stdout.isatty())}\n")


def _plain(table: Table) -> str:
    rows = [[printable(cell) for cell in row] for row in ([table.header] if table.header else []) + list(table.rows)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = [table.title, ""] if table.title else []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [cell + gap if place in table.text else gap + cell for place, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ruled(table: Table) -> str:
    from rich.console import Console
    from rich.table import Table as Ruled
    from rich.text import Text

    ruled = Ruled(title=Text(table.title) if table.title else None, title_justify="left", show_header=bool(table.header))
    for place, name in enumerate(table.header or (*table.rows, ())[0]):
        text = place in table.text
        ruled.add_column(Text(name), justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in table.rows:
        ruled.add_row(*(Text(printable(cell)) for cell in row), style="bold" if row[0] in table.bold else None)
    console = Console(force_terminal=True)
    with console.capture() as drawn:
        console.print(ruled)
    return drawn.get().rstrip("\n")
