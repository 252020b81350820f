"""Calibration: small models of how far an estimate can be trusted, and the curves and areas that check it. Pure maths, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorag.files.stored import Number, Numbers, PositiveNumbers  # noqa: TC001 - pydantic reads a stored one's annotations

__all__ = ["Logistic", "RiskCoverage", "auroc", "calibration_error", "cross_fitted", "residual_interval", "risk_coverage"]

_NEWTON_STEPS = 50
_LARGEST = 8.0  # standard deviations from the fitted mean; what lies farther out counts as no farther


@dataclass(frozen=True)
class Logistic:
    """A logistic model on standardised features; targets may lie anywhere between 0 and 1.

    Attributes:
        mean: Of each feature where it was fitted (f,).
        scale: Standard deviation of each feature (f,).
        weights: One per standardised feature (f,).
        bias: Added to their sum.
    """

    mean: Numbers
    scale: PositiveNumbers
    weights: Numbers
    bias: Number

    @classmethod
    def fit(cls, features: Tensor, targets: Tensor, *, weights: Tensor | None = None, penalty: float = 1.0) -> Logistic:
        """Fits by Newton's method; the optimum is unique, so that the result depends on the data alone.

        Args:
            features: Rows (n, f).
            targets: Shares or classes (n,), from 0 to 1.
            weights: How much each row counts (n,); scaled to a mean of 1. All alike without.
            penalty: Ridge on the weights, in rows; the bias is free.
        """
        features, targets = features.double(), targets.double().clamp(0.0, 1.0)
        counted = torch.ones(len(features), dtype=torch.float64) if weights is None else weights.double()
        counted = counted / counted.mean()
        mean = (counted[:, None] * features).mean(0)
        scale = (counted[:, None] * (features - mean).square()).mean(0).sqrt()
        scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
        rows = torch.cat([_standard(features, mean, scale), torch.ones(len(features), 1, dtype=torch.float64)], 1)
        ridge = torch.full((rows.shape[1],), penalty, dtype=torch.float64)
        ridge[-1] = 1e-3  # one class alone would send a free bias to infinity
        solution = torch.zeros(rows.shape[1], dtype=torch.float64)
        for _ in range(_NEWTON_STEPS):
            guess = torch.sigmoid(rows @ solution)
            slope = rows.T @ (counted * (guess - targets)) + ridge * solution
            curvature = (rows * (counted * guess * (1 - guess))[:, None]).T @ rows + torch.diag(ridge)
            step = torch.linalg.solve(curvature, slope)
            solution = solution - step * min(1.0, 4.0 / max(step.abs().max().item(), 1e-12))
            if step.abs().max() < 1e-10:
                break
        return cls(tuple(mean.tolist()), tuple(scale.tolist()), tuple(solution[:-1].tolist()), float(solution[-1]))

    def __call__(self, features: Tensor) -> Tensor:
        """Probabilities (n,) of rows (n, f)."""
        rows = _standard(features.double(), torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.scale, dtype=torch.float64))
        return torch.sigmoid(rows @ torch.tensor(self.weights, dtype=torch.float64) + self.bias)

    def contributions(self, row: Tensor) -> Tensor:
        """What each feature of a row (f,) adds to the log-odds (f,), against a row at the fitted mean."""
        mean, scale, weights = (torch.tensor(part, dtype=torch.float64) for part in (self.mean, self.scale, self.weights))
        return _standard(row.double(), mean, scale) * weights

    def to_dict(self) -> dict[str, Any]:
        """JSON form, six digits each."""
        lists = {name: [_short(v) for v in getattr(self, name)] for name in ("mean", "scale", "weights")}
        return lists | {"bias": _short(self.bias)}

    def counts(self, features: int) -> bool:
        """Whether it is a model of so many features."""
        return all(len(part) == features for part in (self.mean, self.scale, self.weights))


def _standard(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return ((features - mean) / scale).clamp(-_LARGEST, _LARGEST)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def cross_fitted(
    features: Tensor, targets: Tensor, groups: Sequence[int], *, weights: Tensor | None = None, penalty: float = 1.0
) -> Tensor:
    """Predictions (n,) for rows (n, f), each by a `Logistic` that saw no row of its group.

    Args:
        features: Rows (n, f).
        targets: From 0 to 1 (n,).
        groups: Group of each row, such as the cluster of its task; with one group alone it sees itself.
        weights: How much each row counts (n,).
        penalty: Of the fits.
    """
    group = torch.tensor(list(groups))
    counted = torch.ones(len(features)) if weights is None else weights
    predicted = torch.zeros(len(features), dtype=torch.float64)
    for one in group.unique():
        rest = group != one
        rest = rest if rest.any() else ~rest
        fitted = Logistic.fit(features[rest], targets[rest], weights=counted[rest], penalty=penalty)
        predicted[group == one] = fitted(features[group == one])
    return predicted


def residual_interval(predicted: Tensor, actual: Tensor, level: float = 0.9) -> tuple[float, float]:
    """Offsets (low, high) from a prediction between which `level` of the actual values (n,) lay, as split conformal prediction takes them.

    Args:
        predicted: Predictions (n,) that did not see their own value.
        actual: What came out (n,).
        level: Share to be covered; the finite-sample correction (n + 1) / n widens it for small n.
    """
    left = (actual.double() - predicted.double()).sort().values
    tail = (1 - level) / 2
    count = len(left)
    below = min(max(math.floor((count + 1) * tail) - 1, 0), count - 1)
    return left[below].item(), left[count - 1 - below].item()


def auroc(lower: Tensor, higher: Tensor) -> float:
    """Area under the ROC curve: probability that a value of `higher` (n,) exceeds one of `lower` (m,), ties counted half."""
    from sklearn.metrics import roc_auc_score  # takes a second to import

    return float(roc_auc_score([0] * len(lower) + [1] * len(higher), torch.cat([lower, higher]).double().numpy()))


@dataclass(frozen=True)
class RiskCoverage:
    """Selective prediction: the risk of what is kept when only the share with the highest confidence is.

    Attributes:
        coverage: Shares kept (n,): 1/n, 2/n, ... 1.
        risk: Mean risk of what is kept (n,).
        area: Area under the curve (AURC, Geifman and El-Yaniv 2017): the mean of `risk`.
        best: AURC of the confidence that knows the risks.
    """

    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    area: float
    best: float

    def at(self, coverage: float) -> float:
        """Risk at a coverage, of at least one row."""
        return self.risk[max(0, math.ceil(coverage * len(self.risk) - 1e-9) - 1)]


def risk_coverage(confidence: Tensor, risk: Tensor) -> RiskCoverage:
    """Curve of rows (n,); rows of equal confidence share their mean risk, so that their order does not matter."""
    confidence, risk = confidence.double(), risk.double()
    if not len(risk):
        raise ValueError("a risk-coverage curve needs at least one row")
    _, place = confidence.unique(return_inverse=True)
    shared = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add(0, place, risk) / torch.bincount(place)
    kept = _running(shared[place][confidence.argsort(descending=True, stable=True)])
    count = len(risk)
    return RiskCoverage(
        tuple((i + 1) / count for i in range(count)), tuple(kept.tolist()), kept.mean().item(), _running(risk.sort().values).mean().item()
    )


def _running(risks: Tensor) -> Tensor:
    return risks.cumsum(0) / torch.arange(1, len(risks) + 1, dtype=torch.float64)


def calibration_error(predicted: Tensor, actual: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean distance of mean prediction and mean outcome over bins of equal numbers of rows."""
    order = predicted.double().argsort(stable=True)
    parts = [part for part in order.tensor_split(min(bins, len(order))) if len(part)]
    apart = [len(part) * (predicted.double()[part].mean() - actual.double()[part].mean()).abs().item() for part in parts]
    return sum(apart) / len(order)
