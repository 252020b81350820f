"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Address", "Cpus", "Device", "Dtype", "Gpus", "OnBackend", "Quiet"]

_AFAR = "Where it runs"

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Dtype = Annotated[str, typer.Option(help="Of the base model: auto, fast (bf16 where that is faster), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OnBackend = Annotated[str, typer.Option("--backend", help="local, or ray (extra `ray`).", rich_help_panel=_AFAR)]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster, such as auto; by default one on this machine.", rich_help_panel=_AFAR)]
Cpus = Annotated[int, typer.Option(min=1, help="CPU cores, and threads, of a Ray task.", rich_help_panel=_AFAR)]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of a Ray task; .5 lets two share one.", rich_help_panel=_AFAR)]
