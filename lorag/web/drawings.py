"""What the page shows of results, as HTML and SVG: no scripts, colours from the page's theme, everything from outside escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorag.web.orders import Answers, Made, Order, Outlook

__all__ = ["draw_answers", "draw_made", "draw_map", "draw_message", "draw_neighbours", "draw_verdict"]

_WIDE, _HIGH, _EDGE = 480, 320, 24
_MOST_DOTS = 2000
_LONGEST_LABEL = 48


def _safe(text: object) -> str:
    """Text that is no markup, nor anything to the page's own templates, which replace ${...} and {{...}}."""
    return html.escape(str(text)).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;").replace("`", "&#96;")


def draw_message(text: str, kind: str = "note") -> str:
    """A sentence on how it went; kind "error" is announced at once by screen readers, "note" in its turn."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="lorag-message lorag-{_safe(kind)}" role="{role}">{_safe(text)}</p>'


def draw_neighbours(outlook: Outlook) -> str:
    """The nearest experts as bars; the number is the cosine between descriptions."""
    rows = []
    for name, cosine in outlook.neighbours:
        width = max(0.0, min(1.0, cosine)) * 100
        bar = f'<span class="lorag-bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
        rows.append(
            f'<tr><th scope="row">{_safe(name)}</th><td class="lorag-wide">{bar}</td><td class="lorag-number">{cosine:.2f}</td></tr>'
        )
    caption = "Nearest experts: how alike are their descriptions? (cosine, 1 is the same)"
    return f'<table class="lorag-table"><caption>{caption}</caption><tbody>{"".join(rows)}</tbody></table>'


def draw_map(outlook: Outlook) -> str:
    """The map of tasks: a dot for each, named when pointed at; filled ones are the nearest experts, the cross is the description."""
    tasks = outlook.tasks
    points = [(float(x), float(y)) for x, y in tasks.points.tolist()]
    xs, ys = zip(*points, outlook.place, strict=True)
    low_x, low_y = min(xs), min(ys)
    span_x, span_y = (max(xs) - low_x) or 1.0, (max(ys) - low_y) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return _EDGE + (x - low_x) / span_x * (_WIDE - 2 * _EDGE), _HIGH - _EDGE - (y - low_y) / span_y * (_HIGH - 2 * _EDGE)

    near = {name for name, _ in outlook.neighbours}
    step = -(-len(points) // _MOST_DOTS)
    shown = [i for i in range(len(points)) if i % step == 0 or tasks.names[i] in near]
    shown.sort(key=lambda i: tasks.names[i] in near)  # the nearest lie on top
    dots = [_dot(*at(*points[i]), tasks.names[i], "near" if tasks.names[i] in near else "far") for i in shown]
    x, y = at(*outlook.place)
    cross = f'<path d="M{x - 9:.1f} {y:.1f}h18M{x:.1f} {y - 9:.1f}v18"/>'
    here = f'<g class="lorag-here">{cross}{_label(x, y, "your description")}</g>'
    count = f"{len(shown)} of {len(points)}" if len(shown) < len(points) else f"{len(points)}"
    caption = (
        f"Where does your description fall among the bank's tasks? Dots: {count} tasks, filled ones the nearest experts; cross: your "
        f"description. Two principal directions of the embeddings, which hold {tasks.kept:.0%} of their variance."
    )
    title = f"Map of {len(points)} tasks; the table of the nearest experts holds the same in words"
    return (
        f'<figure class="lorag-map"><svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{_safe(title)}">'
        f"{''.join(dots)}{here}</svg><figcaption>{_safe(caption)}</figcaption></figure>"
    )


def _dot(x: float, y: float, name: str, kind: str) -> str:
    return f'<g class="lorag-dot lorag-{kind}"><circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>{_label(x, y, name)}</g>'


def _label(x: float, y: float, text: str) -> str:
    """A name beside a point, on the side where there is room."""
    anchor, shift = ("end", -10) if x > _WIDE / 2 else ("start", 10)
    short = text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"
    return f'<text x="{x + shift:.1f}" y="{max(14.0, y - 8):.1f}" text-anchor="{anchor}">{_safe(short)}</text>'


def draw_verdict(gate: Mapping[str, Any], cosine: float) -> str:
    """Decision, novelty and expected gap closed, as far as the generator estimates them.

    Args:
        gate: As `adapter.info["gate"]` holds it.
        cosine: To the nearest expert.
    """
    rows = [("Decision", f"{gate.get('served') or gate['decision']}: {gate['reason']}")]
    if gate["novelty"] is None:
        rows.append(("Novelty", f"not estimated; 1 - the best cosine is {1 - cosine:.2f}"))
    else:
        rows.append(("Novelty", f"{gate['novelty']:.2f}: the estimated probability that no task of the bank is of its kind"))
    if gate["expected_gap_closed"] is None:
        rows.append(("Expected gap closed", "not estimated"))
    else:
        rows.append(
            ("Expected gap closed", f"{gate['expected_gap_closed']:.0%} of the way from the base model to an expert{_between(gate)}")
        )
    return f'<dl class="lorag-facts">{"".join(f"<dt>{key}</dt><dd>{_safe(text)}</dd>" for key, text in rows)}</dl>'


def _between(gate: Mapping[str, Any]) -> str:
    interval = gate["expected_gap_closed_interval"]
    return "" if interval is None else f"; between {interval[0]:.0%} and {interval[1]:.0%} for 9 of 10 tasks"


def draw_made(made: Sequence[Made], order: Order) -> str:
    """The adapters of an order, one a row, so that generators and samples can be compared."""
    body = []
    for one in made:
        info = one.adapter.info
        gate = info["gate"]
        novelty = "not estimated" if gate["novelty"] is None else f"{gate['novelty']:.2f}"
        gain = "not estimated" if gate["expected_gap_closed"] is None else f"{gate['expected_gap_closed']:.0%}"
        what = f"same as {one.repeats}" if one.repeats else gate["served"]
        values = (what, one.adapter.rank, f"{info['norm']:.2f}", novelty, gain, f"{one.seconds:.2f} s")
        body.append(f'<tr><th scope="row">{_safe(one.label)}</th>' + "".join(f"<td>{_safe(value)}</td>" for value in values) + "</tr>")
    named = ("Adapter", "What", "Rank", "Norm of ΔW", "Novelty", "Expected gap closed", "Took")
    head = "".join(f'<th scope="col">{name}</th>' for name in named)
    return _scrolling("lorag-made", head, body, f"Adapters for “{_safe(' '.join(order.description.split())[:120])}”")


def draw_answers(answers: Answers) -> str:
    """Inputs, and the base model's answers beside the adapted ones."""
    head = '<th scope="col">Input</th>' + "".join(f'<th scope="col">{_safe(label)}</th>' for label, _ in answers.columns)
    body = []
    for number, text in enumerate(answers.inputs):
        cells = "".join(f"<td>{_safe(column[number]) or '<em>nothing</em>'}</td>" for _, column in answers.columns)
        body.append(f'<tr><th scope="row">{_safe(text)}</th>{cells}</tr>')
    return _scrolling("lorag-answers", head, body, "What do the base model and the adapters make of your inputs?")


def _scrolling(kind: str, head: str, body: Sequence[str], title: str) -> str:
    """A table under its title, which scrolls by itself on a narrow screen, with the keyboard too."""
    table = f'<table class="lorag-table {kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<p class="lorag-title">{title}</p><div class="lorag-scroll" tabindex="0" role="region" aria-label="{title}">{table}</div>'
