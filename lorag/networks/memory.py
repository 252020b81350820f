"""What was learned of each known task, recalled by how near a description lies to those of the task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TaskMemory"]

_TEMPERATURE = 0.03
_RATE = 0.3  # of values beside other weights: a value is met in few steps, and Adam moves what it seldom sees the most
_NOTHING = 0.5  # cosine beyond which a task is recalled rather than nothing, to begin with


class TaskMemory(nn.Module):
    """Attention over known tasks, with a free value for each: what a reader cannot tell of a task, a value can hold.

    ```text
    m(x) = Σ_i w_i v_i        w = softmax over tasks i, and nothing, of cos(P (x − centre), k_i) / temperature
    ```

    Args:
        embedding: Length e of a description's vector.
        features: Length f of a value.
        count: Number n of tasks; without any, nothing is recalled.
        directions: Length d of a key.
    """

    centre: Tensor
    projection: Tensor
    keys: Tensor

    def __init__(self, embedding: int, features: int, count: int = 0, directions: int = 0) -> None:
        super().__init__()
        self.features, self.count = features, count
        if count:
            self.register_buffer("centre", torch.zeros(embedding))
            self.register_buffer("projection", torch.zeros(directions, embedding))
            self.register_buffer("keys", torch.zeros(count, directions))
            self.values = nn.Parameter(torch.zeros(count, features))
            self.nothing = nn.Parameter(torch.tensor(_NOTHING))

    def key(self, vectors: Tensor) -> Tensor:
        """Keys (..., d) of descriptions' vectors (..., e), each of unit length, or of their means."""
        return nn.functional.normalize((vectors - self.centre) @ self.projection.T, dim=-1)

    def forward(self, pooled: Tensor, places: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """What is recalled (b, f) of descriptions' vectors (b, e).

        Args:
            pooled: The vectors.
            places: While it learns, the number of each description's own task (b,), or −1 of a task that is not known.
            keys: That task's key without the descriptions that it must not have seen (b, d); zero where none is left, and then the
                task is not recalled.
        """
        if not self.count:
            return pooled.new_zeros(len(pooled), self.features)
        key = self.key(nn.functional.normalize(pooled, dim=-1))
        near = torch.cat([key @ self.keys.T, self.nothing.expand(len(key), 1)], 1)
        if places is not None and keys is not None:
            known = places >= 0
            itself = torch.where(keys.any(1), (key * keys).sum(1), -1.0)[:, None]
            near = torch.where(known[:, None], near.scatter(1, places.clamp_min(0)[:, None], itself), near)
        return _RATE * (near / _TEMPERATURE).softmax(-1)[:, :-1] @ self.values
