"""One adapter from elsewhere, as a candidate for a bank: read, and checked for what it says of its base model and for its size."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.adapter import LoraAdapter, fused_error
from lorag.adapters.formats import Base
from lorag.adapters.provenance import UNKNOWN
from lorag.adapters.purpose import find_purpose, stated_licence
from lorag.adapters.reading import read_folder
from lorag.base.names import same_model
from lorag.base.renaming import fused_experts, renamed_modules
from lorag.errors import (
    BaseMismatchError,
    BaseModelError,
    LoragError,
    MissingDependencyError,
    NormRangeError,
    StorageError,
    UndescribedError,
)

if TYPE_CHECKING:
    from lorag.adapters.checks import Match
    from lorag.adapters.sources import Source
    from lorag.base.base_model import BaseModel
    from lorag.base.runner import BankBase

__all__ = ["DUPLICATE", "Candidate", "ImportOptions", "check_base", "check_norm", "check_size", "read_candidate"]

DUPLICATE = 0.999  # cosine of ΔW from which two experts are taken for one
FAR_OUTSIDE = 20.0  # times the largest, or a part of the smallest, norm of the bank
_FEWEST_NORMS = 4  # of which a range can be spoken
_LARGEST_NORM = 1e5  # of any adapter: base models' whole weights are smaller


@dataclass(frozen=True)
class ImportOptions:
    """How adapters are taken into a bank.

    Attributes:
        descriptions: What the task is; without one, the adapter's own files must say so.
        name: Name in the bank, instead of one made from the folder's or repository's.
        licence: Licence, instead of what the adapter's files state.
        ignore_extra: Leave out factors of modules outside of the bank's layout, instead of refusing the adapter.
        any_norm: Take norms far outside of the bank's too.
        base_aliases: Other names of the bank's base model, which adapters may give, under any revision.
        revision: Revision of adapters on the hub.
        convert: Share of ‖ΔW‖² that is kept of adapters of PEFT's other methods; without it these are refused.
    """

    descriptions: tuple[str, ...] = ()
    name: str | None = None
    licence: str | None = None
    ignore_extra: bool = False
    any_norm: bool = False
    base_aliases: tuple[str, ...] = ()
    revision: str | None = None
    convert: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One adapter as it was read, here or on a worker.

    Attributes:
        where: Its folder.
        adapter: The adapter, unless there is an error.
        norm: ‖ΔW‖_F over all modules.
        descriptions: Of its task.
        origin: What these were taken from.
        licence: Its licence.
        missing: Modules of the layout without factors, which count as unchanged.
        ignored: Modules outside of the layout, left out.
        ignored_share: Their share of ‖ΔW‖²; None if it is not known.
        error: Why it cannot be used. One that nothing describes is read all the same, for its weights may tell.
    """

    where: Path | str
    adapter: LoraAdapter | None = None
    norm: float = 0.0
    descriptions: tuple[str, ...] = ()
    origin: str = ""
    licence: str = UNKNOWN
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ignored_share: float | None = 0.0
    error: LoragError | None = None


def _own_names(model: BaseModel, names: Sequence[str]) -> dict[str, str]:
    """A base model's own names of modules that transformers renamed.

    Raises:
        BaseModelError: If one of them is an expert of a mixture, which the model holds fused with the others.
    """
    try:
        skeleton = model.skeleton()
    except (BaseModelError, MissingDependencyError):  # then the names stand, and the adapter is judged by them
        return {}
    new = renamed_modules(skeleton, names)
    for name in names:
        fused = None if name in new else fused_experts(skeleton, name)
        if fused is not None:
            raise fused_error(name, fused, type(skeleton).__name__)
    return new


def read_candidate(common: tuple[BankBase, ImportOptions], source: Source) -> Candidate:
    """Fetches, reads and checks one adapter; a norm that no adapter has is refused before it is loaded, others where the bank is known.

    Args:
        common: What the bank's experts share, and how adapters are taken in.
        source: Where it comes from.
    """
    base, options = common
    where: Path | str = source.label
    adapter: LoraAdapter | None = None
    try:
        where = folder = source.folder(options.revision, Base(base.model, base.layout.modules), options.convert)
        check = partial(check_base, base, folder, options.base_aliases)
        parts = read_folder(
            folder,
            base.layout,
            allow_missing=True,
            ignore_extra=options.ignore_extra,
            rename=partial(_own_names, base.model),
            check=check,
            check_norm=partial(check_size, where=folder),
        )
        adapter, norm = LoraAdapter.from_parts(parts, base.layout), parts.norm
        if norm is None:  # of a rank whose Gram matrices are as large as the factors themselves
            norm = adapter.factors.norm()
            check_size(norm, folder)
        descriptions, origin, licence = options.descriptions, "--description", parts.info.get("license")
        if not descriptions and source.descriptions:
            descriptions, origin, licence = source.descriptions, "the list", licence or stated_licence(folder)
        elif not descriptions:
            purpose = find_purpose(folder, parts.info)
            descriptions, origin, licence = purpose.descriptions, purpose.origin, purpose.licence
    except LoragError as error:
        traceback.clear_frames(error.__traceback__)  # what is kept of the error must not keep what was being read
        return Candidate(where, adapter if isinstance(error, UndescribedError) else None, error=error)
    except OSError as error:  # of the adapter's files: no leave to read them, a share that is gone
        return Candidate(where, error=StorageError(f"{source.label} cannot be read: {error.strerror or error}"))
    licence = str(options.licence or licence or UNKNOWN)
    return Candidate(where, adapter, norm, descriptions, origin, licence, parts.missing, parts.ignored, parts.ignored_share)


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
    named, revision, expected = config.get("base_model_name_or_path"), config.get("revision"), base.model.name

    def differs(what: str, got: object, expected: object, remedy: str = "A bank has one base model.") -> BaseMismatchError:
        return BaseMismatchError(f"{where} was made for another base model: {what}", got=str(got)[:120], expected=expected, remedy=remedy)

    if named and named not in aliases and not same_model(str(named), expected):
        raise differs("its name", named, expected, f"If that is the same model under another name, pass --base-alias {str(named)[:80]}.")
    if revision and named not in aliases and revision != (base.model.revision or "main"):
        raise differs("its revision", revision, base.model.revision or "main")
    given = info.get("base_model")
    stated: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    if stated.get("identity") and _other_weights(base, str(stated["identity"])):
        raise differs("its weights", stated["identity"], base.identity)
    if stated.get("layout") and not matched.missing and not matched.extra and stated["layout"] != base.layout.fingerprint:
        raise differs("the layout's fingerprint", stated["layout"], base.layout.fingerprint)


def _other_weights(base: BankBase, identity: str) -> bool:
    """Whether an adapter's base model has other weights than a bank's; a mere revision and a digest cannot be compared."""
    if identity == base.identity or base.model.has_identity(identity):  # in an older form, perhaps
        return False
    return identity.startswith("revision:") == base.identity.startswith("revision:")


def check_size(norm: float, where: object) -> None:
    """Checks that an adapter changes something, and no more than an adapter can, whatever a bank's experts do.

    Raises:
        NormRangeError: If it does not.
    """
    if norm == 0:
        raise NormRangeError(f"{where} changes nothing: all of its products are zero", remedy="It looks untrained; train it.")
    if not norm <= _LARGEST_NORM:
        raise NormRangeError(
            f"{where}: ‖ΔW‖ is larger than any adapter's",
            got=f"{norm:.4g}",
            expected=f"at most {_LARGEST_NORM:g}",
            remedy="Is lora_alpha right?",
        )


def check_norm(norm: float, others: Iterable[float], where: object) -> None:
    """Checks that an adapter changes not immeasurably more or less than a bank's experts do, if there are enough of them to say.

    Raises:
        NormRangeError: If it does.
    """
    sizes = [other for other in others if other > 0]
    if len(sizes) < _FEWEST_NORMS:
        return
    low, high = min(sizes) / FAR_OUTSIDE, max(sizes) * FAR_OUTSIDE
    if not low <= norm <= high:
        raise NormRangeError(
            f"{where}: ‖ΔW‖ lies far outside of the bank's norms",
            got=f"{norm:.4g}",
            expected=f"{low:.4g} to {high:.4g}",
            remedy="Is lora_alpha right? If it is meant, pass --any-norm.",
        )
