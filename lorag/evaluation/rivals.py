"""Adapters that a ladder compares with, and that no description made: drawn at random, or trained on a few examples."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lorag.adapters.factors import Factors
from lorag.bank.experts import ExpertConfig, train_group
from lorag.base.objectives.prompts import draw_shots

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import Runner
    from lorag.progress import Bar
    from lorag.tasks.suite import Task

__all__ = ["WITH_EXAMPLES", "random_like", "train_fresh"]

WITH_EXAMPLES = re.compile(r"(few_shot|fresh)_(\d{1,3})")  # rows that take a number of training examples

_STEPS, _RATE = 60, 5e-3
_TOGETHER = 8  # adapters that are trained at once
_BATCH = 4


def random_like(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """An untrained adapter of the same rank, with the same ‖ΔW‖ at each module: A as PEFT draws it, B normal."""
    rng = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (a, b) in adapter.factors.items():
        bound = 1 / math.sqrt(a.shape[1])
        pairs[name] = ((torch.rand(a.shape, generator=rng) * 2 - 1) * bound, torch.randn(b.shape, generator=rng))
    wanted, drawn = adapter.factors.norms(), Factors(pairs).norms()
    return replace(adapter, factors=Factors({name: (a, b * (wanted[name] / drawn[name])) for name, (a, b) in pairs.items()}), info={})


def train_fresh(runner: Runner, tasks: Sequence[Task], count: int, rank: int, seed: int, bar: Bar) -> list[LoraAdapter]:
    """Trains an adapter from nothing for each task, on `count` of its training examples: those that prompts would show."""
    config = ExpertConfig(steps=_STEPS, batch=min(count, _BATCH), learning_rate=_RATE, checkpoints=1, seed=seed)
    few = [replace(task, examples=tuple(draw_shots(task, count, seed))) for task in tasks]
    adapters: list[LoraAdapter] = []
    for start in range(0, len(few), _TOGETHER):
        trained = train_group(runner, few[start : start + _TOGETHER], rank, config, progress=_Alive(bar))
        adapters += [checkpoints[-1] for checkpoints in trained]
    return adapters


class _Alive:
    """Lets a bar say that work goes on, whose unit is not training steps."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def update(self, n: int = 1) -> None:
        """A step is done."""
        self._bar.update(0)

    def set_postfix(self, values: Any = None, **more: Any) -> None:  # noqa: ANN401 - as tqdm has it
        """Losses are not shown."""
