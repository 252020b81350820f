"""How figures look: one palette in a light and a dark form, shapes beside colours, and pictures whose bytes repeat.

The palette is Okabe and Ito's (2008, "Color Universal Design"), which people with any common form of colour blindness can tell
apart. Colour never stands alone: whatever has a role of its own has a shape or a dash of its own as well.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorag.errors import MissingDependencyError, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "Mark", "Theme", "require_matplotlib", "shorten", "to_png"]

WIDTH = 7.2  # inches; at `_DPI` 1080 pixels, twice what a page on a laptop gives a figure
_DPI = 150
_LONGEST = 34


@dataclass(frozen=True)
class Mark:
    """What shows a role: the name of a theme's colour, and a marker of matplotlib's."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Theme:
    """Colours of one form of the palette.

    Attributes:
        name: "light" or "dark".
        paper: Background.
        ink: Text, and what bounds a scale.
        grey: What a result is compared with.
        line: Grid.
        blue: The generator's own result.
        red: Its controls, and what failed; Okabe and Ito's vermilion, orange on dark paper.
        green: A second result beside the first.
    """

    name: str
    paper: str
    ink: str
    grey: str
    line: str
    blue: str
    red: str
    green: str

    def colour(self, role: str) -> str:
        """The colour of a name, such as "blue"."""
        return str(getattr(self, role))


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#6a737d", "#dfe3e8", "#0072b2", "#d55e00", "#009e73")
DARK = Theme("dark", "#16191d", "#e6e9ec", "#9aa4ae", "#343a41", "#56b4e9", "#e69f00", "#00b386")


def require_matplotlib() -> None:
    """Checks that figures can be drawn, before anything is computed for them.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("a report needs matplotlib", got=str(error)[:80], remedy='pip install "lorag[report]"') from error


def shorten(text: str, most: int = _LONGEST) -> str:
    """A name as a figure can show it: in one line, its middle left out where it is long."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - most + most // 2 + 1 :]}"


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Settings that hold while a figure is drawn and saved, whatever the user's own are."""
    import matplotlib

    settings: dict[str, Any] = {
        "text.parse_math": False,  # a `$` in a task's name is a dollar
        "font.family": "DejaVu Sans",  # ships with matplotlib
        "font.size": 10,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.dpi": _DPI,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.grey,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.line,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Writing that the font lacks is drawn as boxes; the page's tables hold the same names in words.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # A backend is the user's; figures made without pyplot are drawn by Agg whichever it is.
        values: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")} | settings
        matplotlib.rcParams.update(values)
        yield


def to_png(figure: Figure) -> bytes:
    """The picture; the same figure gives the same bytes, because no date and no version is written into it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
