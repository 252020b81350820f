"""A bank's experts as adapter folders of one rank and one set of modules, as PEFT's Arrow routing needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.errors import BankError
from lorag.files.atomic import require_empty

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank

__all__ = ["export_arrow"]


def export_arrow(bank: AdapterBank, out: str | Path, names: Sequence[str] | None = None) -> Iterator[Path]:
    """Writes experts for `peft.tuners.lora.create_arrow_model`, which routes each token to the experts whose ΔW it excites most.

    Arrow takes adapters of equal rank and modules only: smaller ones are filled up with zeros, and lora_alpha grows with the rank, so that
    ΔW stays the same (Ostapenko et al., arXiv 2405.11157).

    Args:
        bank: The bank.
        out: A new folder; gets a folder for each expert.
        names: Which experts; all without.

    Yields:
        The folders, as they are finished.

    Raises:
        BankError: If an expert is not in the bank, or fewer than two are left.
        StorageError: If `out` is not empty, or writing fails.
    """
    out, chosen = Path(out), [bank[name] for name in (bank.names if names is None else dict.fromkeys(names))]
    if len(chosen) < 2:
        raise BankError("there is nothing to route between", got=f"{len(chosen)} expert", expected="two or more")
    require_empty(out)
    rank = max(expert.rank for expert in chosen)
    for expert in chosen:
        adapter = bank.adapter(expert.name)
        yield replace(adapter, factors=adapter.factors.padded(rank)).save_pretrained(out / expert.name)
