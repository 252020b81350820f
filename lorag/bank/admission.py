"""What an adapter must be to be taken into a bank: of its base model, and of a size that its experts have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorag.adapters.checks import Match
from lorag.base.bank_base import BankBase
from lorag.base.names import same_model
from lorag.errors import BaseMismatchError, NormRangeError

__all__ = ["DUPLICATE", "FAR_OUTSIDE", "check_base", "check_norm"]

DUPLICATE = 0.999  # cosine of ΔW from which two experts are taken for one
FAR_OUTSIDE = 20.0  # times the largest, or a part of the smallest, norm of the bank
_FEWEST_NORMS = 4  # of which a range can be spoken
_LARGEST_NORM = 1e5  # of any adapter: base models' whole weights are smaller


def check_base(
    base: BankBase, where: Path, aliases: Sequence[str], config: Mapping[str, Any], info: Mapping[str, Any], matched: Match
) -> None:
    """Checks all that an adapter says of its base model against a bank's, before its values are read.

    Args:
        base: The bank's.
        where: The adapter's folder, for messages.
        aliases: Other names of the bank's base model, under which any revision is taken.
        config: Its adapter_config.json.
        info: Its lorag.json, or nothing.
        matched: Its modules; that their sizes are the layout's is known.

    Raises:
        BaseMismatchError: If name, revision, digest or layout differ; what the adapter does not state is not compared.
    """
    named, revision, own = config.get("base_model_name_or_path"), config.get("revision"), base.model.name

    def differs(what: str, got: object, expected: object, remedy: str = "A bank has one base model.") -> BaseMismatchError:
        return BaseMismatchError(f"{where} was made for another base model: {what}", got=str(got)[:120], expected=expected, remedy=remedy)

    if named and named not in aliases and not same_model(str(named), own):
        raise differs("its name", named, own, f"If that is the same model under another name, pass --base-alias {str(named)[:80]}.")
    if revision and named not in aliases and revision != (base.model.revision or "main"):
        raise differs("its revision", revision, base.model.revision or "main")
    stated = info.get("base_model")
    known: Mapping[str, Any] = stated if isinstance(stated, Mapping) else {}
    if known.get("identity") and known["identity"] != base.identity:
        raise differs("its weights", known["identity"], base.identity)
    if known.get("layout") and not matched.missing and not matched.extra and known["layout"] != base.layout.fingerprint:
        raise differs("the layout's fingerprint", known["layout"], base.layout.fingerprint)


def check_norm(norm: float, others: Iterable[float], where: object, *, any_norm: bool = False) -> None:
    """Checks that an adapter changes something, and not immeasurably more or less than a bank's experts do.

    Raises:
        NormRangeError: If it does not.
    """
    if norm == 0:
        raise NormRangeError(f"{where} changes nothing: all of its products are zero", remedy="It looks untrained; train it.")
    sizes = [other for other in others if other > 0]
    low, high = 0.0, _LARGEST_NORM
    if len(sizes) >= _FEWEST_NORMS and not any_norm:
        low, high = min(sizes) / FAR_OUTSIDE, min(high, max(sizes) * FAR_OUTSIDE)
    if not low <= norm <= high or not math.isfinite(norm):
        raise NormRangeError(
            f"{where}: ‖ΔW‖ lies far outside of the bank's norms",
            got=f"{norm:.4g}",
            expected=f"{low:.4g} to {high:.4g}",
            remedy="Is lora_alpha right? If it is meant, pass --any-norm." if norm <= _LARGEST_NORM else "Is lora_alpha right?",
        )
