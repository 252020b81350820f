"""The gate: whether the adapter for a description is looked up, fused, generated or refused, and how much of the gap it should close.

`evidence` measures a description, `training/calibrate_gate` learns on held-out tasks what the numbers mean, and `Gate.decide` turns
one into the other: a pure function, whose answer names the evidence that decided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.errors import GeneratorError, UnknownTaskError, UnknownTaskWarning, warn_caller
from lorag.files.stored import Number, Numbers, PositiveNumbers, Stored, Texts
from lorag.generator.calibration import Logistic
from lorag.generator.evidence import FEATURES, Evidence, Reference
from lorag.tasks.descriptions import same_words

if TYPE_CHECKING:
    from lorag.text.conditioning import Condition

__all__ = ["Gate", "Verdict", "digest", "report_unknown", "unasked", "unfitted"]

_SHOWN = 3
_TAIL = 0.05  # left out on each side of an interval
_NAMED, _SHARE = 3, 0.6  # most features that a reason names, and the share of the log-odds after which it names no more

# What a feature says where it speaks against a description, and where it speaks for it.
_PHRASES = {
    "nearest": ("the nearest task is far (cosine {:.2f})", "the nearest task is close (cosine {:.2f})"),
    "near": ("the nearest four tasks are far (mean cosine {:.2f})", "the nearest four tasks are close (mean cosine {:.2f})"),
    "spread": ("the nearest tasks do not stand out (spread {:.2f})", "the nearest tasks stand out (spread {:.2f})"),
    "outside": ("{:.0%} of it lies outside of the bank's descriptions", "only {:.0%} of it lies outside of the bank's descriptions"),
    "rewording": ("other words for it change the adapter by {:.0%}", "other words for it change the adapter by only {:.0%}"),
    "sampling": ("samples of its adapter differ by {:.0%}", "samples of its adapter differ by only {:.0%}"),
    "norm": ("the size of its adapter is unusual (log norm {:.2f})", "the size of its adapter is usual (log norm {:.2f})"),
    "code_distance": (
        "its adapter's modules are sized unlike the bank's ({:.1f} deviations)",
        "its adapter's modules are sized like the bank's ({:.1f} deviations)",
    ),
}


_RENAMED: dict[str, str] = {
    "gain": "gap_closed",
    "gain_range": "gap_range",
    "gain_error": "gap_closed_error",
}  # in files of older generators
_BY = {"wording": "very words", "name": "name", "nearest": "closeness"}


def digest(text: str) -> int:
    """Names a wording, whatever its case and spaces, by 63 bits."""
    return int.from_bytes(hashlib.sha256(same_words(text).encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one description.

    Attributes:
        decision: "expert" (it is a known task's), "fuse" (close to some), "generate" (within reach) or "refuse" (far).
        reason: In a sentence, which names the evidence that decided.
        novelty: Estimated probability that it is not a task of the bank's kind, from 0 to 1; None if no gate was fitted.
        expected_gap_closed: Share of the gap between base model and expert that its adapter should close; None if none was measured.
        interval: 90 % of held-out tasks' values lay as near to their estimate.
        nearest: Nearest tasks and their cosines.
        known: The expert that it names, if it does.
        decided_by: The evidence that decided, what weighed most first: names of `evidence.FEATURES`, or "wording" or "name" where
            the description is one that the bank holds.
        evidence: The features that were measured, by name.
    """

    decision: str
    reason: str
    novelty: float | None = None
    expected_gap_closed: float | None = None
    interval: tuple[float, float] | None = None
    nearest: tuple[tuple[str, float], ...] = ()
    known: str | None = None
    decided_by: tuple[str, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as `adapter.info["gate"]` holds it."""
        return {
            "decision": self.decision,
            "reason": self.reason,
            "decided_by": list(self.decided_by),
            "evidence": {name: float(f"{value:.5g}") for name, value in self.evidence.items()},
            "novelty": self.novelty,
            "expected_gap_closed": self.expected_gap_closed,
            "expected_gap_closed_interval": None if self.interval is None else list(self.interval),
            "nearest": [list(pair) for pair in self.nearest],
        }


def unfitted(condition: Condition) -> Verdict:
    """The verdict of a generator without a gate: that it has none."""
    reason = "no gate was fitted for this generator, so that nobody knows how far to trust it here; fit one with lorag gate fit"
    return Verdict("generate", reason, nearest=condition.neighbours[:_SHOWN])


def unasked(condition: Condition) -> Verdict:
    """The verdict where the gate was not to be asked."""
    return Verdict("generate", "the gate was not asked", nearest=condition.neighbours[:_SHOWN])


def report_unknown(description: str, verdict: Verdict, on_unknown: str) -> None:
    """Raises UnknownTaskError if `on_unknown` is "raise", else warns the caller of lorag, of a description that was refused."""
    what = f"no task of the bank is like {description[:80]!r}"
    if on_unknown == "raise":
        raise UnknownTaskError(
            what, got=verdict.reason, remedy='Describe it otherwise, add such experts to the bank, or take on_unknown="warn" or "fallback".'
        )
    done = "the adapter changes nothing" if on_unknown == "fallback" else "do not expect the adapter to work"
    warn_caller(f"{what}; {verdict.reason}; {done}", UnknownTaskWarning)


class _StoredGate(Stored):
    """A gate in generator.json, as `Gate` describes it; `size` and `deviation` are those of its reference (m,)."""

    features: Texts
    novelty: Logistic
    refuse_above: Number
    gap_closed: Logistic | None
    gap_range: tuple[Number, Number]
    offsets: tuple[Number, Number]
    same_above: Number | None
    fuse_above: Number | None
    size: Numbers
    deviation: PositiveNumbers
    fitted: dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """A fitted gate. It is small: plain numbers in generator.json, and one integer for each wording of the bank.

    Attributes:
        reference: What evidence is compared with.
        novelty: From evidence to novelty.
        refuse_above: Novelty beyond which a description is refused.
        gap_closed: From evidence to the share of the gap that should be closed, scaled to `gap_range`; None where no task was scored.
        gap_range: Smallest and largest share of the gap that it can give.
        offsets: Of the interval around what should be closed.
        same_above: Cosine from which a description counts as its nearest expert's; None if no cosine told them apart.
        fuse_above: Cosine from which fused experts did as well as generated adapters; None if they never did.
        wordings: Digests (w,) of the wordings of the bank's tasks, int64.
        owners: Expert of each (w,), int32.
        fitted: On what, and how well it did on what it was not fitted on.
    """

    reference: Reference
    novelty: Logistic
    refuse_above: float
    gap_closed: Logistic | None
    gap_range: tuple[float, float]
    offsets: tuple[float, float]
    same_above: float | None
    fuse_above: float | None
    wordings: Tensor
    owners: Tensor
    fitted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needed(self) -> frozenset[str]:
        """The features that count in its estimates: others need not be measured."""
        models = [self.novelty] if self.gap_closed is None else [self.novelty, self.gap_closed]
        return frozenset(name for model in models for name, weight in zip(FEATURES, model.weights, strict=True) if weight)

    def decide(self, evidence: Evidence) -> Verdict:
        """Judges one description by the evidence on it; nothing is computed but this."""
        row = evidence.row()
        novelty, gap_closed = self.estimate(row[None])
        probability, expected, interval = novelty.item(), None, None
        if gap_closed is not None:
            expected = round((1 - probability) * gap_closed.item(), 4)
            interval = self._interval(probability, gap_closed.item(), expected)
        neighbours = evidence.condition.neighbours
        shown = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in neighbours[:_SHOWN])
        known, decided_by = self._known(evidence)
        if known is not None:
            decision, reason = "expert", f"the description is that of a known task, {known}, by its {_BY[decided_by]}"
            deciding: tuple[str, ...] = (decided_by,)
        elif probability > self.refuse_above:
            deciding = self._deciding(row, against=True)
            reasons = self._phrases(evidence, deciding, against=True)
            decision = "refuse"
            novel = f"novelty {probability:.2f} exceeds {self.refuse_above:.2f}: the bank has nothing near it"
            reason = f"{novel}{reasons}; nearest tasks: {shown}"
        elif self.fuse_above is not None and neighbours[0][1] >= self.fuse_above:
            decision, deciding = "fuse", ("nearest",)
            reason = f"so close to known tasks that fusing them did as well as generating, from {self.fuse_above:.2f}: {shown}"
        else:
            deciding = self._deciding(row, against=False)
            reasons = self._phrases(evidence, deciding, against=False)
            decision = "generate"
            reason = f"novelty {probability:.2f} is within the bank's reach, up to {self.refuse_above:.2f}{reasons}; nearest tasks: {shown}"
        return Verdict(
            decision, reason, round(probability, 4), expected, interval, neighbours[:_SHOWN], known, deciding, dict(evidence.features)
        )

    def _interval(self, novelty: float, gap_closed: float, expected: float) -> tuple[float, float]:
        """Where 90 % of what is closed should lie: 0 for an unknown task, as near to its estimate as held-out tasks' for a known one."""
        low, high = (min(max(gap_closed + offset, self.gap_range[0]), self.gap_range[1]) for offset in self.offsets)
        low = low if novelty <= _TAIL else min(0.0, low)
        high = high if novelty <= 1 - _TAIL else 0.0
        return round(min(low, expected), 4), round(max(high, expected), 4)

    def estimate(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Novelty (n,), and the gap closed (n,) if it is not novel, of rows of features (n, f)."""
        low, high = self.gap_range
        return self.novelty(rows), None if self.gap_closed is None else low + (high - low) * self.gap_closed(rows)

    def _known(self, evidence: Evidence) -> tuple[str | None, str]:
        """The task whose description this is, and by what: one of `_BY`."""
        place = (self.wordings == digest(evidence.text)).nonzero()
        if len(place):
            return evidence.tasks[int(self.owners[place[0, 0]])], "wording"
        if same_words(evidence.text) in evidence.tasks:
            return same_words(evidence.text), "name"
        name, cosine = evidence.condition.neighbours[0]
        return (name if self.same_above is not None and cosine >= self.same_above else None), "nearest"

    def _deciding(self, row: Tensor, *, against: bool) -> tuple[str, ...]:
        """The features that moved the novelty most in one direction: few, but most of what moved it."""
        moved = self.novelty.contributions(row) * (1 if against else -1)
        total, explained = moved.clamp_min(0).sum().item(), 0.0
        names: list[str] = []
        for place in moved.argsort(descending=True, stable=True).tolist():
            if moved[place] <= 0 or explained > _SHARE * total or len(names) == _NAMED:
                break
            names.append(FEATURES[place])
            explained += moved[place].item()
        return tuple(names)

    def _phrases(self, evidence: Evidence, names: tuple[str, ...], *, against: bool) -> str:
        phrases = [_PHRASES[name][0 if against else 1].format(evidence.features[name]) for name in names if name in evidence.features]
        return ", because " + " and ".join(phrases) if phrases else ""

    # --- files ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without wordings and owners."""
        return {
            "features": list(FEATURES),
            "novelty": self.novelty.to_dict(),
            "refuse_above": self.refuse_above,
            "gap_closed": None if self.gap_closed is None else self.gap_closed.to_dict(),
            "gap_range": list(self.gap_range),
            "offsets": list(self.offsets),
            "same_above": self.same_above,
            "fuse_above": self.fuse_above,
            "size": [round(v, 4) for v in self.reference.size],
            "deviation": [round(v, 4) for v in self.reference.deviation],
            "fitted": dict(self.fitted),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], wordings: Tensor, owners: Tensor, *, modules: int, experts: int) -> Gate:
        """Reads the JSON form and the two tensors.

        Raises:
            GeneratorError: If they do not make a gate for a generator of so many modules and experts.
        """
        what = "a stored gate cannot be read"
        stored = _StoredGate.read({_RENAMED.get(name, name): one for name, one in value.items()}, what, GeneratorError)
        models = [stored.novelty] if stored.gap_closed is None else [stored.novelty, stored.gap_closed]
        try:
            if stored.features != FEATURES:
                raise ValueError("it goes by other evidence; fit it again with lorag gate fit")
            if not all(model.counts(len(FEATURES)) for model in models):
                raise ValueError("its calibration is of other features")
            if len(stored.size) != modules or len(stored.deviation) != modules:
                raise ValueError("its numbers do not fit the generator's modules")
            if wordings.dtype != torch.int64 or wordings.dim() != 1 or wordings.shape != owners.shape:
                raise ValueError("its wordings have no owners")
            if len(owners) and not (0 <= int(owners.min()) and int(owners.max()) < experts):
                raise ValueError("its wordings belong to experts that there are not")
        except ValueError as error:
            raise GeneratorError(what, got=str(error)) from error
        return cls(
            reference=Reference(stored.size, stored.deviation),
            novelty=stored.novelty,
            refuse_above=stored.refuse_above,
            gap_closed=stored.gap_closed,
            gap_range=stored.gap_range,
            offsets=stored.offsets,
            same_above=stored.same_above,
            fuse_above=stored.fuse_above,
            wordings=wordings,
            owners=owners,
            fitted={_RENAMED.get(name, name): one for name, one in stored.fitted.items()},
        )
