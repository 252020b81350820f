"""What methods learn from, as plain data: codes of experts, embedded descriptions, tasks with examples, and who must not see whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lorag.errors import GeneratorError

if TYPE_CHECKING:
    from lorag.spaces.weight_space import WeightSpace
    from lorag.tasks.suite import Task
    from lorag.text.conditioning import Conditioner
    from lorag.text.embedding import Embedding

__all__ = ["TrainingSet"]


@dataclass(frozen=True)
class TrainingSet:
    """Tasks to learn from. The first n have an expert, whose code is known; the others have descriptions and examples alone.

    Where a method learns from examples, through the base model, all tasks count alike.

    Attributes:
        space: The weight space of the codes, where the base model runs.
        codes: Codes of the n experts (n, c), on the CPU; n may be 0.
        deviations: Standard deviations over their checkpoints (n, c).
        embeddings: Embedded descriptions of each task.
        groups: Group of each task, as in scikit-learn's GroupKFold: a group is held out as a whole, and a task
            that is treated as unseen sees no expert of its group.
        training: Tasks that may be learned from, ascending.
        validation: Tasks held out for early stopping and calibration, ascending; never tasks of the test split.
        conditioner: Compares descriptions with those of the experts.
        tasks: The tasks with their examples; empty without examples, and every task has an expert then.
        alignment: For a space of activation bases, the map (g, e, k) from embeddings to its input directions; None for others.
    """

    AVERAGED: ClassVar[int] = 16

    space: WeightSpace
    codes: Tensor
    deviations: Tensor
    embeddings: Sequence[Sequence[Embedding]]
    groups: Sequence[int]
    training: Sequence[int]
    validation: Sequence[int]
    conditioner: Conditioner
    tasks: Sequence[Task] = ()
    alignment: Tensor | None = None

    @property
    def embedding_size(self) -> int:
        """Length e of the vectors of descriptions."""
        return self.embeddings[0][0].pooled.shape[-1]

    def averaged(self, task: int) -> Sequence[Embedding]:
        """The descriptions of a task over which what is read of it is averaged: its first `AVERAGED`."""
        return self.embeddings[task][: self.AVERAGED]

    @property
    def training_experts(self) -> list[int]:
        """Training tasks that have an expert."""
        return [i for i in self.training if i < len(self.codes)]

    @property
    def validation_experts(self) -> list[int]:
        """Held-out tasks that have an expert."""
        return [i for i in self.validation if i < len(self.codes)]

    def masked(self, tasks: Sequence[int], *, validation: bool = False) -> Tensor:
        """Which experts (b, n) each of some tasks must not see where it is treated as unseen: those of its group.

        Args:
            tasks: b tasks.
            validation: Whether the held-out experts are masked too, as while a method trains.
        """
        groups = torch.tensor(list(self.groups))
        mask = groups[list(tasks), None] == groups[None, : len(self.codes)]
        if validation:
            mask[:, self.validation_experts] = True
        return mask

    def require_experts(self, name: str) -> None:
        """Refuses a bank without experts, for a method that learns from their codes alone.

        Raises:
            GeneratorError: If no training task has an expert.
        """
        if not self.training_experts:
            raise GeneratorError(
                f"{name} learns from experts, and there is none to learn from",
                remedy="Train experts with lorag bank build, or choose a method that learns from examples: method=house.",
            )
