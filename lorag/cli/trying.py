"""The command that tries an adapter on a few texts: answers side by side on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorag.cli.options import Device, Dtype

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.evaluation.side_by_side import Answers

__all__ = ["register"]

_TITLES = {"base": "base model", "prompted": "description in its prompt", "adapter": "adapter", "random": "random adapter"}


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("try")(try_adapter)


def try_adapter(
    adapter: Annotated[
        str,
        typer.Argument(help="Adapter folder, file or hub id; or a description of several words, which is generated."),
    ],
    texts: Annotated[list[str], typer.Argument(help="What to ask.")],
    base: Annotated[bool, typer.Option("--base/--no-base", help="Also the bare base model.")] = True,
    prompted: Annotated[
        bool | None,
        typer.Option("--prompted/--no-prompted", help="Also the base model with the description in its prompt; done if one is known."),
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", help="Also a random adapter of the same norms, and whether yours changes more than such ones do.")
    ] = False,
    description: Annotated[str | None, typer.Option(help="What the adapter is for, if its files do not say it.")] = None,
    generator: Annotated[str | None, typer.Option(help="Of a described adapter: name, folder or hub id.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="Base model, if not the one that the adapter names.")] = None,
    kind: Annotated[str | None, typer.Option(help="Base model's kind: causal_lm or seq2seq_lm.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Most tokens of an answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of random adapters, and of methods that sample.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer texts with the base model, with the description in its prompt, and with an adapter, side by side."""
    from lorag.errors import ConfigError
    from lorag.evaluation.side_by_side import open_for, side_by_side

    opened, template, said = _open(adapter, generator, seed, base_model, kind)
    said = description or said
    if prompted and said is None:
        raise ConfigError(f"nothing says what {adapter} is for", remedy='Give --description "…", or leave --prompted out.')
    runner, fitted = open_for(opened, base_model=base_model, kind=kind, chat_template=template, device=device, dtype=dtype)
    chosen = None if prompted is False else said
    compared = side_by_side(runner, fitted, texts, description=chosen, base=base, null=null, seed=seed, max_new_tokens=tokens)
    if sys.stdout.isatty():
        _print_table(compared)
    else:
        typer.echo("\n".join(_lines(compared)))
    if compared.effect is not None:
        typer.echo(compared.effect.line())


def _open(
    place: str, generator: str | None, seed: int, base_model: str | None, kind: str | None
) -> tuple[LoraAdapter, str | None, str | None]:
    """The adapter, the chat template beside it, and what it is for; several words that name no folder are a description."""
    from lorag.adapters.adapter import LoraAdapter
    from lorag.adapters.formats import named_base, peft_folder
    from lorag.adapters.purpose import find_purpose
    from lorag.adapters.reading import CHAT_FILES, own_chat_template
    from lorag.errors import DescriptionError, UndescribedError
    from lorag.generator.generate import generate_lora

    if len(place.split()) > 1 and not Path(place).exists():
        adapter = generate_lora(place, generator=generator, seed=seed)
        return adapter, None, str(adapter.info["description"])
    if generator is not None:
        raise typer.BadParameter("--generator is for an adapter that is described by several words")
    folder = peft_folder(place, named_base(base_model, kind), more=CHAT_FILES)
    opened = LoraAdapter.from_pretrained(folder, repair=True)
    try:
        said = find_purpose(folder, opened.info).descriptions[0]
    except (UndescribedError, DescriptionError):
        said = None
    return opened, own_chat_template(folder), said


def _lines(compared: Answers) -> list[str]:
    """One line per answer, for pipes."""
    from lorag.errors import printable

    lines = []
    for place, text in enumerate(compared.texts):
        lines.append(f"text: {printable(text)}")
        lines += [f"{name}: {printable(answers[place])}" for name, answers in compared.columns.items()]
    return lines


def _print_table(compared: Answers) -> None:
    """A row per text and a column per answer; what a model writes may hold control characters, which a terminal must not obey."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lorag.errors import printable

    def shown(text: str) -> Text:
        return Text("\n".join(printable(line) for line in text.splitlines()))

    table = Table(show_lines=True)
    for title in ("text", *(_TITLES[name] for name in compared.columns)):
        table.add_column(title, overflow="fold")
    for place, text in enumerate(compared.texts):
        table.add_row(shown(text), *(shown(answers[place]) for answers in compared.columns.values()))
    Console(highlight=False).print(table)
