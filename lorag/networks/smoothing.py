"""Features of a description, drawn towards those of training tasks near it that give the same answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FeatureSmoothing"]


class FeatureSmoothing(nn.Module):
    """Kernel regression (Nadaraya and Watson) among tasks that give the same answers.

    Tasks that all answer "yes" or "no" need the same output, whatever they are about. What a reader's features say beyond that differs
    from one wording to the next, and of a task that training never saw it is mostly noise.

    ```text
    f' = f + Σ_s p(s | f) (m_s(f) − f)        m_s(f) = Σ_i w_i c_i / Σ_i w_i,  w_i = exp(−‖f − c_i‖² / 2 width²)
    ```

    Args:
        features: Length f of the features.
        counts: Number of tasks in each of s sets of answers; without any, features stay as they are.
    """

    weights: Tensor
    bias: Tensor
    centres: Tensor
    width: Tensor

    def __init__(self, features: int, counts: Sequence[int] = ()) -> None:
        super().__init__()
        self.counts = tuple(counts)
        if self.counts:
            self.register_buffer("weights", torch.zeros(len(self.counts) + 1, features))  # the last: no set of these
            self.register_buffer("bias", torch.zeros(len(self.counts) + 1))
            self.register_buffer("centres", torch.zeros(sum(self.counts), features))
            self.register_buffer("width", torch.ones(()))

    def forward(self, features: Tensor, masked: Tensor | None = None) -> Tensor:
        """Smooths features (b, f).

        Args:
            features: The features.
            masked: While a network learns, the number of the centre of each one's own task (b,), which then does not count, or −1.
        """
        if not self.counts:
            return features
        likely = (features @ self.weights.T + self.bias).softmax(-1)
        smooth, first = features, 0
        for number, centres in enumerate(self.centres.split(self.counts)):
            # Not by a matrix product, which rounds away the small distances that a narrow kernel compares.
            distances = torch.cdist(features, centres, compute_mode="donot_use_mm_for_euclid_dist")
            if masked is not None:
                distances = distances.masked_fill(
                    torch.arange(first, first + len(centres), device=masked.device) == masked[:, None], math.inf
                )
            first += len(centres)
            near = (-distances.square() / (2 * self.width.square())).softmax(-1) @ centres
            smooth = smooth + likely[:, number, None] * (near - features)
        return smooth
