"""The command that turns descriptions into adapters: one, a skill, or each line of a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorag.cli.options import Address, Cpus, Gpus, OnBackend
from lorag.errors import GeneratorError, UnknownTaskWarning

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.generator.generate import AdapterResult, BatchSettings
    from lorag.parallel import Backend

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(generate)


def generate(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, in PEFT's format.")],
    description: Annotated[str | None, typer.Argument(help='What the adapter should do, such as "summarise legal text".')] = None,
    descriptions: Annotated[
        Path | None, typer.Option(help="File with one per line, or JSON lines of name, description and wordings; --out gets a folder each.")
    ] = None,
    wording: Annotated[
        list[str] | None, typer.Option(help="The same task in other words; repeat it. The adapter is the mean over all wordings.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Skill: a text file of any length, with a description in YAML front matter if it has one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that sample.")] = 0,
    strength: Annotated[float, typer.Option(help="Factor on the generated weights.")] = 1.0,
    generator: Annotated[str | None, typer.Option(help="Shipped generator by name, folder or hub id; by default sandbox.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter; by default the generator's.")] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"input": …, "output": …} of the task, beside the description or, if read, instead of it.'),
    ] = None,
    refine_steps: Annotated[int, typer.Option(min=0, help="Gradient steps on the examples.")] = 0,
    on_unknown: Annotated[
        str,
        typer.Option(help="If the bank has nothing near it: warn, raise, fallback (an adapter that changes nothing) or ignore."),
    ] = "warn",
    bank: Annotated[
        str | None, typer.Option(help="The generator's bank: a known task then gets its own expert, a close one a fusion.")
    ] = None,
    backend: OnBackend = "local",
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
) -> None:
    """Turn a description into an adapter folder, or each description of a file into one of its own."""
    stated = sum(given is not None for given in (description, descriptions, file))
    if stated > 1 or (not stated and examples is None):
        raise typer.BadParameter("give one description, a file of them with --descriptions, a skill with --file, or --examples")
    if descriptions is not None:
        from lorag.generator.generate import BatchSettings
        from lorag.parallel import Backend

        if examples is not None or refine_steps or bank is not None or wording:
            raise typer.BadParameter("--examples, --refine-steps, --bank and --wording are for a single description")
        where = Backend(backend, address, cpus, gpus)
        return _generate_each(descriptions, out, BatchSettings(generator, seed, strength, on_unknown, rank), where)
    if backend != "local" or address is not None:
        raise typer.BadParameter("--backend is for many descriptions, with --descriptions")

    from lorag.generator.generate import generate_lora
    from lorag.tasks.skills import read_skill
    from lorag.tasks.suite import read_pairs

    skill = None if file is None else read_skill(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownTaskWarning)  # it is said below, in one line
        adapter = generate_lora(
            description if skill is None else skill.description,
            generator=generator,
            seed=seed,
            strength=strength,
            rank=rank,
            examples=[] if examples is None else read_pairs(examples),
            refine_steps=refine_steps,
            on_unknown=on_unknown,
            bank=bank,
            details=() if skill is None else skill.pieces,
            wordings=wording or (),
        )
    folder = adapter.save_pretrained(out)
    if skill is not None:
        typer.echo(f"{file}: {skill.line(adapter.info.get('details', ()))}")
    _print_made(folder, adapter)


def _print_made(folder: Path, adapter: LoraAdapter) -> None:
    """What was made, and what may be expected of it."""
    if "read_as" in adapter.info:
        typer.echo(f"read as: {adapter.info['read_as']}")
    nearest = ", ".join(f"{name} {score:.2f}" for name, score in adapter.info["neighbours"][:3]) or "not compared without a description"
    typer.echo(f"{folder}: rank {adapter.rank} adapter of {adapter.base_model}, norm {adapter.info['norm']:.3f}")
    gate = adapter.info["gate"]
    if gate["decision"] == "refuse":
        typer.echo(f"lorag: do not expect this adapter to work: {gate['reason']}", err=True)
    elif gate["expected_gap_closed"] is not None:
        low, high = gate["expected_gap_closed_interval"]
        share = f"{gate['expected_gap_closed']:.0%} of the gap ({low:.0%} to {high:.0%})"
        typer.echo(f"{gate['served']}; expected to close {share}: {gate['reason']}")
    typer.echo(f"nearest experts: {nearest}")
    typer.echo(f'next: PeftModel.from_pretrained(base_model, "{folder}"), or LoraAdapter.apply_to()')


def _generate_each(file: Path, out: Path, settings: BatchSettings, backend: Backend) -> None:
    """A folder for each description of a file, and a line; those that existed are kept, and what failed is said at the end."""
    from lorag.generator.generate import read_requests, write_adapters

    requests, failed = read_requests(file), []
    for number, one in enumerate(write_adapters(requests, out, settings, backend=backend), 1):
        if one.error is not None:
            failed.append(one.request.name)
        typer.echo(f"{number}/{len(requests)} {_line(one)}")
    if failed:
        raise GeneratorError(
            f"{len(failed)} of {len(requests)} adapters were not made", got=f"{failed[0]} first", remedy="The lines above say why."
        )
    typer.echo(f"next: lorag info {out / requests[0].name}")


def _line(one: AdapterResult) -> str:
    if one.error is not None:
        return f"refused {one.request.name}: {type(one.error).__name__}: {one.error}"
    if one.existed:
        return f"kept {one.folder}: it was made before"
    gate, closed = one.info["gate"], one.info["gate"]["expected_gap_closed"]
    judged = "do not expect it to work" if gate["decision"] == "refuse" else gate["served"]
    return f"{one.folder}: {judged}" + ("" if closed is None else f", expected to close {closed:.0%} of the gap")
