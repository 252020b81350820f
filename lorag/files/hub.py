"""Folders from and to the hub: named files only, all of them safetensors, JSON or text; nothing is ever unpickled.

The hub's own client does the work: cache, resuming, authentication. Its token is never passed on, stored or shown here.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorag.errors import ArtifactError, StorageError
from lorag.files.artifacts import read_json, resolve_inside

__all__ = ["fetch", "fetch_small", "list_adapters", "list_files", "push"]

logger = logging.getLogger(__name__)

# What is fetched of an adapter. Of banks and generators it is the manifest, then what the manifest lists. A repository may
# hold anything else, such as pickles or a whole model; it stays there.
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "lorag.json", "README.md", "description.txt"]
_ADAPTER_FILES += ["adapters.safetensors", "pytorch_lora_weights.safetensors"]  # as mlx-lm and diffusers call theirs
_LARGEST_SMALL = 4 * 2**20
_MANIFESTS = {"bank": "bank.json", "generator": "generator.json"}
# Tokens of the hub, what follows "Bearer", and JSON web tokens.
_SECRET = re.compile(r"hf_\w{8,}|(?<=Bearer )\S+|\bey[\w-]{10,}\.[\w-]+\.[\w-]*")


def fetch(path: str | Path, kind: str, revision: str | None = None, *, more: Sequence[str] = ()) -> Path:
    """Returns a local folder: the path itself, or the snapshot of a hub repository `user/name` in the client's cache.

    Args:
        path: A folder; text may also be a hub id. Of the two the folder wins.
        kind: "adapter", "bank" or "generator"; decides which files are fetched.
        revision: Branch, tag or commit on the hub.
        more: Further files of an adapter that are fetched where it has them.

    Raises:
        ArtifactError: If there is neither, or if a manifest lists files outside of its folder.
    """
    local = Path(path)
    if local.is_dir():
        return local
    text = str(path)
    if local.is_file():
        remedy = f"Give its folder: {local.parent}"
        raise ArtifactError(f"{text} is a file, where the folder of the {kind} belongs", got=local.name, expected="a folder", remedy=remedy)
    if isinstance(path, Path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ArtifactError(f"no {kind} at {text}", got="no such folder", expected="a folder, or a hub id such as user/name")
    if kind not in _MANIFESTS:
        return _snapshot(text, kind, revision, [*_ADAPTER_FILES, *more])
    manifest = _MANIFESTS[kind]
    folder = _snapshot(text, kind, revision, [manifest])
    if not (folder / manifest).is_file():
        raise ArtifactError(f"no {kind} at {text}", got=f"a repository without {manifest}", remedy="Check the name.")
    listed = read_json(folder / manifest).get("files")
    for name in listed if isinstance(listed, dict) else ():
        resolve_inside(folder, name)
    names = [glob.escape(name) for name in listed or ()]
    return _snapshot(text, kind, folder.name, [manifest, "README.md", *names])  # of the same commit, after which the folder is named


def _snapshot(repository: str, kind: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with _bars():
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except _failures() as error:
        raise ArtifactError(
            f"no {kind} at {repository}",
            got=f"no such folder, and from the hub: {_reason(error)}",
            remedy="Check the name, the network and HF_HUB_OFFLINE; for a private repository log in with `hf auth login`.",
        ) from _cause(error)


def list_files(repository: str, revision: str) -> list[str]:
    """Names of all files of a repository; none where the hub cannot be asked, as when what is in its client's cache is used offline."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return []
    try:
        return [str(name) for name in HfApi().list_repo_files(repository, revision=revision)]
    except _failures() as error:
        logger.debug("the files of %s cannot be listed: %s", repository, _reason(error))
        return []


def list_adapters(base: str, limit: int) -> list[str]:
    """Hub ids of the adapters in the tree of a base model, those with the most downloads first.

    Raises:
        ArtifactError: If the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        return [str(one.id) for one in HfApi().list_models(filter=f"base_model:adapter:{base}", sort="downloads", limit=limit)]
    except _failures() as error:
        remedy = "Check the name, the network and HF_HUB_OFFLINE."
        raise ArtifactError(f"the adapters of {base} cannot be listed", got=_reason(error), remedy=remedy) from _cause(error)


def fetch_small(repository: str, names: Sequence[str]) -> tuple[Path, dict[str, int], str]:
    """Fetches some small files of a repository, where it has them, and says how large all of its files are.

    Returns:
        The snapshot's folder, bytes by file name, and the licence that the repository states, or "unknown".

    Raises:
        ArtifactError: If it cannot be had, or one of the files is larger than 4 MiB.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, files_metadata=True)
    except _failures() as error:
        raise ArtifactError(f"{repository} cannot be looked at", got=_reason(error), remedy="Is it public?") from _cause(error)
    sizes = {one.rfilename: int(one.size or 0) for one in info.siblings or ()}
    large = next((name for name in names if sizes.get(name, 0) > _LARGEST_SMALL), None)
    if large is not None:
        raise ArtifactError(f"{large} of {repository} is too large for what it is", got=f"{sizes[large]} bytes")
    stated = getattr(info.card_data, "license", None) if info.card_data is not None else None
    licence = stated if isinstance(stated, str) and stated else "unknown"
    return _snapshot(repository, "adapter", info.sha, [*names]), sizes, licence[:60]


def push(files: Mapping[str, Path], repository: str, *, message: str, private: bool = True) -> str:
    """Uploads files to `user/name` on the hub, in one commit, and returns the commit's address.

    Args:
        files: Where each file is, by its path in the repository. Nothing else is uploaded.
        repository: Hub id; the repository is made if there is none.
        message: Of the commit.
        private: Whether a new repository is private; an old one stays as it is.

    Raises:
        StorageError: If it fails; the repository is then as it was before.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        with _bars():
            api.create_repo(repository, private=private, exist_ok=True)
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())]
            commit = api.create_commit(repository, operations, commit_message=message)
    except _failures() as error:
        raise StorageError(
            f"uploading to {repository} failed: {_reason(error)}", remedy="Log in with `hf auth login`, and check the name and the network."
        ) from _cause(error)
    return str(commit.commit_url)


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """The client's progress bars on a terminal, and none elsewhere."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    off = are_progress_bars_disabled() or sys.stderr.isatty()
    if not off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            enable_progress_bars()


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises when something fails: its HTTP library's error, whichever library that is, and plain ones."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def _cause(error: Exception) -> Exception | None:
    """The error itself, for a traceback, unless a server repeated a token in it."""
    return error if _hidden(str(error)) == str(error) else None


def _hidden(text: str) -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return _SECRET.sub("***", text)


def _reason(error: Exception) -> str:
    """What failed, in one line, without anything that could be a token."""
    from huggingface_hub import errors

    for kind, text in (
        (errors.GatedRepoError, "access to the repository must be asked for on its page"),
        (errors.RepositoryNotFoundError, "no such repository, or no right to it"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.OfflineModeIsEnabled, "the hub is switched off by HF_HUB_OFFLINE"),
        (errors.LocalEntryNotFoundError, "it cannot be reached, and nothing is in the cache"),
    ):
        if isinstance(error, kind):
            return text
    text = re.sub(r"For more information check: \S+", "", str(error))
    return _hidden(" ".join(text.split()))[:200]
