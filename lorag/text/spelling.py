"""Mistyped words of a description, led back to words of the descriptions that a generator learned from.

A text embedder pieces a word together that it does not know, and what it makes of `sumarise` is far from what it makes of `summarise`. Most
descriptions use words that others used before, so that the list of those is all that is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Spelling", "Vocabulary"]

_WORD = re.compile(r"[A-Za-z]+")
_SHORTEST = 4  # letters: of a shorter word too many others are one error away
_STEM = 3
_ENDINGS = ("s", "es", "d", "ed", "r", "er", "ers", "ing", "ly")


@runtime_checkable
class Vocabulary(Protocol):
    """An embedder that can tell which words it knows."""

    def knows(self, word: str) -> bool:
        """Whether a word in small letters is one of its own, rather than pieced together."""
        ...


class Spelling:
    """Corrects words that neither the embedder nor the learned descriptions know, and that one error leads to a word of those.

    An error is a letter left out, one too many, another one, or two neighbours exchanged. What a known word becomes by an ending is
    known too, and a capital letter within a text is taken for a name's.

    Args:
        words: Of the learned descriptions, in small letters; of several that come into question the first is taken.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = tuple(words)
        self._place = {word: place for place, word in enumerate(words)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> Spelling:
        """From descriptions; words that occur more often come first."""
        counts = Counter(word for text in texts for word in _WORD.findall(text.lower()) if len(word) >= _SHORTEST)
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def corrected(self, text: str, embedder: object) -> str:
        """The text as it is to be read; as it stands where the embedder cannot tell which words it knows."""
        if not self.words or not isinstance(embedder, Vocabulary):
            return text
        return _WORD.sub(lambda match: self._word(match, embedder), text)

    def _word(self, match: re.Match[str], embedder: Vocabulary) -> str:
        typed, name = match.group(), match.start() > 0 and match.group()[0].isupper() and not match.group().isupper()
        word = typed.lower()
        if len(word) < _SHORTEST or name or word in self._place or embedder.knows(word) or self._derived(word, embedder):
            return typed
        near = [one for one in self.words if abs(len(one) - len(word)) <= 1 and _one_error(word, one)]
        if not near:
            return typed
        return near[0].upper() if typed.isupper() else near[0].capitalize() if typed[0].isupper() else near[0]

    def _derived(self, word: str, embedder: Vocabulary) -> bool:
        """Whether a word is a known one with an ending, or a known one without it."""
        stems = [word[: -len(ending)] for ending in _ENDINGS if word.endswith(ending) and len(word) - len(ending) >= _STEM]
        return any(stem in self._place or embedder.knows(stem) for stem in stems) or any(
            word + ending in self._place for ending in _ENDINGS
        )


def _one_error(typed: str, word: str) -> bool:
    """Whether one letter left out, added, changed, or exchanged with the next one makes one of two different words of the other."""
    at = next((place for place, (a, b) in enumerate(zip(typed, word, strict=False)) if a != b), min(len(typed), len(word)))
    if len(typed) == len(word):
        return typed[at + 1 :] == word[at + 1 :] or typed[at : at + 2] == word[at : at + 2][::-1] and typed[at + 2 :] == word[at + 2 :]
    return typed[at + 1 :] == word[at:] if len(typed) > len(word) else typed[at:] == word[at + 1 :]
