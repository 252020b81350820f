"""What the page shows of results: what stands in `fragments.html`, which escapes everything from outside."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorag.files.templates import render

if TYPE_CHECKING:
    from lorag.web.requests import Answers, Preview, Request, Result

__all__ = ["draw_answers", "draw_map", "draw_message", "draw_neighbours", "draw_results", "draw_verdict"]

_WIDE, _HIGH, _EDGE = 480, 320, 24
_MOST_DOTS = 2000
_LONGEST_LABEL = 48


def _safe(text: str) -> str:
    """Text that is not markup, nor anything to the page's own templates, which replace ${...} and {{...}}."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;").replace("`", "&#96;")


def _draw(kind: str, **values: object) -> str:
    return render("lorag.web", "fragments.html", _safe, kind=kind, **values)


def draw_message(text: str, kind: str = "note") -> str:
    """A sentence on how it went; kind "error" is announced at once by screen readers, "note" in its turn."""
    return _draw("message", text=text, tone=kind)


def draw_neighbours(preview: Preview) -> str:
    """The nearest experts as bars; the number is the cosine between descriptions."""
    return _draw("neighbours", neighbours=preview.neighbours)


def draw_map(preview: Preview) -> str:
    """The map of tasks: a dot for each, named when pointed at; filled ones are the nearest experts, the cross is the description."""
    tasks = preview.tasks
    points = [(float(x), float(y)) for x, y in tasks.points.tolist()]
    xs, ys = zip(*points, preview.place, strict=True)
    low_x, low_y = min(xs), min(ys)
    span_x, span_y = (max(xs) - low_x) or 1.0, (max(ys) - low_y) or 1.0

    def at(x: float, y: float, name: str, kind: str) -> dict[str, object]:
        return {
            "x": _EDGE + (x - low_x) / span_x * (_WIDE - 2 * _EDGE),
            "y": _HIGH - _EDGE - (y - low_y) / span_y * (_HIGH - 2 * _EDGE),
            "name": name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…",
            "kind": kind,
        }

    near = {name for name, _ in preview.neighbours}
    step = -(-len(points) // _MOST_DOTS)
    shown = [i for i in range(len(points)) if i % step == 0 or tasks.names[i] in near]
    shown.sort(key=lambda i: tasks.names[i] in near)  # the nearest lie on top
    return _draw(
        "map",
        wide=_WIDE,
        high=_HIGH,
        dots=[at(*points[i], tasks.names[i], "near" if tasks.names[i] in near else "far") for i in shown],
        here=at(*preview.place, "your description", "here"),
        total=len(points),
        shown=f"{len(shown)} of {len(points)}" if len(shown) < len(points) else f"{len(points)}",
        kept=tasks.kept,
    )


def draw_verdict(gate: Mapping[str, Any], cosine: float) -> str:
    """Decision, novelty and expected gap closed, as far as the generator estimates them.

    Args:
        gate: As `adapter.info["gate"]` holds it.
        cosine: To the nearest expert.
    """
    novelty = f"not estimated; 1 - the best cosine is {1 - cosine:.2f}"
    if gate["novelty"] is not None:
        novelty = f"{gate['novelty']:.2f}: the estimated probability that no task of the bank is of its kind"
    expected, interval = _share(gate["expected_gap_closed"]), gate["expected_gap_closed_interval"]
    if gate["expected_gap_closed"] is not None:
        expected += " of the way from the base model to an expert"
        expected += "" if interval is None else f"; between {interval[0]:.0%} and {interval[1]:.0%} for 9 of 10 tasks"
    decision = f"{gate.get('served') or gate['decision']}: {gate['reason']}"
    return _draw("facts", facts=[("Decision", decision), ("Novelty", novelty), ("Expected gap closed", expected)])


def draw_results(results: Sequence[Result], request: Request) -> str:
    """The adapters of a request, one per row, so that generators and samples can be compared."""
    rows = []
    for one in results:
        gate, info = one.adapter.info["gate"], one.adapter.info
        novelty = "not estimated" if gate["novelty"] is None else f"{gate['novelty']:.2f}"
        what = f"same as {one.repeats}" if one.repeats else gate["served"]
        expected = _share(gate["expected_gap_closed"])
        rows.append((one.label, what, f"{one.adapter.rank}", f"{info['norm']:.2f}", novelty, expected, f"{one.seconds:.2f} s"))
    head = ("Adapter", "What", "Rank", "Norm of ΔW", "Novelty", "Expected gap closed", "Took")
    return _draw("table", name="made", head=head, rows=rows, title=f"Adapters for “{' '.join(request.description.split())[:120]}”")


def draw_answers(answers: Answers) -> str:
    """Inputs, and the base model's answers beside the adapted ones."""
    rows = [(text, *(column[number] for _, column in answers.columns)) for number, text in enumerate(answers.inputs)]
    head = ("Input", *(label for label, _ in answers.columns))
    return _draw("table", name="answers", head=head, rows=rows, title="What do the base model and the adapters make of your inputs?")


def _share(value: float | None) -> str:
    return "not estimated" if value is None else f"{value:.0%}"
