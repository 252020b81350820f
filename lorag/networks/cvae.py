"""Conditional VAEs over short vectors: encoder q(z|x, h), prior p(z|h), decoder p(x|z, h), all diagonal Gaussians.

Shape letters: b batch, z latents, p elements of what is generated, h what is known of the task, t tokens, e embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorag.networks.code_networks import Blur, TokenReader, linear_head

__all__ = ["ConditionReader", "ConditionalVae", "Gaussian", "LearnedPriorVae", "Reconstruction"]


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


class ConditionReader(nn.Module):
    """A description's vectors, a task vector, or both, to features (b, hidden).

    Args:
        embedding: Length e of the description's vectors; 0 without a description.
        vector: Length of the task vector; 0 without one.
        width: Of the transformer that reads the description.
        queries: Learned queries of the transformer.
        layers: Of the transformer.
        heads: Of its attention.
        hidden: Number of features.
        dropout: In the transformer and before the features.
        word_dropout: Share of a description's tokens hidden in training.
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
        hidden: int,
        dropout: float,
        word_dropout: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.blur = Blur(word_dropout, noise)
        self.reader = (
            TokenReader(embedding, width=width, queries=queries, layers=layers, heads=heads, dropout=dropout) if embedding else None
        )
        self.vector = nn.Sequential(nn.Linear(vector, width), nn.GELU()) if vector else None
        size = (queries * width if embedding else 0) + (width if vector else 0)
        self.hidden = nn.Sequential(nn.Dropout(dropout), nn.Linear(size, hidden))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor, vector: Tensor | None) -> Tensor:
        """Features of pooled (b, e), tokens (b, t, e) with their mask (b, t), and task vectors (b, v)."""
        parts = []
        if self.reader is not None:
            parts.append(self.reader(*self.blur(pooled, tokens, mask)))
        if self.vector is not None:
            parts.append(self.vector(vector))
        return self.hidden(torch.cat(parts, -1))


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
        known = merge + features
        self.encoder = nn.Sequential(nn.Linear(elements + known, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.beliefs = nn.Sequential(nn.Linear(known, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent + known, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), linear_head(width, elements)
        )
        self.reader = reader
        self.head = None if reader is None else linear_head(known, elements)

    def read(self, merge: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """What is known of the task (b, h), of the merge (b, 2 p) and, with a reader, the description's vectors."""
        return merge if self.reader is None else torch.cat([merge, self.reader(pooled, tokens, mask, None)], -1)

    def encode(self, x: Tensor, h: Tensor) -> Gaussian:
        """q(z|x, h) of x (b, p) and conditions h (b, h)."""
        return gaussian(self.encoder(torch.cat([x, h], -1)))

    def prior(self, h: Tensor) -> Gaussian:
        """p(z|h)."""
        return gaussian(self.beliefs(h))

    def decode(self, z: Tensor, h: Tensor) -> Tensor:
        """Mean (b, p) of p(x|z, h)."""
        made = self.decoder(torch.cat([z, h], -1))
        return made if self.head is None else made + self.head(h)

    def forward(self, x: Tensor, noise: Tensor, merge: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Reconstruction:
        """Reconstructs x (b, p) through a sample of the posterior made of noise (b, z)."""
        h = self.read(merge, pooled, tokens, mask)
        posterior = self.encode(x, h)
        return Reconstruction(self.decode(posterior.sample(noise), h), posterior, self.prior(h))
