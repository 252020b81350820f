"""Forms that an answer can take: other words for yes and no, another case, something around it; as drawn combinations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorag.worlds.smollm2.files import read

__all__ = ["CASES", "PLAIN", "WRAPS", "Format", "answers"]

CASES: Mapping[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "upper": str.upper,
    "title": lambda text: text[:1].upper() + text[1:],
}
WRAPS: Mapping[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "json": lambda text: json.dumps({"answer": text}, ensure_ascii=False),
    "label": lambda text: f"Answer: {text}",
    "bullet": lambda text: f"- {text}",
    "quoted": lambda text: f'"{text}"',
    "brackets": lambda text: f"[{text}]",
    "parentheses": lambda text: f"({text})",
    "stop": lambda text: f"{text}.",
    "exclaim": lambda text: f"{text}!",
    "bold": lambda text: f"**{text}**",
    "tag": lambda text: f"<answer>{text}</answer>",
    "arrow": lambda text: f"-> {text}",
    "code": lambda text: f"`{text}`",
}


@dataclass(frozen=True, order=True)
class Format:
    """A form of answers, applied in this order.

    Attributes:
        words: "plain", a key of `words` in formats.yaml that has answers (of yes/no tasks), or "initial" (of labels).
        case: A key of `CASES`.
        wrap: A key of `WRAPS`.
    """

    words: str = "plain"
    case: str = "plain"
    wrap: str = "plain"

    @property
    def name(self) -> str:
        """What the names of formatted tasks end with; empty for plain answers."""
        return "+".join(part for part in (self.words, self.case, self.wrap) if part != "plain")

    def apply(self, output: str) -> str:
        """The output in this form."""
        if self.words == "initial":
            output = output[:1]
        elif self.words != "plain":
            output = answers(self.words)[("yes", "no").index(output)]
        return WRAPS[self.wrap](CASES[self.case](output))


PLAIN = Format()


def answers(words: str) -> tuple[str, str]:
    """The two answers of a yes/no task."""
    if words == "plain":
        return "yes", "no"
    yes, no = read("wordings/formats")["words"][words]["answers"]
    return yes, no
