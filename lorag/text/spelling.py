"""Mistyped words of a description, led back to words of the descriptions that a generator learned from.

A text embedder pieces a word together that it does not know, and what it makes of `sumarise` is far from what it makes of `summarise`. Most
descriptions use words that others used before, so that the list of those is all that is needed.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
        self._longest = max(map(len, words), default=0)

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
        if not _SHORTEST <= len(word) <= self._longest + 1 or name:
            return typed
        if word in self._place or embedder.knows(word) or self._derived(word, embedder):
            return typed
        near = min((one for one in _one_error(word) if one in self._place), key=self._place.__getitem__, default=None)
        if near is None:
            return typed
        return near.upper() if typed.isupper() else near.capitalize() if typed[0].isupper() else near

    def _derived(self, word: str, embedder: Vocabulary) -> bool:
        """Whether a word is a known one with an ending, or a known one without it."""
        stems = [word[: -len(ending)] for ending in _ENDINGS if word.endswith(ending) and len(word) - len(ending) >= _STEM]
        return any(stem in self._place or embedder.knows(stem) for stem in stems) or any(
            word + ending in self._place for ending in _ENDINGS
        )


def _one_error(word: str) -> Iterator[str]:
    """All that one letter taken out, put in or changed, or exchanged with the next one, makes of a word: some 50 for each of its letters.

    They are looked up among the known words, rather than each known word compared, so that the longest description, made of words that
    nobody knows, takes hundredths of a second.
    """
    for at in range(len(word) + 1):
        before, after = word[:at], word[at:]
        yield before + after[1:]
        yield before + after[1:2] + after[:1] + after[2:]
        for letter in string.ascii_lowercase:
            yield before + letter + after
            yield before + letter + after[1:]
