"""Build a bank: train an expert for each task of a suite, group by group, each group kept as soon as it is finished."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.bank.experts import ExpertConfig, train_group
from lorag.base.runner import BankBase, Runner
from lorag.errors import ConfigError
from lorag.files.metrics import Metrics, check_trackers
from lorag.parallel import Backend
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.base_model import BaseModel
    from lorag.progress import Bar
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
        base: Base model: "sandbox-lm", "smollm2-135m-instruct", a hub id, a folder or a GGUF file.
        kind: "causal_lm", "seq2seq_lm", "encoder", "two_towers" or "image_seq2seq".
        revision: Revision of the base model on the hub.
        objective: A registered objective.
        objective_settings: Its settings.
        experts: How experts are trained.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen base model while experts train; adapters are always trained in fp32.
        trackers: Names among "tensorboard" and "trackio", which get the numbers that `metrics.jsonl` gets (extra `trackers`).
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
    trackers: list[str] = field(default_factory=list)


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
    trackers: Sequence[str] = (),
    backend: Backend | None = None,
    quiet: bool = False,
) -> AdapterBank:
    """Trains an expert for each task and writes a bank; goes on at the last finished group.

    On Ray a group is a task. Each is written here as soon as it is finished; the bank is, byte for byte, the one that a local
    run with the same number of threads writes.

    Args:
        folder: The bank.
        suite: Tasks with training examples.
        base: The base model.
        objective_name: A registered objective.
        settings: Its settings.
        config: How experts are trained.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the frozen base model.
        trackers: Which get the numbers that the bank's `metrics.jsonl` gets: of each group its losses, then its mean score.
        backend: Where groups are trained; None is here.
        quiet: No progress bar.
    """
    check_trackers(trackers)
    _check(config)
    backend = Backend() if backend is None else backend
    afar = backend.name != "local"
    if afar and base.remote_code:
        raise ConfigError("a base model with code of its own is run on this machine alone", got=base.name, remedy="Use --backend local.")
    order = _Order(BankBase.of(base, objective_name, settings, config.target_modules, config.layers), config, device, dtype)
    runner = None if afar else order.open()
    bank = AdapterBank.create(folder, order.base)
    tasks = list(suite)
    random.Random(config.seed).shuffle(tasks)
    groups = _groups(tasks, config)
    finished = sum(task.key in bank for task in tasks)
    if finished:
        logger.info("%s: %d of %d experts are there; going on with the others", folder, finished, len(tasks))
    left = [rest for group in groups if (rest := group.without(bank)).tasks]
    done, metrics = (len(groups) - len(left)) * config.steps, Metrics(Path(folder), trackers, {"experts": asdict(config)})
    with metrics, progress_bar(total=len(groups) * config.steps, initial=done, desc="experts", disable=quiet) as bar:
        trained: Iterable[tuple[_Group, _Trained]]
        if runner is not None:
            trained = ((group, _train(runner, config, group, _recorder(metrics, group.number * config.steps), bar)) for group in left)
        else:
            trained = ((left[one.place], one.result()) for one in backend.run(_train_afar, order, left, ordered=False))
        for group, result in trained:
            for step, loss in result.losses:
                metrics.record("experts", group.number * config.steps + step, loss=loss)
            if afar:
                bar.update(config.steps)
            bank = _with_group(bank, group, result, config.precision)
            score = result.mean_score
            metrics.record("groups", group.number + 1, score=score, rank=group.rank, experts=len(group.tasks))
            if score is not None and not quiet:
                bar.write(f"group {group.number + 1} of {len(groups)}: rank {group.rank}, mean score {score:.3f}")
    return _in_order(bank, [task.key for task in tasks]) if afar else bank


def _check(config: ExpertConfig) -> None:
    if not config.ranks or config.steps < 1 or config.group < 1 or config.batch < 1 or config.checkpoints < 1:
        raise ConfigError("experts: ranks, steps, group, batch and checkpoints must be positive")
    targets = config.target_modules
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        raise ConfigError("experts.target_modules cannot be used", got=repr(targets)[:80], expected="a list of names, or one expression")


def _groups(tasks: Sequence[Task], config: ExpertConfig) -> list[_Group]:
    """Tasks that are trained together; ranks take turns."""
    starts = range(0, len(tasks), config.group)
    return [
        _Group(number, config.ranks[number % len(config.ranks)], list(tasks[start : start + config.group]))
        for number, start in enumerate(starts)
    ]


def _with_group(bank: AdapterBank, group: _Group, result: _Trained, precision: str) -> AdapterBank:
    """The bank with the experts of a group, on disk as well."""
    details = {
        task.key: {"suite": task.suite, "license": task.license, "score": score, "examples": len(task.split("train"))}
        for task, score in zip(group.tasks, result.scores, strict=True)
    }
    experts = [(task.key, task.descriptions, checkpoints) for task, checkpoints in zip(group.tasks, result.checkpoints, strict=True)]
    return bank.add(experts, precision=precision, details=details)


def _recorder(metrics: Metrics, before: int) -> Callable[[int, float], None]:
    """Notes losses of a group whose steps follow those of the groups before it."""
    return lambda step, loss: metrics.record("experts", before + step, loss=loss)


def _in_order(bank: AdapterBank, names: Sequence[str]) -> AdapterBank:
    """The bank with some experts in this order, in the places that they have: the order in which groups were finished says nothing."""
    with bank.locked() as now:
        ordered, wanted = (now[name] for name in names if name in now), set(names)
        experts = [next(ordered) if expert.name in wanted else expert for expert in now.experts]
        return now if experts == list(now.experts) else AdapterBank(now.folder, now.base, experts, now.files).write_manifest()


# --- one group, here or on a worker -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What all groups have in common."""

    base: BankBase
    config: ExpertConfig
    device: str
    dtype: str

    def open(self) -> Runner:
        """Loads the base model."""
        return Runner.open(self.base, self.device, self.dtype)


@dataclass(frozen=True)
class _Group:
    """Tasks that are trained together."""

    number: int
    rank: int
    tasks: list[Task]

    def without(self, bank: AdapterBank) -> _Group:
        """The group without tasks that a bank has an expert of."""
        return replace(self, tasks=[task for task in self.tasks if task.key not in bank])


@dataclass(frozen=True)
class _Trained:
    """Checkpoints and score of each task's expert, and losses that were not recorded yet, by step."""

    checkpoints: list[list[LoraAdapter]]
    scores: list[float | None]
    losses: list[tuple[int, float]]

    @property
    def mean_score(self) -> float | None:
        """Over the tasks that have one."""
        measured = [score for score in self.scores if score is not None]
        return sum(measured) / len(measured) if measured else None


def _train(
    runner: Runner, config: ExpertConfig, group: _Group, record: Callable[[int, float], None] | None = None, bar: Bar | None = None
) -> _Trained:
    losses: list[tuple[int, float]] = []
    record = (lambda step, loss: losses.append((step, loss))) if record is None else record
    checkpoints = train_group(runner, group.tasks, group.rank, config, progress=bar, record=record)
    return _Trained(checkpoints, _score(runner, group.tasks, checkpoints, config), losses)


_opened: dict[str, Runner] = {}  # in a worker: the base model of the order that it last worked on


def _train_afar(order: _Order, group: _Group) -> _Trained:
    """One group on a worker, which keeps the base model for the next."""
    key = repr(order)
    if key not in _opened:
        _opened.clear()
        _opened[key] = order.open()
    return _train(_opened[key], order.config, group)


def _score(runner: Runner, tasks: Sequence[Task], checkpoints: Sequence[Sequence[LoraAdapter]], config: ExpertConfig) -> list[float | None]:
    if not config.test_limit or not all(task.split("test") for task in tasks):
        return [None] * len(tasks)
    stacked = Factors.stack([of_task[-1].factors for of_task in checkpoints], runner.device)
    return [score[runner.objective.metric] for score in runner.scores(stacked, tasks, limit=config.test_limit)]
