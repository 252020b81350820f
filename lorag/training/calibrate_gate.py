"""Fit a gate: what the evidence on held-out training tasks meant, and on descriptions that no bank of text tasks serves.

Held-out training tasks play unknown tasks that a bank can serve: their experts, and others of their group, do not count while
evidence on them is gathered, and the gap that they close is measured. Every number that is calibrated comes from a fit that saw
no task of the same cluster. Nothing is trained again, and no task of a test split is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.errors import GeneratorError
from lorag.generator.calibration import Logistic, auroc, calibration_error, cross_fitted, residual_interval, risk_coverage
from lorag.generator.evidence import Reference, gather
from lorag.generator.gate import Gate, digest
from lorag.progress import progress_bar
from lorag.tasks.unknown import unknown_tasks
from lorag.text.embedding import Embedding, TextEmbedder
from lorag.training.calibrate import gap_closed_by

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.tasks.suite import Task, TaskSuite

__all__ = ["GateSettings", "fit_gate"]

_REFERENCES = 64  # experts whose codes stand for the bank's
_REFUSED = 0.05  # share of held-out known descriptions that the gate may refuse, at most
_NOVELTY_PENALTY, _GAP_PENALTY = 1.0, 4.0
_PRECISION, _LEAST_CLAIMS, _COMPARED = 0.95, 20, 3
_LEAST_TASKS, _LEAST_CLOSED = 3, 0.5  # that fusing must have shown


@dataclass
class GateSettings:
    """What a gate is fitted on.

    Attributes:
        wordings: Descriptions of each held-out task.
        limit: Most examples of each held-out task that the gap closed is measured on.
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
    others: Sequence[Task] = (),
    unknown: Mapping[str, Sequence[str]] | None = None,
    settings: GateSettings | None = None,
    quiet: bool = True,
) -> Gate:
    """Fits a gate for a generator.

    Args:
        generator: The generator; it is only used.
        bank: The bank that it learned from.
        suite: The experts' tasks with examples; without it, the gap closed is not estimated.
        held: Tasks that the generator did not learn from: indices into the bank, and after its experts into `others`.
        groups: Group of each task: none of its group counts while it plays an unknown one.
        others: Tasks without an expert. They show what is known; how much of a gap is closed on them, nobody can tell.
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
    names, experts = bank.names, len(bank)
    owned = [i for i in held if i < experts]
    tasks = {} if suite is None else {task.key: task for task in suite.of_experts([names[i] for i in owned])}
    described = {i: (bank[names[i]].descriptions if i < experts else others[i - experts].descriptions) for i in held}
    rows = [(i, text) for i in held for text in described[i][: settings.wordings]]
    group_of = torch.tensor(list(groups[:experts]))
    masks = [group_of == groups[i] if experts else None for i, _ in rows]
    reference = Reference.of(generator.space, _some_codes(generator, bank))
    evidence, codes, firsts = _look(generator, reference, [text for _, text in rows], masks, quiet)
    listed = [text for texts in (unknown or unknown_tasks("fit")).values() for text in texts]
    strange = _really_unknown(_look(generator, reference, listed, [None] * len(listed), quiet)[0], evidence)
    clusters = _clusters(generator.embedder, described, groups)
    group = [clusters[i] for i, _ in rows]
    novelty, threshold, facts = _fit_novelty(evidence, strange, group)
    facts |= {"held_out_tasks": len(held), "descriptions": len(rows), "unknown": len(strange), "clusters": len(set(clusters.values()))}
    gap_closed, gap_range, offsets, fuse_above = None, (0.0, 1.0), (0.0, 0.0), None
    if tasks:
        # Rows and first rows of the tasks that have an expert.
        with_expert = [place for place, (i, _) in enumerate(rows) if i < experts]
        first = [next(place for place in with_expert if rows[place][0] == i) for i in owned]
        fused = torch.cat([generator.fuse_nearest(bank, firsts[place])[1] for place in first])
        owners = [names[rows[place][0]] for place in with_expert] + [names[i] for i in owned]
        strengths = [generator.strength] * len(with_expert) + [1.0] * len(owned)
        every = gap_closed_by(generator, torch.cat([codes[with_expert], fused]), owners, bank, tasks, settings.limit, strengths)
        closed = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        closed[with_expert] = every[: len(with_expert)]
        fuse_above = fusing_cosine(evidence[first, 0], every[len(with_expert) :], closed[first])
        sure = closed.isfinite()
        if sure.any():
            gap_range = min(0.0, closed[sure].min().item()), 1.0
            gap_closed, offsets, more = _fit_gap_closed(
                evidence[sure], closed[sure], [g for g, s in zip(group, sure.tolist(), strict=True) if s], gap_range
            )
            facts |= more
    wordings, owners_of = task_wordings(generator.conditioner.names, bank)
    return Gate(
        reference=reference,
        novelty=novelty,
        refuse_above=threshold,
        gap_closed=gap_closed,
        gap_range=gap_range,
        offsets=offsets,
        same_above=naming_cosine(generator, bank, evidence[:, 0], settings.wordings),
        fuse_above=fuse_above,
        wordings=wordings,
        owners=owners_of,
        fitted=facts,
    )


# --- what is looked at ------------------------------------------------------------------------------------------------


def _some_codes(generator: LoraGenerator, bank: AdapterBank) -> Tensor:
    """Codes (u, c) of experts, or, where there are none, what the method makes of the training tasks' mean descriptions."""
    conditioner = generator.conditioner
    step = -(-len(conditioner.names) // _REFERENCES)
    if len(bank):
        return torch.stack([generator.space.encode(bank.adapter(name).factors) for name in conditioner.names[::step]])
    conditions = (conditioner(Embedding(vector, vector[None])) for vector in conditioner.centroids[::step])
    return torch.cat([generator.method.generate(condition, torch.Generator().manual_seed(0)).float() for condition in conditions])


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


def _clusters(embedder: TextEmbedder, described: Mapping[int, Sequence[str]], groups: Sequence[int]) -> dict[int, int]:
    """Cluster of each held-out task: k-means on unit vectors, started at tasks far from each other; groups stay together."""
    from sklearn.cluster import KMeans  # takes a second to import

    first = {groups[i]: i for i in sorted(described, reverse=True)}
    heads = sorted(first.values())
    vectors = [torch.stack([one.pooled for one in embedder.embed(list(described[i]))]).mean(0) for i in heads]
    points = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
    count = max(1, min(8, len(heads) // 3))
    centres = points[:1]
    while len(centres) < count:
        centres = torch.cat([centres, points[(points @ centres.T).max(1).values.argmin()][None]])
    labels = KMeans(count, init=centres.double().numpy(), n_init=1).fit_predict(points.double().numpy())
    of = dict(zip(heads, labels.tolist(), strict=True))
    return {i: of[first[groups[i]]] for i in described}


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


def _fit_gap_closed(
    evidence: Tensor, measured: Tensor, group: Sequence[int], gap_range: tuple[float, float]
) -> tuple[Logistic, tuple[float, float], dict[str, Any]]:
    low, high = gap_range
    shares = (measured - low) / (high - low)
    checked = low + (high - low) * cross_fitted(evidence, shares, group, penalty=_GAP_PENALTY)
    below, above = residual_interval(checked, measured)
    curve = risk_coverage(checked, 1 - measured)
    facts = {
        "gap_closed": round(measured.mean().item(), 4),
        "gap_closed_error": round(calibration_error(checked, measured), 4),
        "aurc": round(curve.area, 4),
        "risk": round(curve.risk[-1], 4),
        "risk_at_half": round(curve.at(0.5), 4),
    }
    return Logistic.fit(evidence, shares, penalty=_GAP_PENALTY), (round(below, 4), round(above, 4)), facts


# --- from which cosine a description is a known task's, and from which experts are fused --------------------------------


def fusing_cosine(nearest: Tensor, fused: Tensor, generated: Tensor) -> float | None:
    """The cosine from which fused experts closed as much of the gap as generated codes; None if there is no such cosine.

    Args:
        nearest: Cosine of each held-out task to its nearest expert (n,).
        fused: Gap closed by fused experts on it (n,); NaN counts for neither.
        generated: Gap closed by what was generated (n,).
    """
    for cosine in sorted(nearest.tolist()):
        near = (nearest >= cosine) & fused.isfinite() & generated.isfinite()
        if near.sum() < _LEAST_TASKS:
            break
        if fused[near].mean() >= generated[near].mean() and fused[near].mean() > _LEAST_CLOSED:
            return round(cosine, 4)
    return None


def naming_cosine(generator: LoraGenerator, bank: AdapterBank, nearest: Tensor, wordings: int) -> float | None:
    """The cosine from which a description names its nearest expert, right in 95 % of cases; None if there is no such cosine.

    Each wording of an expert is compared with all experts, its own without that wording; held-out tasks, `nearest` (n,) to
    some expert that is not theirs, are wrong wherever they are taken for one.
    """
    conditioner = generator.conditioner
    if not len(bank):
        return None
    texts = [bank[name].descriptions[: min(max(2, wordings), _COMPARED)] for name in conditioner.names]
    flat = iter(generator.embedder.embed([text for of_expert in texts for text in of_expert]))
    cosines, right = [], []
    for index, of_expert in enumerate(texts):
        vectors = [next(flat) for _ in of_expert]
        for place, one in enumerate(vectors if len(vectors) > 1 else ()):
            cosine, best = _without(conditioner.centroids, index, vectors, place, one)
            cosines.append(cosine)
            right.append(best)
    if not cosines:
        return None
    claims = torch.tensor([*cosines, *nearest.tolist()])
    correct = torch.tensor([*right, *([False] * len(nearest))])
    weights = torch.tensor([1 / len(cosines)] * len(cosines) + [1 / len(nearest)] * len(nearest))
    for cosine in sorted(set(cosines)):
        claimed = claims >= cosine
        if claimed.sum() < _LEAST_CLAIMS:
            return None
        if (weights * correct)[claimed].sum() >= _PRECISION * weights[claimed].sum():
            return round(cosine, 4)
    return None


def _without(centroids: Tensor, index: int, vectors: Sequence[Embedding], place: int, one: Embedding) -> tuple[float, bool]:
    """Best cosine of a wording, and whether that is its own expert's, whose centroid is made from its other wordings."""
    others = torch.stack([other.pooled for number, other in enumerate(vectors) if number != place]).mean(0)
    similarities = centroids @ one.pooled
    similarities[index] = torch.nn.functional.normalize(others, dim=-1) @ one.pooled
    return similarities.max().item(), int(similarities.argmax()) == index


def task_wordings(names: Sequence[str], bank: AdapterBank) -> tuple[Tensor, Tensor]:
    """Digests of all wordings of experts and the places of their owners among names; a wording of several experts names none."""
    owners: dict[int, set[int]] = {}
    for index, name in enumerate(names):
        for text in bank[name].descriptions if name in bank else ():
            owners.setdefault(digest(text), set()).add(index)
    sole = sorted((mark, next(iter(places))) for mark, places in owners.items() if len(places) == 1)
    return torch.tensor([m for m, _ in sole], dtype=torch.int64), torch.tensor([o for _, o in sole], dtype=torch.int32)
