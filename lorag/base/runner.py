"""A base model with its layout and objective, loaded once: the one way in which adapters are trained, scored and tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.base.objectives import Objective, make_objective
from lorag.base.objectives.base import select
from lorag.base.row_adapters import Cores, RowAdapters, Stacked

if TYPE_CHECKING:
    from lorag.base.bank_base import BankBase
    from lorag.base.layout import LoraLayout
    from lorag.tasks.suite import Task

__all__ = ["Runner"]


class Runner:
    """Runs tasks and texts through one frozen base model, with an adapter for each of them or with none.

    Wherever n adapters meet n tasks, adapter number i works on task number i. Adapters are stacked factors (module ->
    A (n, r, i) and B (n, o, r), scaling folded in), cores in shared bases, or None for the bare base model.

    Args:
        model: The frozen base model, in evaluation mode.
        layout: The modules that adapters change.
        objective: How tasks are learned and scored.
    """

    def __init__(self, model: nn.Module, layout: LoraLayout, objective: Objective) -> None:
        self._rows = RowAdapters(model, layout)
        self.objective = objective

    @classmethod
    def open(cls, base: BankBase, device: str = "auto", dtype: str = "auto") -> Runner:
        """Loads what a bank or a generator states about its base.

        Args:
            base: Base model, layout and objective.
            device: "auto", "cpu" or "cuda".
            dtype: Precision of the frozen base model: "auto", "float32", "bfloat16" or "float16".

        Raises:
            BaseModelError: If the base model cannot be loaded, or does not fit the layout.
            ConfigError: If objective, device or dtype cannot be used.
        """
        objective = make_objective(base.objective, base.model.tokenizer(), base.settings)
        return cls(base.model.load(device, dtype), base.layout, objective)

    @property
    def model(self) -> Any:  # noqa: ANN401 - what a transformers model has beyond nn.Module is used too
        """The base model."""
        return self._rows.model

    @property
    def layout(self) -> LoraLayout:
        """The modules that adapters change."""
        return self._rows.layout

    @property
    def device(self) -> torch.device:
        """Where the base model is; stacked adapters belong there."""
        return self.model.device

    @contextmanager
    def use(self, adapters: Stacked | Cores | None) -> Iterator[Any]:
        """Adapts the base model until the block ends, and yields it.

        Rows of a batch are shared out in equal runs: of b rows, the first b/n belong to the first of n adapters.

        Raises:
            LayoutError: If adapters change other modules than the layout's, or n does not divide a batch's rows.
        """
        if adapters is None:
            yield self.model
            return
        with self._rows.use(adapters) as model:
            yield model

    def losses(self, adapters: Stacked | Cores | None, tasks: Sequence[Task], count: int, seed: str) -> Tensor:
        """Mean loss (n,) of each adapter on `count` training examples of its task; differentiable.

        What is drawn for a task depends on the seed and that task alone.

        Raises:
            TaskError: If a task has no training examples.
        """
        order, found = [], []
        for numbers, batch in self.objective.sample_parts(tasks, count, seed):
            with self.use(select(adapters, numbers)) as model:
                found.append(self.objective.losses(model, batch))
            order += numbers
        return torch.cat(found)[torch.tensor(order).argsort().to(found[0].device)]

    def scores(self, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0) -> list[dict[str, float]]:
        """Scores of each adapter on the first `limit` test examples of its task, `objective.metric` among them.

        Args:
            adapters: n adapters, or None.
            tasks: n tasks.
            limit: Most test examples used of each task.
            seed: Seed of what an objective draws; without effect unless `objective.draws_when_scoring`.

        Raises:
            TaskError: If a task has no test examples.
        """
        return self.objective.scores(self._rows, adapters, tasks, limit=limit, seed=seed)

    def hidden(self, inputs: Sequence[str]) -> Tensor:
        """What the bare base model makes of inputs (b, h)."""
        return self.objective.hidden(self.model, inputs)

    @torch.inference_mode()
    def generate(self, inputs: Sequence[str], adapters: Stacked | Cores | None = None, *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to inputs, which are shared out among the adapters in equal runs.

        Raises:
            ConfigError: If the objective writes no answers (`objective.generates`).
        """
        with self.use(adapters) as model:
            return self.objective.generate(model, inputs, max_new_tokens=max_new_tokens)

    @torch.inference_mode()
    def choose(self, inputs: Sequence[str], candidates: Sequence[str], adapters: Stacked | Cores | None = None) -> list[tuple[str, float]]:
        """The candidate nearest to each input and its cosine, for objectives that write no answers; one adapter, or None."""
        with self.use(adapters) as model:
            vectors = nn.functional.normalize(self.objective.hidden(model, [*inputs, *candidates]), dim=-1)
        values, places = (vectors[: len(inputs)] @ vectors[len(inputs) :].T).max(-1)
        return [(candidates[place], value) for value, place in zip(values.tolist(), places.tolist(), strict=True)]
