"""Tasks of which a network that goes on from another run says what it said before, while it learns the others through the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.methods.method import draw

if TYPE_CHECKING:
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.text.embedding import Embedding

__all__ = ["KeptTasks", "Predict"]

Predict = Callable[[Sequence[int], Sequence["Embedding"]], Tensor]  # codes (b, c) of tasks (indices) that embeddings describe

_BESIDE = 2  # kept tasks beside each task of a step
_LEAST = 1e-8  # spread of tasks of which the same is said


@dataclass(frozen=True)
class KeptTasks:
    """Learning without forgetting (arXiv 1606.09282), on codes instead of answers: no base model runs for these tasks.

    ```text
    loss = weight · ‖c(d) − c₀(d)‖² / mean_i ‖c₀(d_i) − c̄₀‖²        c₀: what was said before of a description d
    ```

    Attributes:
        data: All tasks.
        tasks: Those that are kept (indices); steps through the base model leave them out.
        before: What was said of them.
        weight: Of the loss beside the base model's.
        spread: Mean squared distance of their codes from the mean of them.
    """

    data: TrainingSet
    tasks: Sequence[int]
    before: Predict
    weight: float
    spread: float

    @classmethod
    def of(cls, data: TrainingSet, tasks: Sequence[int], before: Predict, weight: float) -> KeptTasks:
        """Measures the spread, on the first description of each task."""
        total, squares = torch.zeros((), dtype=torch.float64), 0.0
        with torch.no_grad():
            for i in tasks:  # one at a time: many codes at once would fill memory
                code = before([i], [data.embeddings[i][0]])[0].cpu().double()
                total, squares = total + code, squares + code.square().sum().item()
        spread = squares / len(tasks) - (total / len(tasks)).square().sum().item()
        return cls(data, tasks, before, weight, max(spread, _LEAST))

    def draw(self, count: int, loop: TrainingLoop) -> list[list[tuple[int, Embedding]]]:
        """For each of `count` tasks of a step those beside it, each with one of its descriptions."""
        rows = [self.tasks[place] for place in torch.randint(len(self.tasks), (count * _BESIDE,), generator=loop.rng).tolist()]
        drawn = list(zip(rows, draw(self.data, rows, loop), strict=True))
        return [drawn[start : start + _BESIDE] for start in range(0, len(drawn), _BESIDE)]

    def losses(self, predict: Predict, drawn: Sequence[Sequence[tuple[int, Embedding]]]) -> Tensor:
        """The loss (b,) of what is said now of what was drawn beside b tasks."""
        rows, embeddings = zip(*(one for some in drawn for one in some), strict=True)
        with torch.no_grad():
            before = self.before(rows, embeddings)
        far = (predict(rows, embeddings) - before).square().sum(-1)
        return self.weight / self.spread * far.view(len(drawn), -1).mean(1)
