"""Conditional VAEs over short vectors: encoder q(z|x, h), prior p(z|h), decoder p(x|z, h), all diagonal Gaussians.

Shape letters: b batch, z latents, p elements of what is generated, h what is known of the task, v elements of a task vector, t tokens,
e embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorag.networks.readers import ConditionReader, linear_head

__all__ = [
    "ConditionalVae",
    "FusionVae",
    "Gaussian",
    "LearnedPriorVae",
    "Reconstruction",
    "added_directions",
    "mean_direction",
    "resolve_conflicts",
    "standard_normal",
]


class Gaussian(NamedTuple):
    """Diagonal Gaussians: means (b, z) and logarithms of variances (b, z)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Samples (b, z) made of standard normal noise (b, z)."""
        return self.mean + (0.5 * self.log_variance).exp() * noise


class Reconstruction(NamedTuple):
    """What a VAE makes of x in training: x again (b, p), q(z|x, h), and p(z|h)."""

    x: Tensor
    posterior: Gaussian
    prior: Gaussian


def gaussian(outputs: Tensor) -> Gaussian:
    """Reads outputs (b, 2 z) as Gaussians; variances stay between e^-12 and e^12, so that no exponential overflows."""
    mean, log_variance = outputs.chunk(2, -1)
    return Gaussian(mean, log_variance.clamp(-12.0, 12.0))


def standard_normal(h: Tensor, latent: int) -> Gaussian:
    """N(0, I) for each row of h."""
    zeros = h.new_zeros(len(h), latent)
    return Gaussian(zeros, zeros)


class ConditionalVae(nn.Module):
    """A VAE with prior N(0, I) whose decoder adds what the condition says to what z says: x = W h + f(z, h).

    The first term alone is the network that predicts a code from a description, so nothing is lost against it; both
    terms start at zero, so training starts from the mean.
    """

    def __init__(self, condition: ConditionReader, elements: int, *, latent: int, hidden: int, width: int) -> None:
        super().__init__()
        self.latent = latent
        self.condition = condition
        self.encoder = nn.Sequential(
            nn.Linear(elements + hidden, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * latent)
        )
        self.head = linear_head(hidden, elements)
        self.branch = nn.Sequential(
            nn.Linear(latent + hidden, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), linear_head(width, elements)
        )

    def read(self, pooled: Tensor, tokens: Tensor, mask: Tensor, vector: Tensor | None) -> Tensor:
        """What is known of the task (b, h)."""
        return self.condition(pooled, tokens, mask, vector)

    def encode(self, x: Tensor, h: Tensor) -> Gaussian:
        """q(z|x, h) of x (b, p)."""
        return gaussian(self.encoder(torch.cat([x, h], -1)))

    def prior(self, h: Tensor) -> Gaussian:
        """p(z) = N(0, I)."""
        return standard_normal(h, self.latent)

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Mean (b, p) of p(x|z, h)."""
        return self.head(h) + self.branch(torch.cat([z, h], -1))

    def forward(self, x: Tensor, noise: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor, vector: Tensor | None) -> Reconstruction:
        """Reconstructs x (b, p) through a sample of the posterior made of noise (b, z)."""
        h = self.read(pooled, tokens, mask, vector)
        posterior = self.encode(x, h)
        return Reconstruction(self.decode(posterior.sample(noise), h), posterior, self.prior(h))


class LearnedPriorVae(nn.Module):
    """SG-LoRA's VAE (arXiv 2509.10535): a prior p(z|h) learned beside the encoder q(z|x, h), and a decoder p(x|z, h).

    Encoder and prior are two-layer perceptrons and the decoder has three layers, all with ReLU; widths are not published.

    Args:
        merge: Length of what merged experts say.
        elements: Length p of what is generated.
        latent: Number of latents.
        width: Of the hidden layers.
        reader: Reads the description, and h is its features beside the merge; the decoder then adds W h, as in
            `ConditionalVae`. None is the published network, and h the merge alone.
        features: Number of the reader's features; 0 without one.
    """

    def __init__(
        self, merge: int, elements: int, *, latent: int, width: int, reader: ConditionReader | None = None, features: int = 0
    ) -> None:
        super().__init__()
        self.latent = latent
        size = merge + features
        self.encoder = nn.Sequential(nn.Linear(elements + size, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.prior_network = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent + size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), linear_head(width, elements)
        )
        self.reader = reader
        self.head = None if reader is None else linear_head(size, elements)

    def read(self, merge: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """What is known of the task (b, h), of the merge (b, 2 p) and, with a reader, the description's vectors."""
        return merge if self.reader is None else torch.cat([merge, self.reader(pooled, tokens, mask, None)], -1)

    def encode(self, x: Tensor, h: Tensor) -> Gaussian:
        """q(z|x, h) of x (b, p) and conditions h (b, h)."""
        return gaussian(self.encoder(torch.cat([x, h], -1)))

    def prior(self, h: Tensor) -> Gaussian:
        """p(z|h)."""
        return gaussian(self.prior_network(h))

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Mean (b, p) of p(x|z, h)."""
        decoded = self.decoder(torch.cat([z, h], -1))
        return decoded if self.head is None else decoded + self.head(h)

    def forward(self, x: Tensor, noise: Tensor, merge: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Reconstruction:
        """Reconstructs x (b, p) through a sample of the posterior made of noise (b, z)."""
        h = self.read(merge, pooled, tokens, mask)
        posterior = self.encode(x, h)
        return Reconstruction(self.decode(posterior.sample(noise), h), posterior, self.prior(h))


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


# --- several latents made one: the same in training and at use; n experts, d dimensions ------------------------------


def mean_direction(vectors: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean (d,) of unit vectors of (n, d), given the vectors' weighted mean norm; zero where they cancel."""
    norms = vectors.norm(dim=1)
    direction = weights @ (vectors / norms.clamp_min(1e-12)[:, None])
    length = direction.norm()
    return direction * (weights @ norms) / length if length > 1e-6 else direction * 0


def added_directions(vectors: Tensor, weights: Tensor) -> Tensor:
    """The mean direction (d,), as long as if n vectors at right angles had been added; one alone stays what it is.

    With unequal weights n is their effective number 1 / Σ w².
    """
    return mean_direction(vectors, weights) / weights.square().sum().sqrt()


def resolve_conflicts(vectors: Tensor) -> Tensor:
    """Removes from each of (n, d) its part along every other one that it points against, all as they were given.

    Methods that project one after another depend on the order; here each is projected against the originals.
    """
    gram = vectors @ vectors.T
    along = (gram / gram.diagonal().clamp_min(1e-12)).clamp_max(0.0)
    return vectors - along @ vectors
