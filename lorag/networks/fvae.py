"""The Fusion VAE of ICM-Fusion: an encoder of a code beside its task's vector, and a decoder of a latent beside it.

Shape letters: b batch, z latents, p elements of a code, v elements of a task vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorag.networks.cvae import Gaussian, Reconstruction, gaussian, standard_normal
from lorag.networks.fused_latents import added_directions, mean_direction

__all__ = ["FusionVae"]


class FusionVae(nn.Module):
    """F-VAE (arXiv 2508.04153): (μ, σ) = E([l; v]) and l = D([z; v]).

    Sizes are not published. Here both are two-layer perceptrons beside a linear map that skips them, so that a mixture of
    latents is, to first order, decoded to the mixture of what they stand for. What the decoder adds to the mean code
    starts at zero.

    Args:
        elements: p, of a code.
        vector: v, of a task vector.
        latent: z.
        width: Of the hidden layers.
        code: Length c of whole codes, if directions from elements to them are learned too; 0 where they are not.
    """

    directions: nn.Linear | None

    def __init__(self, elements: int, vector: int, *, latent: int, width: int, code: int = 0) -> None:
        super().__init__()
        self.latent = latent
        self.directions = nn.Linear(elements, code) if code else None
        self.encoder = _perceptron(elements + vector, width, 2 * latent)
        self.inward = nn.Linear(elements, latent, bias=False)
        self.decoder = _perceptron(latent + vector, width, elements)
        self.outward = nn.Linear(latent, elements, bias=False)
        for layer in (self.encoder[-1], self.decoder[-1], self.outward):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def encode(self, x: Tensor, v: Tensor) -> Gaussian:
        """q(z|x, v) of codes x (b, p) and task vectors v (b, v)."""
        mean, log_variance = gaussian(self.encoder(torch.cat([x, v], -1)))
        return Gaussian(mean + self.inward(x), log_variance)

    def decode(self, z: Tensor, v: Tensor) -> Tensor:
        """Codes (b, p) of latents z (b, z) and task vectors v (b, v)."""
        return self.outward(z) + self.decoder(torch.cat([z, v], -1))

    def fuse(self, z: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """One latent (z,) and one task vector (v,) for several experts' (n, z) and (n, v): with directions as they were learned."""
        rule = mean_direction if self.directions is None else added_directions
        return rule(z, weights), mean_direction(v, weights)

    def forward(self, x: Tensor, v: Tensor, noise: Tensor) -> Reconstruction:
        """Reconstructs x (b, p) through a sample of the posterior made of noise (b, z); the prior is N(0, I)."""
        posterior = self.encode(x, v)
        return Reconstruction(self.decode(posterior.sample(noise), v), posterior, standard_normal(v, self.latent))


def _perceptron(inward: int, width: int, outward: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inward, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outward))
