"""Markdown as text: its front matter apart, without comments, code and marks."""

from __future__ import annotations

import re

__all__ = ["plain_text", "split_front", "visible_text"]

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n|)---[ \t]*(?:\n|\Z)", re.S)


def split_front(text: str) -> tuple[str | None, str]:
    """The YAML between two lines of dashes at the start of a text, and the rest; None where there is none."""
    front = _FRONT.match(text)
    return (None, text) if front is None else (front[1], text[front.end() :])


def visible_text(text: str) -> str:
    """Text without comments, scripts, details and blocks of code; what is opened and never closed hides the rest, as in a browser."""
    for start, end in (("<!--", "-->"), ("<script", "</script>"), ("<style", "</style>"), ("<details", "</details>")):
        first, *others = text.split(start)
        text = "\n".join([first, *(other.partition(end)[2] for other in others)])
    shown, fence = [], ""
    for line in text.splitlines():
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and mark == (fence or mark):
            fence = "" if fence else mark
        elif not fence:
            shown.append(line)
    return "\n".join(shown)


def plain_text(text: str) -> str:
    """Text in one line without marks: links keep their words, emphasis and code their content."""
    text = re.sub(r"!\[[^\]]{0,200}\]\([^)]{0,500}\)|<[^<>]{1,200}>", " ", text)
    text = re.sub(r"\[([^\[\]]{0,200})\](\([^()]{0,500}\)|\[[^\[\]]{0,200}\])", r"\1", text)
    text = re.sub(r"(\*\*|__|\*|`)(\S(?:[^*_`]{0,200}\S)?)\1", r"\2", text)
    return " ".join(text.split())
