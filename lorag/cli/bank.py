"""Commands on banks: build, add, remove, list, check, describe, export, compress, transfer."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorag.base.kinds import KINDS
from lorag.cli.options import Address, Cpus, Device, Dtype, Gpus, OnBackend, Quiet
from lorag.errors import BankError, BaseModelError, MissingDependencyError
from lorag.tables import Table, print_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorag.adapters.sources import Source
    from lorag.bank.importing import Imported, ImportOptions
    from lorag.parallel import Backend
    from lorag.text.embedding import TextEmbedder

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Build, fill and look at banks of experts.")

_MOST_ROWS = 30
_NEW = "Only for a new bank"


@app.command("build")
def build(
    settings: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE settings, such as experts.steps=100.")] = None,
    config: Annotated[str | None, typer.Option(help="Preset, recipe (recipes/NAME), or a YAML file.")] = None,
    backend: OnBackend = "local",
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    quiet: Quiet = False,
) -> None:
    """Train an expert for each task of a suite; goes on at the last finished group."""
    from lorag.bank.build import BankConfig, build_bank
    from lorag.base.base_model import BaseModel, is_trusted
    from lorag.config import load_config
    from lorag.parallel import Backend
    from lorag.tasks.finding import find_tasks

    values = load_config(BankConfig, config, settings or [], "build")
    bank = build_bank(
        values.out,
        find_tasks(values.tasks, values.split),
        BaseModel(values.base, values.kind, values.revision, is_trusted(values.base)),
        values.objective,
        values.objective_settings,
        values.experts,
        device=values.device,
        dtype=values.dtype,
        trackers=values.trackers,
        backend=Backend(backend, address, cpus, gpus),
        quiet=quiet,
    )
    typer.echo(f"{values.out}: {len(bank)} experts of {bank.base.model.name}")
    typer.echo(f"next: lorag train bank={values.out} tasks={values.tasks}")


@app.command("add")
def add(
    bank: Annotated[Path, typer.Option(help="The bank; a new one is started from what the adapters' configs say.")],
    places: Annotated[
        list[str] | None,
        typer.Argument(help="Adapters (folders, or files in another format than PEFT's), folders of such, or hub ids such as user/name."),
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--from", help="File with a folder or hub id per line, and after tabs a name and a description.")
    ] = None,
    hub_base: Annotated[
        str | None, typer.Option(help="Hub id of a base model: all its adapters on the hub; says what there is, and with --yes adds it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Of --hub-base: most adapters, the most downloaded first.")] = 100,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Of --hub-base: most bytes of weights to fetch.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Of --hub-base: fetch and add what was found.")] = False,
    config: Annotated[str | None, typer.Option(help="Recipe for a new bank (recipes/NAME), or a YAML file.", rich_help_panel=_NEW)] = None,
    description: Annotated[
        list[str] | None,
        typer.Option(help="What its task is; may be repeated. By default its description.txt, lorag.json or model card says it."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the bank; by default made from the folder's.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", "--license", help="Its licence; by default what its files state.")] = None,
    ignore_extra: Annotated[bool, typer.Option("--ignore-extra", help="Leave out factors of modules that the bank lacks.")] = False,
    any_norm: Annotated[bool, typer.Option("--any-norm", help="Take adapters far larger or smaller than the bank's too.")] = False,
    base_alias: Annotated[list[str] | None, typer.Option(help="Another name of the bank's base model; may be repeated.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Also take DoRA and PEFT's other methods, as LoRA; the base model's weights are read for it.")
    ] = False,
    keep: Annotated[float, typer.Option(help="Share of ‖ΔW‖² that --convert keeps of each module.")] = 0.99,
    embedder: Annotated[str | None, typer.Option(help="Compares descriptions; 'none' compares none.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Of a new bank: a hub id, folder, GGUF file or short name of the base model.", rich_help_panel=_NEW)
    ] = None,
    kind: Annotated[str | None, typer.Option(help=f"One of {', '.join(KINDS)}.", rich_help_panel=_NEW)] = None,
    base_revision: Annotated[str | None, typer.Option(help="The base model's revision on the hub.", rich_help_panel=_NEW)] = None,
    objective: Annotated[
        str | None, typer.Option(help="How the base model is run on tasks; by default its kind's first.", rich_help_panel=_NEW)
    ] = None,
    objective_setting: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, such as template='{input}\n'; may be repeated.", rich_help_panel=_NEW)
    ] = None,
    backend: OnBackend = "local",
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    quiet: Quiet = False,
) -> None:
    """Add PEFT LoRA adapters to a bank: checked, folded to plain ΔW, compared with the experts that are there.

    A bank that does not exist is started: with the base model that the adapters name, and all modules that any of them changes.
    """
    from lorag.adapters.sources import find_sources, listed_sources
    from lorag.bank.importing import ImportOptions
    from lorag.bank.new_bank import NewBank, start_bank
    from lorag.config import load_config, read_settings
    from lorag.parallel import Backend

    sources = find_sources(places or []) + ([] if listed is None else listed_sources(listed))
    if hub_base is not None:
        fitting = _on_the_hub(hub_base, limit, max_bytes, quiet)
        if not yes:
            typer.echo("nothing was fetched or added; the same command with --yes does, and skips what the bank has")
            return
        sources, base = [*sources, *fitting], base or hub_base
    if not sources:
        raise typer.BadParameter("no adapter is named: give folders, hub ids, --from FILE or --hub-base ID")
    if (name is not None or description) and len(sources) > 1:
        raise typer.BadParameter(f"--name and --description are for a single adapter; these are {len(sources)}")
    planned = load_config(NewBank, config, [], "add")
    new = NewBank(
        base or planned.base,
        kind or planned.kind,
        base_revision or planned.revision,
        objective or planned.objective,
        {**planned.settings, **read_settings(objective_setting or [])},
        (*planned.aliases, *(base_alias or ())),
    )
    started = start_bank(bank, sources, new, revision=revision, convert=keep if convert else None, quiet=quiet)
    if started is not None:
        model, layout = started.base.model, started.base.layout
        typer.echo(f"started {bank}: base model {model.name} ({model.kind}, {started.base.identity}), objective {started.base.objective}")
        typer.echo(f"  {len(layout)} modules: {', '.join(layout.target_modules[:8])}{' …' if len(layout.target_modules) > 8 else ''}")
    options = ImportOptions(
        tuple(description or ()), name, licence, ignore_extra, any_norm, new.aliases, revision, keep if convert else None
    )
    _add_each(bank, sources, options, _embedder(embedder), Backend(backend, address, cpus, gpus), quiet)
    typer.echo(f"next: lorag bank check {bank}")


def _on_the_hub(base: str, limit: int, max_bytes: int | None, quiet: bool) -> Sequence[Source]:
    """Prints what adapters the hub lists for a base model, and gives those that can be added."""
    from lorag.bank.model_tree import chosen, survey, survey_lines

    listed = survey(base, limit=limit, quiet=quiet)
    typer.echo("\n".join(survey_lines(listed, max_bytes)))
    fitting = chosen(listed, max_bytes)
    if not fitting:
        raise BankError(f"no adapter of {base} can be added", got=f"{len(listed)} listed")
    return fitting


def _add_each(
    bank: Path, sources: Sequence[Source], options: ImportOptions, embedder: TextEmbedder | None, backend: Backend, quiet: bool
) -> None:
    """Adds adapters one after the other and prints what became of each; a single one that is refused is an error of its own."""
    from lorag.bank.importing import import_adapters

    refused: list[Imported] = []
    with closing(import_adapters(bank, sources, options, embedder=embedder, backend=backend, quiet=quiet)) as done:
        for number, one in enumerate(done, 1):
            if one.error is not None:
                refused.append(one)
                if len(sources) == 1:
                    raise one.error
            typer.echo(_line(one, f"{number}/{len(sources)} " if len(sources) > 1 else ""))
    if refused:
        raise BankError(
            f"{len(refused)} of {len(sources)} adapters were not added", got=f"{refused[0].source} first", remedy="The lines above say why."
        )


def _embedder(name: str | None) -> TextEmbedder | None:
    from lorag.text.embedding import SentenceEmbedder

    if name == "none":
        return None
    try:
        return SentenceEmbedder.from_pretrained() if name is None else SentenceEmbedder.from_pretrained(name)
    except (BaseModelError, MissingDependencyError) as error:
        if name is not None:
            raise
        typer.echo(f"descriptions are not compared: {error}")
        return None


def _line(one: Imported, head: str) -> str:
    """What became of one adapter: a line, and indented ones for what a person should look at."""
    if one.error is not None:
        return f"{head}refused {one.source}: {type(one.error).__name__}: {one.error}"
    if one.existed:
        return f"{head}skipped {one.name}: it is there already"
    parts = [f"rank {one.rank}", f"norm {one.norm:.3g}", f"described by {one.described_by}"]
    if one.energy is not None:
        parts.append(f"{one.energy:.1%} of its energy lies in the bank's bases")
    for label, near in (("nearest by weight", one.by_weight), ("by description", one.by_description)):
        if near:
            parts.append(f"{label} " + ", ".join(f"{name} {similarity:.2f}" for name, similarity in near))
    lines = [f"{head}added {one.name}: " + "; ".join(parts)]
    if one.missing:
        lines.append(f"  note: {len(one.missing)} modules without factors count as unchanged, such as {one.missing[0]}")
    if one.ignored:
        share = "" if one.ignored_share is None else f", {one.ignored_share:.1%} of its energy"
        lines.append(f"  note: left out {len(one.ignored)} modules such as {one.ignored[0]}{share}")
    if one.same_weights:
        lines.append(f"  warning: same weights as {', '.join(one.same_weights)}; keep one of them with lorag bank remove")
    if one.looks_like:
        like = ", ".join(f"{name} {similarity:.2f}" for name, similarity in one.looks_like)
        lines.append(f"  warning: its weights do not fit its description; they look like those of {like}; lorag try shows what it does")
    if one.same_description:
        lines.append(f"  warning: same description as {', '.join(one.same_description[:3])}; say how the tasks differ")
    return "\n".join(lines)


@app.command("remove")
def remove(
    names: Annotated[list[str], typer.Argument(help="Experts of the bank.")],
    bank: Annotated[Path, typer.Option(help="The bank.")],
) -> None:
    """Take experts out of a bank."""
    from lorag.bank.bank import AdapterBank

    left = AdapterBank.from_pretrained(bank).remove(names)
    typer.echo(f"removed {', '.join(names)}; {len(left)} experts are left")


@app.command("list")
def list_experts(bank: Annotated[str, typer.Argument(help="The bank, or 'sandbox'.")] = "sandbox") -> None:
    """List a bank's experts."""
    from lorag.bank.bank import find_bank

    rows = [
        (one.name, str(one.rank), "" if one.score is None else f"{one.score:.2f}", one.license, one.descriptions[0])
        for one in find_bank(bank).experts
    ]
    print_tables(Table(("expert", "rank", "score", "licence", "description"), rows, text=(0, 3, 4)))


@app.command("check")
def check(
    bank: Annotated[str, typer.Argument(help="The bank, or 'sandbox'.")] = "sandbox",
    every: Annotated[bool, typer.Option("--all", help="Show sound experts too; done anyway for at most 30.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Also whether weights fit their descriptions.")] = False,
    embedder: Annotated[str | None, typer.Option(help="Embeds descriptions, for --cards.")] = None,
    quiet: Quiet = False,
) -> None:
    """Read every expert of a bank, compare them, and say what is wrong and what to do about it."""
    from lorag.bank.bank import find_bank
    from lorag.bank.check import check_bank, format_findings

    findings = check_bank(find_bank(bank), embedder=_embedder(embedder) if cards else None, quiet=quiet)
    table = format_findings(findings, every=every or len(findings) <= _MOST_ROWS, terminal=sys.stdout.isatty())
    if table:
        typer.echo(table + "\n")
    severe, odd = sum(one.severe for one in findings), sum(bool(one.problem) and not one.severe for one in findings)
    if severe:
        raise BankError(f"{severe} of {len(findings)} experts have problems", remedy="The table says what to do.")
    typer.echo(f"{len(findings)} experts, all sound" + (f"; {odd} worth a look" if odd else ""))


@app.command("describe")
def describe(
    places: Annotated[list[str], typer.Argument(help="Adapter folders and files, folders of such, or hub ids; undescribed ones too.")],
    bank: Annotated[str, typer.Option(help="Bank of described experts of the same base model, or 'sandbox'.")] = "sandbox",
    find: Annotated[str | None, typer.Option(help="A task: adapters are sorted by how well their weights fit it.")] = None,
    ignore_extra: Annotated[bool, typer.Option("--ignore-extra", help="Leave out factors of modules that the bank lacks.")] = False,
    base_alias: Annotated[list[str] | None, typer.Option(help="Another name of the bank's base model; may be repeated.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    embedder: Annotated[str | None, typer.Option(help="Embeds descriptions.")] = None,
    quiet: Quiet = False,
) -> None:
    """Say which of a bank's tasks adapters are near, by their weights alone; or find those that do what a text says."""
    from lorag.adapters.sources import find_sources
    from lorag.bank.bank import find_bank
    from lorag.bank.candidates import ImportOptions
    from lorag.bank.weights_to_text import describe_adapters
    from lorag.text.embedding import SentenceEmbedder

    opened = find_bank(bank)
    model = SentenceEmbedder.from_pretrained() if embedder is None else SentenceEmbedder.from_pretrained(embedder)
    options = ImportOptions(ignore_extra=ignore_extra, base_aliases=tuple(base_alias or ()), revision=revision)
    for one in describe_adapters(opened, find_sources(places), model, options, find=find, quiet=quiet):
        if one.error is not None:
            typer.echo(f"{one.source}: {type(one.error).__name__}: {one.error}")
            continue
        typer.echo(one.source if one.match is None else f"{one.source}: fits {one.match:.2f}")
        rows = [(f"{cosine:.2f}", name, opened[name].descriptions[0]) for name, cosine in one.near]
        print_tables(Table((), rows, text=(1, 2)))


@app.command("export")
def export(
    bank: Annotated[str, typer.Argument(help="The bank, or 'sandbox'.")],
    out: Annotated[Path, typer.Option(help="A new folder; gets an adapter folder for each expert.")],
    arrow: Annotated[bool, typer.Option("--arrow", help="For PEFT's Arrow routing: equal ranks and modules, the same ΔW.")] = False,
    expert: Annotated[list[str] | None, typer.Option(help="An expert to be written; may be repeated. All by default.")] = None,
) -> None:
    """Write a bank's experts as adapter folders for PEFT's create_arrow_model."""
    from lorag.bank.bank import find_bank
    from lorag.bank.exporting import export_arrow

    if not arrow:
        raise typer.BadParameter("say for what: --arrow")
    written = list(export_arrow(find_bank(bank), out, expert))
    typer.echo(f"{out}: {len(written)} adapters of one rank")
    typer.echo("next: create_arrow_model(base_model, [their folders], ArrowConfig(top_k=2))")


@app.command("compress")
def compress(
    bank: Annotated[str, typer.Argument(help="The bank, or 'sandbox'.")],
    out: Annotated[Path, typer.Option(help="A new folder, for the compressed bank.")],
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the experts' energy ‖ΔW‖² that is kept at each module.")] = 0.99,
    precision: Annotated[str, typer.Option(help="float32, float16 or int8.")] = "float16",
    quiet: Quiet = False,
) -> None:
    """Write a bank in less room: bases that its experts share, and a small core for each of them."""
    from lorag.bank.bank import find_bank
    from lorag.bank.compressing import compress_bank

    small = compress_bank(find_bank(bank), out, keep=keep, precision=precision, quiet=quiet)
    size = f"{small.after / 1e6:.3g} MB instead of {small.before / 1e6:.3g} MB ({small.plain / 1e6:.3g} MB as they are in {precision})"
    typer.echo(f"{out}: {len(small.bank)} experts in {size}")
    low, high = small.directions
    typer.echo(f"modules keep {low} to {high} directions on a side")
    typer.echo(f"energy kept {small.energy:.2%} on average, least {small.energies[small.worst]:.2%} ({small.worst})")
    typer.echo(f"next: lorag bank check {out}")


@app.command("transfer")
def transfer(
    bank: Annotated[str, typer.Argument(help="The bank, or 'sandbox'.")],
    to: Annotated[str, typer.Option(help="The new base model: a hub id, folder, GGUF file or short name.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bank.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE settings, such as answers.keep=.9, experts.steps=100 or objective_settings.template='{input}'."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Suite with the experts' tasks, whose inputs are answered; labels are not used.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="Text file whose lines every expert answers.")] = None,
    by: Annotated[
        Literal["auto", "copy", "answers"],
        typer.Option(help="auto: a copy where experts fit and, if there are inputs, give the same answers; else learned from answers."),
    ] = "auto",
    expert: Annotated[list[str] | None, typer.Option(help="An expert to be transferred; may be repeated. All by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="The new base model's revision on the hub.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Make a bank of the same tasks for another base model, without labelled data."""
    from lorag.bank.bank import find_bank
    from lorag.bank.transferring import TransferConfig, read_inputs, task_inputs, transfer_bank
    from lorag.base.base_model import BaseModel, is_trusted
    from lorag.config import load_config
    from lorag.tasks.finding import find_tasks

    if tasks is not None and inputs is not None:
        raise typer.BadParameter("--tasks and --inputs are two ways to say the same; give one")
    opened = find_bank(bank)
    config = load_config(TransferConfig, None, settings or [])
    names = opened.names if expert is None else expert
    asked = task_inputs(find_tasks(tasks), names) if tasks is not None else None if inputs is None else read_inputs(inputs, names)
    base = BaseModel(to, opened.base.model.kind, revision, is_trusted(to))
    done = transfer_bank(opened, out, base, by=by, inputs=asked, names=expert, config=config, device=device, dtype=dtype, quiet=quiet)
    alike = done.likeness
    if alike.similarity is not None and alike.least is not None:
        low, where = alike.least
        typer.echo(f"weights of both bases: mean cosine {alike.similarity:.4f}, least {low:.4f} ({where})")
        typer.echo(f"the base moved {done.moved:.2f} times as far as an expert changes it")
    if done.by == "copy":
        typer.echo(f"{out}: {len(done.bank)} experts, copied to {base.name}")
    else:
        kept, answered = (sum(counts) for counts in zip(*done.kept.values(), strict=True))
        typer.echo(f"{out}: {len(done.bank)} experts of {base.name}, learned from {kept} of {answered} answers")
    if done.agreement is not None:
        typer.echo(f"in {done.agreement:.1%} of the cases tried they give the answer that the old base and expert give")
    if done.skipped:
        typer.echo(f"left out, with too few sound answers: {', '.join(done.skipped[:8])}{' …' if len(done.skipped) > 8 else ''}")
    typer.echo(f"next: lorag train bank={out}")
