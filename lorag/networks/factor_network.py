"""From a description to low-rank factors: rows that read a module's input, columns that write to its output.

Most rows and all columns come from features of the description. The remaining rows, the probes, are linear in the description's own
vector, so that they can begin as what is known before any task is learned: along which directions of a module's input lie the texts
that mean what the description says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorag.networks.memory import TaskMemory
from lorag.networks.readers import Augmentation, FeatureReader
from lorag.networks.smoothing import FeatureSmoothing

__all__ = ["FactorNetwork", "Probes"]

_SHARED = 8.0  # how much faster columns that all descriptions share learn than those that follow one
_PROBED = 3.0  # length of a typical probe beside that of the other rows, so that what is behind it learns as much faster
_FLOOR = 0.1  # of the mean variance, which directions of features that hardly vary get as well


class Probes(nn.Module):
    """Rows that are linear in a description's vector: along them lie the texts that mean what it says.

    Args:
        embedding: Length e of the description's vectors.
        groups: Number g of input bases.
        count: Probes p of a basis; each reads the description's tokens in its own way.
        directions: Input directions k of a basis, without the bias.
    """

    def __init__(self, embedding: int, groups: int, count: int, directions: int) -> None:
        super().__init__()
        self.focus = nn.Parameter(torch.randn(count, embedding) * 0.02)
        self.register_buffer("centre", torch.zeros(count, embedding))
        self.alignment = nn.Parameter(torch.zeros(groups, embedding, directions))

    centre: Tensor

    def vectors(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """One vector of unit length for each probe (b, p, e): the tokens' mean, weighted by what the probe looks for."""
        weights = torch.einsum("pe,bte->bpt", self.focus, tokens).masked_fill(~mask[:, None], -1e4).softmax(-1)
        return nn.functional.normalize(torch.einsum("bpt,bte->bpe", weights, tokens), dim=-1)

    @torch.no_grad()
    def align(self, alignment: Tensor, tokens: Tensor, mask: Tensor) -> None:
        """Begins from a linear map of embeddings to directions, scaled so that typical probes have length 1.

        Args:
            alignment: (g, e, k), from a centred embedding to the directions of texts that mean the same.
            tokens: Vectors of typical descriptions (b, t, e).
            mask: True at real tokens (b, t).
        """
        vectors = self.vectors(tokens, mask)
        self.centre.copy_(vectors.mean(0))
        rows = torch.einsum("bpe,gek->bgpk", vectors - self.centre, alignment)
        size = rows.square().sum(-1).mean((0, 2)).sqrt().clamp_min(1e-8)
        self.alignment.copy_(alignment / size[:, None, None])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rows (b, g, p, k) of descriptions: tokens (b, t, e), with a mask (b, t) that is true at real ones."""
        return torch.einsum("bpe,gek->bgpk", self.vectors(tokens, mask) - self.centre, self.alignment)


class FactorNetwork(nn.Module):
    """Maps a description to a code: for each module rows (r, k), then columns (r, l), flattened.

    Args:
        embedding: Length e of the description's vectors.
        entry: For each of m modules the number of its input basis, of g.
        inputs: Input directions k of a module.
        outputs: Output directions l of a module.
        rank: Rows r of a module, the probes among them.
        probes: Rows that are linear in the description's vector.
        directions: Leading input directions, beside the last, that rows from features use.
        features: Number of features f.
        width: Of the transformer that reads the description.
        queries: Its learned queries.
        layers: Its layers.
        heads: Of its attention.
        dropout: In it.
        word_dropout: Share of a description's tokens masked in training.
        noise: Gaussian noise on its vectors in training, as a share of their own size.
        smoothed: Number of tasks in each set of answers among which features are smoothed.
        remembered: Number n of known tasks of which more is remembered than can be read.
        memory: Directions d by which those are told apart.
    """

    def __init__(
        self,
        embedding: int,
        entry: Sequence[int],
        *,
        inputs: int,
        outputs: int,
        rank: int,
        probes: int,
        directions: int,
        features: int,
        width: int,
        queries: int,
        layers: int,
        heads: int,
        dropout: float,
        word_dropout: float,
        noise: float,
        smoothed: Sequence[int] = (),
        remembered: int = 0,
        memory: int = 0,
    ) -> None:
        super().__init__()
        m, g, rows = len(entry), max(entry) + 1, rank - probes
        used = min(directions, inputs - 1)
        self.entry, self.unused = tuple(entry), inputs - 1 - used
        self.augment = Augmentation(word_dropout, noise)
        self.reading = FeatureReader(
            embedding, width=width, queries=queries, layers=layers, heads=heads, features=features, dropout=dropout
        )
        self.register_buffer("middle", torch.zeros(features))
        self.register_buffer("spread", torch.eye(features))
        self.smoothing = FeatureSmoothing(features, smoothed)
        self.memory = TaskMemory(embedding, features, remembered, memory)
        d = used + 1
        self.row_start = nn.Parameter(torch.randn(m, rows, d) / math.sqrt(d))
        self.row_weights = nn.Parameter(torch.randn(m, features, rows * d) * 0.3 / math.sqrt(d))  # of features of length 1
        self.column_start = nn.Parameter(torch.zeros(m, rank, outputs))
        self.column_weights = nn.Parameter(torch.zeros(m, features, rank * outputs))
        self.probes = Probes(embedding, g, probes, inputs - 1)

    middle: Tensor
    spread: Tensor

    def read(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features (b, f), not whitened yet, of pooled (b, e) and tokens (b, t, e), with a mask (b, t) that is true at real ones."""
        return self.reading(*self._augmented(pooled, tokens, mask))

    def features(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features (b, f), whitened, not smoothed, and without augmentation, of a description's vectors."""
        return self.whitened(self.reading(pooled, tokens, mask))

    def whitened(self, features: Tensor) -> Tensor:
        """What `read` gives (b, f), under the map that `whiten` set."""
        return (features - self.middle) @ self.spread

    def _augmented(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A description as it is read in training; where all of its tokens would be masked, none is."""
        pooled, tokens, seen = self.augment(pooled, tokens, mask)
        return pooled, tokens, torch.where(seen.any(1, keepdim=True), seen, mask)

    @torch.no_grad()
    def whiten(self, features: Tensor) -> None:
        """Sets a map under which typical features (n, f) have mean 0, are nearly white, and have a length of about 1.

        White, so that all that they tell is as easy to learn from; short, because Adam moves every weight by about the learning rate, and
        what follows a description would otherwise outrun what all descriptions share, and carry as much noise.
        """
        self.middle.copy_(features.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(features.T).double().nan_to_num())
        values = values.clamp_min(0) + _FLOOR * values.clamp_min(0).mean() + 1e-12
        self.spread.copy_(vectors / (values * len(values)).sqrt() @ vectors.T)

    def forward(
        self,
        pooled: Tensor,
        tokens: Tensor,
        mask: Tensor,
        centres: Tensor | None = None,
        places: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Maps pooled (b, e) and tokens (b, t, e), with a mask (b, t) that is true at real ones, to codes (b, c).

        While it learns, `centres` (b,) says which are the descriptions' own in smoothing, `places` (b,) and `keys` (b, d) in memory.
        """
        recalled = self.memory(pooled, places, keys)
        pooled, tokens, seen = self._augmented(pooled, tokens, mask)
        features = self.smoothing(self.features(pooled, tokens, seen), centres) + recalled
        b = len(features)
        read = self.row_start + torch.einsum("bf,mfx->bmx", features, self.row_weights).view(b, *self.row_start.shape)
        read = torch.cat([read[..., :-1], read.new_zeros(*read.shape[:-1], self.unused), read[..., -1:]], -1)
        probe = _PROBED * self.probes(tokens, seen)
        probe = torch.cat([probe, probe.new_zeros(*probe.shape[:-1], 1)], -1)[:, list(self.entry)]
        write = _SHARED * self.column_start + torch.einsum("bf,mfx->bmx", features, self.column_weights).view(b, *self.column_start.shape)
        return torch.cat([torch.cat([read, probe], 2).flatten(2), write.flatten(2)], 2).flatten(1)
