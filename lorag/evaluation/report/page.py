"""Write a report: a picture for each chapter that has a figure, then one HTML file that holds them all and needs nothing else.

The page has its pictures inside, no scripts and no network; it reads well in light and in dark, narrow and wide.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.errors import printable
from lorag.evaluation.report.chapters import write_chapters
from lorag.evaluation.report.style import DARK, LIGHT, drawing, require_matplotlib, to_png
from lorag.files.atomic import write_bytes
from lorag.files.templates import Markup, render

if TYPE_CHECKING:
    from lorag.evaluation.report.chapters import Chapter
    from lorag.evaluation.report.findings import Findings

__all__ = ["PAGE", "render_page", "write_report"]

PAGE = "report.html"

# Whatever the file holds, a browser fetches nothing for it and runs nothing in it.
_POLICY = Markup("default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'")


def write_report(folder: str | Path, findings: Findings) -> Path:
    """Draws all figures and writes `CHAPTER.png`, for light paper, and `report.html`, which needs none of them.

    The same findings give the same bytes. The page comes last; each file is written whole or not at all, and the picture of a
    chapter that has nothing to show any more is removed.

    Args:
        folder: Where it is written; other files in it are left alone.
        findings: What to show.

    Returns:
        The page's path.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        StorageError: If a file cannot be written.
    """
    require_matplotlib()
    folder, chapters = Path(folder), write_chapters(findings)
    pictures: dict[str, tuple[bytes, bytes]] = {}
    for chapter in chapters:
        if chapter.draw is None:
            (folder / f"{chapter.name}.png").unlink(missing_ok=True)
            continue
        drawn = []
        for theme in (LIGHT, DARK):
            with drawing(theme):
                drawn.append(to_png(chapter.draw(theme)))
        pictures[chapter.name] = (drawn[0], drawn[1])
        write_bytes(folder / f"{chapter.name}.png", drawn[0])
    title = f"{findings.subject}: from descriptions to adapters, measured"
    write_bytes(folder / PAGE, render_page(title, findings.facts, chapters, pictures).encode())
    return folder / PAGE


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
