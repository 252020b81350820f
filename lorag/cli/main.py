"""The command line. Exit codes: 0 fine, 1 an error that lorag raised on purpose, 2 wrong usage."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from lorag.cli import bank as cli_bank
from lorag.cli import gate as cli_gate
from lorag.cli import publishing as cli_publishing
from lorag.cli import tasks as cli_tasks
from lorag.cli import trying as cli_trying
from lorag.cli import web as cli_web
from lorag.cli.batch import generate_from_file
from lorag.cli.options import Address, Cpus, Device, Dtype, Gpus, OnBackend, Quiet
from lorag.errors import LoragError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="From the description of a task to a LoRA adapter, in one pass.")
sandbox_app = typer.Typer(no_args_is_help=True, help="The embedded world of small tasks.")
app.add_typer(cli_bank.app, name="bank")
app.add_typer(cli_gate.app, name="gate")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(cli_tasks.smollm2_app, name="smollm2")
app.add_typer(cli_tasks.app, name="tasks")
cli_publishing.register(app)
cli_trying.register(app)
cli_web.register(app)

_state = {"debug": False}
_INTERRUPTED = 130


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    trusted: Annotated[
        list[str] | None, typer.Option("--trust-remote-code", help="Base model whose own Python code may run; you have read it.")
    ] = None,
) -> None:
    for name in trusted or []:
        from lorag.base.base_model import trust_remote_code

        trust_remote_code(name)
    _state["debug"] = debug
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # of other libraries: HTTP clients log what servers answer
    logging.getLogger("lorag").setLevel(logging.DEBUG if debug else logging.INFO)


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, in PEFT's format.")],
    description: Annotated[str | None, typer.Argument(help='What the adapter should do, such as "summarise legal text".')] = None,
    descriptions: Annotated[
        Path | None, typer.Option(help="File with one per line, or JSON lines with name and description; --out gets a folder for each.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Skill: a text file of any length, with a description in YAML front matter if it has one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that sample.")] = 0,
    strength: Annotated[float, typer.Option(help="Factor on the generated weights.")] = 1.0,
    generator: Annotated[str | None, typer.Option(help="Shipped generator by name, folder or hub id; by default sandbox.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter; by default the generator's.")] = None,
    examples: Annotated[Path | None, typer.Option(help='JSON lines {"input": …, "output": …} of the task, if there are some.')] = None,
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
    import warnings

    if sum(given is not None for given in (description, descriptions, file)) != 1:
        raise typer.BadParameter("give one description, a file of them with --descriptions, or a skill with --file")
    if descriptions is not None:
        from lorag.generator.generate import BatchSettings
        from lorag.parallel import Backend

        if examples is not None or refine_steps or bank is not None:
            raise typer.BadParameter("--examples, --refine-steps and --bank are for a single description")
        where = Backend(backend, address, cpus, gpus)
        return generate_from_file(descriptions, out, BatchSettings(generator, seed, strength, on_unknown, rank), where)
    if backend != "local" or address is not None:
        raise typer.BadParameter("--backend is for many descriptions, with --descriptions")

    from lorag.errors import UnknownTaskWarning
    from lorag.generator.generate import generate_lora
    from lorag.tasks.skills import read_skill
    from lorag.tasks.suite import read_pairs

    skill = None if file is None else read_skill(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownTaskWarning)  # it is said below, in one line
        adapter = generate_lora(
            str(description) if skill is None else skill.description,
            generator=generator,
            seed=seed,
            strength=strength,
            rank=rank,
            examples=[] if examples is None else read_pairs(examples),
            refine_steps=refine_steps,
            on_unknown=on_unknown,
            bank=bank,
            details=() if skill is None else skill.pieces,
        )
    folder = adapter.save_pretrained(out)
    if skill is not None:
        print(f"{file}: {skill.line(adapter.info.get('details', ()))}")
    if "read_as" in adapter.info:
        print(f"read as: {adapter.info['read_as']}")
    nearest = ", ".join(f"{name} {score:.2f}" for name, score in adapter.info["neighbours"][:3])
    print(f"{folder}: rank {adapter.rank} adapter of {adapter.base_model}, norm {adapter.info['norm']:.3f}")
    gate = adapter.info["gate"]
    if gate["decision"] == "refuse":
        print(f"lorag: do not expect this adapter to work: {gate['reason']}", file=sys.stderr)
    elif gate["expected_gap_closed"] is not None:
        low, high = gate["expected_gap_closed_interval"]
        share = f"{gate['expected_gap_closed']:.0%} of the gap ({low:.0%} to {high:.0%})"
        print(f"{gate['served']}; expected to close {share}: {gate['reason']}")
    print(f"nearest experts: {nearest}")
    print(f'next: PeftModel.from_pretrained(base_model, "{folder}"), or LoraAdapter.apply_to()')


@app.command()
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
    learned = f"{len(generator.conditioner.names)} {'tasks' if values.base else 'experts'}"
    print(f"{values.out}: {values.method} from {learned}, strength {generator.strength:g}, {size:.1f} MB")
    if values.tasks is None:  # there is nothing to score it on
        print(f'next: lorag generate "DESCRIPTION" --generator {values.out} --out my-adapter')
    else:
        named = {"bank": values.bank, "tasks": values.tasks}
        more = "".join(f" --{option} {name}" for option, name in named.items() if name not in (None, "sandbox"))
        print(f"next: lorag evaluate --generator {values.out}{more}")


@app.command()
def evaluate(
    generator: Annotated[list[str] | None, typer.Option(help="Generator folder; may be repeated, also for other seeds.")] = None,
    bank: Annotated[str | None, typer.Option(help="Bank of training experts, for the baselines; by default that of the sandbox.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task suite; by default the embedded one of the base model.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the suite, or several with commas between; by default the held-out ones; 'all' takes every task."),
    ] = None,
    oracles: Annotated[str | None, typer.Option(help="Bank of experts of the evaluated tasks, or of some of them.")] = None,
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
            print(f"split {name}")
        print_report(reports[name])
        print()
        if json_file is not None:  # after each split, because all of them take long
            write_json(json_file, reports[name] if len(ladder.splits) == 1 else {"splits": reports})
        if report is not None:
            from lorag.evaluation.report.gathering import gather_findings
            from lorag.evaluation.report.page import write_report

            folder = report if len(ladder.splits) == 1 else report / name
            page = write_report(folder, gather_findings(one, reports[name], quiet=quiet))
            print(f"written to {folder}: {page.name}, which holds all, and its figures")
            print(f"next: open {page} in a browser")
    if json_file is not None:
        print(f"written to {json_file}")
    if report is None:
        print("next: the same with --report DIR writes a page with figures")


@app.command()
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
    print(f"{folder}: rank {adapter.rank} adapter of {adapter.base_model}, {len(names)} {parts} by {method}")
    if "energy" in adapter.info:
        print(f"its rank keeps {adapter.info['energy']:.1%} of the merged weights' energy")
    print(f"next: lorag info {folder}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the trained generator and an adapter.")] = Path("runs/quickstart"),
    quiet: Quiet = False,
) -> None:
    """Do the main job on the embedded default: train, generate for unseen descriptions, load, evaluate."""
    from lorag.cli.quickstart import quickstart as run

    for line in run(out, quiet=quiet):
        print(line, flush=True)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="Adapter (a folder, or a file in another format than PEFT's), bank, generator or suite.")],
    base_model: Annotated[str | None, typer.Option("--base-model", help="An adapter's base model, where its format asks for it.")] = None,
) -> None:
    """Say what a folder or file holds."""
    from lorag.cli.info import describe_path

    print(describe_path(path, base_model))


@sandbox_app.command("build")
def sandbox_build(
    settings: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE settings.")] = None,
    quiet: Quiet = False,
) -> None:
    """Rebuild base model, tasks, bank, oracles and generators of the sandbox."""
    from lorag.config import load_config
    from lorag.worlds.sandbox.build import SandboxConfig
    from lorag.worlds.sandbox.build import build as run

    for line in run(load_config(SandboxConfig, None, settings or []), quiet=quiet):
        print(line)
    print("next: lorag evaluate")


def main(arguments: list[str] | None = None) -> Any:  # noqa: ANN401 - exits
    """Runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):  # a pipe's or old console's code page may lack a character: better another one than a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    # PEFT asks every model for it, which is nothing that a user could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        app(arguments)
    except LoragError as error:
        if _state["debug"] or isinstance(error, AssertionError):
            raise
        print(f"lorag: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if _state["debug"]:
            raise
        print(f"lorag: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != _INTERRUPTED:  # typer turns an interruption into an exit, silently
            raise
        print("lorag: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(_INTERRUPTED)
