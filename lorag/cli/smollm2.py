"""Commands of the world smollm2: rebuild its tasks from their sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The world of real tasks for SmolLM2-135M-Instruct.")


@app.command()
def tasks(
    sources: Annotated[Path, typer.Argument(help="Folder of the source suites, each with tasks.jsonl and examples.jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="Folder of the suite.")] = Path("data/smollm2/tasks"),
) -> None:
    """Rebuild the tasks that ship: the same sources give the same bytes."""
    from lorag.worlds.smollm2.build import build_tasks

    counts = build_tasks(sources, out)
    typer.echo(f"{out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
