"""Runs benchmarks and writes docs/benchmarks.md: `python -m benchmarks [NAME ...] [--quick] [--out FILE]`.

Without names, all that make a table. A table of a benchmark that is not run stays as it is, and CPU and GPU have tables of
their own: the page can be filled in several runs, on several machines. Each table states what it ran on.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from benchmarks.machine import describe, device, load_average
from benchmarks.page import Table, read_page, write_page

# A module has TITLE, a docstring that says what bounds its figures, and measure(quick) -> rows of one table.
TABLES = ("generation", "vae_step", "rows", "base_step", "experts", "weight_fit", "growth", "retrieval", "startup")
PAGE = Path(__file__).resolve().parent.parent / "docs/benchmarks.md"


def main(arguments: list[str] | None = None) -> None:
    """Runs what is asked for; a table is written as soon as it is finished."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TABLES, []], metavar="NAME", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="smallest forms: shows that everything runs; figures mean little")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page, docs/benchmarks.md by default")
    given = parser.parse_args(arguments)
    if given.quick and given.out == PAGE:
        parser.error("--quick would overwrite measured figures: give another page with --out")
    tables = read_page(given.out)
    for name in given.names or TABLES:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"{name}: {module.TITLE}", flush=True)
        busy, start = load_average(), time.perf_counter()
        rows = module.measure(given.quick)
        minutes = (time.perf_counter() - start) / 60
        ran = f"{describe()}. {minutes:.1f} minutes; {busy:.1f} other processes were running at the start."
        table = Table(name, device().type, module.TITLE, ran, module.__doc__ or "", rows)
        tables[table.key] = table
        write_page(given.out, tables, TABLES)
        print("\n".join(table.lines()), flush=True)
    print(f"written to {given.out.name}")


if __name__ == "__main__":
    main()
