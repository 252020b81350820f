"""Licences: of several, which one a work made from all of them may carry; a hint for people, never legal advice.

The order is coarse on purpose. From free to strict: public domain, notice, notice with patent or attribution terms,
rules of use, weak copyleft, copyleft, network copyleft, terms of a model's maker, no commercial use, no derivatives.
What the table does not know, and what cannot be combined, is "unknown": a guess would be worse than a question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["UNKNOWN", "Derived", "derive", "known_licence"]

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
    given = Counter(str(licence).strip() or UNKNOWN for licence in licences)
    if not given:
        return Derived(UNKNOWN, "nothing states what it was made from")
    known = {text: known_licence(text) for text in given}
    strange = sorted(text for text, name in known.items() if name is None)
    if strange:
        count = sum(given[text] for text in strange)
        named = ", ".join(repr(text[:40]) for text in strange[:3])
        return Derived(UNKNOWN, f"{count} of {sum(given.values())} parents have no licence whose terms are known: {named}")
    names = {name for name in known.values() if name is not None}
    strictest = max(names, key=lambda name: (_LEVEL[name], name))
    if _LEVEL[strictest] == _NO_DERIVATIVES:
        return Derived(UNKNOWN, f"a parent is under {strictest}, which allows no derivatives")
    bound = sorted((names & _BINDING) - {strictest})
    if bound:
        return Derived(UNKNOWN, f"no one licence meets both {bound[0]} and {strictest}, which parents are under")
    if len(names) == 1:
        return Derived(strictest, "the licence of all parents")
    return Derived(strictest, f"the most restrictive among the parents' {', '.join(sorted(names))}")
