"""Put a ladder together from what a user names: generators, the bank for the baselines, tasks, oracles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorag.bank.bank import AdapterBank, find_bank
from lorag.errors import ArtifactError, ConfigError
from lorag.evaluation.ladder import BASELINES, evaluate
from lorag.files.artifacts import embedded
from lorag.generator.files import find_generator
from lorag.generator.generate import DEFAULT
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.methods.training_loop import TrainingLoop
from lorag.tasks.finding import find_split, find_tasks
from lorag.tasks.suite import TaskSuite
from lorag.training.preparation import prepare
from lorag.training.train import fit_generator

__all__ = ["Ladder", "open_ladder"]

_WORDINGS = 6  # descriptions of each expert that the baselines of the ladder are fitted on
MULTITASK = "multitask"


@dataclass(frozen=True)
class Ladder:
    """A ladder that is ready to be climbed.

    Attributes:
        bank: Experts of the training tasks.
        suite: The evaluated tasks.
        oracles: Their own experts, if there are any.
        generators: Name to generators of that method, baselines first; several count as seeds.
        folders: Where the first of each method that was opened, and not fitted here, lies.
        methods: Names to score, in this order; None is all that can be scored.
        device: "auto", "cpu" or "cuda".
    """

    bank: AdapterBank
    suite: TaskSuite
    oracles: AdapterBank | None
    generators: Mapping[str, Sequence[LoraGenerator]]
    folders: Mapping[str, Path]
    methods: Sequence[str] | None = None
    device: str = "auto"

    def evaluate(self, *, seeds: int = 3, limit: int = 32, quiet: bool = False) -> dict[str, Any]:
        """Scores it; arguments and report are those of `lorag.evaluation.ladder.evaluate`."""
        return evaluate(
            self.suite,
            self.generators,
            oracles=self.oracles,
            methods=self.methods,
            seeds=seeds,
            limit=limit,
            reproduce=self.oracles is self.bank,
            device=self.device,
            quiet=quiet,
        )


def open_ladder(
    generators: Sequence[str],
    *,
    bank: str = "sandbox",
    tasks: str = "sandbox",
    split: str | None = "test",
    oracles: str | None = None,
    methods: Sequence[str] | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Ladder:
    """Opens everything and fits the closed-form baselines on the bank.

    Args:
        generators: Generator folders; several of one method count as seeds of it. Without any, the embedded ones.
        bank: Bank of the training experts.
        tasks: Suite.
        split: Split of the suite.
        oracles: Bank of the evaluated tasks' own experts; for the sandbox the embedded one.
        methods: Names to be scored, so that other baselines need not be fitted; all by default.
        device: "auto", "cpu" or "cuda".
        quiet: No progress bars.

    Raises:
        ConfigError: If there is no generator.
        ArtifactError: If a generator was trained on a bank of another base.
    """
    experts = find_bank(bank)
    suite = find_tasks(tasks, split)
    oracle_bank: AdapterBank | None
    if split == "train" and oracles is None:
        oracle_bank = experts
    elif oracles is None:
        oracle_bank = AdapterBank.from_pretrained(embedded("data/sandbox/oracles")) if tasks == "sandbox" else None
    else:
        oracle_bank = AdapterBank.from_pretrained(oracles)
    names = list(generators) or ([DEFAULT] if bank == "sandbox" else [])
    if not names:
        raise ConfigError("no generator to evaluate", remedy="Train one: lorag train bank=BANK out=DIR; then --generator DIR.")
    given, places = _open_generators(names, experts, device)
    if bank == "sandbox" and MULTITASK not in given:
        more, folder = _open_generators([MULTITASK], experts, device)
        given, places = given | more, places | folder
    baselines = [name for name in BASELINES if name not in given and (methods is None or name in methods)]
    everything: dict[str, list[LoraGenerator]] = {}
    if baselines:
        first = next(iter(given.values()))[0]
        training = find_split(tasks, "train") if split != "train" else None
        prepared = prepare(experts, first.embedder, space=first.space, wordings=_WORDINGS, suite=training, device=device, quiet=quiet)
        loop = TrainingLoop(None, torch.Generator().manual_seed(0), quiet)
        for name in baselines:
            fitted = fit_generator(prepared, method_type(name)(), loop, rank=first.rank, strength=None if training else 1.0, origin={})
            everything[name] = [fitted]
    order = ["random", "mean", "multitask", "nearest", "top_k", "ridge", "sg_mixture"]
    everything |= given
    ranked = {name: everything[name] for name in (*order, *everything) if name in everything}
    return Ladder(experts, suite, oracle_bank, ranked, places, methods, device)


def _open_generators(names: Sequence[str], experts: AdapterBank, device: str) -> tuple[dict[str, list[LoraGenerator]], dict[str, Path]]:
    """Generators by method, which share an embedder, and the folder of the first of each method."""
    opened: dict[str, list[LoraGenerator]] = {}
    folders: dict[str, Path] = {}
    embedder = None
    for name in names:
        folder = find_generator(name)
        generator = LoraGenerator.from_pretrained(folder, embedder=embedder, device=device)
        embedder = generator.embedder
        if generator.base != experts.base:
            raise ArtifactError(
                f"{name} was not trained on a bank of this base", got=generator.base.model.name, expected=experts.base.model.name
            )
        opened.setdefault(generator.method.name, []).append(generator)
        folders.setdefault(generator.method.name, folder)
    return opened, folders
