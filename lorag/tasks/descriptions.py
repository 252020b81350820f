"""What a description of a task may be: text that can be embedded and shown."""

from __future__ import annotations

from lorag.errors import DescriptionError

__all__ = ["MAX_DESCRIPTION", "check_description", "same_words"]

MAX_DESCRIPTION = 4096
_INVISIBLE = "\ufeff\u200b\u2060"  # byte order mark and spaces of no width, which editors and web pages leave at ends


def check_description(text: object) -> str:
    """Returns a description that can be embedded, stripped.

    Raises:
        DescriptionError: If it is not text, is empty, longer than 4,096 characters, or holds control characters or
            halves of surrogate pairs, which is how Python passes on bytes that were not UTF-8.
    """
    if not isinstance(text, str):
        raise DescriptionError("a description must be text", got=type(text).__name__, expected="str")
    stripped = text.strip().strip(_INVISIBLE).strip()
    if not stripped:
        raise DescriptionError("the description is empty", remedy='Say what the adapter should do, such as "summarise legal text".')
    if len(stripped) > MAX_DESCRIPTION:
        remedy = "Say it in a sentence, and give the rest as a file: lorag generate --file, or details=."
        got = f"{len(stripped)} characters"
        raise DescriptionError("the description is too long", got=got, expected=f"at most {MAX_DESCRIPTION}", remedy=remedy)
    if any((c < " " and c not in "\t\n\r") or c in "\x7f\ufffd" or "\ud800" <= c <= "\udfff" for c in stripped):
        raise DescriptionError("the description is not text", got=repr(stripped[:40]), remedy="Pass UTF-8 text.")
    return stripped


def same_words(text: str) -> str:
    """A description without what makes no other task of it: case, spaces and the full stop."""
    return " ".join(text.casefold().split()).rstrip(".!")
