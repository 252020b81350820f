"""Commands on task suites: derive, import, coco; and of the world smollm2, whose suite it rebuilds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app", "smollm2_app"]

app = typer.Typer(no_args_is_help=True, help="Task suites.")
smollm2_app = typer.Typer(no_args_is_help=True, help="The world of real tasks for SmolLM2-135M-Instruct.")


@app.command("derive")
def tasks_derive(
    source: Annotated[Path, typer.Argument(help="Folder of suites.")],
    out: Annotated[Path, typer.Option(help="Folder of the derived suite.")],
    subsets: Annotated[int, typer.Option(min=0, help="Tasks made of each large label set.")] = 1,
    without_expert: Annotated[int, typer.Option(help="More subsets, of training tasks, that teach without an expert.")] = 0,
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Share of source data sets held out.")] = 0.3,
    names: Annotated[Path | None, typer.Option(help="JSON list of the tasks to start with.")] = None,
    by: Annotated[str, typer.Option(help="What keeps tasks on one side of the split: their 'source', or shared 'texts' alone.")] = "source",
    seed: Annotated[int, typer.Option(help="Seed of subsets and split.")] = 0,
) -> None:
    """Make a labelled suite with subsets of label sets, split by source data set."""
    from lorag.tasks.derived import derive

    counts = derive(source, out, names=names, subsets=subsets, without_expert=without_expert, held_out=held_out, by=by, seed=seed)
    typer.echo(f"{out}: " + ", ".join(f"{count} {split} tasks" for split, count in counts.items()))


@app.command("import")
def tasks_import(
    source: Annotated[Path, typer.Argument(help="Folder of Super-NaturalInstructions task files, one JSON file per task.")],
    out: Annotated[Path, typer.Option(help="Folder of the suite.")],
    train: Annotated[int, typer.Option(min=1, help="Most training examples of a task.")] = 200,
    test: Annotated[int, typer.Option(min=1, help="Most test examples of a task.")] = 32,
    longest: Annotated[int, typer.Option(min=1, help="Most characters of an example, input and output together.")] = 4000,
    language: Annotated[str, typer.Option(help="Language of inputs and outputs; 'all' takes every task.")] = "English",
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the tasks held out, whole source data sets.")] = 0.1,
    test_tasks: Annotated[Path | None, typer.Option(help="File with names of the tasks to hold out instead, one per line.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of which examples are taken.")] = 0,
) -> None:
    """Make a suite of Super-NaturalInstructions tasks: definitions become descriptions, and are taken out of the inputs."""
    from lorag.tasks.natural_instructions import Limits, import_instructions

    counts = import_instructions(source, out, Limits(train, test, longest, language), held_out=held_out, test_tasks=test_tasks, seed=seed)
    typer.echo(f"{out}: {counts['train']} training and {counts['test']} held-out tasks; {counts['skipped']} files left out")


@app.command("coco")
def tasks_coco(
    instances: Annotated[Path, typer.Argument(help="COCO's instances_*.json, or any file in that format.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Annotated[Path, typer.Option(help="Folder of the suite; images are copied into it.")],
    captions: Annotated[
        Path | None, typer.Option(help="COCO's captions_*.json: tasks are then image-text retrieval, not detection.")
    ] = None,
    train: Annotated[int, typer.Option(min=1, help="Most training images of a task.")] = 200,
    test: Annotated[int, typer.Option(min=1, help="Most test images of a task.")] = 100,
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the categories held out.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of which images and categories are taken.")] = 0,
) -> None:
    """Make a suite with one task per category of images: finding its boxes, or, with captions, telling its images apart."""
    from lorag.tasks.coco import import_coco

    counts = import_coco(instances, images, out, captions=captions, train=train, test=test, held_out=held_out, seed=seed)
    typer.echo(f"{out}: {counts['train']} training and {counts['test']} held-out tasks; {counts['skipped']} categories left out")


@smollm2_app.command("tasks")
def smollm2_tasks(
    sources: Annotated[Path, typer.Argument(help="Folder of the source suites, each with tasks.jsonl and examples.jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="Folder of the suite.")] = Path("data/smollm2/tasks"),
) -> None:
    """Rebuild the tasks that ship: the same sources give the same bytes."""
    from lorag.worlds.smollm2.build import build_tasks

    counts = build_tasks(sources, out)
    typer.echo(f"{out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
