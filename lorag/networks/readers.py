"""Networks that read a description's vectors. Heads that make codes start at zero, so training starts from the mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = [
    "Augmentation",
    "ConditionReader",
    "DescriptionNetwork",
    "FeatureReader",
    "PairReader",
    "PooledNetwork",
    "TokenReader",
    "linear_head",
    "noisy",
]


def linear_head(features: int, code: int) -> nn.Linear:
    """A linear map from features (b, f) to codes (b, c), zero at the start."""
    layer = nn.Linear(features, code)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PooledNetwork(nn.Module):
    """Two-layer perceptron from a pooled embedding (b, e) to a code (b, c)."""

    def __init__(self, embedding: int, code: int, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(embedding, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)
        )
        self.head = linear_head(width, code)

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps pooled (b, e) to codes (b, c); tokens and mask are not looked at."""
        return self.head(self.body(pooled * pooled.shape[-1] ** 0.5))


class TokenReader(nn.Module):
    """Learned queries read a description's tokens: one vector (b, q * w) that keeps the parts of a composition apart.

    One pooled vector mixes the words of a description; its tokens do not. Queries see the words but not each other.
    """

    def __init__(self, embedding: int, *, width: int, queries: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.size = queries * width
        self.inward = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, width))
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(256, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=dropout, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Reads tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e)."""
        words = self.inward(torch.cat([pooled[:, None], tokens], 1))
        length = min(words.shape[1], len(self.positions))
        words = words[:, :length] + self.positions[:length]
        count = len(self.queries)
        asked = repeat(self.queries, "q w -> b q w", b=len(words))
        seen = torch.cat([mask.new_ones(len(mask), count + 1), mask], 1)[:, : count + length]
        apart = torch.zeros(seen.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device)
        apart[:, :count] = ~torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)[:, :count]
        x = torch.cat([asked, words], 1)
        for layer in self.body.layers[:-1]:
            x = layer(x, src_mask=apart, src_key_padding_mask=~seen)
        for layer in self.body.layers[-1:]:
            x = _first_of_layer(layer, x, count, apart, ~seen)
        return rearrange(self.norm(x[:, :count]), "b q w -> b (q w)")


def _first_of_layer(layer: nn.TransformerEncoderLayer, x: Tensor, count: int, apart: Tensor, padding: Tensor) -> Tensor:
    """What a layer that normalises first makes of the first positions (b, count, w) of x; the others are only looked at.

    Of the last layer no more is read, which in a reader of one layer is less than half of the work.
    """
    seen = layer.norm1(x)
    attended, _ = layer.self_attn(seen[:, :count], seen, seen, key_padding_mask=padding, attn_mask=apart[:count], need_weights=False)
    x = x[:, :count] + layer.dropout1(attended)
    return x + layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm2(x))))))


def noisy(vectors: Tensor, share: float) -> Tensor:
    """Vectors (..., e) with Gaussian noise, whose standard deviation is a share of each one's own root mean square."""
    size = vectors.square().mean(-1, keepdim=True).sqrt()
    return vectors + share * size * torch.randn_like(vectors)


class Augmentation(nn.Module):
    """Masks some of a description's tokens and adds noise to its vectors, in training alone, so that no wording is memorised.

    Args:
        word_dropout: Share of the tokens that are masked.
        noise: Standard deviation of the noise, as a share of a vector's own root mean square.
    """

    def __init__(self, word_dropout: float, noise: float) -> None:
        super().__init__()
        self.word_dropout, self.noise = word_dropout, noise

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds noise to pooled (b, e) and tokens (b, t, e), and takes tokens out of their mask (b, t)."""
        if not self.training:
            return pooled, tokens, mask
        pooled, tokens = noisy(pooled, self.noise), noisy(tokens, self.noise)
        return pooled, tokens, mask & (torch.rand(mask.shape, device=mask.device) >= self.word_dropout)


class ConditionReader(nn.Module):
    """A description's vectors, a task vector, or both, to features (b, f).

    Args:
        embedding: Length e of the description's vectors; 0 without a description.
        vector: Length of the task vector; 0 without one.
        width: Of the transformer that reads the description.
        queries: Learned queries of the transformer.
        layers: Of the transformer.
        heads: Of its attention.
        features: Number of features.
        dropout: In the transformer and before the features.
        word_dropout: Share of a description's tokens masked in training.
        noise: Gaussian noise on its vectors in training, as a share of their own size.
    """

    def __init__(
        self,
        embedding: int,
        vector: int,
        *,
        width: int,
        queries: int,
        layers: int,
        heads: int,
        features: int,
        dropout: float,
        word_dropout: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.augmentation = Augmentation(word_dropout, noise)
        self.reader = (
            TokenReader(embedding, width=width, queries=queries, layers=layers, heads=heads, dropout=dropout) if embedding else None
        )
        self.vector = nn.Sequential(nn.Linear(vector, width), nn.GELU()) if vector else None
        size = (queries * width if embedding else 0) + (width if vector else 0)
        self.hidden = nn.Sequential(nn.Dropout(dropout), nn.Linear(size, features))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor, vector: Tensor | None) -> Tensor:
        """Features of pooled (b, e), tokens (b, t, e) with their mask (b, t), and task vectors (b, v)."""
        parts = []
        if self.reader is not None:
            parts.append(self.reader(*self.augmentation(pooled, tokens, mask)))
        if self.vector is not None:
            parts.append(self.vector(vector))
        return self.hidden(torch.cat(parts, -1))


class FeatureReader(nn.Module):
    """Reads a description's tokens into features (b, f) of a fixed length."""

    def __init__(self, embedding: int, *, width: int, queries: int, layers: int, heads: int, features: int, dropout: float) -> None:
        super().__init__()
        self.reader = TokenReader(embedding, width=width, queries=queries, layers=layers, heads=heads, dropout=dropout)
        self.hidden = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.reader.size, features))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Reads tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e)."""
        return self.hidden(self.reader(pooled, tokens, mask))


class PairReader(nn.Module):
    """Reads a few (input, output) pairs of a task into features (b, f), as a `FeatureReader` reads the words of a description.

    Args:
        vector: Length v of what the base model made of a pair.
        reader: Reads vectors of this length.
        noise: Standard deviation of the noise on them in training, as a share of a vector's own root mean square.
    """

    MOST = 16  # pairs that are read

    mean: Tensor
    scale: Tensor

    def __init__(self, vector: int, reader: FeatureReader, noise: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(vector))
        self.register_buffer("scale", torch.ones(vector))
        self.reader, self.noise = reader, noise

    def standardise(self, pairs: Tensor) -> None:
        """Takes mean and scale from pairs (n, v)."""
        self.mean.copy_(pairs.mean(0))
        self.scale.copy_(pairs.std(0).clamp_min(1e-3 * float(pairs.std())))

    def forward(self, pairs: Sequence[Tensor]) -> Tensor:
        """Features of b tasks, each with p pairs (p, v)."""
        standard = [(some[: self.MOST].to(self.mean) - self.mean) / self.scale for some in pairs]
        lengths = torch.tensor([len(some) for some in standard], device=self.mean.device)
        vectors = nn.utils.rnn.pad_sequence(standard, batch_first=True)
        if self.training:
            vectors = noisy(vectors, self.noise)
        mask = torch.arange(vectors.shape[1], device=self.mean.device)[None] < lengths[:, None]
        pooled = (vectors * mask[..., None]).sum(1) / lengths[:, None]
        return self.reader(pooled, vectors, mask)


class DescriptionNetwork(nn.Module):
    """Features of an ensemble of readers, averaged, and a head that makes a code (b, c) of them.

    Members misread different wordings, so that their mean is right more often than each of them.

    Args:
        head: From features (b, f) to codes.
        readers: The members.
        augmentation: Of descriptions in training.
        pairs: Reads examples, if the network learned to.
    """

    def __init__(
        self, head: nn.Module, readers: Sequence[FeatureReader], augmentation: Augmentation, pairs: PairReader | None = None
    ) -> None:
        super().__init__()
        self.augmentation, self.readers, self.head, self.pairs = augmentation, nn.ModuleList(readers), head, pairs

    def features(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features (b, f), the mean over the members."""
        if len(self.readers) == 1:
            return self.readers[0](pooled, tokens, mask)
        return torch.stack([reader(pooled, tokens, mask) for reader in self.readers]).mean(0)

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e), to codes (b, c)."""
        return self.head(self.features(*self.augmentation(pooled, tokens, mask)))
