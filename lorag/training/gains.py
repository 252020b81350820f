"""Gains: the share of the gap between base model and expert that generated codes close, measured on tasks' examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.generator.lora_generator import LoraGenerator
from lorag.tasks.suite import Task

__all__ = ["gains_of", "score_codes", "share_closed"]

_CHUNK = 32
_LEAST_GAP = 0.05  # between base and expert; below it a share of the gap is noise
_GAINS = (-1.0, 1.0)  # an expert that learned little is easily beaten by several times its gap


def score_codes(generator: LoraGenerator, codes: Tensor | None, tasks: Sequence[Task], limit: int, strengths: Sequence[float]) -> Tensor:
    """Scores (n,) of codes (n, c), each on its task and with its factor on ΔW; without codes, those of the bare base model."""
    runner = generator.runner()
    found: list[float] = []
    for start in range(0, len(tasks), _CHUNK):
        part, own = tasks[start : start + _CHUNK], None
        if codes is not None:
            part_strengths = strengths[start : start + _CHUNK]
            decoded = generator.space.decode(codes[start : start + _CHUNK], generator.rank)
            scaled = [factors.scaled(strength) for factors, strength in zip(decoded, part_strengths, strict=True)]
            own = Factors.stack(scaled, runner.device)
        found += [score[runner.objective.metric] for score in runner.scores(own, part, limit=limit)]
    return torch.tensor(found, dtype=torch.float64)


def gains_of(
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
    floor = score_codes(generator, None, mine, limit, ())
    ceiling: list[float] = []
    for start in range(0, len(distinct), _CHUNK):
        experts = Factors.stack([bank.adapter(name).factors for name in distinct[start : start + _CHUNK]], runner.device)
        ceiling += [s[runner.objective.metric] for s in runner.scores(experts, mine[start : start + _CHUNK], limit=limit)]
    place = torch.tensor([distinct.index(name) for name in names])
    made = score_codes(generator, codes, [tasks[name] for name in names], limit, strengths or [generator.strength] * len(names))
    return share_closed(made, floor[place], torch.tensor(ceiling, dtype=torch.float64)[place])


def share_closed(scores: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """Share of the gap between base model and expert that scores (n,) close, -1 to 1; NaN where there is no gap."""
    gap = ceiling - floor
    share = ((scores - floor) / gap.clamp_min(_LEAST_GAP)).clamp(*_GAINS)
    return torch.where(gap >= _LEAST_GAP, share, torch.full_like(share, torch.nan))
