"""Fit a gate: what evidence means, learned from held-out training tasks and from descriptions that no bank of text tasks serves.

Held-out training tasks play unknown tasks that a bank can serve: their experts, and others of their group, do not count while
evidence on them is gathered, and the gap that they close is measured. Every number that is calibrated comes from a fit that saw
no task of the same cluster. Nothing is trained again, and no task of a test split is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.errors import GeneratorError
from lorag.generator.calibration import Logistic, auroc, calibration_error, cross_fitted, residual_interval, risk_coverage
from lorag.generator.evidence import Reference, gather, rewordings
from lorag.generator.gate import Gate, digest
from lorag.progress import progress_bar
from lorag.tasks.unknown import unknown_tasks
from lorag.text.embedding import Embedding, TextEmbedder
from lorag.training.calibrate import gap_closed_by

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.training.split import RunTasks, Split

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
    run: RunTasks,
    split: Split,
    *,
    unknown: Mapping[str, Sequence[str]] | None = None,
    settings: GateSettings | None = None,
    measure: Callable[..., Tensor] = gap_closed_by,
    quiet: bool = True,
) -> Gate:
    """Fits a gate for a generator.

    Args:
        generator: The generator; it is only used.
        bank: The bank that it learned from.
        run: The tasks of its run. Without examples of the experts' tasks, the gap closed is not estimated; the others show what is
            known, but how much of a gap is closed on them, nobody can tell.
        split: What the generator did not learn from. No expert of a task's group counts while the task plays an unknown one.
        unknown: Descriptions that the bank cannot serve, by kind; by default the shipped ones for fitting.
        settings: How much is looked at.
        measure: Measures the gap that codes close, as `gap_closed_by` does.
        quiet: No progress bar.

    Raises:
        GeneratorError: If there is no held-out task, or the method cannot work from a description alone.
        ConfigError: If the suite lacks held-out tasks.
    """
    settings, held, experts = settings or GateSettings(), split.validation, len(bank)
    if not held or generator.method.needs_task_vectors:
        raise GeneratorError(
            "no gate can be fitted for this generator",
            got="no held-out training task" if not held else f"{generator.method.name} with task vectors from examples",
            remedy="Train with validation above 0, and with a method that works from a description alone.",
        )
    described = [*(expert.descriptions for expert in bank.experts), *(task.descriptions for task in run.others)]
    rows = [(task, text) for task in held for text in described[task][: settings.wordings]]
    group_of = torch.tensor(split.groups[:experts])
    masks = [group_of == split.groups[task] if experts else None for task, _ in rows]
    reference = Reference.of(generator.space, _some_codes(generator, bank))
    looked = _look(generator, reference, [text for _, text in rows], masks, quiet)
    listed = [text for texts in (unknown or unknown_tasks("fit")).values() for text in texts]
    strange = _really_unknown(_look(generator, reference, listed, [None] * len(listed), quiet).evidence, looked.evidence)
    cluster_of = _clusters(generator.embedder, {task: described[task] for task in held}, split.groups)
    cluster = [cluster_of[task] for task, _ in rows]
    novelty, threshold, facts = _fit_novelty(looked.evidence, strange, cluster)
    facts |= {"held_out_tasks": len(held), "descriptions": len(rows), "unknown": len(strange), "clusters": len(set(cluster_of.values()))}
    closed, fuse_above = _gaps_closed(
        generator, bank, run, [task for task, _ in rows], looked, functools.partial(measure, limit=settings.limit)
    )
    gap_closed, gap_range, offsets = None, (0.0, 1.0), (0.0, 0.0)
    sure = closed.isfinite()
    if sure.any():
        gap_range = min(0.0, closed[sure].min().item()), 1.0
        clusters = [one for one, measured in zip(cluster, sure.tolist(), strict=True) if measured]
        gap_closed, offsets, more = _fit_gap_closed(looked.evidence[sure], closed[sure], clusters, gap_range)
        facts |= more
    wordings, owners_of = task_wordings(generator.conditioner.names, bank)
    return Gate(
        reference=reference,
        novelty=novelty,
        refuse_above=threshold,
        gap_closed=gap_closed,
        gap_range=gap_range,
        offsets=offsets,
        same_above=naming_cosine(generator, bank, looked.evidence[:, 0], settings.wordings),
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


@dataclass(frozen=True)
class _Looked:
    """What is known of u descriptions: evidence (u, f), codes made from them (u, c), and similarities to the experts (u, n)."""

    evidence: Tensor
    codes: Tensor
    similarities: Tensor


def _look(generator: LoraGenerator, reference: Reference, texts: Sequence[str], masks: Sequence[Tensor | None], quiet: bool) -> _Looked:
    """Looks at descriptions; the experts of a mask (n,) do not count."""
    evidence, codes, similarities = [], [], []
    # Rewordings too, which `gather` then finds in the embedder's cache: one by one they take nearly twice as long.
    embedded = generator.embedder.embed([*texts, *(other for text in texts for other in rewordings(text))], quiet=quiet)[: len(texts)]
    for text, one, masked in progress_bar(
        list(zip(texts, embedded, masks, strict=True)), desc="gathering evidence", disable=quiet, leave=False
    ):
        unseen = functools.partial(generator.conditioner, masked=masked)
        gathered = gather(generator, text, unseen(one), reference=reference, condition_of=unseen)
        evidence.append(gathered.row())
        codes.append(gathered.code[0].float())
        similarities.append(gathered.condition.similarities)
    return _Looked(torch.stack(evidence), torch.stack(codes), torch.stack(similarities))


def _gaps_closed(
    generator: LoraGenerator, bank: AdapterBank, run: RunTasks, tasks: Sequence[int], looked: _Looked, measure: Callable[..., Tensor]
) -> tuple[Tensor, float | None]:
    """Share of the gap that each row's code closes (u,), NaN where nobody can tell, and the cosine from which experts are fused.

    Args:
        generator: The generator.
        bank: Its bank.
        run: The tasks of its run.
        tasks: Number of each row's task, u in all; rows of a task follow one another.
        looked: What is known of the rows.
        measure: Measures the gap that codes close.
    """
    closed = torch.full((len(tasks),), torch.nan, dtype=torch.float64)
    with_expert = [row for row, task in enumerate(tasks) if task < len(bank)]
    if run.suite is None or not with_expert:
        return closed, None
    first = [row for row in with_expert if row == tasks.index(tasks[row])]  # one row for each task
    suite = {task.key: task for task in run.suite.of_experts([bank.names[tasks[row]] for row in first])}
    fused = torch.cat([generator.fuse_nearest(bank, looked.similarities[row])[1] for row in first])
    owners = [bank.names[tasks[row]] for row in (*with_expert, *first)]
    strengths = [generator.strength] * len(with_expert) + [1.0] * len(first)
    every = measure(generator, torch.cat([looked.codes[with_expert], fused]), owners, bank, suite, strengths=strengths)
    closed[with_expert] = every[: len(with_expert)]
    return closed, fusing_cosine(looked.evidence[first, 0], every[len(with_expert) :], closed[first])


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
