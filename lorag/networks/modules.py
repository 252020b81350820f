"""Networks that make a code module by module, with one set of weights for all adapted modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = ["ModuleDecoder", "ModuleNetwork"]

_WAVES = 8  # wavelengths of 2π·2⁰ to 2π·2⁷ layers for each number of a module's path


class _Residual(nn.Module):
    """x + MLP(norm(x)), `expansion` times as wide inside."""

    def __init__(self, width: int, expansion: int, dropout: float = 0.0) -> None:
        super().__init__()
        inside = expansion * width
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inside), nn.GELU(), nn.Dropout(dropout), nn.Linear(inside, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ModuleDecoder(nn.Module):
    """Tokens of (z, depth, kind), one per module, through one stack of residual blocks; one head for each kind.

    A place scales what z says before it adds itself, so that layers can take different parts of it. Without blocks a module's
    part is a linear function of z, of its own for each place; blocks add what is not linear, and nothing after them rescales.
    Heads start at zero, so that training starts from the mean adapter. The size depends on the number of kinds and on k, and neither on
    the depth nor on the width of the base model: a place is features of its numbers, not an embedding of its own.

    Args:
        latent: Length z of what is known of the task.
        kinds: Number of each module's kind (m,), int64, counted from 0.
        depths: Numbers of each module's path (m, d), int64; shorter ones are filled up with zeros.
        part: Length of each module's part of a code.
        width: Of a token.
        blocks: Number of residual blocks.
    """

    kinds: Tensor
    depths: Tensor

    def __init__(self, latent: int, kinds: Tensor, depths: Tensor, part: int, *, width: int, blocks: int) -> None:
        super().__init__()
        # Not among the parameters' state: whoever stores the network stores the places apart, as the integers that they are.
        self.register_buffer("kinds", kinds, persistent=False)
        self.register_buffer("depths", depths, persistent=False)
        count = int(kinds.max()) + 1
        self.inward = nn.Linear(latent, width)
        self.kind = nn.Parameter(torch.randn(count, 2 * width) * 0.5)
        self.depth = nn.Linear(2 * _WAVES * depths.shape[1], 2 * width)
        # Gains of about unit variance over layers: layers have bases of their own and begin with maps as far apart.
        nn.init.normal_(self.depth.weight, std=(_WAVES * depths.shape[1]) ** -0.5)
        self.blocks = nn.Sequential(*(_Residual(width, 2) for _ in range(blocks)))
        self.heads = nn.Parameter(torch.zeros(count, width, part))
        self.offsets = nn.Parameter(torch.zeros(count, part))

    def features(self) -> Tensor:
        """Sine and cosine (m, 2 · waves · d) of the numbers of the modules' paths, as Vaswani et al. (2017) do with positions."""
        rates = 0.5 ** torch.arange(_WAVES, device=self.depths.device)
        angles = rearrange(self.depths[..., None] * rates, "m d f -> m (d f)")
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, z: Tensor) -> Tensor:
        """Maps z (b, z) to codes (b, c)."""
        gain, shift = (self.kind[self.kinds] + self.depth(self.features())).chunk(2, -1)
        tokens = self.blocks(self.inward(z)[:, None] * (1 + gain) + shift)
        parts = tokens.new_empty(len(z), len(self.kinds), self.heads.shape[-1])
        for kind in range(len(self.heads)):
            of_kind = self.kinds == kind
            parts[:, of_kind] = torch.addmm(self.offsets[kind], tokens[:, of_kind].flatten(0, 1), self.heads[kind]).unflatten(
                0, (len(z), -1)
            )
        return rearrange(parts, "b m v -> b (m v)")


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
        self.blocks = nn.Sequential(*(_Residual(width, 4, dropout) for _ in range(depth)), nn.LayerNorm(width))
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
            parts = rearrange(head(states[:, places]), "b m v -> m b v")
            written |= dict(zip(places, parts, strict=True))
        return torch.cat([written[place] for place in range(count)], -1)
