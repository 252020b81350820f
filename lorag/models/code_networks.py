"""Networks from a description's vectors to a code. Their last layers start at zero, so training starts from the mean."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = ["PooledNetwork", "TokenNetwork"]


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


class TokenNetwork(nn.Module):
    """Learned queries read a description's tokens, and a linear head adds up what they read to a code (b, c).

    A description is a composition; one pooled vector blurs it, its tokens keep the parts apart. Queries see the words but
    not each other.
    """

    def __init__(
        self, embedding: int, code: int, *, width: int, queries: int, layers: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, width))
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(256, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=dropout, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        # No activation: a code is a sum of what each query contributes, so that parts learned apart can be put together.
        self.hidden = nn.Sequential(nn.Dropout(dropout), nn.Linear(queries * width, hidden))
        self.head = _zero(nn.Linear(hidden, code))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps tokens (b, t, e), with a mask (b, t) that is true at real ones, and pooled (b, e), to codes (b, c)."""
        words = self.inward(torch.cat([pooled[:, None], tokens], 1))
        length = min(words.shape[1], len(self.positions))
        words = words[:, :length] + self.positions[:length]
        asked = repeat(self.queries, "q w -> b q w", b=len(words))
        seen = torch.cat([mask.new_ones(len(mask), len(self.queries) + 1), mask], 1)[:, : len(self.queries) + length]
        apart = torch.zeros(seen.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device)
        count = len(self.queries)
        apart[:, :count] = ~torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)[:, :count]
        read = self.body(torch.cat([asked, words], 1), mask=apart, src_key_padding_mask=~seen)
        answered = self.norm(read[:, : len(self.queries)])
        return self.head(self.hidden(rearrange(answered, "b q w -> b (q w)")))
