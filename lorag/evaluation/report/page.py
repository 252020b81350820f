"""The report as one HTML file that needs nothing else: pictures inside, no scripts, no network, light and dark, narrow and wide."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from lorag.errors import printable

if TYPE_CHECKING:
    from lorag.evaluation.report.chapters import Chapter

__all__ = ["render_page"]

# Whatever the file holds, a browser fetches nothing for it and runs nothing in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_page(title: str, facts: Mapping[str, str], chapters: Sequence[Chapter], pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page; the same arguments give the same text.

    Args:
        title: Of the page.
        facts: What was evaluated: label to text.
        chapters: In their order.
        pictures: For the name of a chapter that has a figure, its PNG for light and for dark paper.
    """
    style = resources.files("lorag.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    listed = "".join(f"<dt>{_safe(key)}</dt><dd>{_safe(text)}</dd>" for key, text in facts.items())
    contents = "".join(f'<li><a href="#{_safe(one.name)}">{_safe(one.heading)}</a>: {_safe(one.question)}</li>' for one in chapters)
    body = "".join(_section(one, pictures.get(one.name)) for one in chapters)
    return (
        '<!doctype html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_safe(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_safe(title)}</h1>\n<dl class="facts">{listed}</dl>\n'
        f'<nav aria-label="Questions"><ol>{contents}</ol></nav>\n{body}</main>\n</body>\n</html>\n'
    )


def _safe(text: object) -> str:
    """Text from outside that is neither markup nor a control character."""
    return html.escape(printable(str(text)))


def _section(chapter: Chapter, pictures: tuple[bytes, bytes] | None) -> str:
    name = _safe(chapter.name)
    head = f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{_safe(chapter.heading)}</h2>\n'
    if pictures is None:
        return f'{head}<p class="absent">{_safe(chapter.question)} Left out. {_safe(chapter.answer)}</p>\n</section>\n'
    light, dark = (f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}" for picture in pictures)
    width, height = _size(pictures[0])
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" width="{width}" height="{height}" alt="{_safe(chapter.alt)}"></picture>'
    )
    return (
        f'{head}<p class="answer">{_safe(chapter.answer)}</p>\n'
        f'<figure><div class="plate" tabindex="0" role="region" aria-label="{_safe(f"Figure: {chapter.heading}")}">{picture}</div>'
        f"<figcaption>{_safe(chapter.explained)}</figcaption></figure>\n{_table(chapter)}</section>\n"
    )


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height that a PNG states in its first chunk, so that a page does not jump while it is laid out."""
    return int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")


def _table(chapter: Chapter) -> str:
    """The figure's numbers, folded away; it scrolls by itself, with the keyboard too."""
    head = "".join(f'<th scope="col">{_safe(text)}</th>' for text in chapter.head)
    rows = "".join(
        f'<tr><th scope="row">{_safe(row[0])}</th>' + "".join(f"<td>{_safe(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in chapter.rows
    )
    label = _safe(f"Numbers: {chapter.question}")
    return (
        f"<details><summary>The numbers, {len(chapter.rows)} rows</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>\n"
    )
