"""Vectors instead of descriptions: a bank whose entries carry a vector of the user's own, such as a profile of a reader.

A vector is written as a description of its own kind, `vector: 0.25 -1 3`, so that banks, files and methods need to know nothing of it, and
is read by an embedder that its name tells apart, `vectors:3`. (Adapters from a user's vector: RecLoRA, arXiv 2408.03533.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lorag.errors import ConfigError, DescriptionError
from lorag.text.embedding import CachedEmbedder, Embedding, SentenceEmbedder

__all__ = ["VectorEmbedder", "open_embedder", "reads_vectors", "vector_text"]

_MARK = "vector:"
_KIND = "vectors:"
_MOST = 256  # values, which fit into a description whatever they are


def vector_text(values: Sequence[float]) -> str:
    """A vector as a description, in six significant digits.

    Raises:
        DescriptionError: If there are no values, too many, or one is not a finite number.
    """
    numbers = [float(value) for value in values]
    if not 1 <= len(numbers) <= _MOST or not all(map(math.isfinite, numbers)):
        got = f"{len(numbers)} values" if len(numbers) != 1 else repr(numbers[0])
        raise DescriptionError("a vector cannot be used", got=got, expected=f"1 to {_MOST} finite numbers")
    return f"{_MARK} {' '.join(f'{number:.6g}' for number in numbers)}"


def reads_vectors(embedder: str) -> bool:
    """Whether an embedder's name is that of one for vectors, which stand no rewording and no typing error."""
    return embedder.startswith(_KIND)


class VectorEmbedder:
    """Reads descriptions that `vector_text` wrote.

    What it gives is (v, 1), made of unit length as similarities need it: vectors of one length keep their angles, and of others the
    length still counts. The one token is the same.

    Args:
        length: Number of values of a vector.
    """

    def __init__(self, length: int) -> None:
        self.length, self.name = length, f"{_KIND}{length}"

    @property
    def size(self) -> int:
        """Length e of its vectors: one more than the user's have."""
        return self.length + 1

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> list[Embedding]:
        """Reads vectors in order.

        Raises:
            DescriptionError: If a text is not a vector of this length.
        """
        return [self._read(text) for text in texts]

    def _read(self, text: str) -> Embedding:
        try:
            values = [float(word) for word in text.removeprefix(_MARK).split()] if text.startswith(_MARK) else []
        except ValueError:
            values = []
        if len(values) != self.length or not all(map(math.isfinite, values)):
            raise DescriptionError(
                "a generator of vectors reads no text",
                got=repr(text[:60]),
                expected=f"{self.length} numbers",
                remedy="Give generate_lora(vector=[…]), or write it as vector_text does.",
            )
        vector = torch.nn.functional.normalize(torch.tensor([*values, 1.0], dtype=torch.float64), dim=0).float()
        return Embedding(vector, vector[None])


def open_embedder(name: str, device: str = "auto") -> CachedEmbedder:
    """The embedder of a name: `vectors:N` for vectors of N values, otherwise a sentence-transformers model. It embeds a text once.

    Raises:
        ConfigError: If N is not a number of values.
        BaseModelError: If a model cannot be loaded.
    """
    if not reads_vectors(name):
        return CachedEmbedder(SentenceEmbedder.from_pretrained(name, device))
    length = name.removeprefix(_KIND)
    if not length.isdecimal() or not 1 <= int(length) <= _MOST:
        raise ConfigError("embedder: length of vectors cannot be used", got=name[:60], expected=f"{_KIND}1 to {_KIND}{_MOST}")
    return CachedEmbedder(VectorEmbedder(int(length)))
