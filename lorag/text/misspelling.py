"""Typing errors, as people make them: training that never meets one makes generators that stumble over the first."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["misspell", "misspell_some"]

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SHORTEST = 4  # letters of a word that may be hit: an error in a shorter one often gives another word


def misspell(text: str, rng: random.Random) -> str:
    """The text with one typing error in one word: a letter left out, doubled, exchanged with the next one, or the key beside it.

    A text without a word of four plain letters comes back as it is.
    """
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if len(word) >= _SHORTEST and word.isascii() and word.isalpha()]
    if not places:
        return text
    place = rng.choice(places)
    word = words[place]
    at = rng.randrange(len(word) - 1)
    letter, rest = word[at], word[at + 1 :]
    variants = {
        "left out": rest,
        "doubled": letter * 2 + rest,
        "exchanged": rest[0] + letter + rest[1:],
        "beside": _beside(letter, rng) + rest,
    }
    words[place] = word[:at] + variants[rng.choice(sorted(variants))]
    return " ".join(words)


def misspell_some(texts: Sequence[str], share: float, rng: random.Random) -> list[str]:
    """The texts, of which a share has a typing error; never the first one, which may be all that there is."""
    return [misspell(text, rng) if number and rng.random() < share else text for number, text in enumerate(texts)]


def _beside(letter: str, rng: random.Random) -> str:
    """A letter next to this one on a keyboard, in the same case."""
    row = next(row for row in _KEYS if letter.lower() in row)
    at = row.index(letter.lower())
    key = rng.choice([row[near] for near in (at - 1, at + 1) if 0 <= near < len(row)])
    return key.upper() if letter.isupper() else key
