"""What a trained generator gets afterwards: a gate, or a reader of examples; nothing else of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.runner import Runner
from lorag.errors import ConfigError, GeneratorError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import TrainingSet
from lorag.methods.training_loop import TrainingLoop
from lorag.tasks.unknown import read_unknown
from lorag.training.calibrate_gate import fit_gate
from lorag.training.preparation import prepare
from lorag.training.split import RunTasks, SplitRule

if TYPE_CHECKING:
    from lorag.training.calibrate_gate import GateSettings

__all__ = ["add_gate", "add_pairs"]


class _FinishedRun:
    """A trained generator, and what it learned from: as named, or else as its settings say.

    Args:
        folder: The generator's.
        bank: Name of the bank.
        tasks: Name of the suite.
        device: Where embedder and base model run.
    """

    def __init__(self, folder: str | Path, bank: str | None, tasks: str | None, device: str) -> None:
        self.folder = Path(folder)
        self.generator = LoraGenerator.from_pretrained(folder, device=device)
        self.config = self.generator.origin.get("config", {})
        self.bank_name, self.tasks_name = bank or self.config.get("bank"), tasks or self.config.get("tasks")
        self.rule = SplitRule.stated(self.config)

    def bank(self) -> AdapterBank:
        """The bank; one without experts, on the generator's base model, where none is named."""
        return AdapterBank.without_experts(self.generator.base) if self.bank_name is None else find_bank(self.bank_name)

    def saved(self) -> LoraGenerator:
        """The generator, written back into its folder."""
        self.generator.save_pretrained(self.folder)
        return self.generator


def add_gate(
    folder: str | Path,
    *,
    bank: str | None = None,
    tasks: str | None = None,
    unknown: str | Path | None = None,
    settings: GateSettings | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> LoraGenerator:
    """Fits a gate for a trained generator and writes it into its folder.

    Args:
        folder: The generator's.
        bank: The bank that it learned from; by default the one that its settings name. None is needed for a generator that learned
            from the examples of its tasks alone.
        tasks: The suite; by default the one that its settings name.
        unknown: YAML of descriptions that the bank cannot serve; by default the shipped ones.
        settings: How much is looked at.
        device: Where embedder and base model run.
        quiet: No progress bar.

    Raises:
        ConfigError: If the generator's settings name neither bank nor base, or bank, tasks and generator do not belong together.
    """
    run = _FinishedRun(folder, bank, tasks, device)
    generator, without_bank = run.generator, run.bank_name is None
    if without_bank and (run.config.get("base") is None or run.tasks_name is None):
        raise ConfigError("no bank to fit a gate on", remedy="Give --bank, the one that the generator learned from.")
    experts, known = run.bank(), generator.conditioner.names
    if not without_bank and (experts.base != generator.base or experts.names != known):
        raise ConfigError(
            "bank: the generator learned from another one", got=run.bank_name, remedy="Give --bank, the one that it learned from."
        )
    run_tasks = RunTasks.named(run.tasks_name, len(experts))
    split = run.rule.split(experts.names, run_tasks)
    if without_bank and [run_tasks.others[i].key for i in split.training] != list(known):
        raise ConfigError(
            "tasks: the generator learned from others", got=run.tasks_name, remedy="Give --tasks, the suite that it learned from."
        )
    listed = None if unknown is None else read_unknown(unknown, "fit")
    generator.gate = fit_gate(generator, experts, run_tasks, split, unknown=listed, settings=settings, quiet=quiet)
    return run.saved()


def add_pairs(
    folder: str | Path, *, bank: str | None = None, tasks: str | None = None, steps: int = 1200, device: str = "auto", quiet: bool = True
) -> LoraGenerator:
    """Teaches a trained generator of method `house` to read examples, and writes that into its folder.

    Args:
        folder: The generator's.
        bank: The bank that it learned from; by default the one that its settings name.
        tasks: The suite with the examples; by default the one that its settings name.
        steps: Of training.
        device: Where embedder and base model run.
        quiet: No progress bar.

    Raises:
        ConfigError: If there are no tasks to learn from, or the bank is another one.
        GeneratorError: If the generator is of another method.
    """
    run = _FinishedRun(folder, bank, tasks, device)
    generator = run.generator
    if not generator.method.learns_pairs:  # said before minutes of preparation
        raise GeneratorError(f"{generator.method.name} does not learn to read examples", expected="method house")
    experts = run.bank()
    if run.tasks_name is None:
        raise ConfigError(
            "no examples that the generator learned from", got=f"bank {run.bank_name}, no tasks", remedy="Give --bank and --tasks."
        )
    if not experts.base.same(generator.base):
        raise ConfigError("bank: it is of another base model", got=experts.base.model.name, expected=generator.base.model.name)
    prepared = prepare(
        experts,
        generator.embedder,
        RunTasks.named(run.tasks_name, len(experts)),
        run.rule,
        runner=Runner.open(generator.base, device),
        space=generator.space,
        wordings=TrainingSet.AVERAGED,
        quiet=quiet,
    )
    loop = TrainingLoop(None, torch.Generator().manual_seed(run.rule.seed), quiet)
    generator.method.learn_pairs(prepared.data, loop, prepared.runner, steps)
    return run.saved()
