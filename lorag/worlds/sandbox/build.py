"""Rebuild everything that the sandbox ships: base model, tasks, experts, and generators. Finished stages are skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.base.base_model import BaseModel
from lorag.base.names import SANDBOX_LM
from lorag.tasks.suite import TaskSuite
from lorag.training.train import TrainConfig, train
from lorag.worlds.sandbox.base_lm import TEMPLATE, PretrainConfig, pretrain
from lorag.worlds.sandbox.grid import build_suite, splits

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank

__all__ = ["SandboxConfig", "build"]

logger = logging.getLogger(__name__)


def _experts() -> ExpertConfig:
    return ExpertConfig(
        target_modules=["q_proj", "v_proj", "down_proj"],
        ranks=[4, 2, 3],
        group=29,
        steps=80,
        batch=8,
        learning_rate=5e-3,
        weight_decay=6.0,
        initial_scale=0.1,
        checkpoints=3,
        precision="float16",
        test_limit=32,
    )


@dataclass
class SandboxConfig:
    """What the sandbox is built with; the defaults made the shipped artifacts.

    Attributes:
        root: Folder that gets `checkpoints` and `data`; a checkout of the project.
        work: Folder of intermediate results.
        base: The base model.
        experts: How experts and oracles are trained.
        expert_examples: Training examples of an expert.
        examples: Training examples of a task that ship, for functional training.
        test_examples: Test examples of a held-out task.
        descriptions: Descriptions of a training task.
        eval_descriptions: Descriptions of a held-out task, in wordings of their own.
        seed: Seed of everything.
    """

    root: str = "."
    work: str = "runs/sandbox"
    base: PretrainConfig = field(default_factory=PretrainConfig)
    experts: ExpertConfig = field(default_factory=_experts)
    expert_examples: int = 384
    examples: int = 96
    test_examples: int = 32
    descriptions: int = 64
    eval_descriptions: int = 8
    seed: int = 0


def build(config: SandboxConfig, *, quiet: bool = False) -> Iterator[str]:
    """Builds stage by stage and yields a line for each: what it made and where."""
    root, work = Path(config.root), Path(config.work)
    base = root / "checkpoints" / SANDBOX_LM
    if not (base / "model.safetensors").exists():
        pretrain(base, config.base, quiet=quiet)
    yield f"base model: {base}"
    tasks = root / "data/sandbox/tasks"
    if not (tasks / "splits.json").exists():
        _write_tasks(tasks, config)
    yield f"tasks: {tasks}"
    everything = _build_experts(work / "experts", config, quiet)
    for folder, names in ((root / "data/sandbox/bank", ("train",)), (root / "data/sandbox/oracles", ("test", "hard"))):
        if not (folder / "bank.json").exists():
            chosen = [cell.name for name in names for cell in splits()[name]]
            everything.copy_to(folder, chosen, "int8")
        yield f"bank: {folder}"
    for method in ("multitask", "house"):
        out = root / "checkpoints" / method
        train(TrainConfig(out=str(out), method=method, seed=config.seed), quiet=quiet)
        yield f"generator: {out}"


def _write_tasks(folder: Path, config: SandboxConfig) -> None:
    """The suite that ships: training tasks, with or without an expert, to learn from; held-out tasks to be scored on."""
    held = splits()["test"] + splits()["hard"]
    taught = splits()["train"] + splits()["without_expert"]
    taught_tasks = build_suite(taught, train=config.examples, test=16, descriptions=config.descriptions, wording="train", seed=config.seed)
    unseen = build_suite(held, train=0, test=config.test_examples, descriptions=config.eval_descriptions, wording="eval", seed=config.seed)
    TaskSuite([*taught_tasks, *unseen], {name: [cell.name for cell in cells] for name, cells in splits().items()}).save(folder)


def _build_experts(folder: Path, config: SandboxConfig, quiet: bool) -> AdapterBank:
    """Trains experts of the training tasks, and of the held-out ones as oracles, in one go."""
    suites = [
        build_suite(
            splits()[name],
            train=config.expert_examples,
            test=config.test_examples,
            descriptions=config.descriptions if name == "train" else config.eval_descriptions,
            wording="train" if name == "train" else "eval",
            seed=config.seed,
        )
        for name in ("train", "test", "hard")
    ]
    torch.manual_seed(config.seed)
    return build_bank(
        folder,
        TaskSuite(task for suite in suites for task in suite),
        BaseModel(SANDBOX_LM, "causal_lm"),
        "causal_lm",
        {"template": TEMPLATE},
        config.experts,
        device="cpu",
        quiet=quiet,
    )
