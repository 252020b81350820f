"""Calibrate: the strength of what a method generates, and the share of the gap between base and expert that codes close."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.adapters.factors import Factors
from lorag.methods.functional import evenly, mean_loss, task_vectors
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.base.runner import Runner
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.methods import Method, TrainingSet
    from lorag.tasks.suite import Task

__all__ = ["gap_closed", "gap_closed_by", "scores_in_parts", "tune_strength"]

_ASKED = 64  # tasks, counted as often as they are asked, on which the strength is chosen
_STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
_CHUNK = 32
_LEAST_GAP = 0.05  # between base and expert; below it a share of the gap is noise
_GAINS = (-1.0, 1.0)  # an expert that learned little is easily beaten by several times its gap


def tune_strength(
    method: Method, data: TrainingSet, runner: Runner | None, rng: torch.Generator, most: int = 48, *, quiet: bool = True
) -> float:
    """The factor on ΔW with the lowest loss on held-out training tasks, each conditioned as if it were unseen.

    The same rule for every method, so that none gains from its scale alone. The fewer tasks are held out, the more often each is
    asked. 1 without examples or held-out tasks.
    """
    if runner is None or not data.tasks or not data.validation:
        return 1.0
    chosen = evenly(data.validation, most)
    vectors = task_vectors(runner, [data.tasks[i] for i in chosen]).cpu() if method.needs_task_vectors else [None] * len(chosen)
    conditions = [
        replace(data.conditioner(data.embeddings[i][-1], masked=mask), task_vector=vector)
        for i, mask, vector in zip(chosen, data.masked(chosen), vectors, strict=True)
    ]
    codes = torch.cat([method.generate(condition, rng).cpu() for condition in conditions])
    losses: dict[float, float] = {}
    draws = max(1, _ASKED // len(chosen))
    with progress_bar(total=len(_STRENGTHS) * draws, desc=f"strength of {method.name}", disable=quiet, leave=False) as bar:
        for strength in _STRENGTHS:
            scaled, asked = data.space.scaled(codes, strength).to(runner.device), 0.0
            for draw in range(draws):
                asked += mean_loss(runner, data, scaled, chosen, 4, f"strength/{draw}")
                bar.update()
            losses[strength] = asked / draws
    return min(losses, key=lambda strength: losses[strength])


def gap_closed_by(
    generator: LoraGenerator,
    codes: Tensor,
    names: Sequence[str],
    bank: AdapterBank,
    tasks: Mapping[str, Task],
    limit: int,
    strengths: Sequence[float] | None = None,
) -> Tensor:
    """Share of the gap between base model and expert that codes (n, c) close, -1 to 1, each on its task; NaN where there is no gap.

    Args:
        generator: Whose base model, weight space and strength are used.
        codes: One for each name.
        names: Experts' names; one may occur again, its base and expert are then scored once.
        bank: The experts.
        tasks: Their tasks by name.
        limit: Most examples of each.
        strengths: Factor on the ΔW of each; by default the generator's own for all.
    """
    runner = generator.runner()
    distinct = list(dict.fromkeys(names))
    mine = [tasks[name] for name in distinct]
    factor = strengths or [generator.strength] * len(names)

    def generated(some: slice) -> list[Factors]:
        decoded = generator.space.decode(codes[some], generator.rank)
        return [factors.scaled(one) for factors, one in zip(decoded, factor[some], strict=True)]

    floor = scores_in_parts(runner, None, mine, limit)
    ceiling = scores_in_parts(runner, lambda some: [bank.adapter(name).factors for name in distinct[some]], mine, limit)
    reached = scores_in_parts(runner, generated, [tasks[name] for name in names], limit)
    place = torch.tensor([distinct.index(name) for name in names])
    return gap_closed(reached, floor[place], ceiling[place])


def scores_in_parts(runner: Runner, adapters: Callable[[slice], list[Factors]] | None, tasks: Sequence[Task], limit: int) -> Tensor:
    """Scores (n,) of adapters, each on its task; some are made at a time, since all together may not fit into memory."""
    scores: list[float] = []
    for start in range(0, len(tasks), _CHUNK):
        some = slice(start, start + _CHUNK)
        stacked = None if adapters is None else Factors.stack(adapters(some), runner.device)
        scores += [score[runner.objective.metric] for score in runner.scores(stacked, tasks[some], limit=limit)]
    return torch.tensor(scores, dtype=torch.float64)


def gap_closed(scores: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """Share of the gap between base model and expert that scores (n,) close, -1 to 1; NaN where there is no gap."""
    gap = ceiling - floor
    share = ((scores - floor) / gap.clamp_min(_LEAST_GAP)).clamp(*_GAINS)
    return torch.where(gap >= _LEAST_GAP, share, torch.full_like(share, torch.nan))
