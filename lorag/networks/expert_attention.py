"""Attention over a bank's experts: a learned view of descriptions says which experts to trust, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ExpertAttention"]


class ExpertAttention(nn.Module):
    """A weighted mean of the experts' ΔW, with one learned factor a module, and a learned offset for all descriptions alike.

    A few thousand parameters: on a bank of some dozen experts anything larger learns the experts by heart.

    Args:
        keys: Pooled descriptions of the experts (n, e).
        codes: Codes of the experts (n, c).
        zero: Code of the adapter that changes nothing (c,).
        modules: Length of each module's part of a code.
        width: Dimensions of the learned view.
        temperature: Of the softmax over experts, at the start.
        offset: Whether the offset is learned.
    """

    keys: Tensor
    codes: Tensor
    zero: Tensor
    _OFFSET_GAIN = 30.0  # an offset of unit-variance values has to move faster than the weights of the view

    def __init__(
        self, keys: Tensor, codes: Tensor, zero: Tensor, modules: list[int], *, width: int, temperature: float, offset: bool
    ) -> None:
        super().__init__()
        for name, value in (("keys", keys), ("codes", codes), ("zero", zero)):
            self.register_buffer(name, value)
        self.modules_of_code = modules
        self.view = nn.Linear(keys.shape[1], width, bias=False)
        nn.init.normal_(self.view.weight, std=width**-0.5)  # until `hold` turns it
        self.sharpness = nn.Parameter(torch.tensor(1.0 / temperature).log())
        self.strength = nn.Parameter(torch.zeros(len(modules)))
        self.offset = nn.Parameter(torch.zeros(codes.shape[1])) if offset else None

    def hold(self, keys: Tensor, codes: Tensor, zero: Tensor) -> None:
        """Takes over a bank's experts, and turns the untrained view to the directions in which their descriptions lie.

        Training then starts from plain similarity. A random view of few dimensions does not keep cosines: its error, the root of one
        in `width`, is as large as what tells one expert from another.

        Args:
            keys: Pooled descriptions of the experts (n, e).
            codes: Their codes (n, c).
            zero: Code of the adapter that changes nothing (c,).
        """
        device = self.view.weight.device
        self.keys, self.codes, self.zero = keys.to(device), codes.to(device), zero.to(device)
        # The products of all values (e, e) have the right singular vectors, whatever the number of experts.
        directions = torch.linalg.eigh(keys.double().T @ keys.double()).eigenvectors.flip(1).T[: len(self.view.weight)]
        with torch.no_grad():
            self.view.weight.zero_()
            self.view.weight[: len(directions)] = directions.to(self.view.weight)

    def weights(self, pooled: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Weights (b, n) of the experts for pooled descriptions (b, e); experts where `hidden` (b, n) is true get none."""
        query, key = F.normalize(self.view(pooled), dim=-1), F.normalize(self.view(self.keys), dim=-1)
        scores = query @ key.T * self.sharpness.exp()
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1)

    def forward(self, pooled: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Codes (b, c) for pooled descriptions (b, e)."""
        change = self.weights(pooled, hidden) @ (self.codes - self.zero)
        factors = torch.cat([s.expand(size) for s, size in zip(self.strength.exp(), self.modules_of_code, strict=True)])
        mixed = self.zero + factors * change
        return mixed if self.offset is None else mixed + self._OFFSET_GAIN * self.offset
