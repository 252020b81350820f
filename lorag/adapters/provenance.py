"""Provenance: what lorag.json says of how an adapter came about. No time, no machine's path: same seed, same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag import __version__
from lorag.adapters.licences import UNKNOWN, Derived, derive
from lorag.base.names import packaged

if TYPE_CHECKING:
    from lorag.base.base_model import BaseModel
    from lorag.base.layout import LoraLayout

__all__ = ["base_fields", "licence_of", "parents", "parents_of", "prompt_of", "public_name", "versions"]

_LIBRARIES = ("torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """Versions of lorag and of the libraries that decide what an adapter's bytes mean."""
    return {"lorag": __version__, **{name: metadata.version(name) for name in _LIBRARIES}}


def public_name(name: str) -> str:
    """A name that may be published: of a local folder, only the last part."""
    path = Path(name).expanduser()
    local = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or path.exists()
    return path.name or "local" if local else name


def base_fields(model: BaseModel, identity: str, layout: LoraLayout, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What identifies the base model: name, kind, revision, digest, and the fingerprint of the adapted modules.

    Where a package carries other weights than the hub has, also which: their format and the sha256 of the file. Given the
    settings of a language model's objective, also the prompt that it was trained with, so that it can be served likewise.
    """
    one = packaged(model.name)
    stored = {"weights": {"format": one.format, "sha256": one.sha256}} if one and one.format and one.identity == identity else {}
    chosen = {key: settings[key] for key in ("template", "system") if key in settings} if settings else {}
    prompt = {"prompt": chosen} if chosen else {}
    return {
        "name": public_name(model.name),
        "kind": model.kind,
        "revision": model.revision,
        "identity": identity,
        "layout": layout.fingerprint,
        **stored,
        **prompt,
    }


def prompt_of(info: Mapping[str, Any]) -> str | None:
    """How lorag.json says that inputs become prompts, for people; None if it says nothing."""
    base = info.get("base_model")
    prompt = base.get("prompt") if isinstance(base, Mapping) else None
    if not isinstance(prompt, Mapping) or not isinstance(prompt.get("template"), str):
        return None
    system = prompt.get("system")
    if prompt["template"] == "chat":
        return "the tokenizer's chat template" + (f", with the system text {system[:200]!r}" if isinstance(system, str) else "")
    return f"the template {prompt['template'][:200]!r}"


def parents(names: Sequence[str], licences: Mapping[str, str], weights: Sequence[float] | None) -> list[dict[str, Any]]:
    """The experts that an adapter was made from.

    Args:
        names: Experts.
        licences: Of each by name; one without counts as unknown. Names of no expert are training tasks without one.
        weights: How much each counted, for methods that mix experts; those that did not count are left out. None for
            methods that learn from all experts, and tasks without one, together, where no single one has a weight.

    Returns:
        Name, weight (or None) and licence of each, the heaviest first.
    """
    if weights is None:
        return [{"name": name, "weight": None, "license": licences.get(name, UNKNOWN)} for name in dict.fromkeys([*names, *licences])]
    pairs = sorted(((round(float(w), 6), n) for n, w in zip(names, weights, strict=True)), key=lambda pair: (-abs(pair[0]), pair[1]))
    return [{"name": name, "weight": weight, "license": licences.get(name, UNKNOWN)} for weight, name in pairs if weight]


def parents_of(infos: Iterable[Mapping[str, Any]], weights: Sequence[float]) -> list[dict[str, Any]]:
    """Parents of a merge of adapters, given what is known of each; an adapter of a bank is an expert, others are named by their task."""
    found: list[dict[str, Any]] = []
    for info, weight in zip(infos, weights, strict=True):
        name = info.get("expert") or info.get("description") or UNKNOWN
        found.append({"name": str(name), "weight": round(float(weight), 6), "license": str(info.get("license") or UNKNOWN)})
    return sorted(found, key=lambda parent: (-abs(parent["weight"]), parent["name"]))


def licence_of(info: Mapping[str, Any]) -> Derived:
    """The licence of an adapter: that of its parents taken together; without parents, the one stated for itself."""
    listed = info.get("parents")
    if isinstance(listed, list) and listed:
        return derive(parent.get("license") if isinstance(parent, Mapping) else None for parent in listed)
    if info.get("license"):
        return derive([info["license"]])
    return derive(())
