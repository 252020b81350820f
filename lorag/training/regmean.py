"""RegMean: merge adapters in closed form, so that each acts on the inputs of its own task and leaves the others' alone.

A sum of experts disturbs each of them, because nothing told an expert what to do with inputs of other tasks. What flows through a
module on each task's examples says which inputs are whose, and a linear regression makes one ΔW that does on each task's inputs what
that task's expert does. It is of the experts' output directions, so its rank is at most the sum of theirs, and nothing is lost to a
rank. No gradient step is taken, and no loss is lowered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors, balanced, thin_svd
from lorag.adapters.merging import check_mergeable
from lorag.adapters.provenance import parents_of
from lorag.base.activations import input_moments
from lorag.errors import AdapterError, ConfigError
from lorag.methods.support_examples import few_examples

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.tasks.suite import Task

__all__ = ["regmean"]

_PASSES = 2  # draws are with replacement: so many for each example leave few out


def regmean(
    runner: Runner,
    adapters: Sequence[LoraAdapter],
    tasks: Sequence[Task],
    *,
    weights: Sequence[float] | None = None,
    examples: int = 32,
    rounds: int = 3,
    ridge: float = 1e-3,
    rank: int | None = None,
    seed: int = 0,
    at_once: int = 2**27,
) -> LoraAdapter:
    """Merges n experts by a regression on what flows through each module on their own tasks' examples.

    For each module, with x the module's inputs and G_t the mean of x xᵀ on task t,

        ΔW = argmin Σ_t w_t E_t ‖(ΔW − ΔW_t) x‖² + ρ‖ΔW‖² = (Σ_t w_t ΔW_t G_t)(Σ_t w_t G_t + ρI)⁻¹

    (Jin et al., arXiv 2212.09849, there for whole weights). Two things are ours: positions count only if the task's loss depends on
    them there, so that padding does not, and the moments are gathered again with the merged adapter at work, because what
    reaches later modules depends on the earlier ones. Memory is one (i, i) matrix for each module, in parts if there are many.

    Args:
        runner: The base model, of the adapters' layout.
        adapters: n experts, of any ranks.
        tasks: Their tasks, in their order.
        weights: w, one for each; equal ones without.
        examples: Most training examples of each task.
        rounds: Times that moments are gathered: first of the bare base model, then of the adapter so far.
        ridge: ρ, as a share of the mean of the moments' diagonal.
        rank: Largest rank of the result, by default the sum of the experts' ranks, which loses nothing.
        seed: Seed of the choice of examples.
        at_once: Most values of moments that are gathered at once, of one module at the least; the default is 1 GiB in fp64.

    Raises:
        AdapterError: If adapters do not fit each other, or weights or the rank cannot be used.
        ConfigError: If rounds, examples or ridge cannot be used.
    """
    check_mergeable(adapters)
    shares = torch.ones(len(adapters)) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    if len(tasks) != len(adapters) or shares.shape != (len(adapters),) or not (shares.isfinite().all() and (shares > 0).all()):
        got = f"{len(tasks)} tasks, weights {shares.tolist()}"
        raise AdapterError(
            "regmean needs a task and a positive weight for each adapter", got=got[:120], expected=f"{len(adapters)} of each"
        )
    if rounds < 1 or examples < 1 or not 0 < ridge <= 1:
        got = f"rounds {rounds}, examples {examples}, ridge {ridge}"
        raise ConfigError(
            "regmean cannot run with these settings", got=got, expected="rounds and examples of 1 or more, a ridge above 0 and up to 1"
        )
    whole = sum(adapter.rank for adapter in adapters)
    wanted = whole if rank is None else rank
    if wanted < 1:
        raise AdapterError("rank cannot be used", got=rank, expected="1 or more")
    support = [few_examples(task, examples, seed) for task in tasks]
    parts, merged = _parts(adapters[0], at_once), None
    for number in range(rounds):
        merged = _regress(runner, adapters, support, (shares / shares.sum()).tolist(), merged, ridge, f"regmean/{seed}/{number}", parts)
    if merged is None:
        raise AssertionError("no round was run")
    factors, energy = merged.truncated(min(wanted, whole))
    info = {
        "method": "regmean",
        "experts": [adapter.info.get("expert") for adapter in adapters],
        "settings": {"examples": examples, "rounds": rounds, "ridge": ridge, "weights": [round(w, 6) for w in shares.tolist()]},
        "energy": round(energy, 6),
        "parents": parents_of([adapter.info for adapter in adapters], shares.tolist()),
    }
    first = adapters[0]
    return LoraAdapter(first.layout, factors, first.base_model, first.task_type, info, first.base_revision)


def _regress(
    runner: Runner,
    adapters: Sequence[LoraAdapter],
    support: Sequence[Task],
    shares: Sequence[float],
    at_work: Factors | None,
    ridge: float,
    seed: str,
    parts: Sequence[Sequence[str]],
) -> Factors:
    """One round: the merged ΔW of all modules, from moments gathered with an adapter at work, or with none."""
    stacked = None if at_work is None else Factors.stack([at_work], runner.device)
    tensors = {}
    for names in parts:
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        total: dict[str, Tensor] = {}
        for adapter, task, share in zip(adapters, support, shares, strict=True):
            moments = input_moments(runner, stacked, task, _PASSES * len(task.examples), seed, names)
            for name in names:
                moment = moments[name].cpu().double() * share
                rows[name].append(adapter.factors.pair(name, torch.float64)[0] @ moment)
                total[name] = moment if name not in total else total[name].add_(moment)
        for name in names:
            moment = total.pop(name)
            size = moment.diagonal().mean()
            moment.diagonal().add_(ridge * size if size > 0 else 1.0)
            a = torch.linalg.solve(moment, torch.cat(rows[name]).T).T
            b = torch.cat([adapter.factors.pair(name, torch.float64)[1] for adapter in adapters], 1)
            tensors[name] = balanced(thin_svd(a, b), a.shape[0])
    return Factors(tensors)


def _parts(adapter: LoraAdapter, at_once: int) -> list[list[str]]:
    """Names of modules in runs whose moments fit into memory together."""
    parts: list[list[str]] = []
    held = 0
    for module in adapter.layout.modules:
        size = module.in_features**2
        if not parts or held + size > at_once:
            parts.append([])
            held = 0
        parts[-1].append(module.name)
        held += size
    return parts
