"""Command on the page: web."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from lorag.cli.options import Device

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(web)


def web(
    generator: Annotated[list[str] | None, typer.Option(help="Shipped generator by name, folder or hub id; several to compare.")] = None,
    bank: Annotated[str | None, typer.Option(help="The generators' bank: a known task then gets its own expert.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; by default the first free one from 7860.")] = None,
    device: Device = "auto",
) -> None:
    """Open a page to type descriptions on, for this machine alone."""
    from lorag.base.names import SANDBOX_LM
    from lorag.tasks.finding import find_tasks
    from lorag.web.serving import serving
    from lorag.web.session import Session

    session = Session.from_folders(generator or [], bank=bank, device=device)
    inputs = ""
    if session.first.base.model.name == SANDBOX_LM:  # its base model reads no other texts than its own world's
        inputs = "\n".join(example.input for example in find_tasks("sandbox", "test")["legal-summarise-plain"].split("test")[:2])
    with serving(session, port=port, inputs=inputs) as address:
        typer.echo(f"{address}: {', '.join(session.generators)} for {session.first.base.model.name}; for this machine alone")
        typer.echo("next: open it in a browser; Ctrl-C closes it and removes what it wrote")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            typer.echo("closed")
