"""Publishing: the cards of adapters, banks, generators and merged models, and what goes to the hub with them."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorag import __version__
from lorag.adapters.provenance import UNKNOWN, Derived, derive, licence_of, prompt_of, public_name
from lorag.errors import BaseModelError, GeneratorError
from lorag.files.artifacts import GENERATOR_FORMAT, check_manifest
from lorag.files.atomic import write_bytes
from lorag.files.hub import push
from lorag.files.templates import Markup, render

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
    description, base = _one_line(info.get("description") or ""), None
    if base_model:
        base = _code(public_name(base_model)) + Markup(" ") + _safe(str(_part(info, "base_model").get("identity", "")))
    facts = {
        "Base model": base,
        "Prompt": _code(str(prompt_of(info))) if prompt_of(info) else None,
        "Method": info.get("method"),
        "Generator": _part(info, "generator").get("revision"),
        "Text embedder": info.get("embedder"),
        "Seed": info.get("seed"),
        "Strength": info.get("strength"),
        "Novelty": info.get("novelty"),
        "Norm of ΔW": info.get("norm"),
        "Rank, lora_alpha": f"{rank}, {alpha:g}",
        "Modules": _listed(modules),
        "Made with": ", ".join(f"{name} {version}" for name, version in _part(info, "versions").items()),
    }
    return _card(
        "adapter",
        "LoRA adapter",
        base_model,
        "peft",
        ["lora", "lorag", *(["generated-adapter"] if "generator" in info else [])],
        licence_of(info),
        f"A LoRA adapter. {'Made for the task' if description else 'Nothing states the task that it was made for.'}",
        facts,
        description=Markup(description),
        generated=bool(info.get("method")) and "generator" in info,
        fits=[Markup(line) for line in fits],
        **_parents(info),
    )


def merged_card(info: Mapping[str, Any], *, base_model: str | None) -> str:
    """The card of a base model with an adapter merged into its weights."""
    description = _one_line(info.get("description") or "")
    lead = _code(public_name(base_model or UNKNOWN)) + Markup(" with a LoRA adapter merged into its weights")
    lead += Markup(". The adapter was made for the task" if description else ".")
    facts = {"Method": info.get("method"), "Seed": info.get("seed"), "Strength": info.get("strength")}
    tags = ["lorag", "merged-adapter"]
    more = {"description": Markup(description), **_parents(info)}
    return _card("model", "Merged model", base_model, "transformers", tags, licence_of(info), lead, facts, **more)


def bank_card(*, base_model: str, modules: Sequence[str], experts: Sequence[tuple[str, str, str]]) -> str:
    """The card of a bank.

    Args:
        base_model: Name of its base model.
        modules: Target modules.
        experts: Name, first description and licence of each.
    """
    licences = [licence for _, _, licence in experts]
    facts = {
        "Base model": _code(public_name(base_model)),
        "Modules": _listed(modules),
        "Experts": len(experts),
        "Their licences": _counted(licences),
    }
    lead = "A bank of LoRA adapters (experts) of one base model, each with descriptions of its task, for lorag."
    tags = ["lora", "lorag", "adapter-bank"]
    listed = [(_code(name), text, licence) for name, text, licence in experts]
    more = {"experts": listed, "most": 4 * _MOST_LISTED}
    return _card("bank", "Bank of LoRA experts", base_model, "lorag", tags, derive(licences), lead, facts, **more)


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
    facts = {
        "Base model": _code(public_name(base_model)),
        "Method": method,
        "Text embedder": _code(public_name(embedder)),
        "Experts": len(licences),
        "Their licences": _counted(licences),
        "Rank of its adapters": rank,
        "Strength": strength,
    }
    lead = "Turns the description of a task into a LoRA adapter for its base model. Learned by lorag from a bank of experts."
    return _card("generator", "LoRA generator", base_model, "lorag", ["lora", "lorag", "adapter-generator"], derive(licences), lead, facts)


def _card(
    what: str,
    title: str,
    base_model: str | None,
    library: str,
    tags: Sequence[str],
    licence: Derived,
    lead: str,
    facts: Mapping[str, Any],
    **more: Any,  # noqa: ANN401 - parts that only some cards have
) -> str:
    from huggingface_hub import ModelCardData

    named = _one_line(public_name(base_model or UNKNOWN))[:120]  # a line of its own could end the front matter
    front = ModelCardData(base_model=named, library_name=library, license=licence.name, tags=list(tags))
    values: dict[str, Any] = {"description": "", "generated": False, "parents": [], "fits": [], "most": _MOST_LISTED, **more}
    return render(
        "lorag.adapters",
        "card.md",
        _safe,
        front=Markup(front.to_yaml().strip()),  # noqa: S704 - YAML
        mark=Markup(_MARK),
        place=PLACE,
        what=what,
        title=title,
        lead=Markup(lead),  # noqa: S704 - names in it are code spans
        licence=licence,
        facts={name: value for name, value in facts.items() if value not in (None, "")},
        **values,
    )


def _part(info: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = info.get(key)
    return value if isinstance(value, Mapping) else {}


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _safe(text: str) -> Markup:
    """Text on one line that cannot end a table's cell or start markup."""
    return Markup(re.sub(r"([|<>\[\]`*])", r"\\\1", _one_line(text))[:300])  # noqa: S704 - escaped


def _code(text: str) -> Markup:
    return Markup("`" + re.sub(r"[`|\s]+", " ", text)[:120] + "`")  # noqa: S704 - nothing ends the span


def _listed(modules: Sequence[str]) -> str:
    return ", ".join(modules) if len(modules) <= _MOST_LISTED else f"{len(modules)} modules"


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(Counter(names).items()))


def _parents(info: Mapping[str, Any]) -> dict[str, Any]:
    listed = [
        {key: parent.get(key) for key in ("name", "weight", "license")}
        for parent in info.get("parents") or []
        if isinstance(parent, Mapping)
    ]
    weighted = any(parent["weight"] is not None for parent in listed)
    return {"parents": listed, "weighted": weighted, "licences": _counted(str(parent["license"]) for parent in listed)}


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
    written = readme if readme is not None else own_card(folder)
    with tempfile.TemporaryDirectory(prefix="lorag-") as staging:
        path = Path(staging) / CARD
        path.write_text(card.replace(PLACE, repository) if written is None else written, encoding="utf-8")
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
