"""Fit a gate: what the evidence on held-out training tasks meant, and on descriptions that no bank of text tasks serves.

Held-out training tasks play unknown tasks that a bank can serve: their experts, and others of their group, do not count while
evidence on them is gathered, and their gains are measured. Every number that is calibrated comes from a fit that saw
no task of the same cluster. Nothing is trained again, and no task of a test split is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorag.bank.bank import AdapterBank, find_bank
from lorag.errors import ConfigError, GeneratorError
from lorag.generator.calibration import Logistic, auroc, calibration_error, cross_fitted, residual_interval, risk_coverage
from lorag.generator.evidence import Reference, gather
from lorag.generator.gate import Gate
from lorag.generator.lora_generator import LoraGenerator
from lorag.progress import progress_bar
from lorag.tasks.suite import TaskSuite
from lorag.tasks.unknown import read_unknown, unknown_tasks
from lorag.training.gains import gains_of
from lorag.training.gate_rungs import bank_wordings, fusing_cosine, naming_cosine
from lorag.training.preparation import WITHOUT_EXPERT, find_split, find_tasks, hold_out

__all__ = ["GateSettings", "add_gate", "fit_gate"]

_REFERENCES = 64  # experts whose codes stand for the bank's
_REFUSED = 0.05  # share of held-out known descriptions that the gate may refuse, at most
_NOVELTY_PENALTY, _GAIN_PENALTY = 1.0, 4.0


@dataclass
class GateSettings:
    """What a gate is fitted on.

    Attributes:
        wordings: Descriptions of each held-out task.
        limit: Most examples of each held-out task that gains are measured on.
    """

    wordings: int = 4
    limit: int = 16


def fit_gate(
    generator: LoraGenerator,
    bank: AdapterBank,
    suite: TaskSuite | None,
    held: Sequence[int],
    groups: Sequence[int],
    *,
    unknown: Mapping[str, Sequence[str]] | None = None,
    settings: GateSettings | None = None,
    quiet: bool = True,
) -> Gate:
    """Fits a gate for a generator.

    Args:
        generator: The generator; it is only used.
        bank: The bank that it learned from.
        suite: The experts' tasks with examples; without it, gains are not estimated.
        held: Experts that the generator did not learn from, as indices into the bank.
        groups: Group of each expert: none of its group counts while its task plays an unknown one.
        unknown: Descriptions that the bank cannot serve, by kind; by default the shipped ones for fitting.
        settings: How much is looked at.
        quiet: No progress bar.

    Raises:
        GeneratorError: If there is no held-out task, or the method cannot work from a description alone.
        ConfigError: If the suite lacks held-out tasks.
    """
    settings = settings or GateSettings()
    if not held or generator.method.needs_task_vectors:
        raise GeneratorError(
            "no gate can be fitted for this generator",
            got="no held-out training task" if not held else f"{generator.method.name} with task vectors from examples",
            remedy="Train with validation above 0, and with a method that works from a description alone.",
        )
    names = generator.conditioner.names
    tasks = {task.key: task for task in suite} if suite is not None else {}
    missing = [names[i] for i in held if tasks and names[i] not in tasks]
    if missing:
        raise ConfigError("tasks: the suite lacks tasks of experts", got=f"{len(missing)} such as {missing[0]}")
    reference = Reference.of(generator.space, _some_codes(generator, bank))
    rows = [(i, text) for i in held for text in bank[names[i]].descriptions[: settings.wordings]]
    of = torch.tensor(list(groups))
    evidence, codes, firsts = _look(generator, reference, [text for _, text in rows], [of == groups[i] for i, _ in rows], quiet)
    listed = [text for texts in (unknown or unknown_tasks("fit")).values() for text in texts]
    strange = _really_unknown(_look(generator, reference, listed, [None] * len(listed), quiet)[0], evidence)
    clusters = _clusters(generator.conditioner.centroids, held, groups)
    group = [clusters[i] for i, _ in rows]
    novelty, threshold, facts = _fit_novelty(evidence, strange, group)
    facts |= {"held_out_tasks": len(held), "descriptions": len(rows), "unknown": len(strange), "clusters": len(set(clusters.values()))}
    gain, gain_range, offsets, fuse_above = None, (0.0, 1.0), (0.0, 0.0), None
    if tasks:
        first = [next(place for place, (i, _) in enumerate(rows) if i == task) for task in held]
        fused = torch.cat([generator.fuse_nearest(bank, firsts[place])[1] for place in first])
        owners = [names[i] for i, _ in rows] + [names[i] for i in held]
        strengths = [generator.strength] * len(rows) + [1.0] * len(held)
        every = gains_of(generator, torch.cat([codes, fused]), owners, bank, tasks, settings.limit, strengths)
        gains = every[: len(rows)]
        fuse_above = fusing_cosine(evidence[first, 0], every[len(rows) :], gains[first])
        sure = gains.isfinite()
        if sure.any():
            gain_range = min(0.0, gains[sure].min().item()), 1.0
            gain, offsets, more = _fit_gain(
                evidence[sure], gains[sure], [g for g, s in zip(group, sure.tolist(), strict=True) if s], gain_range
            )
            facts |= more
    wordings, owned = bank_wordings(bank, names)
    return Gate(
        reference=reference,
        novelty=novelty,
        refuse_above=threshold,
        gain=gain,
        gain_range=gain_range,
        offsets=offsets,
        same_above=naming_cosine(generator, bank, evidence[:, 0], settings.wordings),
        fuse_above=fuse_above,
        wordings=wordings,
        owners=owned,
        fitted=facts,
    )


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
    """Fits a gate for a trained generator and writes it into its folder; nothing else of the generator changes.

    Args:
        folder: The generator's.
        bank: The bank that it learned from; by default the one that its settings name.
        tasks: The suite; by default the one that its settings name.
        unknown: YAML of descriptions that the bank cannot serve; by default the shipped ones.
        settings: How much is looked at.
        device: Where embedder and base model run.
        quiet: No progress bar.

    Raises:
        ConfigError: If the generator's settings name no bank, or bank and generator do not belong together.
    """
    generator = LoraGenerator.from_pretrained(folder, device=device)
    config = generator.origin.get("config", {})
    bank, tasks = bank or config.get("bank"), tasks or config.get("tasks")
    if bank is None:
        raise ConfigError("no bank to fit a gate on", remedy="Give --bank, the one that the generator learned from.")
    experts = find_bank(bank)
    if experts.base != generator.base or experts.names != generator.conditioner.names:
        raise ConfigError("bank: the generator learned from another one", got=bank, remedy="Give --bank, the one that it learned from.")
    suite = None if tasks is None else find_tasks(tasks)
    more = None if tasks is None else find_split(tasks, WITHOUT_EXPERT)
    share, seed = float(config.get("validation", 0.1)), int(config.get("seed", 0))
    split = hold_out(experts, suite, more, groups=str(config.get("groups", config.get("kin", "task"))), validation=share, seed=seed)
    held, groups = [i for i in split.validation if i < len(experts)], split.groups[: len(experts)]
    listed = None if unknown is None else read_unknown(unknown, "fit")
    generator.gate = fit_gate(generator, experts, suite, held, groups, unknown=listed, settings=settings, quiet=quiet)
    generator.save_pretrained(folder)
    return generator


# --- what is looked at ------------------------------------------------------------------------------------------------


def _some_codes(generator: LoraGenerator, bank: AdapterBank) -> Tensor:
    names = generator.conditioner.names
    chosen = names[:: -(-len(names) // _REFERENCES)]
    return torch.stack([generator.space.encode(bank.adapter(name)) for name in chosen])


def _look(
    generator: LoraGenerator, reference: Reference, texts: Sequence[str], masks: Sequence[Tensor | None], quiet: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence (u, f) on descriptions, their codes (u, c), and their similarities to the experts (u, n)."""
    evidence, codes, similarities = [], [], []
    embedded = generator.embedder.embed(list(texts), quiet=quiet)
    for text, one, masked in progress_bar(
        list(zip(texts, embedded, masks, strict=True)), desc="gathering evidence", disable=quiet, leave=False
    ):
        unseen = functools.partial(generator.conditioner, masked=masked)
        gathered = gather(generator, text, unseen(one), reference=reference, condition_of=unseen)
        evidence.append(gathered.row())
        codes.append(gathered.code[0].float())
        similarities.append(gathered.condition.similarities)
    return torch.stack(evidence), torch.stack(codes), torch.stack(similarities)


def _really_unknown(strange: Tensor, evidence: Tensor) -> Tensor:
    """Evidence on listed descriptions but those that lie as near to an expert as half of the held-out tasks do: a bank may serve them."""
    far = strange[:, 0] < evidence[:, 0].median()
    return strange[far] if far.any() else strange


def _clusters(centroids: Tensor, held: Sequence[int], groups: Sequence[int]) -> dict[int, int]:
    """Cluster of each held-out task: k-means on the sphere, started at tasks far from each other; groups stay together."""
    first = {groups[i]: i for i in sorted(held, reverse=True)}
    heads = sorted(first.values())
    points = centroids[heads]
    count = max(1, min(8, len(heads) // 3))
    centres = points[:1]
    while len(centres) < count:
        centres = torch.cat([centres, points[(points @ centres.T).max(1).values.argmin()][None]])
    for _ in range(10):
        label = (points @ centres.T).argmax(1)
        means = torch.stack([points[label == k].mean(0) if (label == k).any() else centres[k] for k in range(len(centres))])
        centres = torch.nn.functional.normalize(means, dim=-1)
    of = dict(zip(heads, (points @ centres.T).argmax(1).tolist(), strict=True))
    return {i: of[first[groups[i]]] for i in held}


# --- what it meant ----------------------------------------------------------------------------------------------------


def _fit_novelty(evidence: Tensor, strange: Tensor, group: Sequence[int]) -> tuple[Logistic, float, dict[str, Any]]:
    """Novelty of known rows (n, f) and unknown ones (u, f), both sides counting alike, and where it refuses."""
    rows = torch.cat([evidence, strange])
    labels = torch.cat([torch.zeros(len(evidence)), torch.ones(len(strange))])
    weights = torch.cat([torch.full((len(part),), 1 / len(part)) for part in (evidence, strange)])
    # Unknown descriptions have no clusters; they are dealt out to the tasks' in turn.
    kinds = sorted(set(group))
    folds = [*group, *(kinds[i % len(kinds)] for i in range(len(strange)))]
    checked = cross_fitted(rows, labels, folds, weights=weights, penalty=_NOVELTY_PENALTY)
    inside, outside = checked[: len(evidence)], checked[len(evidence) :]
    threshold = min(0.95, max(0.5, inside.quantile(1 - _REFUSED).item()))
    facts = {
        "auroc": round(auroc(inside, outside), 4),
        "refused_known": round((inside > threshold).double().mean().item(), 4),
        "refused_unknown": round((outside > threshold).double().mean().item(), 4),
    }
    return Logistic.fit(rows, labels, weights=weights, penalty=_NOVELTY_PENALTY), round(threshold, 4), facts


def _fit_gain(
    evidence: Tensor, gains: Tensor, group: Sequence[int], gain_range: tuple[float, float]
) -> tuple[Logistic, tuple[float, float], dict[str, Any]]:
    low, high = gain_range
    shares = (gains - low) / (high - low)
    checked = low + (high - low) * cross_fitted(evidence, shares, group, penalty=_GAIN_PENALTY)
    below, above = residual_interval(checked, gains)
    curve = risk_coverage(checked, 1 - gains)
    facts = {
        "gain": round(gains.mean().item(), 4),
        "gain_error": round(calibration_error(checked, gains), 4),
        "aurc": round(curve.area, 4),
        "risk": round(curve.risk[-1], 4),
        "risk_at_half": round(curve.at(0.5), 4),
    }
    return Logistic.fit(evidence, shares, penalty=_GAIN_PENALTY), (round(below, 4), round(above, 4)), facts
