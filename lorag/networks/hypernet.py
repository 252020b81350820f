"""A network that is asked for one adapted module at a time: a text's vector and a module's, to that module's part of a code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = ["ModuleNetwork"]


class _Residual(nn.Module):
    """x + MLP(norm(x)), four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ModuleNetwork(nn.Module):
    """Maps a pooled embedding (b, e) to a code (b, c), module by module, with one set of weights for all of them.

    What tells modules apart is a learned embedding of each. Modules with parts of equal length share one head, which
    starts at zero, so that training starts from the mean adapter.

    Args:
        embedding: e.
        parts: Length of each of the m modules' part of a code; they add up to c.
        width: Of text, and of the residual stream.
        depth: Residual blocks.
        module_width: Of a module's embedding.
        dropout: In each block.
    """

    def __init__(self, embedding: int, parts: Sequence[int], *, width: int, depth: int, module_width: int, dropout: float) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.text = nn.Linear(embedding, width)
        self.module_embeddings = nn.Parameter(torch.randn(len(self.parts), module_width) * module_width**-0.5)
        self.mix = nn.Linear(width + module_width, width)
        self.blocks = nn.Sequential(*(_Residual(width, dropout) for _ in range(depth)), nn.LayerNorm(width))
        self.heads = nn.ModuleDict({str(length): nn.Linear(width, length) for length in sorted(set(self.parts))})
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps pooled (b, e) to codes (b, c); tokens and mask are not looked at."""
        text = self.text(pooled * pooled.shape[-1] ** 0.5)  # unit vectors, scaled to entries of about 1
        count = len(self.parts)
        asked = torch.cat([repeat(text, "b w -> b m w", m=count), repeat(self.module_embeddings, "m w -> b m w", b=len(text))], -1)
        states = self.blocks(self.mix(asked))
        written: dict[int, Tensor] = {}
        for length, head in self.heads.items():
            places = [place for place, part in enumerate(self.parts) if part == int(length)]
            own = rearrange(head(states[:, places]), "b m v -> m b v")
            written |= dict(zip(places, own, strict=True))
        return torch.cat([written[place] for place in range(count)], -1)
