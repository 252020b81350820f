"""Tables: plain lines that hold every cell, and rules on a terminal as wide as it is."""

import io
import re
import sys

import pytest
from rich.cells import cell_len

from lorag.tables import Table, print_tables, render

LONG = "say yes if the customer wants to cancel the card " * 8
ROWS = [("cards", "4", LONG.strip()), ("法律", "16", "[bold]law[/bold] :cat: \x1b[31mred\nrow")]
TABLE = Table(("expert", "rank", "description"), ROWS, text=(0, 2))


def test_plain_lines_hold_every_cell_whole():
    """One line per row, text to the left, numbers to the right, wide characters counted; nothing is cut off, obeyed or taken for markup."""
    head, cards, law = render(TABLE).splitlines()
    assert cards.startswith("cards      4  ") and cards.endswith(LONG.strip()) and not head.endswith(" ")
    assert law == "法律      16  [bold]law[/bold] :cat: \\x1b[31mred\\nrow"
    assert cell_len(law.partition("[")[0]) == cards.index("say") == head.index("description")


def test_a_title_and_no_header():
    """A title stands above, tables are apart by a line; a table without a header has its rows alone, and none is nothing."""
    assert render(Table(("a", "b"), [("x", "1")], "two"), Table((), [("y", "10"), ("z", "2")])) == "two\n\na  b\nx  1\n\ny  10\nz   2"
    assert render(Table((), [])) == "" and render(Table((), []), terminal=True).strip() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_gets_rules(monkeypatch, terminal):
    """As wide as it is, with every word of a text that is folded; a pipe gets the plain lines."""
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    print_tables(TABLE)
    lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    if not terminal:
        assert out.getvalue() == render(TABLE) + "\n"
        return
    assert {cell_len(line) for line in lines} == {60} and len(lines) > 8
    words = " ".join(line.split("│")[3].strip() for line in lines if line.startswith("│"))
    assert words.startswith(LONG.strip()) and "[bold]law[/bold] :cat: \\x1b[31mred\\nrow" in words
    assert any("│   16 │" in line for line in lines) and "…" not in out.getvalue()
