"""Start a bank from adapters: the base model that they name, looked at by its config alone, and all modules that they change.

What the adapters' own files say decides, and a person's word decides over them. Values are not read here.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.adapter import fused_error
from lorag.adapters.checks import CONFIG, check_config
from lorag.adapters.formats import Base
from lorag.adapters.reading import own_layout, read_facts
from lorag.bank.bank import AdapterBank, BankBase
from lorag.base.base_model import BaseModel, is_trusted, kind_of
from lorag.base.kinds import KINDS, kind_of_task
from lorag.base.layout import LoraLayout
from lorag.base.names import known_name, locate, same_model
from lorag.base.objectives import make_objective, objectives_of
from lorag.base.renaming import fused_experts, renamed_modules
from lorag.errors import BankError, BaseMismatchError, BaseModelError, ConfigError, LoragError
from lorag.files.artifacts import read_json
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.adapters.sources import Source

__all__ = ["NewBank", "start_bank"]

_MANIFEST = "bank.json"
_OWN = {_MANIFEST, ".lock", "experts"}  # what may be left of a bank that was begun and never filled


@dataclass(frozen=True)
class NewBank:
    """What a person says of a new bank; the adapters' configs say what is left open.

    Attributes:
        base: Base model: hub id or folder.
        kind: A kind of base models, such as "causal_lm".
        revision: Revision of the base model on the hub.
        objective: How the base model is run on tasks; by default the first that is for its kind.
        settings: The objective's settings.
        aliases: Other names of the base model, which adapters may give.
    """

    base: str | None = None
    kind: str | None = None
    revision: str | None = None
    objective: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What one adapter's config and header say of its base model."""

    name: str | None
    revision: str | None
    kind: str | None
    layout: LoraLayout


def start_bank(
    folder: Path,
    sources: Sequence[Source],
    new: NewBank,
    *,
    revision: str | None = None,
    convert: float | None = None,
    quiet: bool = True,
) -> AdapterBank | None:
    """Starts an empty bank that adapters fit, without adding them; None if there is a bank with experts already.

    Args:
        folder: The bank. An empty bank that is there is begun anew.
        sources: The adapters. Those that cannot be read, or are of another base model, have no say.
        new: What is known of the bank.
        revision: Revision of adapters on the hub.
        convert: Share of ‖ΔW‖² that is kept of adapters of PEFT's other methods; without it these have no say.
        quiet: No progress bar.

    Raises:
        BankError: If the folder holds something else, or a bank that is not as `new` says; or if the adapters do not
            say what their base model is, or disagree.
        BaseMismatchError: If they do not fit the base model.
        BaseModelError: If the base model's config cannot be read, or nothing identifies its weights.
        ConfigError: If objective, kind or settings cannot be used.
    """
    if _is_filled(folder, new):
        return None
    given = (
        None if new.base is None else BaseModel(new.base, new.kind or kind_of(new.base, new.revision), new.revision, is_trusted(new.base))
    )
    seen = _look(sources, revision, quiet, given, convert)
    name = known_name(new.base or _agreed_name(seen, new.aliases))
    fitting = [one for one in seen if one.name is None or one.name in new.aliases or same_model(one.name, name)]
    if not fitting:
        named = _counted(one.name for one in seen)
        raise BaseMismatchError(
            "the adapters were made for another base model",
            got=named,
            expected=name,
            remedy="For another name of the same model, pass it as --base-alias.",
        )
    try:
        commit = new.revision or _one("revision", (one.revision for one in fitting if one.name not in new.aliases))
        stated = _one("kind", (one.kind for one in fitting))
        kind = new.kind or kind_of(name, commit, None if stated is None else KINDS[stated].task_type)
        model = BaseModel(name, kind, commit, is_trusted(name))
        layout = _layout(model, fitting)
    except BaseModelError as error:
        if new.base is not None or isinstance(error, BaseMismatchError):
            raise
        remedy = f"Say where the base model is: --base HUB_ID_OR_FOLDER --base-alias {name}"
        raise BaseModelError(f"the adapters' base model {name!r} is not at hand", got=error.got, remedy=remedy) from error
    objective, settings = _objective(model, new)
    base = BankBase(model, _identity(model), layout, objective, settings)
    if (folder / _MANIFEST).is_file():
        with AdapterBank.from_pretrained(folder).locked() as now:
            if not len(now) and now.base != base:
                (folder / _MANIFEST).unlink()
    return AdapterBank.create(folder, base)


def _is_filled(folder: Path, new: NewBank) -> bool:
    """Whether there is a bank with experts; it must be what `new` says."""
    if not (folder / _MANIFEST).is_file():
        strange = sorted(path.name for path in folder.iterdir() if path.name not in _OWN) if folder.is_dir() else []
        if strange:
            raise BankError(f"{folder} is not a bank and holds other things", got=strange[0][:80], remedy="Give a bank, or a new folder.")
        return False
    manifest = read_json(folder / _MANIFEST)
    if not manifest.get("experts"):
        return False
    base = BankBase.from_dict(manifest.get("base", {}))
    for what, stated, wanted in (
        ("base model", base.model.name, new.base),
        ("kind", base.model.kind, new.kind),
        ("revision", base.model.revision, new.revision),
        ("objective", base.objective, new.objective),
    ):
        if wanted is not None and stated != wanted and not (what == "base model" and same_model(str(stated), wanted)):
            raise BankError(
                f"{folder} is a bank of another {what}", got=wanted, expected=stated, remedy="Leave it out, or start another bank."
            )
    return True


def _look(sources: Sequence[Source], revision: str | None, quiet: bool, base: BaseModel | None, convert: float | None) -> list[_Seen]:
    seen, first = [], None
    for source in progress_bar(sources, desc="looking at adapters", disable=quiet or len(sources) < 64, leave=False):
        try:
            folder = source.folder(revision, Base(base), convert)
            facts = read_facts(folder, values=False)
            check_config(facts.config, folder / CONFIG)
            named, at, task = (facts.config.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
            kind = kind_of_task(task)
            seen.append(
                _Seen(
                    named if isinstance(named, str) and named else None,
                    at if isinstance(at, str) and at != "main" else None,
                    None if kind is None else kind.name,
                    own_layout(facts.config, facts.spec, folder),
                )
            )
        except LoragError as error:
            traceback.clear_frames(error.__traceback__)
            first = first or error
    if seen:
        return seen
    if first is not None and len(sources) == 1:
        raise first
    raise BankError("no adapter can start a bank", got=f"{len(sources)}, the first with: {first}" if first else "none")


def _counted(names: Iterable[str | None]) -> str:
    return ", ".join(f"{str(name)[:80]} ({count})" for name, count in Counter(names).most_common(4))


def _agreed_name(seen: Sequence[_Seen], aliases: Sequence[str]) -> str:
    names = {known_name(one.name) for one in seen if one.name is not None and one.name not in aliases}
    if len(names) == 1:
        return names.pop()
    if not names:
        raise BankError("nothing says what the adapters' base model is", remedy="Say it: --base HUB_ID_OR_FOLDER.")
    raise BankError(
        "the adapters name different base models",
        got=_counted(one.name for one in seen),
        expected="one",
        remedy="Choose one with --base; other names of the same model go into --base-alias, and the other adapters are refused.",
    )


def _one(what: str, values: Iterable[str | None]) -> str | None:
    """The one value that adapters state, or None if none does."""
    stated = sorted({value for value in values if value is not None})
    if len(stated) > 1:
        option = {"revision": "--base-revision", "kind": "--kind"}[what]
        raise BankError(f"the adapters state different values for their base model's {what}", got=stated[:4], remedy=f"Choose: {option}.")
    return stated[0] if stated else None


def _layout(model: BaseModel, seen: Sequence[_Seen]) -> LoraLayout:
    """All modules that any of the adapters changes, in the base model's order and of its sizes."""
    skeleton = model.skeleton()
    named = {name for name, _ in skeleton.named_modules()}
    wanted = {name for one in seen for name in one.layout.names}
    new = renamed_modules(skeleton, sorted(wanted - named))
    present = {new.get(name, name) for name in wanted} & named
    for name in sorted(wanted - present - new.keys()):
        fused = fused_experts(skeleton, name)
        if fused is not None and not present:
            raise fused_error(name, fused, type(skeleton).__name__)
    if not present:
        raise BaseMismatchError(
            f"base model {model.name!r} has none of the modules that the adapters change",
            got=min(wanted)[:120],
            expected=f"modules of {type(skeleton).__name__}",
            remedy=f"Is it the right base model, and is {model.kind} the right --kind?",
        )
    targets = sorted({target for one in seen for target in one.layout.target_modules})
    if new:
        return LoraLayout.from_model(skeleton, sorted(present))
    layout = LoraLayout.from_model(skeleton, targets)
    return layout if set(layout.names) == present else LoraLayout.from_model(skeleton, sorted(present))


def _objective(model: BaseModel, new: NewBank) -> tuple[str, dict[str, Any]]:
    fitting = objectives_of(model.kind)
    chosen = new.objective or next(iter(fitting), "none")
    if chosen not in fitting:
        raise ConfigError("objective and base model do not fit", got=f"{chosen} on a {model.kind}", expected=" or ".join(fitting))
    return chosen, make_objective(chosen, model.tokenizer(), new.settings).settings() if new.settings else {}


def _identity(model: BaseModel) -> str:
    """What tells its weights from others; a folder must have them, since every later use compares them."""
    identity = model.identity()
    if identity.startswith("revision:") and Path(locate(model.name, model.revision)).is_dir():
        raise BaseModelError(
            f"base model {model.name!r} has no weights, which identify it", got="no model*.safetensors", remedy="Give its whole folder."
        )
    return identity
