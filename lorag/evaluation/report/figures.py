"""The figures of a report: findings in, a figure of matplotlib's out. Each is titled by the question that it answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorag.evaluation.report.style import WIDTH, Mark, Theme, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lorag.evaluation.report.findings import Curves, Distances, MethodScore, Norms, Pairs, Selective, Tasks
    from lorag.generator.calibration import RiskCoverage

__all__ = ["BAD", "GOOD", "draw_curves", "draw_distances", "draw_ladder", "draw_map", "draw_norms", "draw_pairs", "draw_selective"]

ROLES = {
    "bound": Mark("ink", "D"),
    "baseline": Mark("grey", "s"),
    "generator": Mark("blue", "o"),
    "control": Mark("red", "v"),
}
_ROLE_NAMES = {"bound": "base and oracle", "baseline": "baseline", "generator": "generator", "control": "generator's control"}
GOOD, BAD = 0.8, 0.4  # shares of the gap that count as nearly closed, and as hardly
_COLUMNS = 2
_MOST_PANELS = 6
_DOT = 42.0


def _figure(theme: Theme, title: str, height: float, panels: int = 1, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A titled figure with panels side by side, at most `_COLUMNS` in a row; `height` is a row's, in inches."""
    from matplotlib.figure import Figure

    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.45), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=theme.ink)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    axes = [one for row in grid for one in row]
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a scale: 0 to 1 for shares, whatever the values are; where they are not shares, just beyond them."""
    low, high = min(0.0, *values), max(values)
    high = 1.0 if low == 0 and high <= 1 else high
    edge = 0.04 * (high - low or 1.0)
    return low - edge, high + edge


def draw_ladder(theme: Theme, title: str, methods: Sequence[MethodScore], metric: str, note: str) -> Figure:
    """A row for each method: its score with the 95 % interval over tasks, in numbers at the right."""
    figure, (axes,) = _figure(theme, title, 0.31 * len(methods) + 1.1)
    for row, method in enumerate(methods):
        mark = ROLES[method.role]
        colour = theme.colour(mark.colour)
        axes.plot([method.low, method.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(method.score, row, mark.marker, color=colour, markersize=7)
        gap = "" if method.gap is None else f"{method.gap:10.3f}"
        axes.annotate(
            f"{method.score:.3f}{gap}", (1.0, row), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
            va="center", family="DejaVu Sans Mono", fontsize=9,
        )  # fmt: skip
    heading = "score" if all(method.gap is None for method in methods) else "score gap closed"
    axes.annotate(
        heading, (1.0, 1.0), xycoords="axes fraction", xytext=(8, 4), textcoords="offset points", family="DejaVu Sans Mono", fontsize=9
    )
    axes.set_yticks(range(len(methods)), [shorten(method.name) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlim(_limits([end for method in methods for end in (method.low, method.high)]))
    axes.set_xlabel(f"{metric}, mean over tasks with 95 % interval ({note})")
    axes.grid(axis="y", visible=False)
    for role in dict.fromkeys(method.role for method in methods):
        axes.plot([], [], ROLES[role].marker, color=theme.colour(ROLES[role].colour), markersize=7, label=_ROLE_NAMES[role])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4, handletextpad=0.2, columnspacing=1.4)
    return figure


def draw_pairs(theme: Theme, title: str, pairs: Sequence[Pairs], metric: str, note: str) -> Figure:
    """A panel for each generator, a mark for each pair of scores, larger where more tasks have it; below the line matched is better."""
    shown = pairs[:_MOST_PANELS]
    figure, panels = _figure(theme, title, 3.7 if len(shown) > 1 else 4.6, len(shown), share=True)
    low, high = _limits([value for one in shown for value in (*one.matched, *one.shuffled)])
    between = "\n" if len(shown) > 1 else " "  # half as wide
    for axes, one in zip(panels, shown, strict=True):
        axes.plot([low, high], [low, high], "--", color=theme.grey, linewidth=1.2, zorder=1)
        # One colour and shape per side of the line, so that the two are told apart without measuring.
        for better, role, label in ((True, "generator", "own is better"), (False, "control", "not better")):
            counts = Counter((m, s) for m, s in zip(one.matched, one.shuffled, strict=True) if (m > s) == better)
            if counts:
                xs, ys = zip(*counts, strict=True)
                axes.scatter(
                    xs, ys, s=[_DOT * count**0.8 for count in counts.values()], marker=ROLES[role].marker, alpha=0.6,
                    facecolor=theme.colour(ROLES[role].colour), edgecolor=theme.paper, linewidth=0.8,
                    label=f"{label}: {counts.total()} tasks", clip_on=False, zorder=2,
                )  # fmt: skip
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_title(f"{shorten(one.method)}:{between}{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})", fontsize=10)
        axes.annotate(
            "no difference", (high, high), xytext=(-60, -46), textcoords="offset points", color=theme.grey, fontsize=8, rotation=45
        )
        for handle in axes.legend(loc="upper left", handletextpad=0.2, borderaxespad=0.1).legend_handles:
            handle.set_sizes([_DOT])  # type: ignore[union-attr]
        axes.set_xlabel(f"{metric}{between}with its own description ({note})")
    panels[0].set_ylabel(f"{metric} with another task's")
    return figure


def draw_distances(theme: Theme, title: str, distances: Distances, note: str) -> Figure:
    """A dot for each task; a square with its interval for each group of tasks of like distance."""
    figure, (axes,) = _figure(theme, title, 3.7)
    axes.scatter(
        distances.distance,
        distances.gap_closed,
        s=_DOT,
        marker="o",
        facecolor=theme.blue,
        edgecolor=theme.paper,
        alpha=0.55,
        label="a task",
        clip_on=False,
    )
    if len(distances.bins) > 1:
        far, mean, low, high = zip(*distances.bins, strict=True)
        errors = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        label = f"mean of about {len(distances.gap_closed) / len(distances.bins):.0f} tasks, 95 % interval"
        axes.errorbar(
            far,
            mean,
            errors,
            fmt="s-",
            color=theme.red,
            ecolor=theme.red,
            elinewidth=2,
            capsize=4,
            markersize=8,
            linewidth=1.2,
            label=label,
        )
    axes.set_ylim(min(-0.05, *distances.gap_closed) - 0.02, 1.06)
    axes.set_xlabel(f"distance: 1 − cosine to the nearest expert's descriptions ({note})")
    axes.set_ylabel("share of the gap closed")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, handletextpad=0.4)
    return figure


def draw_map(theme: Theme, title: str, tasks: Tasks, note: str) -> Figure:
    """Small rings for the bank's tasks; the evaluated ones filled, by how much of the gap was closed."""
    figure, (axes,) = _figure(theme, title, 4.6)
    xs, ys = zip(*tasks.experts, strict=True)
    axes.scatter(xs, ys, s=16, marker="o", facecolor="none", edgecolor=theme.grey, linewidth=0.9, alpha=0.8, label=f"expert ({len(xs)})")
    kinds = (
        (f"at least {GOOD:.0%} closed", "blue", "o", GOOD, math.inf),
        ("between", "green", "^", BAD, GOOD),
        (f"less than {BAD:.0%}", "red", "X", -math.inf, BAD),
        ("not known", "ink", "P", math.nan, math.nan),
    )
    for label, colour, marker, low, high in kinds:
        rows = zip(tasks.points, tasks.gap_closed, strict=True)
        inside = [point for point, closed in rows if (math.isnan(low) if closed is None else low <= closed < high)]
        if inside:
            xs, ys = zip(*inside, strict=True)
            axes.scatter(
                xs, ys, s=_DOT * 1.2, marker=marker, facecolor=theme.colour(colour), edgecolor=theme.paper, linewidth=0.8,
                label=f"{label} ({len(inside)})",
            )  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"first principal direction of the descriptions ({note})")
    axes.set_ylabel("second principal direction")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=5, handletextpad=0.1, columnspacing=1.0)
    return figure


def draw_selective(theme: Theme, title: str, selective: Selective) -> Figure:
    """Two panels: the evaluated tasks, and these among descriptions that the bank cannot serve."""
    figure, panels = _figure(theme, title, 3.7, 2, share=True)
    parts: tuple[tuple[str, RiskCoverage, RiskCoverage], ...] = (
        (f"Held-out tasks (n = {selective.tasks})", selective.held_out, selective.held_out_best),
        (f"With {selective.unknown} that no bank serves", selective.with_unknown, selective.with_unknown_best),
    )
    for axes, (label, gate, best) in zip(panels, parts, strict=True):
        axes.axhline(gate.risk[-1], color=theme.grey, linestyle=":", linewidth=1.8, label="any order, on average")
        axes.plot(best.coverage, best.risk, color=theme.green, linestyle="--", linewidth=1.8, label="the best order there is")
        axes.plot(gate.coverage, gate.risk, color=theme.blue, linewidth=2.4, label="the gate's order")
        axes.set_title(label, fontsize=10)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, max(0.2, *selective.with_unknown.risk, *selective.held_out.risk) + 0.05))
        axes.set_xlabel("coverage: share served")
    panels[0].set_ylabel("risk: share of the gap left open")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def draw_norms(theme: Theme, title: str, norms: Norms) -> Figure:
    """A row for each module: where the norms of generated adapters lie beside those of the bank's experts."""
    figure, (axes,) = _figure(theme, title, 0.34 * len(norms.modules) + 1.0)
    rows = (
        ("experts", norms.experts, norms.real, "grey", "s", -0.16),
        ("generated adapters", norms.adapters, norms.generated, "blue", "o", 0.16),
    )
    for name, count, values, colour, marker, shift in rows:
        for row, (low, middle, high) in enumerate(values):
            axes.plot([low, high], [row + shift] * 2, color=theme.colour(colour), linewidth=2.4, solid_capstyle="butt")
            axes.plot(middle, row + shift, marker, color=theme.colour(colour), markersize=6)
        axes.plot([], [], f"{marker}-", color=theme.colour(colour), markersize=6, label=f"{count} {name}")
    axes.set_yticks(range(len(norms.modules)), [shorten(module) for module in norms.modules])
    axes.set_ylim(len(norms.modules) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    kind = "root mean square over the modules of a kind; " if norms.grouped else ""
    axes.set_xlabel(f"‖ΔW‖ of a module (Frobenius; {kind}median, 5th to 95th percentile)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def draw_curves(theme: Theme, title: str, curves: Curves) -> Figure:
    """A panel for each stage of training."""
    shown = curves.stages[:_MOST_PANELS]
    figure, panels = _figure(theme, title, 3.0, len(shown))
    for axes, stage in zip(panels, shown, strict=True):
        axes.plot(stage.steps, stage.loss, "o-", color=theme.grey, markersize=3, linewidth=1.4, label="training loss, of one batch")
        axes.plot(
            stage.validated, stage.validation, "s-", color=theme.blue, markersize=4, linewidth=1.8, label="validation, held-out experts"
        )
        values = [value for value in (*stage.loss, *stage.validation) if value > 0]
        if len(values) == len(stage.loss) + len(stage.validation) and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(f"Stage “{shorten(stage.name, 24)}”", fontsize=10)
        axes.set_xlabel("optimizer steps")
    panels[0].set_ylabel("loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure
