"""Fuse experts in the latents of a fitted `icm_fusion` generator: one latent for several tasks, decoded into one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.provenance import base_fields, parents, versions
from lorag.errors import ArtifactError, ConfigError
from lorag.generator.refine import refine
from lorag.methods.icm_fusion import IcmFusion
from lorag.methods.support_examples import Reduction, few_examples, minimise, warn_of_shared_inputs
from lorag.networks.vae import resolve_conflicts

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.tasks.suite import Task, TaskSuite

__all__ = ["RULES", "distinct", "fuse_experts"]

RULES = ("uniform", "conflict", "learned")


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
    names = sorted(distinct(names))
    if suite is None and (rule == "learned" or refine_steps):
        raise ConfigError("rule learned and refine_steps need examples of the tasks", remedy="Give their suite with tasks=PATH.")
    fusion = _Fusion.of(generator, method, bank, names, adapters or {}, weights)
    if rule == "conflict":
        fusion = replace(fusion, latents=resolve_conflicts(fusion.latents), vectors=resolve_conflicts(fusion.vectors))
    settings: dict[str, Any] = {"rule": rule}
    support = [] if suite is None else _support(generator, suite, names, examples, seed)
    if rule == "learned":
        learning = _Learning(steps, learning_rate, reduction, seed)
        fusion, before, after = fusion.learned(generator, support, learning)
        settings |= {"reduction": reduction, "steps": steps, "support_loss": [round(before, 4), round(after, 4)]}
    with torch.no_grad():
        (factors,) = generator.space.decode(fusion.code(), rank or generator.rank)
        shares = fusion.shares().tolist()
    settings["weights"] = {name: round(share, 4) for name, share in zip(names, shares, strict=True)}
    base = generator.base.model
    adapter = LoraAdapter(generator.base.layout, factors, base.name, base.task_type, revision=base.revision)
    if refine_steps:
        pairs = [(example.input, example.output) for task in support for example in task.examples]
        adapter = refine(generator.runner(), adapter, pairs, refine_steps, seed)
    info = {
        "method": method.name,
        "experts": names,
        "settings": settings,
        "refine_steps": refine_steps,
        "seed": seed,
        "generator": {"revision": generator.revision},
        "base_model": base_fields(base, generator.base.identity, generator.base.layout, generator.base.settings),
        "parents": parents(names, {name: bank[name].license for name in names}, shares),
        "versions": versions(),
    }
    return replace(adapter, info=info)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, each given once.

    Raises:
        ConfigError: If there is none, or one is given twice.
    """
    if not names or len(set(names)) != len(names):
        raise ConfigError("fusion needs experts, each named once", got=", ".join(names)[:120] or "no name")
    return list(names)


def _support(generator: LoraGenerator, suite: TaskSuite, names: Sequence[str], examples: int, seed: int) -> list[Task]:
    """The experts' tasks with a few examples; a warning says which of them share inputs."""
    tasks = suite.of_experts(names)
    warn_of_shared_inputs(generator.runner(), tasks)
    return [few_examples(task, examples, seed) for task in tasks]


@dataclass(frozen=True)
class _Learning:
    """How weights and turn are learned."""

    steps: int
    learning_rate: float
    reduction: Reduction
    seed: int


@dataclass(frozen=True)
class _Fusion:
    """n tasks on their way to one code.

    Attributes:
        method: Fuses and decodes.
        latents: Posterior means (n, z).
        vectors: Standardised task vectors (n, v).
        logits: Logarithms of the tasks' weights (n,).
        turn: A linear map (z, z) of the fused latent, which is added to it; 0 at first.
    """

    method: IcmFusion
    latents: Tensor
    vectors: Tensor
    logits: Tensor
    turn: Tensor

    @classmethod
    def of(
        cls,
        generator: LoraGenerator,
        method: IcmFusion,
        bank: AdapterBank,
        names: Sequence[str],
        adapters: Mapping[str, LoraAdapter],
        weights: Mapping[str, float] | None,
    ) -> _Fusion:
        """Of experts: those that the generator was fitted on have their latents already, unless other adapters stand for them."""
        latents, vectors = [], []
        place_of = {name: place for place, name in enumerate(generator.conditioner.names)}
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
        start = torch.tensor([1.0 if weights is None else float(weights[name]) for name in names])
        if not (start.isfinite().all() and (start > 0).all()):
            raise ConfigError("weights of fused tasks must be positive numbers", got=str(start.tolist())[:80])
        size = len(latents[0])
        return cls(method, torch.stack(latents), torch.stack(vectors), (start / start.sum()).log(), torch.zeros(size, size))

    def shares(self) -> Tensor:
        """Weights (n,) of the tasks, at a sum of 1."""
        return torch.softmax(self.logits, 0)

    def code(self) -> Tensor:
        """The code (1, c) of one adapter for all tasks."""
        z, v = self.method.fuse(self.latents, self.vectors, self.shares())
        return self.method.decode((z + self.turn @ z)[None], v[None])

    def learned(self, generator: LoraGenerator, support: Sequence[Task], how: _Learning) -> tuple[_Fusion, float, float]:
        """With weights and turn learned on examples of the tasks, and the loss before and after."""
        runner = generator.runner()
        space = generator.space.to(runner.device)
        fusion = replace(self, logits=self.logits.clone().requires_grad_(), turn=self.turn.clone().requires_grad_())

        def losses(draw: str, count: int) -> Tensor:
            codes = fusion.code().to(runner.device).expand(len(support), -1)
            return runner.losses(space.differentiable(codes), support, count, f"fusion/{how.seed}/{draw}")

        rates = [([fusion.logits], how.learning_rate), ([fusion.turn], how.learning_rate / len(self.turn))]
        before, after = minimise(rates, losses, how.steps, how.reduction)
        return fusion, before, after
