"""Fuse adapters into one, by name: by the rules of `merging`, by `regmean`, or by `latent_fusion`.

One adapter serves several tasks only if their inputs tell them apart: of two tasks on the same texts it can solve one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.formats import named_base
from lorag.adapters.merging import MERGES, aligned, merge
from lorag.bank.bank import find_bank
from lorag.base.runner import Runner
from lorag.errors import ConfigError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods.support_examples import few_examples, learn_weights, warn_of_shared_inputs
from lorag.tasks.finding import find_tasks
from lorag.training.controls import compare_with_fresh
from lorag.training.latent_fusion import RULES, distinct, fuse_experts
from lorag.training.regmean import regmean

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.tasks.suite import Task

__all__ = ["RULES", "fuse", "fuse_experts", "read_weights"]

_METHODS = (*MERGES, "regmean", "icm_fusion")
_LEARNED_FROM = 8  # examples of each task that `cat` learns its weights from


def fuse(
    names: Sequence[str] | Mapping[str, float],
    *,
    bank: str | None = "sandbox",
    method: str = "mean",
    generator: str | None = None,
    rule: str = "uniform",
    tasks: str | None = None,
    rank: int | None = None,
    base_model: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> LoraAdapter:
    """Opens everything by name and fuses adapters into one.

    Args:
        names: Experts of the bank, or, without a bank, adapter folders, files in any format and hub ids, of any ranks and scalings; as a
            mapping, with the weight of each.
        bank: Bank folder, hub id, or "sandbox"; None for adapters that are in no bank.
        method: A rule of `merging`; "regmean", which needs the tasks; or "icm_fusion".
        generator: Folder of an `icm_fusion` generator, for that method only.
        rule: Its rule.
        tasks: Suite of the experts' tasks: tasks that share inputs are warned of, `cat` learns its weights and warns where an adapter
            trained from nothing on the same examples does better (`info["controls"]`), and
            `icm_fusion` may learn; `regmean` looks at what flows through the base model on their examples.
        rank: Rank of the result.
        base_model: Base model of adapters in no bank whose files do not say it.
        seed: Seed of `dare_ties`, and of the choice of examples.
        device: Where the base model runs.

    Raises:
        AdapterError: If an adapter cannot be read, the adapters do not belong together, or a weight cannot be used.
        ConfigError: If the method is unknown, or a setting asks for a bank or a generator that is not given.
        BankError: If the bank has no such expert.
    """
    weights = list(names.values()) if isinstance(names, Mapping) else None
    names = distinct(list(names))
    _check_together(bank, method, generator, tasks, base_model)
    rng = torch.Generator().manual_seed(seed)
    if bank is None:
        return merge(_loose(names, base_model), method, weights=weights, rank=rank, rng=rng)
    experts = find_bank(bank)
    for name in names:
        experts[name]  # raises before anything is loaded
    suite = find_tasks(tasks) if tasks is not None else None
    if generator is not None:
        opened = LoraGenerator.from_pretrained(generator, device=device)
        shares = None if weights is None else dict(zip(names, weights, strict=True))
        return fuse_experts(opened, experts, names, rule=rule, suite=suite, weights=shares, rank=rank, seed=seed)
    if suite is None:
        return experts.fuse(names, method, rank=rank, weights=weights, rng=rng)
    experts.base.check()
    runner, their_tasks = Runner.open(experts.base, device), suite.of_experts(names)
    warn_of_shared_inputs(runner, their_tasks)
    if method == "regmean":
        return regmean(runner, list(experts.adapters(names)), their_tasks, weights=weights, rank=rank, seed=seed)
    if method == "cat" and weights is None:
        return _learned(runner, experts, names, their_tasks, rank, seed)
    return experts.fuse(names, method, rank=rank, weights=weights, rng=rng)


def _check_together(bank: str | None, method: str, generator: str | None, tasks: str | None, base_model: str | None) -> None:
    """Refuses what cannot be given together, before anything is opened."""
    if method not in _METHODS:
        raise ConfigError("method of fusion is unknown", got=repr(method)[:80], expected=", ".join(_METHODS))
    if (generator is None) == (method == "icm_fusion"):
        raise ConfigError(
            "method icm_fusion and a generator belong together",
            got=f"method {method}, generator {generator}",
            remedy="Train one with lorag train method=icm_fusion out=DIR, then --method icm_fusion --generator DIR.",
        )
    if method == "regmean" and tasks is None:
        raise ConfigError("method regmean needs examples of the experts' tasks", remedy="Give their suite with --tasks SUITE.")
    if bank is None and (tasks is not None or generator is not None):
        raise ConfigError("tasks and generators are of a bank's experts", got="no bank", remedy="Add the adapters to one.")
    if bank is not None and base_model is not None:
        raise ConfigError("a base model is given for adapters in no bank", got=f"bank {bank}", remedy="Leave one of the two out.")


def _loose(names: Sequence[str], base_model: str | None) -> list[LoraAdapter]:
    """Adapters that are in no bank, by folder, file or hub id, with the same modules all of them."""
    base = named_base(base_model).model
    adapters = [LoraAdapter.from_pretrained(name, repair=True, base=base) for name in names]
    return aligned(
        [
            replace(one, base_model=one.base_model or base_model, info={"expert": Path(name).name, **one.info})
            for name, one in zip(names, adapters, strict=True)
        ]
    )


def _learned(runner: Runner, bank: AdapterBank, names: Sequence[str], tasks: Sequence[Task], rank: int | None, seed: int) -> LoraAdapter:
    """Experts by `cat` with weights learned on a few examples, and what an adapter trained on the same examples is worth beside it."""
    support = [few_examples(task, _LEARNED_FROM, seed) for task in tasks]
    weights = learn_weights(runner, list(bank.adapters(names)), support, seed=seed)
    merged = bank.fuse(names, "cat", rank=rank, weights=weights)
    controls = compare_with_fresh(runner, merged, tasks, support, rank=max(bank[name].rank for name in names), seed=seed)
    return merged if controls is None else replace(merged, info={**merged.info, "controls": controls})


def read_weights(names: Sequence[str]) -> list[str] | dict[str, float]:
    """Names, or names with weights where they are written NAME=WEIGHT.

    Raises:
        ConfigError: If some have a weight and others do not.
    """
    pairs = {name: weight for name, sign, weight in (text.rpartition("=") for text in names if not Path(text).exists()) if sign}
    if not pairs:
        return list(names)
    if len(pairs) != len(names):
        raise ConfigError("weights are given to some adapters only", got=", ".join(names)[:120], expected="one for each, or none")
    try:
        return {name: float(weight) for name, weight in pairs.items()}
    except ValueError as error:
        raise ConfigError("a weight is not a number", got=", ".join(names)[:120], expected="NAME=WEIGHT, such as legal=.7") from error
