"""ICM-LoRA's published network (arXiv 2501.17635): a convolutional conditional VAE over one long vector of weights.

About 185 activations for each value of x: a vector of two million values needs gigabytes a batch. The counts of its
parameters agree with the published ones: 7,508,369 for 1,929,928 values and a condition of 768.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from lorag.networks.vae import Gaussian, Reconstruction, standard_normal

__all__ = ["ConvVae"]

_CHANNELS = (1, 8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
_STEP = 2 ** (len(_CHANNELS) - 1)  # each of the 12 convolutions halves the length
_KERNEL = 7


class ConvVae(nn.Module):
    """Twelve strided convolutions to 8 · m values, where m is the length over 4096, a linear map to z, and the way back.

    Args:
        length: Length c of x; it is padded with zeros to a multiple of 4096.
        condition: Length h of the condition.
        latent: Number of latents, 256 as published.
    """

    def __init__(self, length: int, condition: int, latent: int = 256) -> None:
        super().__init__()
        self.latent, self.length = latent, length
        self.places = -(-length // _STEP)
        last = _CHANNELS[-1]
        down: list[nn.Module] = []
        for before, after in zip(_CHANNELS[:-1], _CHANNELS[1:], strict=True):
            down += [nn.Conv1d(before, after, _KERNEL, 2, 3), nn.BatchNorm1d(after), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*down)
        self.inward = nn.Linear(last * self.places, latent)
        self.mean = nn.Linear(latent + condition, latent)
        self.log_variance = nn.Linear(latent + condition, latent)
        self.outward = nn.Linear(latent + condition, last * self.places)
        # The mirror of the encoder but for its last block, which keeps 8 channels, and a convolution that joins them.
        channels = (*reversed(_CHANNELS[1:]), last)
        up: list[nn.Module] = []
        for before, after in zip(channels[:-1], channels[1:], strict=True):
            up += [nn.ConvTranspose1d(before, after, _KERNEL, 2, 3, output_padding=1), nn.BatchNorm1d(after), nn.ELU()]
        joined = nn.Conv1d(last, 1, _KERNEL, padding=3)
        nn.init.zeros_(joined.weight)  # not published: training starts from the mean, as in every network here
        nn.init.zeros_(joined.bias)  # type: ignore[arg-type] # a bias is there by default
        self.decoder = nn.Sequential(*up, joined)

    def read(self, pooled: Tensor, tokens: Tensor, mask: Tensor, vector: Tensor | None) -> Tensor:
        """The condition (b, h): the pooled description, the task vector, or both, as they are; tokens are not looked at.

        A pooled vector of unit length is scaled to elements of unit size.
        """
        parts = [pooled * pooled.shape[-1] ** 0.5] if pooled.shape[-1] else []
        return torch.cat(parts + ([vector] if vector is not None else []), -1)

    def encode(self, x: Tensor, h: Tensor) -> Gaussian:
        """q(z|x, h) of x (b, c)."""
        padded = nn.functional.pad(x, (0, self.places * _STEP - self.length))
        features = self.inward(rearrange(self.encoder(padded[:, None]), "b d l -> b (d l)"))
        both = torch.cat([features, h], -1)
        return Gaussian(self.mean(both), self.log_variance(both).clamp(-12.0, 12.0))

    def prior(self, h: Tensor) -> Gaussian:
        """p(z) = N(0, I)."""
        return standard_normal(h, self.latent)

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Mean (b, c) of p(x|z, h)."""
        start = rearrange(self.outward(torch.cat([z, h], -1)), "b (d l) -> b d l", d=_CHANNELS[-1])
        return self.decoder(start)[:, 0, : self.length]

    def forward(self, x: Tensor, noise: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor, vector: Tensor | None) -> Reconstruction:
        """Reconstructs x (b, c) through a sample of the posterior made of noise (b, z)."""
        h = self.read(pooled, tokens, mask, vector)
        posterior = self.encode(x, h)
        return Reconstruction(self.decode(posterior.sample(noise), h), posterior, self.prior(h))
