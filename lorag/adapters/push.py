"""Publishing to the hub: what is checked before, which files go, and the card that goes with them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from lorag import __version__
from lorag.adapters.licences import UNKNOWN
from lorag.adapters.model_card import CARD, PLACE, generator_card, own_card
from lorag.adapters.provenance import public_name
from lorag.errors import BaseModelError, GeneratorError
from lorag.files.artifacts import GENERATOR_FORMAT, check_manifest
from lorag.files.hub import push

__all__ = ["push_files", "push_generator_folder", "require_public"]


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
