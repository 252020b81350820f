"""One adapter from elsewhere, fetched, read and checked for a bank, before it is compared with the bank's experts."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.licences import UNKNOWN
from lorag.adapters.purpose import find_purpose, stated_licence
from lorag.adapters.reading import read_folder
from lorag.adapters.sources import Source
from lorag.bank.admission import check_base, check_norm
from lorag.base.bank_base import BankBase
from lorag.errors import LoragError, StorageError

__all__ = ["Candidate", "Terms", "plausible", "read_candidate"]


@dataclass(frozen=True)
class Terms:
    """On which terms adapters are taken in.

    Attributes:
        descriptions: What the task is; without one, the adapter's own files must say so.
        name: Name in the bank, instead of one made from the folder's or repository's.
        licence: Licence, instead of what the adapter's files state.
        ignore_extra: Leave out factors of modules outside of the bank's layout, instead of refusing the adapter.
        any_norm: Take norms far outside of the bank's too.
        base_aliases: Other names of the bank's base model, which adapters may give, under any revision.
        revision: Revision of adapters on the hub.
    """

    descriptions: tuple[str, ...] = ()
    name: str | None = None
    licence: str | None = None
    ignore_extra: bool = False
    any_norm: bool = False
    base_aliases: tuple[str, ...] = ()
    revision: str | None = None


@dataclass
class Candidate:
    """One adapter as it was read, here or on a worker.

    Attributes:
        where: Its folder.
        norms: ‖ΔW‖_F, as often as it is judged while the adapter is read: before it is loaded, and as it was loaded.
        adapter: The adapter, unless there is an error.
        texts: Its descriptions.
        origin: What they were taken from.
        licence: Its licence.
        missing: Modules of the layout without factors, which count as unchanged.
        ignored: Modules outside of the layout, left out.
        ignored_share: Their share of ‖ΔW‖²; None if it is not known.
        error: Why it cannot be used.
    """

    where: Path | str
    norms: list[float] = field(default_factory=list)
    adapter: LoraAdapter | None = None
    texts: tuple[str, ...] = ()
    origin: str = ""
    licence: str = UNKNOWN
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ignored_share: float | None = 0.0
    error: LoragError | None = None


def plausible(norm: float, where: object) -> None:
    """Raises NormRangeError where a norm is not that of any adapter, whatever a bank's are."""
    check_norm(norm, (), where, any_norm=True)


def read_candidate(common: tuple[BankBase, Terms, Callable[[float, object], None]], source: Source) -> Candidate:
    """Fetches, reads and checks one adapter.

    Args:
        common: What the bank's experts share, on which terms adapters are taken in, and what judges norms.
        source: Where it comes from.
    """
    base, terms, judge = common
    found = Candidate(source.label)

    def check_size(norm: float) -> None:
        found.norms.append(norm)
        judge(norm, found.where)

    try:
        found.where = folder = source.folder(terms.revision)
        check = partial(check_base, base, folder, terms.base_aliases)
        parts = read_folder(folder, base.layout, allow_missing=True, ignore_extra=terms.ignore_extra, check=check, check_norm=check_size)
        adapter = LoraAdapter.from_parts(parts, base.layout)
        check_size(adapter.factors.norm())
        texts, origin, licence = terms.descriptions, "--description", parts.info.get("license")
        if not texts and source.descriptions:
            texts, origin, licence = source.descriptions, "the list", licence or stated_licence(folder)
        elif not texts:
            purpose = find_purpose(folder, parts.info)
            texts, origin, licence = purpose.descriptions, purpose.origin, purpose.licence
    except LoragError as error:
        traceback.clear_frames(error.__traceback__)  # what is kept of the error must not keep what was being read
        found.error = error
    except OSError as error:  # of the adapter's files: no leave to read them, a share that is gone
        found.error = StorageError(f"{source.label} cannot be read: {error.strerror or error}")
    else:
        found.adapter, found.texts, found.origin, found.licence = adapter, texts, origin, str(terms.licence or licence or UNKNOWN)
        found.missing, found.ignored, found.ignored_share = parts.missing, parts.ignored, parts.ignored_share
    return found
