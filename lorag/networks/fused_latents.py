"""What several experts' latents become together: pure maths, the same in training and at use.

Shape letters: n experts, d dimensions.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["added_directions", "mean_direction", "resolve_conflicts"]


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
