"""The report as one HTML file that needs nothing else: pictures inside, no scripts, no network, light and dark, narrow and wide."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from lorag.errors import printable
from lorag.files.templates import Markup, render

if TYPE_CHECKING:
    from lorag.evaluation.report.chapters import Chapter

__all__ = ["render_page"]

# Whatever the file holds, a browser fetches nothing for it and runs nothing in it.
_POLICY = Markup("default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'")


def render_page(title: str, facts: Mapping[str, str], chapters: Sequence[Chapter], pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page; the same arguments give the same text.

    Args:
        title: Of the page.
        facts: What was evaluated: label to text.
        chapters: In their order.
        pictures: For the name of a chapter that has a figure, its PNG for light and for dark paper.
    """
    style = resources.files("lorag.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    return render(
        "lorag.evaluation.report",
        "page.html",
        _safe,
        policy=_POLICY,
        style=Markup(style),  # noqa: S704 - the package's own file
        title=title,
        facts=facts,
        chapters=chapters,
        pictures={name: _picture(*pair) for name, pair in pictures.items()},
    )


def _safe(text: str) -> str:
    """Text from outside that is neither markup nor a control character."""
    return html.escape(printable(text))


def _picture(light: bytes, dark: bytes) -> dict[str, object]:
    """Both papers' PNG as data, and the width and height that a PNG states first, so that a page does not jump while it is laid out."""
    data = {name: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for name, png in (("light", light), ("dark", dark))}
    return data | {"width": int.from_bytes(light[16:20], "big"), "height": int.from_bytes(light[20:24], "big")}
