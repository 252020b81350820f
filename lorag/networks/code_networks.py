"""Networks from a description's vectors to a code. Their last layers start at zero, so training starts from the mean."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = ["Blur", "PooledNetwork", "Reading", "TokenNetwork", "TokenReader", "linear_head"]


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

    One pooled vector blurs a description; its tokens do not. Queries see the words but not each other.
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
    found, _ = layer.self_attn(seen[:, :count], seen, seen, key_padding_mask=padding, attn_mask=apart[:count], need_weights=False)
    x = x[:, :count] + layer.dropout1(found)
    return x + layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm2(x))))))


class Blur(nn.Module):
    """Hides some of a description's tokens and adds noise to its vectors, in training alone: no wording to be learned by heart.

    Args:
        word_dropout: Share of the tokens that are hidden.
        noise: Standard deviation of the noise, as a share of a vector's own root mean square.
    """

    def __init__(self, word_dropout: float, noise: float) -> None:
        super().__init__()
        self.word_dropout, self.noise = word_dropout, noise

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blurs pooled (b, e) and tokens (b, t, e), and takes tokens out of their mask (b, t)."""
        if not self.training:
            return pooled, tokens, mask
        return self._shake(pooled), self._shake(tokens), mask & (torch.rand(mask.shape, device=mask.device) >= self.word_dropout)

    def _shake(self, vectors: Tensor) -> Tensor:
        size = vectors.square().mean(-1, keepdim=True).sqrt()
        return vectors + self.noise * size * torch.randn_like(vectors)


class Reading(nn.Module):
    """What one reader understood, as features (b, f) of a fixed length."""

    def __init__(self, embedding: int, *, width: int, queries: int, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.reader = TokenReader(embedding, width=width, queries=queries, layers=layers, heads=heads, dropout=dropout)
        self.hidden = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.reader.size, hidden))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Reads tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e)."""
        return self.hidden(self.reader(pooled, tokens, mask))


class TokenNetwork(Reading):
    """What readers understood, averaged, and a head that makes a code (b, c) of it: parts learned apart can be put together.

    Args:
        embedding: Length e of the vectors.
        head: From features (b, f) to codes.
        colleagues: Readers beside the first one. They misread different wordings, so that their mean is right more often than
            each of them.
        sizes: Of each reader, as `Reading` takes them.
    """

    def __init__(self, embedding: int, head: nn.Module, *, colleagues: int = 0, **sizes: Any) -> None:  # noqa: ANN401 - numbers
        super().__init__(embedding, **sizes)
        self.head = head
        self._sizes = {"embedding": embedding, **sizes}
        self.colleagues = nn.ModuleList(self.another_reader() for _ in range(colleagues))

    def another_reader(self) -> Reading:
        """An untrained reader of the same sizes."""
        return Reading(**self._sizes)

    def features(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features (b, f), the mean over all readers."""
        own = super().forward(pooled, tokens, mask)
        return torch.stack([own, *(colleague(pooled, tokens, mask) for colleague in self.colleagues)]).mean(0) if self.colleagues else own

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e), to codes (b, c)."""
        return self.head(self.features(pooled, tokens, mask))
