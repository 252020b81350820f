"""Make a bank ready for fitting: codes, embedded descriptions, who plays the unseen, and the base model's loss on its tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorag.bank.bank import AdapterBank
from lorag.bank.streaming import ExpertStream
from lorag.base.objectives import make_objective
from lorag.base.row_adapters import RowAdapters
from lorag.errors import ConfigError
from lorag.files.artifacts import embedded, read_json
from lorag.methods import FitData
from lorag.methods.functional import TaskLoss
from lorag.progress import progress_bar
from lorag.spaces.weight_space import FlatFactors, SharedSubspace
from lorag.tasks.suite import TaskSuite, connected
from lorag.text.conditioning import Conditioner
from lorag.text.embedding import TextEmbedder
from lorag.text.misspelling import misspell_some

__all__ = ["WITHOUT_EXPERT", "Prepared", "find_bank", "find_split", "find_tasks", "hold_out", "prepare"]

# The split of a suite whose tasks have training examples but no expert.
WITHOUT_EXPERT = "without_expert"
_KIN = ("task", "texts", "source")


def find_bank(name: str) -> AdapterBank:
    """Opens a bank by folder, hub id, or "sandbox"."""
    return AdapterBank.from_pretrained(embedded("data/sandbox/bank") if name == "sandbox" else name)


def find_tasks(name: str, split: str | None = None) -> TaskSuite:
    """Reads a suite by folder, or "sandbox"."""
    return TaskSuite.from_folder(_suite_folder(name), split)


def find_split(name: str, split: str) -> TaskSuite | None:
    """A split of a suite, or None if its splits.json does not name it."""
    listed = _suite_folder(name) / "splits.json"
    return find_tasks(name, split) if listed.is_file() and read_json(listed).get(split) else None


def _suite_folder(name: str) -> Path:
    return embedded("data/sandbox/tasks") if name == "sandbox" else Path(name)


@dataclass(frozen=True)
class Prepared:
    """A bank made ready for fitting: what all methods on it share."""

    bank: AdapterBank
    space: SharedSubspace | FlatFactors
    data: FitData
    embedder: TextEmbedder


def prepare(
    bank: AdapterBank,
    embedder: TextEmbedder,
    *,
    space: SharedSubspace | FlatFactors | None = None,
    space_name: str = "shared_subspace",
    k: int = 32,
    wordings: int = 0,
    typos: float = 0.0,
    validation: float = 0.1,
    kin: str = "task",
    seed: int = 0,
    suite: TaskSuite | None = None,
    without_expert: TaskSuite | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Prepared:
    """Encodes a bank's experts and descriptions.

    Args:
        bank: The training experts, and only they.
        embedder: Embeds descriptions.
        space: A fitted weight space; without one, `space_name` is fitted.
        space_name: "shared_subspace" or "flat_factors".
        k: Dimensions of a shared subspace.
        wordings: Descriptions used of each expert; 0 uses all.
        typos: Share of the descriptions, other than each expert's first, that get a typing error.
        validation: Share of the experts held out for early stopping.
        kin: What is hidden, or held out, together with a task's own expert: see `TrainConfig`.
        seed: Chooses which.
        suite: The experts' tasks; without it nothing runs the base model.
        without_expert: More training tasks, which have examples but no expert.
        device: Where the base model runs.
        dtype: In which precision.
        quiet: No progress bars.
    """
    bank.base.check()
    if kin not in _KIN or kin != "task" and suite is None:
        raise ConfigError("kin cannot be used", got=repr(kin), expected=" or ".join(_KIN), remedy="Other than task, it needs tasks=PATH.")
    layout = bank.base.layout
    if space is None:
        if space_name == "shared_subspace":
            space = SharedSubspace.fit_stream(ExpertStream(bank), layout, k, quiet=quiet)
        elif space_name == "flat_factors":
            space = FlatFactors.fit(bank.adapters, layout)
        else:
            raise ConfigError("space is unknown", got=repr(space_name), expected="shared_subspace or flat_factors")
    codes, deviations = [], []
    for expert in progress_bar(bank.experts, desc="encoding experts", disable=quiet, leave=False):
        late = torch.stack([space.encode(bank.adapter(expert.name, i)) for i in range(expert.checkpoints)])
        codes.append(late[-1])
        deviations.append(late.std(0) if len(late) > 1 else torch.zeros_like(late[0]))
    more = list(without_expert or ())
    described = [*(expert.descriptions for expert in bank.experts), *(task.descriptions for task in more)]
    texts = [misspell_some(own[: wordings or None], typos, random.Random(f"typos/{seed}/{i}")) for i, own in enumerate(described)]
    flat = iter(embedder.embed([text for own in texts for text in own], quiet=quiet))
    embeddings = [[next(flat) for _ in own] for own in texts]
    kin_of = _kin([*bank.names, *(task.key for task in more)], suite, kin)
    experts_kin, held = _unseen(kin_of, len(bank), validation, seed)
    functional = None
    if suite is not None:
        model = bank.base.model.load(device, dtype)
        objective = make_objective(bank.base.objective, bank.base.model.tokenizer(), bank.base.settings)
        tasks = {task.key: task for task in suite}
        missing = [name for name in bank.names if name not in tasks]
        if missing:
            raise ConfigError("tasks: the suite lacks tasks of experts", got=f"{len(missing)} such as {missing[0]}")
        near = space.to(model.device, torch.float32)
        functional = TaskLoss(RowAdapters(model, layout), objective, near, [*(tasks[name] for name in bank.names), *more])
    data = FitData(
        codes=torch.stack(codes),
        deviations=torch.stack(deviations),
        embeddings=embeddings,
        conditioner=Conditioner.fit(bank.names, embeddings[: len(bank)]),
        training=sorted(set(range(len(bank))) - set(held)),
        validation=held,
        kin=experts_kin,
        zero=space.zero.cpu(),
        modules=space.parts,
        places=layout.places,
        functional=functional,
        # Kin of a held-out task would give it away.
        without_expert=[i for i in range(len(bank), len(kin_of)) if functional is not None and not set(kin_of[i]) & set(held)],
    )
    return Prepared(bank, space, data, embedder)


def hold_out(
    bank: AdapterBank, suite: TaskSuite | None, without_expert: TaskSuite | None, *, kin: str, validation: float, seed: int
) -> tuple[list[list[int]], list[int]]:
    """Kin of each expert, and the experts held out for validation: those that `prepare` finds with the same arguments."""
    kin_of = _kin([*bank.names, *(task.key for task in without_expert or ())], suite, kin)
    return _unseen(kin_of, len(bank), validation, seed)


def _unseen(kin_of: Sequence[Sequence[int]], experts: int, validation: float, seed: int) -> tuple[list[list[int]], list[int]]:
    experts_kin = [[i for i in group if i < experts] for group in kin_of]
    return experts_kin, _held_out(experts_kin[:experts], validation, torch.Generator().manual_seed(seed))


def _kin(names: Sequence[str], suite: TaskSuite | None, rule: str) -> list[list[int]]:
    """For each task those that an unseen task like its own would not have beside it, itself among them."""
    tasks = {task.key: task for task in suite or ()}
    marks: list[set[str]] = []
    for name in names:
        found = {name}
        if rule == "source":
            found = {tasks[name].source}
        elif rule == "texts":
            found |= {example.input for example in tasks[name].split("train")}
        marks.append(found)
    of = {index: group for group in connected(marks) for index in group}
    return [of[index] for index in range(len(names))]


def _held_out(kin: Sequence[Sequence[int]], share: float, rng: torch.Generator) -> list[int]:
    """Experts held out for validation: whole groups of kin, as many as fit into the share."""
    groups = sorted({tuple(group) for group in kin})
    most = int(share * len(kin))
    held: list[int] = []
    for place in torch.randperm(len(groups), generator=rng).tolist():
        if len(held) + len(groups[place]) <= most:
            held += groups[place]
    return sorted(held)
