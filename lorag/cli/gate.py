"""The commands `lorag gate fit` and `lorag gate evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorag.cli.options import Device, Quiet

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What a generator cannot do: novelty, expected gap closed, refusals.")

Unknown = Annotated[Path | None, typer.Option(help="YAML of descriptions that the bank cannot serve: kind -> fit, test -> texts.")]


@app.command()
def fit(
    generator: Annotated[Path, typer.Argument(help="Generator folder; the gate is written into it.")],
    bank: Annotated[str | None, typer.Option(help="The bank that it learned from; by default the one that its settings name.")] = None,
    tasks: Annotated[str | None, typer.Option(help="The tasks' suite; by default the one that its settings name.")] = None,
    unknown: Unknown = None,
    wordings: Annotated[int, typer.Option(min=1, help="Descriptions of each held-out training task.")] = 4,
    limit: Annotated[int, typer.Option(min=1, help="Most examples of each.")] = 16,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit a gate for a trained generator on its held-out training tasks; nothing is trained again."""
    from lorag.training.additions import add_gate
    from lorag.training.calibrate_gate import GateSettings

    settings = GateSettings(wordings=wordings, limit=limit)
    fitted = add_gate(generator, bank=bank, tasks=tasks, unknown=unknown, settings=settings, device=device, quiet=quiet)
    if fitted.gate is not None:
        facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in fitted.gate.fitted.items())
        typer.echo(f"{generator}: gate fitted, refuses above novelty {fitted.gate.refuse_above:.2f}; {facts}")
    typer.echo(f"next: lorag gate evaluate --generator {generator}")


@app.command()
def evaluate(
    generator: Annotated[str | None, typer.Option(help="Shipped generator by name, folder or hub id; by default sandbox.")] = None,
    tasks: Annotated[str, typer.Option(help="Task suite.")] = "sandbox",
    split: Annotated[str, typer.Option(help="Split of the suite; 'all' takes every task.")] = "test",
    oracles: Annotated[
        str | None, typer.Option(help="Bank of experts of the evaluated tasks; without them the gap closed is not measured.")
    ] = None,
    unknown: Unknown = None,
    wordings: Annotated[int, typer.Option(min=1, help="Descriptions of each task.")] = 2,
    limit: Annotated[int, typer.Option(min=1, help="Most test examples of each task.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report, with its curves, here.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure refusals, expected gap closed and selective risk on held-out tasks and on descriptions of nothing that the bank does."""
    from lorag.evaluation.folders import find_oracles
    from lorag.evaluation.gate import format_gate, measure_gate
    from lorag.files.artifacts import write_json
    from lorag.generator.generate import open_generator
    from lorag.tasks.finding import find_tasks
    from lorag.tasks.unknown import read_unknown

    opened = open_generator(generator, device=device)
    suite = find_tasks(tasks, None if split == "all" else split)
    listed = None if unknown is None else read_unknown(unknown, "test")
    report = measure_gate(opened, suite, find_oracles(oracles, tasks), unknown=listed, wordings=wordings, limit=limit, quiet=quiet)
    typer.echo(format_gate(report, terminal=sys.stdout.isatty()))
    if json_file is not None:
        write_json(json_file, report)
        typer.echo(f"\nwritten to {json_file}")
    typer.echo(
        "\nnext: lorag evaluate --report DIR draws the curve beside the scores"
        + ("" if generator is None else f", with --generator {generator}")
    )
