"""Train a generator from a bank: codes, conditions, the method's own fit, and the strength of what it generates."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator

from lorag.adapters.provenance import public_name
from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.base_model import BaseModel, device_of
from lorag.base.runner import BankBase, Runner
from lorag.config import to_plain
from lorag.errors import ConfigError
from lorag.files.artifacts import read_json, write_json
from lorag.files.metrics import Metrics
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import Method, method_type
from lorag.methods.training_loop import Shares, TrainingLoop, from_main
from lorag.text.vectors import open_embedder, reads_vectors
from lorag.training.calibrate import tune_strength
from lorag.training.calibrate_gate import fit_gate
from lorag.training.preparation import Prepared, SpaceChoice, prepare
from lorag.training.split import RunTasks, SplitRule

if TYPE_CHECKING:
    from lorag.spaces.weight_space import WeightSpace

__all__ = ["TrainConfig", "fit_generator", "train"]

logger = logging.getLogger(__name__)

# What a run that goes on from a generator takes from it, and what is each run's own.
_KEPT = ("bank", "base", "kind", "objective", "objective_settings", "target_modules", "method", "embedder", "space", "k", "rank")
_OF_A_RUN = {"out", "start", "seed", "device", "settings", "trackers"}


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        bank: Bank folder or hub id; "sandbox" is the embedded one, and what is taken where no base is given either.
        base: Base model to train on without a bank, from the tasks' examples alone: a name, hub id or folder.
        kind: Its kind.
        objective: How it learns and is scored.
        objective_settings: Settings of the objective.
        target_modules: Modules of it that adapters change: PEFT's names, or, as text, an expression for whole paths.
        start: Trained generator to go on from (method aligned): folder, hub id or name of a shipped one. Its network goes on learning,
            with the settings of its own run where these are left at their defaults. It ends as a generator for the tasks of this run.
        out: Folder of the trained generator.
        method: A registered method.
        settings: The method's own settings.
        tasks: Suite with the experts' examples, for functional training and for choosing the strength; "sandbox" is the
            embedded one, null leaves both out.
        embedder: Text embedder, or `vectors:N` for a bank whose entries carry vectors of N values (`lorag.text.vectors`): without gate.
        space: "shared_subspace", "flat_factors", or, which needs no bank, "activation_bases".
        k: Dimensions of a shared subspace on each side; input directions of activation bases.
        rank: Rank of generated adapters.
        wordings: Descriptions used of each expert; 0 uses all.
        typos: Share of the descriptions, other than each expert's first, that are read with a typing error.
        validation: Share of the tasks held out for early stopping.
        groups: Which tasks make a group, whose experts a task does not see where it is treated as unseen, and which is held out as a whole:
            "task" each alone, "texts" tasks that share training texts, "source" tasks of one source. As unseen tasks will be.
        strength: Factor on generated ΔW; null chooses it on the held-out tasks.
        seed: Seed of everything.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen base model in functional training.
        shares: Shares into which each step's batch is cut: processes take them in turn, and a process with several adds up
            their gradients, which takes less memory. null is one for each process. With the same number of shares the result is
            the same, but for rounding, in any number of processes.
        mixed_precision: "no" or "bf16", in which losses are computed; null is what `accelerate launch` was told.
        trackers: Names among "tensorboard" and "trackio", which get the numbers that `metrics.jsonl` gets (extra `trackers`).
    """

    RENAMED: ClassVar[dict[str, str]] = {"kin": "groups"}

    bank: str | None = None
    base: str | None = None
    kind: str = "causal_lm"
    objective: str = "causal_lm"
    objective_settings: dict[str, Any] = field(default_factory=dict)
    target_modules: Any = field(default_factory=lambda: ["q_proj", "v_proj"])
    start: str | None = None
    out: str = "runs/generator"
    method: str = "house"
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: str | None = "sandbox"
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    space: str = "shared_subspace"
    k: int = 32
    rank: int = 16
    wordings: int = 0
    typos: float = 0.15
    validation: float = 0.1
    groups: str = "task"
    strength: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    shares: int | None = None
    mixed_precision: str | None = None
    trackers: list[str] = field(default_factory=list)


def train(config: TrainConfig, *, quiet: bool = False) -> LoraGenerator:
    """Runs a training run, or goes on with it where it was interrupted, also with another number of processes.

    Under `accelerate launch` all processes train, and the main one alone then fits the gate and writes. The others return the
    generator without gate, while the main one may still be at work.

    Raises:
        ConfigError: If a setting is wrong, or if `out` holds a run with other settings.
    """
    start = _Start.of(config)
    config = start.config
    stated = _stated(config)
    loop = _loop(config, stated, quiet)
    out, main = Path(config.out), loop.accelerator.is_main_process
    if (out / "run.json").exists() and read_json(out / "run.json") != stated:
        raise ConfigError(f"out: {out} holds a run with other settings", remedy="Choose another folder, or delete it.")
    if (out / "generator.json").exists():
        logger.warning("%s is trained already; delete it to train it anew", out)
        return LoraGenerator.from_pretrained(out, device=config.device)
    method, bank = start.method(), start.bank()
    tasks = RunTasks.named(config.tasks, len(bank))
    embedder, vectors = open_embedder(config.embedder, config.device), reads_vectors(config.embedder)
    runner = None if tasks.suite is None else Runner.open(bank.base, config.device, config.dtype)
    if main:
        write_json(out / "run.json", stated)
    prepared = prepare(
        bank,
        embedder,
        tasks,
        SplitRule(config.groups, config.validation, config.seed),
        runner=runner,
        space=start.space(),
        wordings=config.wordings,
        typos=0.0 if vectors else config.typos,
        quiet=loop.quiet,
    )
    origin = {"config": _published(stated), "experts": len(bank)}
    generator = fit_generator(prepared, method, loop, rank=config.rank, strength=config.strength, origin=origin)
    generator.licenses = {**start.licenses, **generator.licenses}
    if main:
        if prepared.split.validation and not method.needs_task_vectors and not vectors:
            generator.gate = fit_gate(generator, bank, tasks, prepared.split, quiet=loop.quiet)
        generator.save_pretrained(out)
        loop.finish()
    return generator


def fit_generator(
    prepared: Prepared, method: Method, loop: TrainingLoop, *, rank: int, strength: float | None, origin: dict[str, Any]
) -> LoraGenerator:
    """Fits a method on a prepared bank and chooses its strength."""
    method.fit(prepared.data, loop, prepared.runner)
    if strength is None:
        strength = from_main(loop.accelerator, lambda: tune_strength(method, prepared.data, prepared.runner, loop.rng, quiet=loop.quiet))
    return LoraGenerator(
        base=prepared.bank.base,
        space=prepared.space,
        conditioner=prepared.data.conditioner,
        method=method,
        embedder=prepared.embedder,
        rank=prepared.space.best_rank(rank),
        strength=strength,
        origin=origin,
        licenses=_licences(prepared, method),
        spelling=prepared.spelling,
    )


def _licences(prepared: Prepared, method: Method) -> dict[str, str]:
    """Licences of all that a method learned from: the experts, and the tasks without one if it trained on their examples."""
    data, licences = prepared.data, {expert.name: expert.license for expert in prepared.bank.experts}
    if method.learns_from_tasks:
        licences |= {data.tasks[i].key: data.tasks[i].license for i in data.training if i >= len(prepared.bank)}
    return licences


# --- what a run starts from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """The settings of a run, and the trained generator that it goes on from, if there is one.

    Attributes:
        config: The settings, those of the generator's own run where these are left at their defaults.
        first: The generator.
    """

    config: TrainConfig
    first: LoraGenerator | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> _Start:
        """Opens the generator that the settings name."""
        if config.start is None:
            return cls(config)
        first = LoraGenerator.from_pretrained(config.start, device=config.device)
        return cls(_going_on(config, first), first)

    @property
    def licenses(self) -> dict[str, str]:
        """Of what was learned from before."""
        return {} if self.first is None else dict(self.first.licenses)

    def method(self) -> Method:
        """The method of the run, untrained or as it was left."""
        method = method_type(self.config.method).with_settings(self.config.settings)
        if self.first is not None:
            method.go_on_from(self.first.method)
        return method

    def space(self) -> SpaceChoice | WeightSpace:
        """Which weight space is fitted, or the one that was."""
        config = self.config
        return SpaceChoice(config.space, config.k, config.rank) if self.first is None else self.first.space

    def bank(self) -> AdapterBank:
        """The bank that the settings name, or one without experts: on the base model that they name, or on the generator's.

        Raises:
            ConfigError: If they name both bank and base.
        """
        config = self.config
        if self.first is not None:
            return AdapterBank.without_experts(self.first.base)
        if config.base is None:
            return find_bank(config.bank or "sandbox")
        if config.bank is not None:
            raise ConfigError("bank and base cannot both be given", got=f"{config.bank}, {config.base}", remedy="A bank states its base.")
        model = BaseModel(config.base, config.kind)
        return AdapterBank.without_experts(BankBase.of(model, config.objective, config.objective_settings, config.target_modules))


# --- from settings to values ------------------------------------------------------------------------------------------


def _stated(config: TrainConfig) -> dict[str, Any]:
    """The settings that make a run what it is, checked; those that were left to the machine only where they were chosen.

    Raises:
        ConfigError: If a number is out of its range.
    """
    if not 0 <= config.typos <= 1:
        raise ConfigError("typos must be a share", got=str(config.typos), expected="0 to 1")
    if config.rank < 1 or config.k < 1 or not 0 <= config.validation < 1:
        raise ConfigError("rank and k must be positive, validation a share below 1", got=f"{config.rank}, {config.k}, {config.validation}")
    stated = to_plain(config)
    del stated["trackers"]  # who looks on changes nothing
    return {key: value for key, value in stated.items() if value is not None or key not in ("shares", "mixed_precision")}


def _going_on(config: TrainConfig, first: LoraGenerator) -> TrainConfig:
    """The settings of a run that goes on from a trained generator.

    Raises:
        ConfigError: If one differs that makes the generator what it is.
    """
    stated, default, taken = first.origin.get("config", {}), TrainConfig(), {}
    for name in {one.name for one in fields(config)} & set(stated) - _OF_A_RUN:
        given = getattr(config, name)
        if given == getattr(default, name):
            taken[name] = stated[name]
        elif name in _KEPT and (public_name(given) if name in ("bank", "base") else given) != stated[name]:
            raise ConfigError(f"{name} is not that of start={config.start}", got=given, expected=stated[name], remedy=f"Leave {name} out.")
    taken["settings"] = _merged(stated.get("settings", {}), config.settings)
    return replace(config, **taken)


def _merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those of the second in the place of those of the first."""
    both = {name: _merged(first[name], then[name]) for name in first.keys() & then.keys() if isinstance(first[name], Mapping)}
    return {**first, **then, **both}


def _published(stated: dict[str, Any]) -> dict[str, Any]:
    """What a generator says of its run: not where it was written and on what, and no paths of the machine."""
    shown = {key: value for key, value in stated.items() if key not in ("out", "device")}
    return shown | {key: public_name(stated[key]) for key in ("bank", "base", "start", "tasks") if stated[key]}


def _loop(config: TrainConfig, stated: dict[str, Any], quiet: bool) -> TrainingLoop:
    """The loop of a run in this process; nothing is written yet.

    Raises:
        ConfigError: If shares, precision or trackers cannot be used.
        MissingDependencyError: If a tracker's package is not installed.
    """
    accelerator = Accelerator(cpu=device_of(config.device).type == "cpu")  # it chooses this process's GPU
    if accelerator.num_processes == 1 and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        logger.warning("accelerate launch started one process only; where there are CPUs alone, it starts several with --multi_gpu")
    Shares.of(accelerator, config.shares, config.mixed_precision)
    return TrainingLoop(
        Path(config.out),
        torch.Generator().manual_seed(config.seed),
        quiet or not accelerator.is_local_main_process,
        accelerator,
        config.shares,
        config.mixed_precision,
        Metrics(Path(config.out), config.trackers, stated, main=accelerator.is_main_process),
    )
