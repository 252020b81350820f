"""Networks from a description's vectors to a code. Their last layers start at zero, so training starts from the mean."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = ["PooledNetwork", "TokenNetwork", "TokenReader"]


def _zero(layer: nn.Linear) -> nn.Linear:
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
        self.head = _zero(nn.Linear(width, code))

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
        read = self.body(torch.cat([asked, words], 1), mask=apart, src_key_padding_mask=~seen)
        return rearrange(self.norm(read[:, :count]), "b q w -> b (q w)")


class TokenNetwork(nn.Module):
    """A linear head adds up what each query read to a code (b, c): parts learned apart can be put together."""

    def __init__(
        self, embedding: int, code: int, *, width: int, queries: int, layers: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.reader = TokenReader(embedding, width=width, queries=queries, layers=layers, heads=heads, dropout=dropout)
        self.hidden = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.reader.size, hidden))
        self.head = _zero(nn.Linear(hidden, code))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e), to codes (b, c)."""
        return self.head(self.hidden(self.reader(pooled, tokens, mask)))
