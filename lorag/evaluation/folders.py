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
from lorag.evaluation.ladder import evaluate
from lorag.evaluation.oracles import Oracles, OracleScores
from lorag.files.artifacts import embedded
from lorag.generator.files import DEFAULT, find_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import METHODS
from lorag.methods.training_loop import TrainingLoop
from lorag.progress import progress_bar
from lorag.tasks.finding import TRAIN, find_tasks
from lorag.training.preparation import prepare
from lorag.training.split import RunTasks
from lorag.training.train import fit_generator

if TYPE_CHECKING:
    from lorag.methods.method import Method
    from lorag.tasks.suite import TaskSuite

__all__ = ["Ladder", "bank_baselines", "embedded_suite", "find_oracles", "open_ladder"]

_WORDINGS = 6  # descriptions of each expert that the baselines of the ladder are fitted on
MULTITASK = "multitask"
_SANDBOX, _ALL = "sandbox", "all"
_REAL = "smollm2"
_SUITES = {SANDBOX_LM: _SANDBOX, SMOLLM2: _REAL}  # base model -> embedded suite
_SPLITS = {_REAL: ("unseen_format", "unseen_label", "unseen_task")}


@dataclass(frozen=True)
class Ladder:
    """A ladder that is ready to be climbed.

    Attributes:
        bank: Experts of the training tasks; it may be empty.
        suite: The evaluated tasks.
        oracles: Their own experts, or those of some of them, or such experts' scores, if there are any.
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
    oracles: Oracles | None
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
        oracles: Bank of experts of the evaluated tasks, or of some of them, or a JSON file of such experts' scores; by default what is
            embedded for the suite.
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
    missing = [one for one in bank_baselines() if len(experts) and one.name not in opened and (methods is None or one.name in methods)]
    training = suite.of_split(TRAIN) if missing and not seen and TRAIN in suite.splits else None
    everything = opened | _fit_baselines(missing, first, experts, training, device, dtype, quiet)
    ranked = dict(sorted(everything.items(), key=lambda row: _rank(row[1][0].method)))
    upper = experts if oracles is None and seen and len(experts) else find_oracles(oracles, tasks)
    if oracles is None and isinstance(upper, OracleScores) and not all(upper.covers(suite) for suite in splits.values()):
        upper = None  # of tasks that training saw
    return Ladder(experts, next(iter(splits.values())), upper, ranked, places, methods, device, dtype, splits)


def embedded_suite(base: str) -> str:
    """The suite that is embedded for a base model.

    Raises:
        ConfigError: If there is none.
    """
    if base not in _SUITES:
        raise ConfigError("no tasks to evaluate on", got=f"base model {base}", remedy="Name a suite with --tasks DIR.")
    return _SUITES[base]


def find_oracles(oracles: str | None, tasks: str) -> Oracles | None:
    """Experts of evaluated tasks, or their scores: what is named, else what is embedded for the suite, if there is anything.

    Raises:
        ArtifactError: If a file with scores cannot be read.
        BankError: If a bank cannot be.
    """
    if oracles is not None:
        return OracleScores.read(Path(oracles)) if oracles.endswith(".json") else find_bank(oracles)
    if tasks == _REAL:
        return OracleScores.read(embedded(f"data/{_REAL}/oracles.json"))
    return AdapterBank.from_pretrained(embedded(f"data/{_SANDBOX}/oracles")) if tasks == _SANDBOX else None


def bank_baselines() -> list[Method]:
    """Baselines that take nothing but a bank, unfitted."""
    baselines = [method() for method in METHODS.values() if method.baseline]
    return [method for method in baselines if not method.learns_from_tasks]


def _rank(method: Method) -> tuple[int, bool]:
    """Where a ladder shows a method: baselines first, in the order of their registry, and the rest as it was named."""
    return (list(METHODS).index(method.name), method.prompted) if method.baseline else (len(METHODS), False)


def _fit_baselines(
    methods: Sequence[Method], like: LoraGenerator, bank: AdapterBank, tasks: TaskSuite | None, device: str, dtype: str, quiet: bool
) -> dict[str, list[LoraGenerator]]:
    """Baselines on a bank, in a generator's weight space. Their strength is tuned where a suite has all experts' tasks for training."""
    if not methods:
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
        method.name: [fit_generator(prepared, method, loop, rank=like.rank, strength=strength, origin={})]
        for method in progress_bar(methods, desc="fitting baselines", disable=quiet, leave=False, every=10.0)
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
