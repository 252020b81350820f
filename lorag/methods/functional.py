"""The loss of the frozen base model as a function of codes: its gradients reach whatever made the codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorag.base.objectives import Objective
from lorag.base.objectives.base import training_examples
from lorag.base.row_adapters import RowAdapters
from lorag.spaces.weight_space import WeightSpace
from lorag.tasks.suite import Task

__all__ = ["TaskLoss"]


class TaskLoss:
    """Runs codes as adapters on tasks.

    Args:
        rows: The frozen base model.
        objective: How tasks are learned and scored.
        space: Turns codes into what the base model runs.
        tasks: The tasks of the bank's experts, in the bank's order.
    """

    def __init__(self, rows: RowAdapters, objective: Objective, space: WeightSpace, tasks: Sequence[Task]) -> None:
        self.rows, self.objective, self.space, self.tasks = rows, objective, space, tuple(tasks)

    def losses(self, codes: Tensor, indices: Sequence[int], count: int, seed: str) -> Tensor:
        """Loss (b,) of code number i on `count` training examples of task `indices[i]`; differentiable."""
        batch = self.objective.sample([self.tasks[i] for i in indices], count, seed)
        with self.rows.use(self.space.differentiable(codes)) as model:
            return self.objective.losses(model, batch)

    def task_vectors(self, indices: Sequence[int], count: int = 32) -> Tensor:
        """Task vectors (b, h): the bare base model's mean hidden state over `count` training inputs of each task.

        ICM-LoRA's condition (arXiv 2501.17635), but from the base model without an adapter, as it must be at use.
        """
        found = []
        for index in indices:
            inputs = [example.input for example in training_examples(self.tasks[index])[:count]]
            found.append(self.objective.hidden(self.rows.model, inputs).mean(0))
        return torch.stack(found)

    def loss(self, codes: Tensor, indices: Sequence[int], count: int, seed: str, chunk: int = 32) -> float:
        """Mean loss without gradients, in chunks that bound memory."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(indices), chunk):
                part = slice(start, start + chunk)
                total += self.losses(codes[part], indices[part], count, seed).sum().item()
        return total / len(indices)
