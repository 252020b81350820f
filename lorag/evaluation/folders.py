"""Put a ladder together from what a user names: generators, the bank for the baselines, tasks, oracles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.names import SANDBOX_LM, SMOLLM2
from lorag.base.runner import Runner
from lorag.errors import ArtifactError, ConfigError
from lorag.evaluation.ladder import BASELINES, evaluate
from lorag.files.artifacts import embedded
from lorag.generator.files import DEFAULT, find_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.methods.training_loop import TrainingLoop
from lorag.progress import progress_bar
from lorag.tasks.finding import TRAIN, find_tasks
from lorag.training.preparation import prepare
from lorag.training.split import RunTasks
from lorag.training.train import fit_generator

if TYPE_CHECKING:
    from lorag.tasks.suite import TaskSuite

__all__ = ["Ladder", "embedded_suite", "find_oracles", "open_ladder"]

_WORDINGS = 6  # descriptions of each expert that the baselines of the ladder are fitted on
MULTITASK = "multitask"
_SANDBOX, _ALL = "sandbox", "all"
_SUITES = {SANDBOX_LM: _SANDBOX, SMOLLM2: "smollm2"}  # base model -> embedded suite
_SPLITS = {"smollm2": ("unseen_format", "unseen_label", "unseen_task")}


@dataclass(frozen=True)
class Ladder:
    """A ladder that is ready to be climbed.

    Attributes:
        bank: Experts of the training tasks; it may be empty.
        suite: The evaluated tasks.
        oracles: Their own experts, or those of some of them, if there are any.
        generators: Name to generators of that method, baselines first; several count as seeds.
        folders: Where the first of each method that was opened, and not fitted here, lies.
        methods: Names to score, in this order; None is all that take no training.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the base model.
        splits: All splits that are to be evaluated, of which `suite` is the first.
        loaded: The base model, once it runs.
    """

    bank: AdapterBank
    suite: TaskSuite
    oracles: AdapterBank | None
    generators: Mapping[str, Sequence[LoraGenerator]]
    folders: Mapping[str, Path]
    methods: Sequence[str] | None = None
    device: str = "auto"
    dtype: str = "auto"
    splits: Mapping[str, TaskSuite] = field(default_factory=dict)
    loaded: list[Runner] = field(default_factory=list, repr=False, compare=False)

    def each(self) -> Iterator[tuple[str, Ladder]]:
        """Name and ladder of each split; the base model is loaded once for all."""
        return ((name, replace(self, suite=suite)) for name, suite in self.splits.items())

    def evaluate(self, *, seeds: int = 3, limit: int = 32, write: bool = False, quiet: bool = False) -> dict[str, Any]:
        """Scores it; arguments and report are those of `lorag.evaluation.ladder.evaluate`."""
        if not self.loaded:
            self.loaded.append(Runner.open(self.bank.base, self.device, self.dtype))
        return evaluate(
            self.suite,
            self.generators,
            oracles=self.oracles,
            methods=self.methods,
            seeds=seeds,
            limit=limit,
            reproduce=self.oracles is self.bank,
            write=write,
            runner=self.loaded[0],
            quiet=quiet,
        )


def open_ladder(
    generators: Sequence[str],
    *,
    bank: str | None = None,
    tasks: str | None = None,
    split: str | Sequence[str] | None = None,
    oracles: str | None = None,
    methods: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Ladder:
    """Opens everything and fits the closed-form baselines on the bank, if there is one.

    Args:
        generators: Generator folders; several of one method count as seeds of it. Without any, the embedded ones.
        bank: Bank of training experts, for the baselines; by default the embedded one of the generators' base, if it has one.
        tasks: Suite; by default the embedded one of the base.
        split: Split of the suite, or several; "all" is every task. By default what is held out: "test", or unseen formats, labels, tasks.
        oracles: Bank of experts of the evaluated tasks, or of some of them; for the sandbox the embedded one.
        methods: Names to be scored, so that other baselines need not be fitted; all that take no training by default.
        device: "auto", "cpu" or "cuda".
        dtype: Precision of the base model: "auto", "fast", "float32", "bfloat16" or "float16".
        quiet: No progress bars.

    Raises:
        ConfigError: If there is no generator, or no suite is named or embedded.
        ArtifactError: If generators were trained on different bases, or on another one than the bank's.
    """
    if not generators and bank not in (None, _SANDBOX):
        raise ConfigError("no generator to evaluate", remedy="Train one: lorag train bank=BANK out=DIR; then --generator DIR.")
    opened, places = _open_generators(list(generators) or [DEFAULT], device)
    first = next(iter(opened.values()))[0]
    if bank is None and first.base.model.name == SANDBOX_LM:
        bank = _SANDBOX
    experts = AdapterBank.without_experts(first.base) if bank is None else find_bank(bank)
    if first.base != experts.base:
        name = list(generators or [DEFAULT])[0]
        raise ArtifactError(f"{name} was not trained on a bank of this base", got=first.base.model.name, expected=experts.base.model.name)
    tasks = embedded_suite(SANDBOX_LM if bank == _SANDBOX else first.base.model.name) if tasks is None else tasks
    if bank == _SANDBOX and MULTITASK not in opened:
        more, folder = _open_generators([MULTITASK], device, first)
        opened, places = opened | more, places | folder
    names = _SPLITS.get(tasks, ("test",)) if split is None else (split,) if isinstance(split, str) else tuple(split)
    suite = find_tasks(tasks)
    splits = {name: suite if name == _ALL else suite.of_split(name) for name in names}
    seen = TRAIN in names
    missing = [name for name in BASELINES if len(experts) and name not in opened and (methods is None or name in methods)]
    training = suite.of_split(TRAIN) if missing and not seen and TRAIN in suite.splits else None
    everything = opened | _fit_baselines(missing, first, experts, training, device, dtype, quiet)
    order = ["random", "mean", "multitask", "multitask_prompted", "nearest", "top_k", "ridge", "sg_mixture"]
    ranked = {name: everything[name] for name in (*order, *everything) if name in everything}
    oracle_bank = experts if oracles is None and seen and len(experts) else find_oracles(oracles, tasks)
    return Ladder(experts, next(iter(splits.values())), oracle_bank, ranked, places, methods, device, dtype, splits)


def embedded_suite(base: str) -> str:
    """The suite that is embedded for a base model.

    Raises:
        ConfigError: If there is none.
    """
    if base not in _SUITES:
        raise ConfigError("no tasks to evaluate on", got=f"base model {base}", remedy="Name a suite with --tasks DIR.")
    return _SUITES[base]


def find_oracles(oracles: str | None, tasks: str) -> AdapterBank | None:
    """Experts of evaluated tasks: the bank that is named, else the one that is embedded for their suite, if there is one."""
    if oracles is not None:
        return find_bank(oracles)
    return AdapterBank.from_pretrained(embedded("data/sandbox/oracles")) if tasks == _SANDBOX else None


def _fit_baselines(
    names: Sequence[str], like: LoraGenerator, bank: AdapterBank, tasks: TaskSuite | None, device: str, dtype: str, quiet: bool
) -> dict[str, list[LoraGenerator]]:
    """Baselines on a bank, in a generator's weight space. Their strength is tuned where a suite has all experts' tasks for training."""
    if not names:
        return {}
    if tasks is not None and not set(bank.names) <= {task.key for task in tasks}:
        tasks = None
    prepared = prepare(
        bank,
        like.embedder,
        RunTasks(tasks),
        runner=None if tasks is None else Runner.open(bank.base, device, dtype),
        space=like.space,
        wordings=_WORDINGS,
        quiet=quiet,
    )
    loop = TrainingLoop(None, torch.Generator().manual_seed(0), quiet)
    strength = None if tasks is not None else 1.0
    return {
        name: [fit_generator(prepared, method_type(name)(), loop, rank=like.rank, strength=strength, origin={})]
        for name in progress_bar(names, desc="fitting baselines", disable=quiet, leave=False, every=10.0)
    }


def _open_generators(
    names: Sequence[str], device: str, like: LoraGenerator | None = None
) -> tuple[dict[str, list[LoraGenerator]], dict[str, Path]]:
    """Generators by row, which share an embedder and a base, and the folder of the first of each row."""
    opened: dict[str, list[LoraGenerator]] = {}
    folders: dict[str, Path] = {}
    for name in names:
        folder = find_generator(name)
        generator = LoraGenerator.from_pretrained(folder, embedder=None if like is None else like.embedder, device=device)
        like = generator if like is None else like
        if generator.base != like.base:
            raise ArtifactError(f"{name} was trained on another base", got=generator.base.model.name, expected=like.base.model.name)
        row = f"{generator.method.name}_prompted" if generator.method.prompted else generator.method.name
        opened.setdefault(row, []).append(generator)
        folders.setdefault(row, folder)
    return opened, folders
