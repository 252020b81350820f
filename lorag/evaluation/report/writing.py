"""Write a report: a picture for each chapter that has a figure, then the page that holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorag.evaluation.report.chapters import write_chapters
from lorag.evaluation.report.page import render_page
from lorag.evaluation.report.style import DARK, LIGHT, drawing, require_matplotlib, to_png
from lorag.files.atomic import write_bytes

if TYPE_CHECKING:
    from lorag.evaluation.report.findings import Findings

__all__ = ["PAGE", "write_report"]

PAGE = "report.html"


def write_report(folder: str | Path, found: Findings) -> Path:
    """Draws all figures and writes `CHAPTER.png`, for light paper, and `report.html`, which needs none of them.

    The same findings give the same bytes. The page comes last; each file is written whole or not at all, and the picture of a
    chapter that has nothing to show any more is removed.

    Args:
        folder: Where it is written; other files in it are left alone.
        found: What to show.

    Returns:
        The page's path.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        StorageError: If a file cannot be written.
    """
    require_matplotlib()
    folder, chapters = Path(folder), write_chapters(found)
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
    title = f"{found.subject}: from descriptions to adapters, measured"
    write_bytes(folder / PAGE, render_page(title, found.facts, chapters, pictures).encode())
    return folder / PAGE
