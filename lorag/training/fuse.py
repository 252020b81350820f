"""Fuse tasks into one adapter: by the rules of `merging`, by `regmean`, or in the latents of a fitted `icm_fusion` generator.

One adapter serves several tasks only if their inputs tell them apart: of two tasks on the same texts it can solve one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.formats import named_base
from lorag.adapters.merging import MERGES, aligned, merge
from lorag.adapters.provenance import base_fields, parents, versions
from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.runner import Runner
from lorag.errors import ArtifactError, ConfigError
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.refine import refine
from lorag.methods.icm_fusion import IcmFusion
from lorag.methods.support_examples import Reduction, few_examples, learn_weights, minimise, warn_of_shared_inputs
from lorag.networks.vae import resolve_conflicts
from lorag.tasks.finding import find_tasks
from lorag.training.controls import compare_with_fresh
from lorag.training.regmean import regmean

if TYPE_CHECKING:
    from lorag.tasks.suite import Task, TaskSuite

__all__ = ["RULES", "fuse", "fuse_experts", "read_weights"]

RULES = ("uniform", "conflict", "learned")
_METHODS = (*MERGES, "regmean", "icm_fusion")
_LEARNED_FROM = 8  # examples of each task that `cat` learns its weights from


# --- rules ------------------------------------------------------------------------------------------------------------


def _start_weights(names: Sequence[str], weights: Mapping[str, float] | None) -> Tensor:
    """The given weights (n,) at a sum of 1; equal ones without."""
    start = torch.tensor([1.0 if weights is None else float(weights[name]) for name in names])
    if not (start.isfinite().all() and (start > 0).all()):
        raise ConfigError("weights of fused tasks must be positive numbers", got=str(start.tolist())[:80])
    return start / start.sum()


# --- in the latents of a generator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Members:
    """The tasks to be fused, sorted by name: posterior means (n, z), standardised task vectors (n, v)."""

    names: tuple[str, ...]
    latents: Tensor
    vectors: Tensor


def _members(
    generator: LoraGenerator, method: IcmFusion, bank: AdapterBank, names: Sequence[str], adapters: Mapping[str, LoraAdapter]
) -> _Members:
    latents, vectors = [], []
    place_of = {name: index for index, name in enumerate(generator.conditioner.names)}
    for name in names:
        if name in place_of:
            vector = method.vectors[place_of[name]]
        elif method.settings.condition == "description":
            pooled = torch.stack([one.pooled for one in generator.embedder.embed(list(bank[name].descriptions))])
            vector = method.standardise(F.normalize(pooled.mean(0), dim=0))
        else:
            raise ConfigError(
                f"expert {name!r} is unknown to the generator, whose task vectors come from examples",
                remedy="Fit the generator on a bank that has it, or with settings.condition=description.",
            )
        if name in place_of and name not in adapters:
            latents.append(method.latents[place_of[name]])
        else:
            code = generator.space.encode((adapters.get(name) or bank.adapter(name)).factors)
            latents.append(method.encode(code[None], vector[None]).mean[0])
        vectors.append(vector)
    return _Members(tuple(names), torch.stack(latents), torch.stack(vectors))


def fuse_experts(
    generator: LoraGenerator,
    bank: AdapterBank,
    names: Sequence[str],
    *,
    rule: str = "uniform",
    suite: TaskSuite | None = None,
    reduction: Reduction = "sum",
    steps: int = 100,
    examples: int = 8,
    learning_rate: float = 0.05,
    weights: Mapping[str, float] | None = None,
    adapters: Mapping[str, LoraAdapter] | None = None,
    refine_steps: int = 0,
    rank: int | None = None,
    seed: int = 0,
) -> LoraAdapter:
    """Fuses experts of a bank into one adapter, decoded from one latent (ICM-Fusion, arXiv 2508.04153).

    The paper leaves weights and "orientation" open. The rules, in rising cost, for latents and task vectors alike:
    `uniform` takes the weighted mean of unit vectors and restores their mean norm (latents of a generator that was trained
    on sets: the norm of their sum); `conflict` first removes from each
    vector its parts along vectors that it points against; `learned` starts from `uniform` and learns the weights (a
    softmax) and a linear map of the latents by the tasks' losses on a few examples.

    Args:
        generator: A fitted `icm_fusion` generator.
        bank: Holds the experts; of those that the generator was fitted on, their stored posteriors are taken.
        names: Experts; order does not matter. One alone gives its decoded adapter.
        rule: "uniform", "conflict" or "learned".
        suite: The experts' tasks, for `learned` and for refinement; with it, tasks that share inputs are warned of.
        reduction: What `learned` lowers: the "sum" of the tasks' losses, or the "worst" of them.
        steps: Gradient steps of `learned`.
        examples: Most training examples of each task that `learned` and refinement see.
        learning_rate: Of the weights' logarithms; of the map, this over z.
        weights: Of each task, by name; equal without. `learned` starts from them.
        adapters: Experts that stand for the bank's, by name, such as ones trained on fewer examples.
        refine_steps: K, gradient steps of the decoded adapter on a mixture of the tasks' examples.
        rank: Rank of the adapter; the generator's without.
        seed: Seed of the choice of examples.

    Raises:
        ConfigError: If the generator is of another method, a rule is unknown, or examples are needed and missing.
    """
    method = generator.method
    if not isinstance(method, IcmFusion):
        raise ConfigError("the generator cannot fuse", got=method.name, expected="one trained with method=icm_fusion")
    if rule not in RULES or reduction not in ("sum", "worst"):
        raise ConfigError("rule of fusion is unknown", got=f"{rule}, {reduction}", expected=f"{', '.join(RULES)}; sum or worst")
    if generator.base != bank.base:
        raise ArtifactError("the generator was not trained on a bank of this base", got=generator.base.model.name)
    names = sorted(_distinct(names))
    if suite is None and (rule == "learned" or refine_steps):
        raise ConfigError("rule learned and refine_steps need examples of the tasks", remedy="Give their suite with tasks=PATH.")
    members = _members(generator, method, bank, names, adapters or {})
    start = _start_weights(names, weights)
    latents, vectors = members.latents, members.vectors
    if rule == "conflict":
        latents, vectors = resolve_conflicts(latents), resolve_conflicts(vectors)
    logits = start.log()
    turn, size = torch.zeros(latents.shape[1], latents.shape[1]), latents.shape[1]

    def shares() -> Tensor:
        return torch.softmax(logits, 0)

    def code() -> Tensor:
        z, v = method.fuse(latents, vectors, shares())
        return method.decode((z + turn @ z)[None], v[None])

    support: list[Task] = []
    reduced: tuple[float, float] | None = None
    if suite is not None:
        tasks = suite.of_experts(names)
        runner = generator.runner()
        warn_of_shared_inputs(runner, tasks)
        support = [few_examples(task, examples, seed) for task in tasks]
        if rule == "learned":
            space = generator.space.to(runner.device)
            for parameter in (logits, turn):
                parameter.requires_grad_()

            def losses(draw: str, count: int) -> Tensor:
                codes = code().to(runner.device).expand(len(names), -1)
                return runner.losses(space.differentiable(codes), support, count, f"fusion/{seed}/{draw}")

            reduced = minimise([([logits], learning_rate), ([turn], learning_rate / size)], losses, steps, reduction)
    with torch.no_grad():
        (factors,) = generator.space.decode(code(), rank or generator.rank)
        learned = shares().tolist()
    base = generator.base.model
    adapter = LoraAdapter(generator.base.layout, factors, base.name, base.task_type, revision=base.revision)
    if refine_steps:
        pairs = [(example.input, example.output) for task in support for example in task.examples]
        adapter = refine(generator.runner(), adapter, pairs, refine_steps, seed)
    info: dict[str, Any] = {
        "method": method.name,
        "experts": list(names),
        "settings": {"rule": rule, "weights": {name: round(w, 4) for name, w in zip(names, learned, strict=True)}},
        "refine_steps": refine_steps,
        "seed": seed,
        "generator": {"revision": generator.revision},
        "base_model": base_fields(base, generator.base.identity, generator.base.layout, generator.base.settings),
        "parents": parents(names, {name: bank[name].license for name in names}, learned),
        "versions": versions(),
    }
    if reduced is not None:
        info["settings"] |= {"reduction": reduction, "steps": steps, "support_loss": [round(value, 4) for value in reduced]}
    return replace(adapter, info=info)


def _distinct(names: Sequence[str]) -> list[str]:
    if not names or len(set(names)) != len(names):
        raise ConfigError("fusion needs experts, each named once", got=", ".join(names)[:120] or "no name")
    return list(names)


# --- from names to an adapter -----------------------------------------------------------------------------------------


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
    names = _distinct(list(names))
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
    rng = torch.Generator().manual_seed(seed)
    if bank is None:
        if tasks is not None or generator is not None:
            raise ConfigError("tasks and generators are of a bank's experts", got="no bank", remedy="Add the adapters to one.")
        known = named_base(base_model).model
        loose = [LoraAdapter.from_pretrained(name, repair=True, base=known) for name in names]
        named = [
            replace(one, base_model=one.base_model or base_model, info={"expert": Path(name).name, **one.info})
            for name, one in zip(names, loose, strict=True)
        ]
        return merge(aligned(named), method, weights=weights, rank=rank, rng=rng)
    if base_model is not None:
        raise ConfigError("a base model is given for adapters in no bank", got=f"bank {bank}", remedy="Leave one of the two out.")
    experts = find_bank(bank)
    for name in names:
        experts[name]  # raises before anything is loaded
    suite = find_tasks(tasks) if tasks is not None else None
    if generator is not None:
        opened = LoraGenerator.from_pretrained(generator, device=device)
        shares = None if weights is None else dict(zip(names, weights, strict=True))
        return fuse_experts(opened, experts, names, rule=rule, suite=suite, weights=shares, rank=rank, seed=seed)
    learned: Sequence[float] | Tensor | None = weights
    if suite is not None:
        base = experts.base
        base.check()
        runner = Runner.open(base, device)
        their_tasks = suite.of_experts(names)
        warn_of_shared_inputs(runner, their_tasks)
        if method == "regmean":
            return regmean(runner, list(experts.adapters(names)), their_tasks, weights=weights, rank=rank, seed=seed)
        if method == "cat" and weights is None:
            support = [few_examples(task, _LEARNED_FROM, seed) for task in their_tasks]
            learned = learn_weights(runner, list(experts.adapters(names)), support, seed=seed)
            merged = experts.fuse(names, method, rank=rank, weights=learned)
            controls = compare_with_fresh(runner, merged, their_tasks, support, rank=max(experts[name].rank for name in names), seed=seed)
            return merged if controls is None else replace(merged, info={**merged.info, "controls": controls})
    return experts.fuse(names, method, rank=rank, weights=learned, rng=rng)


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
