"""What `lorag generate --descriptions FILE` does: an adapter folder for each line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorag.errors import GeneratorError

if TYPE_CHECKING:
    from lorag.generator.generate import AdapterResult, BatchSettings
    from lorag.parallel import Backend

__all__ = ["generate_from_file"]


def generate_from_file(file: Path, out: Path, settings: BatchSettings, backend: Backend) -> None:
    """Makes the adapters of a file's descriptions, with a line for each; those that existed are kept.

    Raises:
        GeneratorError: At the end, if some could not be made.
    """
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
