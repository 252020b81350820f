"""Commands on where adapters and generators go next: export, push, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from lorag.base.kinds import KINDS

__all__ = ["register"]

BaseKind = Annotated[str | None, typer.Option("--kind", help=f"Base model's kind: {', '.join(KINDS)}.")]
BaseModelName = Annotated[str | None, typer.Option("--base-model", help="Base model, if the adapter does not name the right one.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command(cls=_Export)(export)
    app.command()(push)
    app.command()(convert)


class _Export(TyperCommand):
    """Its help names the formats of the registry, which are looked up when someone asks: importing them takes seconds."""

    def format_help(self, *given: Any) -> None:  # noqa: ANN401 - click's types, of which typer has brought its own since 0.29
        """Prints the help."""
        from lorag.adapters.formats import FORMATS

        option = next(one for one in self.params if isinstance(one, TyperOption) and "--format" in one.opts)
        option.help = f"Write another format than PEFT's: {' or '.join(name for name, one in FORMATS.items() if one.writes)}."
        super().format_help(*given)


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or file (PEFT, GGUF, MLX, diffusers, kohya), or hub id.")],
    out: Annotated[Path, typer.Option(help="A new folder, or a new file where the format is one, such as GGUF.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write the base model with the adapter merged into its weights.")] = False,
    name: Annotated[str | None, typer.Option("--format", help="Write another format than PEFT's, by its name.")] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF file for llama.cpp (extra `gguf`): --format gguf.")] = False,
    mlx: Annotated[bool, typer.Option("--mlx", help="Write a folder for mlx-lm: --format mlx.")] = False,
    base_model: BaseModelName = None,
    kind: BaseKind = None,
    strength: Annotated[float, typer.Option(help="Factor on ΔW.")] = 1.0,
    rank: Annotated[int | None, typer.Option(min=1, help="Write the nearest ΔW of this rank.")] = None,
    keep: Annotated[float | None, typer.Option(help="Write the smallest rank that keeps this share of ‖ΔW‖², such as .95.")] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Also take DoRA and PEFT's other methods: as the nearest LoRA, or with --merge exactly.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Precision of the merged weights: auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write an adapter as a PEFT folder of one rank and one alpha, which every program reads, in another format, or merged."""
    from lorag.adapters.export import ExportSettings, export_as, export_portable
    from lorag.adapters.formats import FORMATS
    from lorag.adapters.formats.format import AdapterFormat
    from lorag.adapters.merged import export_merged

    if merge + (name is not None) + gguf + mlx > 1:
        raise typer.BadParameter("--merge, --format, --gguf and --mlx exclude each other")
    if merge and (rank is not None or keep is not None):
        raise typer.BadParameter("--rank and --keep are for adapters, not for --merge")
    if not merge and dtype != "auto":
        raise typer.BadParameter("--dtype needs --merge")
    if merge:
        merged = export_merged(adapter, out, base_model=base_model, kind=kind, strength=strength, dtype=dtype, convert=convert)
        typer.echo(f"{out}: {base_model or merged.base_model} with the adapter merged into {len(merged.layout)} weights")
        typer.echo(f'next: AutoModel….from_pretrained("{out}")')
        return
    settings = ExportSettings(base_model=base_model, kind=kind, strength=strength, rank=rank, keep=keep, convert=convert)
    name = "gguf" if gguf else "mlx" if mlx else name
    done = export_portable(adapter, out, **settings) if name is None else export_as(adapter, out, name, **settings)
    typer.echo(f"{out}: rank {done.adapter.rank} adapter of {base_model or done.adapter.base_model}, one lora_alpha for all modules")
    if rank is not None or keep is not None or convert:
        typer.echo(f"relative error of ΔW: {done.error:.3g}")
    typer.echo(f"next: {(AdapterFormat if name is None else FORMATS[name]).next_step.format(out=out)}")


def push(
    folder: Annotated[Path, typer.Argument(help="Adapter, bank or generator.")],
    repository: Annotated[str, typer.Argument(help="Hub id user/name.")],
    base_model: Annotated[str | None, typer.Option("--base-model", help="Hub id of an adapter's base model, if it names a folder.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Publish an adapter, bank or generator on the hub, with its card; private unless --public is given."""
    from lorag.adapters.adapter import LoraAdapter
    from lorag.adapters.checks import CONFIG
    from lorag.adapters.publishing import own_card, push_generator_folder
    from lorag.bank.bank import AdapterBank
    from lorag.errors import ArtifactError

    if base_model is not None and not (folder / CONFIG).is_file():
        raise typer.BadParameter("--base-model is for adapters")
    if (folder / CONFIG).is_file():
        opened, readme = LoraAdapter.from_pretrained(folder), own_card(folder)
        address = opened.push_to_hub(repository, base_model=base_model, private=not public, readme=readme)
    elif (folder / "bank.json").is_file():
        address = AdapterBank.from_pretrained(folder).push_to_hub(repository, private=not public)
    elif (folder / "generator.json").is_file():
        address = push_generator_folder(folder, repository, private=not public)
    else:
        raise ArtifactError(f"{folder} is nothing that can be published", expected="an adapter, bank or generator")
    typer.echo(f"published {folder} as {repository}: {address}")
    typer.echo(f'next: from_pretrained("{repository}")')


def convert(
    generator: Annotated[Path, typer.Argument(help="Folder of a generator that an older lorag wrote.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
) -> None:
    """Write a generator of an older format in today's; it makes the same adapters."""
    from lorag.generator.convert import convert_generator

    method = convert_generator(generator, out)
    typer.echo(f"{out}: {method} generator in today's format")
    typer.echo(f'next: lorag generate "your description" --out my-adapter --generator {out}')
