"""Build a bank: train an expert for each task of a suite, group by group, each group kept as soon as it is finished."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lorag.adapters.adapter import LoraAdapter
from lorag.banks.bank import AdapterBank, BankBase
from lorag.base_models.base_model import BaseModel
from lorag.base_models.layout import LoraLayout
from lorag.errors import ConfigError
from lorag.objectives import Objective, make_objective
from lorag.optimisation.experts import ExpertConfig, train_group
from lorag.row_adapters import RowAdapters, stack_adapters
from lorag.tasks.suite import Task, TaskSuite

__all__ = ["BankConfig", "build_bank"]

logger = logging.getLogger(__name__)


@dataclass
class BankConfig:
    """A bank to build.

    Attributes:
        out: Folder of the bank.
        tasks: Task suite.
        split: Split of the suite's splits.json; null takes all tasks.
        base: Base model: "sandbox-lm", a hub id or a folder.
        kind: "causal_lm", "seq2seq_lm" or "encoder".
        revision: Revision of the base model on the hub.
        objective: A registered objective.
        objective_settings: Its settings.
        experts: How experts are trained.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen base model while experts train; adapters are always trained in fp32.
    """

    out: str = "runs/bank"
    tasks: str = "sandbox"
    split: str | None = None
    base: str = "sandbox-lm"
    kind: str = "causal_lm"
    revision: str | None = None
    objective: str = "causal_lm"
    objective_settings: dict[str, Any] = field(default_factory=dict)
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    device: str = "auto"
    dtype: str = "auto"


def build_bank(
    folder: str | Path,
    suite: TaskSuite,
    base: BaseModel,
    objective_name: str,
    settings: Mapping[str, Any] | None,
    config: ExpertConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> AdapterBank:
    """Trains an expert for each task and writes a bank; goes on at the last finished group.

    Args:
        folder: The bank.
        suite: Tasks with training examples.
        base: The base model.
        objective_name: A registered objective.
        settings: Its settings.
        config: How experts are trained.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen base model.
        quiet: No progress bar.
    """
    if not config.ranks or config.steps < 1 or config.group < 1 or config.batch < 1 or config.checkpoints < 1:
        raise ConfigError("experts: ranks, steps, group, batch and checkpoints must be positive")
    objective = make_objective(objective_name, base.tokenizer(), settings)
    if objective.kind != base.kind:
        raise ConfigError("objective and base model do not fit", got=f"{objective_name} on a {base.kind}", expected=objective.kind)
    model = base.load(device, dtype)
    layout = LoraLayout.from_model(model, config.target_modules)
    bank = AdapterBank.create(folder, BankBase(base, base.identity(), layout, objective_name, objective.settings()))
    rows = RowAdapters(model, layout)
    order = list(suite)
    random.Random(config.seed).shuffle(order)
    groups = [order[i : i + config.group] for i in range(0, len(order), config.group)]
    finished = sum(task.key in bank for task in order)
    if finished:
        logger.info("%s: %d of %d experts are there; going on with the others", folder, finished, len(order))
    left = [(number, [t for t in group if t.key not in bank]) for number, group in enumerate(groups)]
    left = [(number, group) for number, group in left if group]
    with tqdm(total=len(groups) * config.steps, initial=(len(groups) - len(left)) * config.steps, desc="experts", disable=quiet) as bar:
        for number, group in left:
            rank = config.ranks[number % len(config.ranks)]
            late = train_group(rows, objective, group, rank, config, progress=bar)
            scores = _score(rows, objective, group, late, config)
            details = {
                task.key: {"suite": task.suite, "license": task.license, "score": score, "examples": len(task.split("train"))}
                for task, score in zip(group, scores, strict=True)
            }
            bank = bank.add(
                [(task.key, task.descriptions, own) for task, own in zip(group, late, strict=True)],
                precision=config.precision,
                details=details,
            )
            known = [score for score in scores if score is not None]
            if known:
                bar.write(f"group {number + 1} of {len(groups)}: rank {rank}, mean {objective.metric} {sum(known) / len(known):.3f}")
    return bank


def _score(
    rows: RowAdapters, objective: Objective, tasks: Sequence[Task], late: Sequence[Sequence[LoraAdapter]], config: ExpertConfig
) -> list[float | None]:
    if not config.test_limit or not all(task.split("test") for task in tasks):
        return [None] * len(tasks)
    stacked = stack_adapters([own[-1] for own in late], rows.model.device)
    return [score[objective.metric] for score in objective.scores(rows, stacked, tasks, limit=config.test_limit)]
