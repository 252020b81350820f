"""Commands that make and measure generators, and fuse experts: train, evaluate, fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorag.cli.options import Device, Dtype, Quiet

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (train, pairs, evaluate, fuse):
        app.command()(command)


def train(
    settings: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE settings, such as method=ridge settings.steps=500.")] = None,
    config: Annotated[str | None, typer.Option(help="Preset, recipe (recipes/NAME), or a YAML file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train a generator from a bank."""
    from accelerate import PartialState

    from lorag.config import load_config
    from lorag.training.train import TrainConfig
    from lorag.training.train import train as run

    values = load_config(TrainConfig, config, settings or [], "train")
    generator = run(values, quiet=quiet)
    if not PartialState().is_main_process:  # of several, under accelerate launch
        return
    size = (Path(values.out) / "generator.safetensors").stat().st_size / 1e6
    learned = f"{len(generator.conditioner.names)} {'experts' if generator.origin.get('experts') else 'tasks'}"
    typer.echo(f"{values.out}: {generator.method.name} from {learned}, strength {generator.strength:g}, {size:.1f} MB")
    if values.tasks is None:  # there is nothing to score it on
        typer.echo(f'next: lorag generate "DESCRIPTION" --generator {values.out} --out my-adapter')
    else:
        named = {"bank": values.bank, "tasks": values.tasks}
        more = "".join(f" --{option} {name}" for option, name in named.items() if name not in (None, "sandbox"))
        typer.echo(f"next: lorag evaluate --generator {values.out}{more}")


def pairs(
    generator: Annotated[Path, typer.Argument(help="Generator folder, of method house; what is learned is written into it.")],
    bank: Annotated[str | None, typer.Option(help="The bank that it learned from; by default the one that its settings name.")] = None,
    tasks: Annotated[str | None, typer.Option(help="The suite with examples; by default the one that its settings name.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1200,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Teach a trained generator to read a few examples, instead of a description or beside one."""
    from lorag.training.additions import add_pairs

    add_pairs(generator, bank=bank, tasks=tasks, steps=steps, device=device, quiet=quiet)
    typer.echo(f"{generator}: reads examples now")
    typer.echo(f"next: lorag generate --examples EXAMPLES.jsonl --generator {generator} --out my-adapter")


def evaluate(
    generator: Annotated[list[str] | None, typer.Option(help="Generator folder; may be repeated, also for other seeds.")] = None,
    bank: Annotated[str | None, typer.Option(help="Bank of training experts, for the baselines; by default that of the sandbox.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task suite; by default the embedded one of the base model.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the suite, or several with commas between; by default the held-out ones; 'all' takes every task."),
    ] = None,
    oracles: Annotated[
        str | None,
        typer.Option(help="Bank of experts of the evaluated tasks, or of some; or what --json wrote of them, rows oracle or fresh_K."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated names, also few_shot_K and fresh_K; by default all that take no training."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Most test examples of each task.")] = 32,
    write: Annotated[bool, typer.Option("--write", help="Write answers out for all tasks, for lenient match: slower.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a page with figures (extra `report`).")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Score a generator with all its controls; with no argument, the embedded one on its held-out tasks."""
    from lorag.evaluation.folders import open_ladder
    from lorag.evaluation.tables import print_report
    from lorag.files.artifacts import write_json

    if report is not None:
        from lorag.evaluation.report.style import require_matplotlib

        require_matplotlib()
    ladder = open_ladder(
        generator or [],
        bank=bank,
        tasks=tasks,
        split=split.split(",") if split else None,
        oracles=oracles,
        methods=methods.split(",") if methods else None,
        device=device,
        dtype=dtype,
        quiet=quiet,
    )
    reports = {}
    for name, one in ladder.each():
        reports[name] = one.evaluate(seeds=seeds, limit=limit, write=write, quiet=quiet)
        if len(ladder.splits) > 1:
            typer.echo(f"split {name}")
        print_report(reports[name])
        typer.echo()
        if json_file is not None:  # after each split, because all of them take long
            write_json(json_file, reports[name] if len(ladder.splits) == 1 else {"splits": reports})
        if report is not None:
            from lorag.evaluation.report.gathering import gather_findings
            from lorag.evaluation.report.page import write_report

            folder = report if len(ladder.splits) == 1 else report / name
            page = write_report(folder, gather_findings(one, reports[name], quiet=quiet))
            typer.echo(f"written to {folder}: {page.name}, which holds all, and its figures")
            typer.echo(f"next: open {page} in a browser")
    if json_file is not None:
        typer.echo(f"written to {json_file}")
    if report is None:
        typer.echo("next: the same with --report DIR writes a page with figures")


def fuse(
    names: Annotated[
        list[str], typer.Argument(help="Experts of the bank, or adapter folders, files and hub ids; NAME=WEIGHT weighs them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, in PEFT's format.")],
    bank: Annotated[str | None, typer.Option(help="The bank; by default 'sandbox', or none for folders and hub ids.")] = None,
    method: Annotated[str, typer.Option(help="mean, task_arithmetic, ties, dare_ties, cat, lego, tsv, regmean or icm_fusion.")] = "mean",
    generator: Annotated[str | None, typer.Option(help="Folder of a generator of method icm_fusion.")] = None,
    rule: Annotated[str, typer.Option(help="Of icm_fusion: uniform, conflict or learned.")] = "uniform",
    tasks: Annotated[str | None, typer.Option(help="Suite of the experts' tasks, to learn from and to warn of shared inputs.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="Base model of adapters whose files do not say it.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw.")] = 0,
    device: Device = "auto",
) -> None:
    """Fuse experts of a bank, or adapters of any ranks by folder or hub id, into one adapter."""
    from lorag.training.fuse import fuse as run
    from lorag.training.fuse import read_weights

    weights_of = read_weights(names)
    if bank is None and not all("/" in name or Path(name).exists() for name in weights_of):
        bank = "sandbox"
    adapter = run(
        weights_of,
        bank=bank,
        method=method,
        generator=generator,
        rule=rule,
        tasks=tasks,
        rank=rank,
        base_model=base_model,
        seed=seed,
        device=device,
    )
    folder = adapter.save_pretrained(out)
    parts = "adapters" if bank is None else "experts"
    typer.echo(f"{folder}: rank {adapter.rank} adapter of {adapter.base_model}, {len(names)} {parts} by {method}")
    if "energy" in adapter.info:
        typer.echo(f"its rank keeps {adapter.info['energy']:.1%} of the merged weights' energy")
    typer.echo(f"next: lorag info {folder}")
