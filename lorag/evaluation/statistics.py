"""Scores of rows on tasks, and what they say: means, intervals over tasks, shares of the gap, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.evaluation.scoring import MEASURES

if TYPE_CHECKING:
    from lorag.tasks.suite import Task

__all__ = ["Scores", "bootstrap", "differences", "summarise"]

_RESAMPLES = 2000
_LEAST_GAP = 1e-9


@dataclass
class Scores:
    """Scores of rows, seed after seed.

    Attributes:
        tasks: n tasks.
        metric: What counts first.
        rows: Name of a row to the scores of its tasks, for each seed. A row may lack tasks.
        prompt_tokens: Mean tokens of a request, where requests are prompts.
    """

    tasks: tuple[Task, ...]
    metric: str
    rows: dict[str, list[Mapping[str, Mapping[str, float]]]] = field(default_factory=dict)
    prompt_tokens: dict[str, float | None] = field(default_factory=dict)

    def add(self, name: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Adds the scores of a row for one more seed, by task."""
        self.rows.setdefault(name, []).append(scores)

    def per_seed(self, name: str, measure: str) -> Tensor:
        """A measure of a row (s, n); NaN for tasks that lack it."""
        return torch.tensor(
            [[seed.get(task.name, {}).get(measure, float("nan")) for task in self.tasks] for seed in self.rows[name]], dtype=torch.float64
        )

    def per_task(self, name: str, measure: str | None = None) -> Tensor:
        """Mean over seeds (n,)."""
        return self.per_seed(name, measure or self.metric).mean(0)

    def mean(self, name: str) -> float:
        """Mean of the metric over seeds and tasks."""
        return self.per_task(name).nanmean().item()

    @property
    def measures(self) -> list[str]:
        """Measures beside the metric that some task has."""
        first = [scores for seeds in self.rows.values() for scores in seeds[0].values()]
        return [name for name in MEASURES if name != self.metric and any(name in scores for scores in first)]


def summarise(scores: Scores, name: str) -> dict[str, Any]:
    """What a report says of a row. The gap closed is that over the tasks that have an oracle."""
    values = scores.per_task(name)
    row: dict[str, Any] = {
        **_mean(values, "score"),
        "gap_closed": _gap(scores, name),
        "per_task": {task.name: round(value, 4) for task, value in zip(scores.tasks, values.tolist(), strict=True) if value == value},
    }
    per_seed = scores.per_seed(name, scores.metric)
    if len(per_seed) > 1:
        row["per_seed"] = [round(value, 4) for value in per_seed.nanmean(1).tolist()]
    if more := _measures(scores, lambda measure: scores.per_task(name, measure), "score"):
        row["measures"] = more
    if scores.prompt_tokens.get(name) is not None:
        row["prompt_tokens"] = scores.prompt_tokens[name]
    return row


def differences(scores: Scores, rivals: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Differences of rows to others, over the tasks that both have, with intervals."""
    rows = {}
    for name, others in rivals.items():
        for other in others:
            row: dict[str, Any] = _mean(scores.per_task(name) - scores.per_task(other), "difference")
            apart = _measures(scores, lambda m, a=name, b=other: scores.per_task(a, m) - scores.per_task(b, m), "difference")  # type: ignore[misc]
            rows[f"{name} - {other}"] = row | ({"measures": apart} if apart else {})
    return rows


def bootstrap(values: Tensor) -> list[float]:
    """95 % percentile interval (Efron 1979) of the mean of values (n,), one per task."""
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=rng)
    means = values[picks].mean(1).sort().values
    return [round(means[int(_RESAMPLES * q)].item(), 4) for q in (0.025, 0.975)]


def _mean(values: Tensor, key: str) -> dict[str, Any]:
    """Mean over the tasks that have a value, its interval, and how many they are, if not all."""
    present = values[~values.isnan()]
    row = {key: round(present.mean().item(), 4), "ci95": bootstrap(present)}
    return row if len(present) == len(values) else {**row, "tasks": len(present)}


def _measures(scores: Scores, values_of: Any, key: str) -> dict[str, Any]:  # noqa: ANN401 - a function from measure to values
    by_measure = {measure: values_of(measure) for measure in scores.measures}
    return {measure: _mean(values, key) for measure, values in by_measure.items() if not values.isnan().all()}


def _gap(scores: Scores, name: str) -> float | None:
    if "oracle" not in scores.rows:
        return None
    floor, values, ceiling = (scores.per_task(row) for row in ("base", name, "oracle"))
    present = ~ceiling.isnan()
    floor, values, ceiling = (one[present].mean() for one in (floor, values, ceiling))
    return round(((values - floor) / (ceiling - floor)).item(), 4) if (ceiling - floor).abs() >= _LEAST_GAP else None
