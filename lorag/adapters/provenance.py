"""Provenance: how an adapter came about, as lorag.json says it, and the licence of what is made from several.

No time, no machine's path: same seed, same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag import __version__
from lorag.base.names import packaged

if TYPE_CHECKING:
    from lorag.base.base_model import BaseModel
    from lorag.base.layout import LoraLayout

__all__ = [
    "Derived",
    "UNKNOWN",
    "base_fields",
    "derive",
    "known_licence",
    "licence_of",
    "parents",
    "parents_of",
    "prompt_of",
    "public_name",
    "versions",
]

UNKNOWN = "unknown"

# Identifiers as the hub spells them (https://huggingface.co/docs/hub/repositories-licenses), from free to strict.
_ORDER = (
    "cc0-1.0 unlicense wtfpl pddl 0bsd",
    "mit isc zlib ncsa postgresql bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0",
    "apache-2.0 afl-3.0 ecl-2.0 ms-pl artistic-2.0 odc-by cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0",
    "openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m bigscience-bloom-rail-1.0 openrail++",
    "mpl-2.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr epl-1.0 epl-2.0",
    "cc-by-sa-3.0 cc-by-sa-4.0 gpl gpl-2.0 gpl-3.0 osl-3.0 eupl-1.1 eupl-1.2 odbl gfdl cdla-sharing-1.0",
    "agpl-3.0",
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma deepfloyd-if-license",
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 fair-noncommercial-research-license apple-amlr intel-research",
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
)
_LEVEL = {name: level for level, names in enumerate(_ORDER) for name in names.split()}
# What is made from these must carry the same licence, so that two of them cannot be met at once.
_BINDING = {name for name, level in _LEVEL.items() if level in (5, 6, 7, 9)}
_NO_DERIVATIVES = len(_ORDER) - 1
_ALIASES = {"apache": "apache-2.0", "apache2": "apache-2.0", "apache2.0": "apache-2.0", "cc0": "cc0-1.0", "public-domain": "cc0-1.0"}


@dataclass(frozen=True)
class Derived:
    """The licence of something made from others.

    Attributes:
        name: An identifier of the hub, or "unknown".
        reason: Why, in one sentence.
    """

    name: str
    reason: str


def known_licence(text: object) -> str | None:
    """The hub's identifier of a licence as people write it ("Apache 2.0", "CC BY-SA 4.0"), or None."""
    if not isinstance(text, str):
        return None
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    name = name.removeprefix("the-").removesuffix("-license").removesuffix("-licence").replace("license-", "").replace("licence-", "")
    name = re.sub(r"-v?(?=\d)", "-", name)
    name = _ALIASES.get(name, name)
    return name if name in _LEVEL else None


def derive(licences: Iterable[object]) -> Derived:
    """The most restrictive of some licences, if one alone can stand for all.

    Args:
        licences: As people wrote them; anything that is not known counts as unknown.

    Returns:
        "unknown" if there is none, if one is unknown, if two of them demand their own name for what is made from them,
        or if one forbids derivatives; the reason says which.
    """
    counts = Counter(str(licence).strip() or UNKNOWN for licence in licences)
    if not counts:
        return Derived(UNKNOWN, "nothing states what it was made from")
    by_text = {text: known_licence(text) for text in counts}
    strange = sorted(text for text, name in by_text.items() if name is None)
    if strange:
        count = sum(counts[text] for text in strange)
        named = ", ".join(repr(text[:40]) for text in strange[:3])
        return Derived(UNKNOWN, f"{count} of {sum(counts.values())} parents have no licence whose terms are known: {named}")
    names = {name for name in by_text.values() if name is not None}
    strictest = max(names, key=lambda name: (_LEVEL[name], name))
    if _LEVEL[strictest] == _NO_DERIVATIVES:
        return Derived(UNKNOWN, f"a parent is under {strictest}, which allows no derivatives")
    bound = sorted((names & _BINDING) - {strictest})
    if bound:
        return Derived(UNKNOWN, f"no one licence meets both {bound[0]} and {strictest}, which parents are under")
    if len(names) == 1:
        return Derived(strictest, "the licence of all parents")
    return Derived(strictest, f"the most restrictive among the parents' {', '.join(sorted(names))}")


# --- where an adapter comes from --------------------------------------------------------------------------------------


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
    listed: list[dict[str, Any]] = []
    for info, weight in zip(infos, weights, strict=True):
        name = info.get("expert") or info.get("description") or UNKNOWN
        listed.append({"name": str(name), "weight": round(float(weight), 6), "license": str(info.get("license") or UNKNOWN)})
    return sorted(listed, key=lambda parent: (-abs(parent["weight"]), parent["name"]))


def licence_of(info: Mapping[str, Any]) -> Derived:
    """The licence of an adapter: that of its parents taken together; without parents, the one stated for itself."""
    listed = info.get("parents")
    if isinstance(listed, list) and listed:
        return derive(parent.get("license") if isinstance(parent, Mapping) else None for parent in listed)
    if info.get("license"):
        return derive([info["license"]])
    return derive(())
