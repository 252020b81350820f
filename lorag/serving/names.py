"""What a client asks for by the name of a model: a description, an expert of the bank, or a fusion of experts. Pure text.

Names arrive unchecked: of any length, with any characters. Nothing of a name ever becomes part of a path.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

from lorag.errors import DescriptionError, ServedNameError
from lorag.tasks.descriptions import check_description

__all__ = ["PREFIX", "DescribedTask", "Fusion", "NamedExpert", "Requested", "alias", "parse_name"]

PREFIX = "lorag:"
MAX_CHARACTERS = 1024  # of a whole name; it is kept by the server, and compared at each request
MAX_FUSED = 8
_LARGEST_WEIGHT = 10.0
_EXPERT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # as `require_name` takes it
_WEIGHT = re.compile(r"[0-9]{0,2}(\.[0-9]{1,6})?")
_JOINERS = "\u200c\u200d"  # invisible, yet part of words in Persian, Hindi and others
_FORMS = f"{PREFIX}DESCRIPTION, {PREFIX}expert/NAME or {PREFIX}fuse/NAME=WEIGHT,NAME=WEIGHT"


@dataclass(frozen=True)
class DescribedTask:
    """The adapter that is generated for a description."""

    description: str

    @property
    def canonical(self) -> str:
        """The same text for all spellings of one request."""
        return f"describe {self.description}"


@dataclass(frozen=True)
class NamedExpert:
    """An expert of the bank."""

    name: str

    @property
    def canonical(self) -> str:
        """The same text for all spellings of one request."""
        return f"expert {self.name}"


@dataclass(frozen=True)
class Fusion:
    """The sum of experts' ΔW, each times a weight; sorted by name."""

    weights: tuple[tuple[str, float], ...]

    @property
    def canonical(self) -> str:
        """The same text for all spellings of one request."""
        return "fuse " + ",".join(f"{name}={weight:.6f}" for name, weight in self.weights)


Requested = DescribedTask | NamedExpert | Fusion


def alias(name: str) -> str:
    """A name that stands for another one where it would be seen by others: in logs, metrics and lists of models."""
    return f"{PREFIX}#{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def parse_name(name: str) -> Requested | None:
    """Reads the name of a model as a request for an adapter.

    Args:
        name: As it came from a client.

    Returns:
        What is asked for, or None if the name does not start with `lorag:` and so is not for lorag to answer.

    Raises:
        ServedNameError: If it cannot be used.
    """
    if not name.startswith(PREFIX):
        return None
    if len(name) > MAX_CHARACTERS:
        raise ServedNameError("the model's name is too long", got=f"{len(name)} characters", expected=f"at most {MAX_CHARACTERS}")
    strange = next((c for c in name if not (c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs")), None)
    if strange is not None:
        raise ServedNameError("the model's name holds a character that cannot be used", got=f"U+{ord(strange):04X}", expected="plain text")
    rest = " ".join(unicodedata.normalize("NFC", name[len(PREFIX) :]).split())
    if rest.startswith("#"):
        raise ServedNameError("this name only stands for another one", got=name[:40], remedy="Ask by the description, expert or fusion.")
    if rest.startswith("expert/"):
        return NamedExpert(_expert(rest.removeprefix("expert/")))
    if rest.startswith("fuse/"):
        return _fusion(rest.removeprefix("fuse/"))
    try:
        return DescribedTask(check_description(rest))
    except DescriptionError as error:
        raise ServedNameError(str(error)) from error


def _expert(text: str) -> str:
    if _EXPERT.fullmatch(text) is None:
        raise ServedNameError("an expert's name cannot be used", got=repr(text)[:80], expected="1 to 64 of a-z, 0-9, _ and -")
    return text


def _fusion(text: str) -> Fusion:
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or _WEIGHT.fullmatch(value) is None or not 0 < float(value) <= _LARGEST_WEIGHT:
            raise ServedNameError(
                "a fusion cannot be read", got=repr(part)[:80], expected=f"NAME=WEIGHT, above 0 and at most {_LARGEST_WEIGHT:g}"
            )
        if _expert(name) in weights:
            raise ServedNameError("a fusion names an expert twice", got=name)
        weights[name] = float(value)
    if not 2 <= len(weights) <= MAX_FUSED:
        raise ServedNameError(
            "a fusion cannot be used", got=f"{len(weights)} experts", expected=f"2 to {MAX_FUSED}", remedy=f"The forms are {_FORMS}."
        )
    return Fusion(tuple(sorted(weights.items())))
