"""Merge adapters in closed form: one ΔW from many, by a named rule. No rule sees an example or a description.

What is merged is ΔW = scaling·B·A of each expert, so gauge, rank, alpha and rsLoRA do not matter. Rules that only add
concatenate factors, which is exact, and never form an o x i matrix. TIES and DARE judge single values of ΔW: they form
the dense matrices of one module at a time, and what they make is compressed to `rank` by an SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors, Pair, Svd, balanced, thin_svd
from lorag.adapters.provenance import parents_of
from lorag.base.layout import LoraLayout
from lorag.errors import AdapterError

__all__ = ["MERGES", "aligned", "check_mergeable", "merge"]

_NEGLIGIBLE = 1e-6  # of the largest singular value: what rounding leaves of a rank that is not there


@dataclass(frozen=True)
class _Module:
    """One module of all experts, and what a rule may need.

    Attributes:
        pairs: A (r, i) and B (o, r) of each expert, in fp64.
        weights: One for each expert (n,).
        rank: Rank of the merged adapter.
        rng: Randomness, for rules that draw.
    """

    pairs: Sequence[Pair]
    weights: Tensor
    rank: int
    rng: torch.Generator | None

    def weighted(self, factor: float = 1.0) -> Svd:
        """SVD of Σ w ΔW times a factor, by concatenation: exact, and never an o x i matrix."""
        columns = [b * w for (_, b), w in zip(self.pairs, self.weights, strict=True)]
        return thin_svd(torch.cat([a for a, _ in self.pairs]), torch.cat(columns, 1) * factor)

    def dense(self) -> list[Tensor]:
        """ΔW (o, i) of each expert times its weight, in fp32."""
        return [(b * w).float() @ a.float() for (a, b), w in zip(self.pairs, self.weights, strict=True)]


@dataclass(frozen=True)
class _Rule:
    """A rule: from one module to its merged SVD, with the defaults of its settings, and what its weights mean."""

    merge: Callable[..., Svd]
    defaults: Mapping[str, float]
    average: bool = False  # whether weights that are not given are 1/n instead of 1
    draws: bool = False
    narrow: bool = False  # whether the default rank is the experts' largest instead of the sum of their ranks


def _mean(module: _Module) -> Svd:
    """Weighted mean of ΔW, uniform without weights."""
    return module.weighted(1 / module.weights.sum().item())


def _sum(module: _Module, coefficient: float = 1.0) -> Svd:
    """Σ w ΔW times a coefficient: task arithmetic, and the concatenation of LoRA Soups."""
    return module.weighted(coefficient)


def _ties(module: _Module, density: float, coefficient: float, drop: float = 0.0) -> Svd:
    """Trim, elect a sign for each value, average those that agree with it; with `drop`, DARE thins the experts first."""
    # Not PEFT's `ties`: it elects before it weighs, and divides by how many experts agree (docs/decisions/libraries.md).
    trimmed = []
    for delta in module.dense():
        if drop:
            kept = torch.rand(delta.shape, generator=module.rng) >= drop
            delta = delta * kept / (1 - drop)
        trimmed.append(_trim(delta, density))
    elected = torch.stack(trimmed).sum(0).sign()
    total, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, w in zip(trimmed, module.weights.tolist(), strict=True):
        agrees = (delta.sign() == elected) & (delta != 0)
        total += delta * agrees
        weight += w * agrees
    merged = coefficient * total / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    return left, values, right.T


def _trim(delta: Tensor, density: float) -> Tensor:
    """Keeps the share `density` of values that are largest in size."""
    sizes = delta.abs().flatten()
    count = max(1, round(density * sizes.numel()))
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def _tsv(module: _Module, coefficient: float) -> Svd:
    """Makes the singular vectors of all experts orthonormal together, and keeps every expert's singular values.

    Directions that several experts share are turned apart, and so disturb each other less than in a sum. The nearest orthonormal
    columns to stacked vectors are the polar factor of the stack (Procrustes).
    """
    parts = [thin_svd(a, b * weight) for (a, b), weight in zip(module.pairs, module.weights, strict=True)]
    left, values, right = (torch.cat([part[side] for part in parts], -1) for side in range(3))
    real = values > _NEGLIGIBLE * values.max()
    if not real.any():  # no expert changes this module
        return module.weighted(0.0)
    return thin_svd(_polar(right[:, real]).T, _polar(left[:, real]) * values[real] * coefficient)


def _polar(columns: Tensor) -> Tensor:
    """The nearest matrix of orthonormal columns (or rows, where it has more columns than rows)."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right


def _lego(module: _Module) -> Svd:
    """Clusters the experts' rank-1 units and adds up one unit per cluster.

    A unit is a row of A beside a column of B. Which units an adapter has depends on its gauge, so they are taken from
    the SVD of its ΔW, whose units have no gauge but a sign; the sign is left out of distances.
    """
    parts = []
    for (a, b), weight in zip(module.pairs, module.weights, strict=True):
        left, values, right = thin_svd(a, b * weight)
        real = values > _NEGLIGIBLE * values.max()
        root = values[real].sqrt()
        parts.append(torch.cat([left[:, real] * root, right[:, real] * root]).T)
    units = torch.cat(parts)
    out = len(module.pairs[0][1])
    if not len(units):  # no expert changes this module
        return module.weighted(0.0)
    count = min(module.rank, len(units))
    centres = _cluster(units, count)
    # Variance expansion: each unit adds to the output's variance; an expert has len(units) / n of them.
    centres = centres * (len(units) / len(parts) / count) ** 0.25  # both halves: their product gets the square root
    return thin_svd(centres[:, out:], centres[:, :out].T)


def _cluster(units: Tensor, count: int, iterations: int = 50) -> Tensor:
    """k-means of vectors (u, d) up to sign, started from the farthest points; centres have their units' mean norm."""
    norms = units.norm(dim=1)

    def distances(centres: Tensor) -> Tensor:
        return norms[:, None].square() + centres.square().sum(1) - 2 * (units @ centres.T).abs()

    chosen = [int(norms.argmax())]
    while len(chosen) < count:
        chosen.append(int(distances(units[chosen]).amin(1).argmax()))
    centres = units[chosen]
    members = torch.full((len(units),), -1)
    for _ in range(iterations):
        nearest = distances(centres).argmin(1)
        if torch.equal(nearest, members):
            break
        members = nearest
        signs = torch.where((units * centres[members]).sum(1) < 0, -1.0, 1.0)
        sums = torch.zeros_like(centres).index_add(0, members, units * signs[:, None])
        centres = sums / torch.bincount(members, minlength=count).clamp_min(1)[:, None]
    # Norm decay: a mean of vectors that only roughly agree is shorter than they are.
    wanted = torch.zeros(count, dtype=norms.dtype).index_add(0, members, norms) / torch.bincount(members, minlength=count).clamp_min(1)
    return centres * (wanted / centres.norm(dim=1).clamp_min(1e-30))[:, None]


MERGES: Mapping[str, _Rule] = {
    "mean": _Rule(_mean, {}),
    "task_arithmetic": _Rule(_sum, {"coefficient": 0.4}),
    "ties": _Rule(_ties, {"density": 0.2, "coefficient": 1.0}),
    "dare_ties": _Rule(_ties, {"density": 1.0, "coefficient": 1.0, "drop": 0.5}, draws=True),
    "cat": _Rule(_sum, {}, average=True),
    "lego": _Rule(_lego, {}, narrow=True),
    "tsv": _Rule(_tsv, {"coefficient": 0.8}),
}
_RANGES = {"density": (0.0, 1.0), "drop": (0.0, 0.999), "coefficient": (-100.0, 100.0)}


def check_mergeable(adapters: Sequence[LoraAdapter]) -> None:
    """Checks that there are adapters and that they belong to one base model.

    Raises:
        AdapterError: If there is none, or if layouts or base models differ.
    """
    if not adapters:
        raise AdapterError("there is nothing to merge", got="no adapter", expected="one or more")
    if any(adapter.layout != adapters[0].layout for adapter in adapters):
        raise AdapterError("adapters of different layouts cannot be merged", remedy="All must change the same modules of one base model.")
    bases = sorted({f"{one.base_model}{f' at {one.base_revision}' if one.base_revision else ''}" for one in adapters if one.base_model})
    if len(bases) > 1:
        raise AdapterError("adapters of different base models cannot be merged", got=", ".join(bases)[:160])


def aligned(adapters: Sequence[LoraAdapter]) -> list[LoraAdapter]:
    """The same adapters in one layout, of all modules that any of them changes: those that one lacks, it leaves unchanged.

    Raises:
        AdapterError: If a module has different sizes, or is stored in both orders: they are of different base models.
    """
    modules = {module.name: module for adapter in adapters for module in adapter.layout.modules}
    for adapter in adapters:
        other = next((m for m in adapter.layout.modules if m != modules[m.name]), None)
        if other is not None or adapter.layout.fan_in_fan_out != adapters[0].layout.fan_in_fan_out:
            shape = other or adapter.layout.modules[0]
            got = f"{shape.name[:120]} of {shape.out_features} x {shape.in_features} beside another size or order"
            raise AdapterError("adapters of different base models cannot be merged", got=got)
    if all(adapter.layout == adapters[0].layout for adapter in adapters):
        return list(adapters)
    layout = LoraLayout(tuple(sorted(modules)), tuple(modules.values()), adapters[0].layout.fan_in_fan_out)
    return [
        replace(one, layout=layout, factors=Factors({**Factors.zeros(layout, one.rank).tensors, **one.factors}), info=one.info)
        for one in adapters
    ]


def merge(
    adapters: Sequence[LoraAdapter],
    method: str = "mean",
    *,
    weights: Sequence[float] | Tensor | None = None,
    rank: int | None = None,
    rng: torch.Generator | None = None,
    **settings: float,
) -> LoraAdapter:
    """Merges n adapters of one layout into one.

    - `mean`: Σ w ΔW / Σ w. Exact.
    - `task_arithmetic`: `coefficient` · Σ w ΔW (Ilharco et al., arXiv 2212.04089). Exact.
    - `ties`: keep the share `density` of largest values of each expert, elect the sign with the larger mass for each
      value, average the experts that agree with it, times `coefficient` (Yadav et al., arXiv 2306.01708). Trimmed
      module by module, where the paper trims over all of them.
    - `dare_ties`: drop values with probability `drop`, divide the others by 1 - drop (Yu et al., arXiv 2311.03099),
      then as `ties`. Needs `rng`.
    - `cat`: Σ w ΔW with weights for each expert, or for each expert and module (LoRA Soups, arXiv 2410.13025); they are
      meant to be learned, and 1/n if there are none. Exact.
    - `lego`: k-means of rank-1 units to `rank` clusters; centres get the mean norm of their units, and their sum is
      multiplied by √(units of an expert / clusters) (LoRA-LEGO, arXiv 2409.16167).
    - `tsv`: the experts' singular vectors, made orthonormal together, with each expert's singular values, times `coefficient`
      (TSV-M, Gargiulo et al., arXiv 2412.00081; without its cut to a share of the vectors, for experts are thin already).

    Args:
        adapters: The experts; their ranks and scalings may differ. Their order does not matter.
        method: One of these names.
        weights: w, for each expert (n,), or for each expert and module (n, m); 1 without.
        rank: Largest rank of the result; what an SVD cuts off is lost. By default the sum of the experts' ranks, which
            loses nothing of a rule that is called exact, and for `lego` their largest.
        rng: Randomness of `dare_ties`.
        **settings: The method's own, as named above.

    Returns:
        The merged adapter. Its `info` names method, experts, settings, and the share of ‖ΔW‖² that the
        rank kept.

    Raises:
        AdapterError: If adapters do not fit each other, or if the method, a setting or the weights cannot be used.
    """
    if method not in MERGES:
        raise AdapterError("no rule merges by this name", got=repr(method)[:80], expected=", ".join(MERGES))
    check_mergeable(adapters)
    rule, layout = MERGES[method], adapters[0].layout
    values = _settings(method, rule, settings)
    if rule.draws and rng is None:
        raise AdapterError(f"{method} draws at random and has nothing to draw from", remedy="Pass rng=torch.Generator().manual_seed(0).")
    shares = _weights(adapters, rule, weights)
    if rule.draws:  # what is drawn for an expert must not depend on where it stands in the list
        sizes = [adapter.factors.norm() for adapter in adapters]
        order = sorted(range(len(adapters)), key=lambda index: sizes[index])
        adapters, shares = [adapters[index] for index in order], shares[order]
    wanted = _rank(adapters, rule, rank)
    tensors, kept, whole = {}, 0.0, 0.0
    for index, module in enumerate(layout.modules):
        pairs = [adapter.factors.pair(module.name, torch.float64) for adapter in adapters]
        left, strengths, right = rule.merge(_Module(pairs, shares[:, index], wanted, rng), **values)
        kept, whole = kept + strengths[:wanted].square().sum().item(), whole + strengths.square().sum().item()
        tensors[module.name] = balanced((left, strengths, right), wanted)
    info = {
        "method": method,
        "experts": [adapter.info.get("expert") for adapter in adapters],
        "settings": values | ({} if weights is None else {"weights": [[round(w, 6) for w in row] for row in shares.tolist()]}),
        "energy": round(kept / whole, 6) if whole else 1.0,
        "parents": parents_of([adapter.info for adapter in adapters], shares.mean(1).tolist()),
    }
    first = adapters[0]
    return LoraAdapter(layout, Factors(tensors), first.base_model, first.task_type, info, first.base_revision)


def _settings(method: str, rule: _Rule, given: Mapping[str, float]) -> dict[str, float]:
    unknown = set(given) - set(rule.defaults)
    if unknown:
        raise AdapterError(f"{min(unknown)} is not a setting of {method}", expected=", ".join(rule.defaults) or "no setting")
    values = {**rule.defaults, **given}
    for name, value in values.items():
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise AdapterError(f"{name} cannot be used", got=value, expected=f"a number from {low} to {high}")
    return values


def _rank(adapters: Sequence[LoraAdapter], rule: _Rule, given: int | None) -> int:
    """Largest rank of the result; no module can have more than its smaller side."""
    ranks = [adapter.rank for adapter in adapters]
    wanted = (max(ranks) if rule.narrow else sum(ranks)) if given is None else given
    if wanted < 1:
        raise AdapterError("rank cannot be used", got=given, expected="1 or more")
    return min(wanted, max(min(module.in_features, module.out_features) for module in adapters[0].layout.modules))


def _weights(adapters: Sequence[LoraAdapter], rule: _Rule, given: Sequence[float] | Tensor | None) -> Tensor:
    """Weights (n, m) in fp64."""
    count, modules = len(adapters), len(adapters[0].layout)
    if given is None:
        return torch.full((count, modules), 1 / count if rule.average else 1.0, dtype=torch.float64)
    weights = torch.as_tensor(given).detach().cpu().double()
    if weights.shape == (count,):
        weights = weights[:, None].expand(-1, modules)
    if weights.shape != (count, modules):
        raise AdapterError("weights do not fit the adapters", got=tuple(weights.shape), expected=f"({count},) or ({count}, {modules})")
    negative = rule.merge is not _sum and bool((weights < 0).any() or (weights.sum(0) <= 0).any())
    if negative or not weights.isfinite().all():
        raise AdapterError("weights must be finite, and but for sums not negative", got=str(given)[:80])
    return weights
