"""Publishing: the cards of adapters, banks, generators and merged models, and what goes to the hub with them."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from lorag import __version__
from lorag.adapters.provenance import UNKNOWN, Derived, derive, licence_of, prompt_of, public_name
from lorag.errors import BaseModelError, GeneratorError
from lorag.files.artifacts import GENERATOR_FORMAT, check_manifest
from lorag.files.atomic import write_bytes
from lorag.files.hub import push

__all__ = [
    "CARD",
    "PLACE",
    "adapter_card",
    "bank_card",
    "generator_card",
    "merged_card",
    "own_card",
    "push_files",
    "push_generator_folder",
    "require_public",
    "write_card",
]

CARD = "README.md"
PLACE = "user/name"  # stands in a card for the repository that it will lie in
_MARK = "<!-- Written by lorag; delete this line to keep your own changes. -->"
_UNFILLED = "[More Information Needed]"
_MOST_LISTED = 12

_FRAME = Template("""---
$front
---
$mark

# $title

$lead

$body

## Licence

$licence
""")

_UNKNOWN_LICENCE = Template("""> **The licence of this $what is unknown: $reason.**
> Do not publish or use it before you have found out on which terms its parents may be used.""")

_USE = Template("""## Use

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "$name")
```

or, with lorag, `LoraAdapter.from_pretrained("$name").apply_to(base_model)`.""")


def write_card(folder: Path, text: str) -> None:
    """Writes README.md, unless somebody wrote their own: one without lorag's mark stays as it is."""
    if own_card(folder) is None:
        write_bytes(folder / CARD, text.encode())


def own_card(folder: Path) -> str | None:
    """The README.md that somebody wrote for a folder; None for lorag's own, and for the template that PEFT leaves unfilled."""
    path = folder / CARD
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return None if _MARK in text or _UNFILLED in text else text


def adapter_card(
    info: Mapping[str, Any], *, base_model: str | None, rank: int, alpha: float, modules: Sequence[str], fits: Sequence[str] = ()
) -> str:
    """The card of one adapter.

    Args:
        info: Its provenance, as lorag.json states it.
        base_model: Name of its base model.
        rank: r.
        alpha: lora_alpha.
        modules: Its target modules.
        fits: Lines on where it can be loaded.
    """
    description = " ".join(str(info.get("description") or "").split())
    generator, versions = _part(info, "generator"), _part(info, "versions")
    rows = {
        "Base model": base_model and _code(public_name(base_model)) + " " + _cell(_part(info, "base_model").get("identity", "")),
        "Prompt": prompt_of(info) and _code(str(prompt_of(info))),
        "Method": info.get("method"),
        "Generator": generator.get("revision"),
        "Text embedder": info.get("embedder"),
        "Seed": info.get("seed"),
        "Strength": info.get("strength"),
        "Novelty": info.get("novelty"),
        "Norm of ΔW": info.get("norm"),
        "Rank, lora_alpha": f"{rank}, {alpha:g}",
        "Modules": ", ".join(modules) if len(modules) <= _MOST_LISTED else f"{len(modules)} modules",
        "Made with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    quoted = f"Made for the task\n\n    {description}\n" if description else "Nothing states the task that it was made for.\n"
    lead = f"A LoRA adapter. {quoted}"
    if info.get("method") and "generator" in info:
        lead += "\nIt was generated from this description, without training data of the task, and has not been evaluated on it."
    parts = [_table(rows), _parents(info), _USE.substitute(name=PLACE)]
    if fits:
        parts.append("## Where it fits\n\n" + "\n".join(f"- {line}" for line in fits))
    tags = ["lora", "lorag", *(["generated-adapter"] if "generator" in info else [])]
    return _frame("adapter", "LoRA adapter", base_model, "peft", tags, licence_of(info), lead, parts)


def merged_card(info: Mapping[str, Any], *, base_model: str | None) -> str:
    """The card of a base model with an adapter merged into its weights."""
    description = " ".join(str(info.get("description") or "").split())
    lead = f"{_code(public_name(base_model or UNKNOWN))} with a LoRA adapter merged into its weights"
    lead += f". The adapter was made for the task\n\n    {description}\n" if description else ".\n"
    parts = [_table({"Method": info.get("method"), "Seed": info.get("seed"), "Strength": info.get("strength")}), _parents(info)]
    return _frame("model", "Merged model", base_model, "transformers", ["lorag", "merged-adapter"], licence_of(info), lead, parts)


def bank_card(*, base_model: str, modules: Sequence[str], experts: Sequence[tuple[str, str, str]]) -> str:
    """The card of a bank.

    Args:
        base_model: Name of its base model.
        modules: Target modules.
        experts: Name, first description and licence of each.
    """
    counts = Counter(licence for _, _, licence in experts)
    rows = {
        "Base model": _code(public_name(base_model)),
        "Modules": ", ".join(modules) if len(modules) <= _MOST_LISTED else f"{len(modules)} modules",
        "Experts": len(experts),
        "Their licences": ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())),
    }
    listed = [f"- {_code(name)}: {_cell(text)} ({_cell(licence)})" for name, text, licence in experts[: 4 * _MOST_LISTED]]
    if len(experts) > len(listed):
        listed.append(f"- and {len(experts) - len(listed)} more, see bank.json")
    parts = [_table(rows), "## Experts\n\n" + "\n".join(listed or ["None yet."])]
    lead = "A bank of LoRA adapters (experts) of one base model, each with descriptions of its task, for lorag."
    derived = derive(licence for _, _, licence in experts)
    return _frame("bank", "Bank of LoRA experts", base_model, "lorag", ["lora", "lorag", "adapter-bank"], derived, lead, parts)


def generator_card(*, base_model: str, method: str, embedder: str, rank: int, strength: float, licences: Sequence[str]) -> str:
    """The card of a generator.

    Args:
        base_model: Name of the base model that it makes adapters for.
        method: Its method.
        embedder: Its text embedder.
        rank: Rank of its adapters.
        strength: Factor on their ΔW.
        licences: Licence of each of its experts.
    """
    counts = Counter(licences)
    rows = {
        "Base model": _code(public_name(base_model)),
        "Method": method,
        "Text embedder": _code(public_name(embedder)),
        "Experts": len(licences),
        "Their licences": ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())),
        "Rank of its adapters": rank,
        "Strength": strength,
    }
    use = f'from lorag import generate_lora\n\nadapter = generate_lora("what the adapter should do", generator="{PLACE}")'
    parts = [_table(rows), f"## Use\n\n```python\n{use}\n```"]
    lead = "Turns the description of a task into a LoRA adapter for its base model. Learned by lorag from a bank of experts."
    return _frame("generator", "LoRA generator", base_model, "lorag", ["lora", "lorag", "adapter-generator"], derive(licences), lead, parts)


def _frame(
    what: str, title: str, base_model: str | None, library: str, tags: Sequence[str], licence: Derived, lead: str, parts: Sequence[str]
) -> str:
    from huggingface_hub import ModelCardData

    named = " ".join(public_name(base_model or UNKNOWN).split())[:120]  # a line of its own could end the front matter
    front = ModelCardData(base_model=named, library_name=library, license=licence.name, tags=list(tags))
    stated = f"{licence.name}: {licence.reason}. The base model has a licence of its own."
    if licence.name == UNKNOWN:
        stated = _UNKNOWN_LICENCE.substitute(what=what, reason=licence.reason)
        lead = f"{stated}\n\n{lead}"
    return _FRAME.substitute(
        front=front.to_yaml().strip(), mark=_MARK, title=title, lead=lead.strip(), body="\n\n".join(p for p in parts if p), licence=stated
    )


def _part(info: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = info.get(key)
    return value if isinstance(value, Mapping) else {}


def _cell(value: object) -> str:
    """A value on one line that cannot end a table's cell or start markup."""
    return re.sub(r"([|<>\[\]`*])", r"\\\1", " ".join(str(value).split()))[:300]


def _code(text: str) -> str:
    return "`" + re.sub(r"[`|\s]+", " ", text)[:120] + "`"


def _table(rows: Mapping[str, Any]) -> str:
    """Rows with a value; code spans that this module itself put in stay code."""
    shown = {key: str(value) for key, value in rows.items() if value not in (None, "")}
    lines = [f"| {key} | {value if value.startswith('`') else _cell(value)} |" for key, value in shown.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _parents(info: Mapping[str, Any]) -> str:
    listed = [parent for parent in info.get("parents") or [] if isinstance(parent, Mapping)]
    if not listed:
        return ""
    if any(parent.get("weight") is not None for parent in listed):
        lines = [f"| {_cell(p.get('name'))} | {_cell(p.get('weight'))} | {_cell(p.get('license'))} |" for p in listed[:_MOST_LISTED]]
        more = f"\n\nand {len(listed) - _MOST_LISTED} more, see lorag.json" if len(listed) > _MOST_LISTED else ""
        return "\n".join(["## Parents", "", "| expert | weight | licence |", "|---|---|---|", *lines]) + more
    counts = Counter(str(parent.get("license")) for parent in listed)
    licences = ", ".join(f"{_cell(name)} ({count})" for name, count in sorted(counts.items()))
    together = f"All {len(listed)} experts and tasks that the generator learned from together; no single one has a weight."
    return f"## Parents\n\n{together} Licences: {licences}."


# --- the hub ----------------------------------------------------------------------------------------------------------


def require_public(name: str, remedy: str) -> None:
    """Nobody else has a folder of this machine, and its path is nobody's business.

    Raises:
        BaseModelError: If a model's name is that of a local folder.
    """
    if public_name(name) != name:
        what = "what is to be published names a folder of this machine"
        raise BaseModelError(what, got=public_name(name), expected="a hub id", remedy=remedy)


def push_files(
    folder: Path, names: Iterable[str], card: str, repository: str, *, kind: str, private: bool, readme: str | None = None
) -> str:
    """Uploads some files of a folder, and its card.

    Args:
        folder: Holds them.
        names: Their paths in the folder, and in the repository. Nothing else that lies there is published.
        card: README.md, if nobody wrote one.
        repository: Hub id user/name.
        kind: What it is, for the commit's message.
        private: Whether a new repository is private.
        readme: The README.md that somebody wrote; by default the folder's, if it has one.

    Returns:
        Address of the commit.

    Raises:
        StorageError: If the upload fails.
    """
    own = readme if readme is not None else own_card(folder)
    with tempfile.TemporaryDirectory(prefix="lorag-") as staging:
        path = Path(staging) / CARD
        path.write_text(card.replace(PLACE, repository) if own is None else own, encoding="utf-8")
        files = {name: folder / name for name in names} | {CARD: path}
        return push(files, repository, message=f"Upload {kind}, lorag {__version__}", private=private)


def push_generator_folder(folder: Path, repository: str, *, private: bool = True) -> str:
    """Publishes a saved generator: manifest, weights and card, and nothing else of the folder that it was trained in.

    Raises:
        ArtifactError: If it is not a complete generator of a known format.
        BaseModelError: If its base model or embedder is a folder of this machine.
        GeneratorError: If its manifest cannot be read.
        StorageError: If the upload fails.
    """
    manifest = check_manifest(folder, "generator.json", "generator", GENERATOR_FORMAT)
    try:
        base, embedder, licences = str(manifest["base"]["model"]["name"]), str(manifest["embedder"]), manifest.get("licenses", {})
        card = generator_card(
            base_model=base,
            method=str(manifest["method"]),
            embedder=embedder,
            rank=int(manifest["rank"]),
            strength=float(manifest["strength"]),
            licences=[str(licences.get(name, UNKNOWN)) for name in dict.fromkeys([*manifest["experts"], *licences])],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GeneratorError(f"{folder / 'generator.json'} cannot be read", got=repr(error)[:120]) from error
    require_public(base, "Train it from a bank that was built with base=HUB_ID.")
    require_public(embedder, "Train it with embedder=HUB_ID.")
    return push_files(folder, ["generator.json", *manifest["files"]], card, repository, kind="generator", private=private)
