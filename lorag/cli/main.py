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
from lorag.cli import generating as cli_generating
from lorag.cli import publishing as cli_publishing
from lorag.cli import tasks as cli_tasks
from lorag.cli import training as cli_training
from lorag.cli import trying as cli_trying
from lorag.cli import web as cli_web
from lorag.cli.options import Quiet
from lorag.errors import LoragError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="From the description of a task to a LoRA adapter, in one pass.")
sandbox_app = typer.Typer(no_args_is_help=True, help="The embedded world of small tasks.")
app.add_typer(cli_bank.app, name="bank")
app.add_typer(cli_gate.app, name="gate")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(cli_tasks.smollm2_app, name="smollm2")
app.add_typer(cli_tasks.app, name="tasks")
cli_generating.register(app)
cli_training.register(app)
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
    path: Annotated[
        str, typer.Argument(help="Adapter (folder, place on the hub, or file in another format than PEFT's), bank, generator or suite.")
    ],
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
