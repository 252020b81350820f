"""Which task a request belongs to, without training: by the nearest examples of each task, and by the code of its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.errors import BankError

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.text.embedding import TextEmbedder

__all__ = ["CodeIndex", "TextIndex"]

_NEAREST = 5  # of a task's examples; their mean cosine is what speaks for it
_EXAMPLES = 64  # kept of each task


class TextIndex:
    """Texts that each task is known by: inputs of its examples, and its descriptions. Make one with `embed`.

    Args:
        names: The n tasks.
        vectors: Unit vectors of all texts (t, e).
        owners: Task of each text (t,).
    """

    def __init__(self, names: Sequence[str], vectors: Tensor, owners: Tensor) -> None:
        self.names, self._vectors, self._owners = tuple(names), vectors, owners

    @classmethod
    def embed(cls, texts: Mapping[str, Sequence[str]], embedder: TextEmbedder, *, quiet: bool = True) -> TextIndex:
        """Embeds at most 64 texts of each task."""
        kept = {name: list(dict.fromkeys(own))[:_EXAMPLES] for name, own in texts.items()}
        embedded = embedder.embed([text for own in kept.values() for text in own], quiet=quiet)
        owners = torch.tensor([place for place, own in enumerate(kept.values()) for _ in own], dtype=torch.long)
        vectors = torch.stack([one.pooled for one in embedded]) if embedded else torch.zeros(0, embedder.size)
        return cls(list(kept), vectors, owners)

    def scores(self, queries: Tensor) -> Tensor:
        """Mean cosine (q, n) of each query (q, e) to the five nearest texts of each task; -1 for a task without texts."""
        cosines = queries @ self._vectors.T
        found = torch.full((len(queries), len(self.names)), -1.0)
        for place in self._owners.unique().tolist():
            own = cosines[:, self._owners == place]
            found[:, place] = own.topk(min(_NEAREST, own.shape[1]), dim=1).values.mean(1)
        return found


class CodeIndex:
    """Experts' codes: a description is compared by the adapter that the generator would make of it, which tells apart what words do not.

    Args:
        generator: The generator.
        codes: Codes (n, c) of the experts, in its order.
    """

    def __init__(self, generator: LoraGenerator, codes: Tensor) -> None:
        self._generator, self._codes = generator, codes
        self._sizes = codes.square().sum(1)

    @classmethod
    def encode(cls, generator: LoraGenerator, bank: AdapterBank) -> CodeIndex:
        """Encodes the bank's experts.

        Raises:
            BankError: If the bank is not the generator's.
        """
        generator.check_bank(bank)
        names = generator.conditioner.names
        if not names:
            raise BankError("the bank has no experts", remedy="Add some.")
        return cls(generator, torch.stack([generator.space.encode(bank.adapter(name).factors).float() for name in names]))

    def scores(self, description: str, seed: int = 0) -> Tensor:
        """One value for each expert (n,): less the distance between its code and the description's, in shares of the code's size."""
        condition = self._generator.condition(description)
        code = self._generator.method.generate(condition, torch.Generator().manual_seed(seed))[0].float()
        squares = self._sizes - 2 * (self._codes @ code) + code.square().sum()
        return -squares.clamp_min(0).sqrt() / code.norm().clamp_min(1e-9)
