"""Train experts: many adapters at once over one frozen base model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors, Pair

if TYPE_CHECKING:
    from lorag.base.layout import LoraLayout
    from lorag.base.runner import Runner
    from lorag.progress import Bar
    from lorag.tasks.suite import Task

__all__ = ["ExpertConfig", "train_group"]


@dataclass
class ExpertConfig:
    """How experts are trained.

    Attributes:
        target_modules: A list of PEFT's target names, or, as text, a regular expression for whole paths or "all-linear".
        layers: Layers whose modules are adapted, as PEFT's `layers_to_transform`; null takes all. With upper layers alone,
            gradients stop where they begin, and codes are shorter.
        ranks: Ranks given to groups in turn; one bank may mix them.
        group: Experts trained at once.
        steps: Optimizer steps of each.
        batch: Examples of each task in a step (for prototypes: supports, and queries, of each class).
        learning_rate: Peak rate of AdamW; warmed up, then lowered to a tenth by a cosine.
        weight_decay: Of AdamW. Together with a small start it leaves in ΔW what the task asks for and little else, so that
            two experts of one task agree.
        initial_scale: A starts as PEFT draws it, times this.
        checkpoints: Late checkpoints kept, the final one among them.
        precision: How the bank stores values.
        test_limit: Test examples used to score an expert; 0 scores none.
        seed: Seed of initialisation and sampling. Each expert's own depends on its task's name too.
    """

    target_modules: Any = field(default_factory=lambda: ["q_proj", "v_proj"])
    layers: list[int] | None = None
    ranks: list[int] = field(default_factory=lambda: [8])
    group: int = 16
    steps: int = 200
    batch: int = 8
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    initial_scale: float = 1.0
    checkpoints: int = 3
    precision: str = "float32"
    test_limit: int = 64
    seed: int = 0


def _initial(layout: LoraLayout, rank: int, seed: int, scale: float) -> Factors:
    """One expert's start: A as PEFT draws it (Kaiming uniform with a = √5) times a scale, B zero."""
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for module in layout.modules:
        bound = scale / math.sqrt(module.in_features)
        rows = (torch.rand(rank, module.in_features, generator=rng) * 2 - 1) * bound
        factors[module.name] = (rows, torch.zeros(module.out_features, rank))
    return Factors(factors)


def train_group(
    runner: Runner,
    tasks: Sequence[Task],
    rank: int,
    config: ExpertConfig,
    *,
    start: Sequence[LoraAdapter] | None = None,
    progress: Bar | None = None,
    record: Callable[[int, float], None] | None = None,
) -> list[list[LoraAdapter]]:
    """Trains one adapter per task, all at once.

    Args:
        runner: The base model.
        tasks: n tasks.
        rank: Rank of the adapters.
        config: Steps, rates, seeds.
        start: Adapters to go on from; without them, fresh ones.
        progress: A bar that is advanced by one for each step.
        record: Called every tenth step, and at the last, with the steps done and the mean loss.

    Returns:
        For each task its last checkpoints, the final one last.
    """
    layout, device = runner.layout, runner.device
    if start is None:
        seeds = [zlib.crc32(f"{config.seed}/{task.name}".encode()) for task in tasks]
        start = [LoraAdapter(layout, _initial(layout, rank, seed, config.initial_scale)) for seed in seeds]
    stacked = Factors.stack([adapter.factors for adapter in start], device)
    trained = {name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, (a, b) in stacked.items()}
    parameters = [tensor for pair in trained.values() for tensor in pair]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    warmup = max(1, config.steps // 10)
    kept = {config.steps - 1 - number * max(1, config.steps // 20) for number in range(config.checkpoints)}
    checkpoints: list[list[LoraAdapter]] = [[] for _ in tasks]
    for step in range(config.steps):
        factor = min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        losses = runner.losses(trained, tasks, config.batch, f"{config.seed}/{step}")
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        _clip_each(parameters, 1.0)
        optimizer.step()
        if step in kept:
            for of_task, adapter in zip(checkpoints, _snapshot(trained, layout), strict=True):
                of_task.append(adapter)
        if progress is not None:
            progress.update()
            if step % 10 == 0:
                progress.set_postfix(loss=f"{losses.mean().item():.3f}")
        if record is not None and ((step + 1) % 10 == 0 or step + 1 == config.steps):
            record(step + 1, losses.mean().item())
    return checkpoints


def _clip_each(parameters: Sequence[Tensor], limit: float) -> None:
    """Clips the gradient norm of each adapter of a stack on its own."""
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    factor = (limit / squares.sqrt().clamp_min(1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, 1, 1))


def _snapshot(trained: dict[str, Pair], layout: LoraLayout) -> list[LoraAdapter]:
    """Copies a stack into adapters."""
    count = len(next(iter(trained.values()))[0])
    return [
        LoraAdapter(layout, Factors({n: (a[i].detach().cpu().clone(), b[i].detach().cpu().clone()) for n, (a, b) in trained.items()}))
        for i in range(count)
    ]
