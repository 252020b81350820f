"""Train a generator from a bank: codes, conditions, the method's own fit, and the strength of what it generates."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from lorag.artifacts import embedded, read_json, write_json
from lorag.bank import AdapterBank
from lorag.base_model import device_of
from lorag.conditioning import Conditioner
from lorag.config import to_plain
from lorag.embedding import CachedEmbedder, SentenceEmbedder, TextEmbedder
from lorag.errors import ConfigError
from lorag.functional import TaskLoss
from lorag.generator import LoraGenerator
from lorag.generators import FitData, Generator, generator_type
from lorag.objectives import make_objective
from lorag.row_adapters import RowAdapters
from lorag.tasks import TaskSuite
from lorag.training_loop import TrainingLoop
from lorag.weight_space import FlatFactors, SharedSubspace

__all__ = ["TrainConfig", "fit_generator", "prepare", "train", "tune_strength"]

logger = logging.getLogger(__name__)

_STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        bank: Bank folder or hub id; "sandbox" is the embedded one.
        out: Folder of the trained generator.
        method: A registered generator.
        settings: The method's own settings.
        tasks: Suite with the experts' examples, for functional training and for choosing the strength; "sandbox" is the
            embedded one, null leaves both out.
        embedder: Text embedder.
        space: "shared_subspace" or "flat_factors".
        k: Dimensions of a shared subspace on each side.
        rank: Rank of generated adapters.
        wordings: Descriptions used of each expert; 0 uses all.
        validation: Share of the experts held out for early stopping.
        strength: Factor on generated ΔW; null chooses it on the held-out experts' tasks.
        seed: Seed of everything.
        device: "auto", "cpu" or "cuda".
    """

    bank: str = "sandbox"
    out: str = "runs/generator"
    method: str = "house"
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: str | None = "sandbox"
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    space: str = "shared_subspace"
    k: int = 32
    rank: int = 16
    wordings: int = 0
    validation: float = 0.1
    strength: float | None = None
    seed: int = 0
    device: str = "auto"


def find_bank(name: str) -> AdapterBank:
    """Opens a bank by folder, hub id, or "sandbox"."""
    return AdapterBank.from_pretrained(embedded("data/sandbox/bank") if name == "sandbox" else name)


def find_tasks(name: str, split: str | None = None) -> TaskSuite:
    """Reads a suite by folder, or "sandbox"."""
    return TaskSuite.from_folder(embedded("data/sandbox/tasks") if name == "sandbox" else name, split)


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
    validation: float = 0.1,
    seed: int = 0,
    suite: TaskSuite | None = None,
    device: str = "auto",
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
        validation: Share of the experts held out for early stopping.
        seed: Chooses which.
        suite: The experts' tasks; without it nothing runs the base model.
        device: Where the base model runs.
        quiet: No progress bars.
    """
    bank.base.check()
    layout = bank.base.layout
    if space is None:
        if space_name == "shared_subspace":
            space = SharedSubspace.fit(bank.adapters, layout, k)
        elif space_name == "flat_factors":
            space = FlatFactors.fit(bank.adapters, layout)
        else:
            raise ConfigError("space is unknown", got=repr(space_name), expected="shared_subspace or flat_factors")
    codes, deviations = [], []
    for expert in tqdm(bank.experts, desc="encoding experts", disable=quiet, leave=False):
        late = torch.stack([space.encode(bank.adapter(expert.name, i)) for i in range(expert.checkpoints)])
        codes.append(late[-1])
        deviations.append(late.std(0) if len(late) > 1 else torch.zeros_like(late[0]))
    texts = [expert.descriptions[: wordings or None] for expert in bank.experts]
    flat = iter(embedder.embed([text for own in texts for text in own], quiet=quiet))
    embeddings = [[next(flat) for _ in own] for own in texts]
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed)).tolist()
    held = sorted(order[: int(len(bank) * validation)])
    functional = None
    if suite is not None:
        model = bank.base.model.load(device)
        objective = make_objective(bank.base.objective, bank.base.model.tokenizer(), bank.base.settings)
        tasks = {task.key: task for task in suite}
        missing = [name for name in bank.names if name not in tasks]
        if missing:
            raise ConfigError("tasks: the suite lacks tasks of experts", got=f"{len(missing)} such as {missing[0]}")
        functional = TaskLoss(RowAdapters(model, layout), objective, space.to(model.device), [tasks[name] for name in bank.names])
    data = FitData(
        codes=torch.stack(codes),
        deviations=torch.stack(deviations),
        embeddings=embeddings,
        conditioner=Conditioner.fit(bank.names, embeddings),
        training=sorted(set(range(len(bank))) - set(held)),
        validation=held,
        modules=space.parts,
        functional=functional,
    )
    return Prepared(bank, space, data, embedder)


def fit_generator(
    prepared: Prepared, method: Generator, loop: TrainingLoop, *, rank: int, strength: float | None, origin: dict[str, Any]
) -> LoraGenerator:
    """Fits a method on a prepared bank and chooses its strength."""
    method.fit(prepared.data, loop)
    if strength is None:
        strength = tune_strength(method, prepared.data, loop.rng)
    space = prepared.space
    rank = space.rank if isinstance(space, FlatFactors) else min(rank, space.k)
    return LoraGenerator(
        base=prepared.bank.base,
        space=space,
        conditioner=prepared.data.conditioner,
        method=method,
        embedder=prepared.embedder,
        rank=rank,
        strength=strength,
        origin=origin,
    )


def tune_strength(method: Generator, data: FitData, rng: torch.Generator, most: int = 48) -> float:
    """The factor on ΔW with the lowest loss on held-out training tasks, each conditioned as if it were unseen.

    The same rule for every method, so that none gains from its scale alone. 1 without examples or held-out tasks.
    """
    if data.functional is None or not data.validation:
        return 1.0
    chosen = list(data.validation)[:most]
    codes = torch.cat([method.generate(data.conditioner(data.embeddings[i][-1], exclude=i), rng).cpu() for i in chosen])
    space: Any = data.functional.space  # of the two that `_scale` knows
    device = data.functional.rows.model.device
    found: dict[float, float] = {}
    for strength in _STRENGTHS:
        scaled = _scale(space, codes, strength).to(device)
        found[strength] = data.functional.loss(scaled, chosen, 4, "strength")
    return min(found, key=lambda strength: found[strength])


def _scale(space: SharedSubspace | FlatFactors, codes: Tensor, strength: float) -> Tensor:
    """Codes whose ΔW is `strength` times as large. In flat factors the square root goes to both A and B."""
    if isinstance(space, SharedSubspace):
        space = space.to(codes.device)
        return space.standardise(space.restore(codes) * strength)
    mean, scale = space.mean.to(codes.device), space.scale.to(codes.device)
    return ((codes * scale + mean) * strength**0.5 - mean) / scale


def train(config: TrainConfig, *, quiet: bool = False) -> LoraGenerator:
    """Runs a training run, or goes on with it where it was interrupted.

    Raises:
        ConfigError: If a setting is wrong, or if `out` holds a run with other settings.
    """
    out = Path(config.out)
    plain = to_plain(config)
    if (out / "run.json").exists() and read_json(out / "run.json") != plain:
        raise ConfigError(f"out: {out} holds a run with other settings", remedy="Choose another folder, or delete it.")
    if (out / "generator.json").exists():
        logger.warning("%s is trained already; delete it to train it anew", out)
        return LoraGenerator.from_pretrained(out, device=config.device)
    if config.rank < 1 or config.k < 1 or not 0 <= config.validation < 1:
        raise ConfigError("rank and k must be positive, validation a share below 1", got=f"{config.rank}, {config.k}, {config.validation}")
    method = generator_type(config.method).with_settings(config.settings)
    bank = find_bank(config.bank)
    suite = find_tasks(config.tasks) if config.tasks else None
    embedder = CachedEmbedder(SentenceEmbedder.from_pretrained(config.embedder, config.device))
    write_json(out / "run.json", plain)
    prepared = prepare(
        bank,
        embedder,
        space_name=config.space,
        k=config.k,
        wordings=config.wordings,
        validation=config.validation,
        seed=config.seed,
        suite=suite,
        device=config.device,
        quiet=quiet,
    )
    accelerator = Accelerator(cpu=device_of(config.device).type == "cpu")
    loop = TrainingLoop(out, torch.Generator().manual_seed(config.seed), quiet or not accelerator.is_local_main_process, accelerator)
    # Where a run was written, and on what, says nothing about the generator, and paths of a machine are nobody's business.
    origin = {"config": {key: value for key, value in plain.items() if key not in ("out", "device")}, "experts": len(bank)}
    generator = fit_generator(prepared, method, loop, rank=config.rank, strength=config.strength, origin=origin)
    generator.save_pretrained(out)
    loop.finish()
    return generator
