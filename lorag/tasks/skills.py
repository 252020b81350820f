"""Skills as files: a description in front matter and instructions below it, cut into pieces that an embedder reads whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorag.errors import DescriptionError, LoragError, printable
from lorag.files.artifacts import decode_text, read_bounded
from lorag.files.markdown import plain_text, split_front, visible_text
from lorag.files.yaml_values import parse_yaml
from lorag.tasks.descriptions import MAX_DESCRIPTION, check_description

__all__ = ["Skill", "read_skill"]

_FILE = "SKILL.md"
_LARGEST = 2**20
_MOST_PIECES, _SHOWN = 128, 80
_HEAD = 120  # characters of a heading
_PIECE = 600  # bytes: with it a piece stays below the 256 tokens that small embedders read, in any script
_HEADING = re.compile(r"#{1,6}[ \t]+(.*?)[ \t#]*$")
_ITEM = re.compile(r"^[ \t]*(?:[-*+>]|\d+[.)])[ \t]+(?=\S)")
_TABLE = re.compile(r"[ \t]*\|")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class Skill:
    """What a file says of a task.

    Attributes:
        description: What the task is.
        origin: Where the description was found: "its front matter" or "its first paragraph".
        pieces: What else the file says, in its order, each of at most 600 bytes; code, comments and tables are left out.
        dropped: Pieces beyond the first 128.
        name: As its front matter has it.
    """

    description: str
    origin: str
    pieces: tuple[str, ...]
    dropped: int = 0
    name: str | None = None

    def line(self, used: Sequence[str]) -> str:
        """What of it was used, for a person, given the pieces that were."""
        shown = self.description if len(self.description) <= _SHOWN else f"{self.description[:_SHOWN]}…"
        text = f"described by {self.origin}: {printable(shown)!r}"
        if not self.pieces:
            return f"{text}; there is nothing else"
        text += f"; {len(used)} of {len(self.pieces)} other pieces are about the same and were used too"
        if used:
            text += f", such as {printable(used[0][:_SHOWN])!r}"
        return text + (f"; {self.dropped} pieces beyond the first {_MOST_PIECES} were not looked at" if self.dropped else "")


def read_skill(path: str | Path) -> Skill:
    """Reads a skill: a Markdown or text file, with YAML front matter (`name`, `description`) if it has one, or a folder with SKILL.md.

    Raises:
        ArtifactError: If it cannot be read, or is not text of at most 1 MiB.
        DescriptionError: If its front matter cannot be read, or it says nothing.
    """
    path = Path(path)
    path = path / _FILE if path.is_dir() else path
    text = decode_text(read_bounded(path, _LARGEST, named=True), path)
    front, body = split_front(text)
    if front is None and text.startswith("---\n"):
        remedy = "Close it with a line of three dashes."
        raise DescriptionError(f"{path}: the front matter does not end", got=text[4:44], expected="a line ---", remedy=remedy)
    stated = _front(front, path) if front is not None else {}
    parts = list(_pieces(body))
    described = stated.get("description", "")
    if described:
        first, *rest = _cut(plain_text(described), MAX_DESCRIPTION)
        parts, origin = [piece for part in rest for piece in _cut(part, _PIECE)] + parts, "its front matter"
    elif parts:
        first, parts, origin = parts[0], parts[1:], "its first paragraph"
    else:
        remedy = "Write what it is for into its front matter: a line `description: …` between two lines of three dashes."
        raise DescriptionError(f"{path} says nothing", got="no description and no text", remedy=remedy)
    try:
        checked = [check_description(part) for part in (first, *parts)]
    except DescriptionError as error:
        raise DescriptionError(f"{path}: {error}") from error
    kept = list(dict.fromkeys(one for one in checked[1:] if one != checked[0]))
    return Skill(checked[0], origin, tuple(kept[:_MOST_PIECES]), max(0, len(kept) - _MOST_PIECES), stated.get("name"))


def _front(text: str, path: Path) -> dict[str, str]:
    """Name and description of a front matter, whatever else stands in it."""
    try:
        values = parse_yaml(text, f"{path}: the front matter")
    except LoragError as error:
        raise DescriptionError(str(error), remedy="Put texts with a colon or special characters into quotes.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DescriptionError(f"{path}: the front matter cannot be used", got=type(values).__name__, expected="lines KEY: VALUE")
    for key in ("name", "description"):
        if values.get(key) is not None and not isinstance(values[key], str):
            raise DescriptionError(f"{path}: {key} in the front matter is not text", got=repr(values[key])[:60], expected="text")
    return {key: values[key].strip() for key in ("name", "description") if (values.get(key) or "").strip()}


def _pieces(body: str) -> Iterator[str]:
    """Paragraphs and lists in pieces, each after its heading."""
    heading = ""
    for block in re.split(r"\n\s*\n|\n(?=#{1,6}[ \t])", visible_text(body)):
        lines = block.strip().splitlines()
        match = _HEADING.match(lines[0]) if lines else None
        if match is not None:
            heading, lines = plain_text(match[1])[:_HEAD], lines[1:]
        text = plain_text(" ".join(_ITEM.sub("", line) for line in lines if not _TABLE.match(line)))
        yield from _cut(f"{heading}: {text}" if heading and text else text, _PIECE)


def _cut(text: str, most: int) -> list[str]:
    """A text in parts of at most `most` bytes, cut after sentences, else between words, else anywhere."""
    if len(text.encode()) <= most:
        return [text] if text else []
    for split in (_SENTENCE.split, str.split, list):
        units = [unit for unit in split(text) if unit]
        if len(units) > 1:
            break
    glue = "" if split is list else " "
    parts, held = [], ""
    for unit in units:
        longer = f"{held}{glue}{unit}" if held else unit
        if len(longer.encode()) > most and held:
            parts += _cut(held, most)
            held = unit
        else:
            held = longer
    return parts + _cut(held, most)
