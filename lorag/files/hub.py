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
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from lorag.errors import ArtifactError, StorageError
from lorag.files.artifacts import read_json, resolve_inside

__all__ = [
    "OTHER_WEIGHTS",
    "HubPlace",
    "fetch",
    "fetch_adapter",
    "fetch_small",
    "hub_place",
    "list_adapters",
    "list_files",
    "push",
    "read_start",
]

logger = logging.getLogger(__name__)

# What is fetched of an adapter. Of banks and generators it is the manifest, then what the manifest lists. A repository may
# hold anything else, such as pickles or a whole model; it stays there.
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "lorag.json", "README.md", "description.txt"]
OTHER_WEIGHTS = ("adapters.safetensors", "pytorch_lora_weights.safetensors")  # as mlx-lm and diffusers call theirs
_LARGEST_SMALL = 4 * 2**20
_MANIFESTS = {"bank": "bank.json", "generator": "generator.json"}
_TEXTS = ["adapter_config.json", "lorag.json", "README.md", "description.txt"]  # that tell what a single file is
_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.A)
_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface|hf)\.co/([^/?#]+/[^/?#]+)(?:/(?:blob|resolve|tree)/([^/?#]+)/?([^?#]*))?/?(?:[?#].*)?"
)
_FILES = (".gguf", ".safetensors")  # that an adapter may be
# Tokens of the hub, what follows "Bearer", and JSON web tokens.
_SECRET = re.compile(r"hf_\w{8,}|(?<=Bearer )\S+|\bey[\w-]{10,}\.[\w-]+\.[\w-]*")


@dataclass(frozen=True)
class HubPlace:
    """A place on the hub.

    Attributes:
        repository: Its hub id, user/name.
        inside: A folder or file of the repository; "" for all of it.
        revision: Branch, tag or commit, where the address says one.
    """

    repository: str
    inside: str = ""
    revision: str | None = None

    @property
    def name(self) -> str:
        """What an adapter of this place is called: user-name, or user-name-file."""
        whole = f"{self.repository}/{self.inside}".rstrip("/").replace("/", "-")
        return whole.removesuffix(".safetensors").removesuffix(".gguf")


def hub_place(text: str) -> HubPlace | None:
    """What a text names on the hub; None if it cannot be a place there.

    Args:
        text: A hub id user/name, one of its files as user/name/file.gguf (or .safetensors), or the address of a repository, folder or
            file, as a browser shows it.
    """
    repository, revision, inside = "/".join(text.split("/", 2)[:2]), None, "/".join(text.split("/", 2)[2:])
    if (address := _ADDRESS.fullmatch(text)) is not None:
        repository, revision, inside = address[1], address[2] and unquote(address[2]), unquote(address[3] or "").rstrip("/")
    elif inside and not inside.endswith(_FILES):
        return None
    parts = inside.split("/") if inside else []
    if not _ID.fullmatch(repository) or ".." in repository or any(part in ("", ".", "..") or "\\" in part for part in parts):
        return None
    return HubPlace(repository, inside, revision)


def fetch(path: str | Path, kind: str, revision: str | None = None) -> Path:
    """Returns a local folder: the path itself, or the snapshot of a hub repository `user/name` in the client's cache.

    Args:
        path: A folder; text may also be a hub id. Of the two the folder wins.
        kind: "adapter", "bank" or "generator"; decides which files are fetched.
        revision: Branch, tag or commit on the hub.

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
    place = None if isinstance(path, Path) else hub_place(text)
    if place is None or (place.inside and kind in _MANIFESTS):
        raise ArtifactError(f"no {kind} at {text}", got="no such folder", expected="a folder, or a hub id such as user/name")
    if kind not in _MANIFESTS:
        return fetch_adapter(place, revision)[0]
    manifest, repository = _MANIFESTS[kind], place.repository
    folder = _snapshot(repository, kind, revision or place.revision, [manifest])
    if not (folder / manifest).is_file():
        raise ArtifactError(f"no {kind} at {text}", got=f"a repository without {manifest}", remedy="Check the name.")
    listed = read_json(folder / manifest).get("files")
    for name in listed if isinstance(listed, dict) else ():
        resolve_inside(folder, name)
    names = [glob.escape(name) for name in listed or ()]
    # Of the same commit, after which the folder is named.
    return _snapshot(repository, kind, folder.name, [manifest, "README.md", *names])


def fetch_adapter(place: HubPlace, revision: str | None = None, *, more: Sequence[str] = ()) -> tuple[Path, str]:
    """Fetches what an adapter consists of: a folder's files by their usual names, or one file with the texts beside it.

    Args:
        place: Where it is.
        revision: Instead of the one that the place names.
        more: Further files that are fetched where they lie beside it.

    Returns:
        The folder or file in the client's cache, and the commit that it is of. A folder without such files may be missing there.

    Raises:
        ArtifactError: If it cannot be had, or the repository has no such file or folder.
    """
    above, _, name = place.inside.rpartition("/") if place.inside.endswith(_FILES) else (place.inside, "", "")
    names = [name, *_TEXTS, *more] if name else [*_ADAPTER_FILES, *OTHER_WEIGHTS, *more]
    patterns = [glob.escape(f"{above}/{one}" if above else one) for one in names]
    root = _snapshot(place.repository, "adapter", revision or place.revision, patterns)
    if place.inside and not (root / place.inside).exists():
        files = list_files(place.repository, root.name)
        if name or not any(one.startswith(f"{place.inside}/") for one in files):
            beside = ", ".join([one for one in files if one.endswith(_FILES)][:4])
            got = f"no {place.inside} in {place.repository}" + (f", but {beside}" if beside else "")
            raise ArtifactError(f"no adapter at {place.repository}/{place.inside}", got=got, remedy="Check the name.")
    return root / place.inside, root.name


def read_start(repository: str, revision: str, name: str, size: int) -> bytes:
    """The first bytes of a file of a repository, of which no more is fetched.

    Raises:
        ArtifactError: If it cannot be had.
    """
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem(skip_instance_cache=True).open(f"{repository}@{revision}/{name}", cache_type="none") as file:
            return bytes(file.read(size))
    except _failures() as error:
        raise ArtifactError(f"{name} of {repository} cannot be looked at", got=_reason(error), remedy="Check the network.") from _cause(
            error
        )


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
    """The client's progress bars on a terminal, and none elsewhere; that no file matched is for us to say."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    client = logging.getLogger("huggingface_hub._snapshot_download")
    client.addFilter(_is_news)
    off = are_progress_bars_disabled() or sys.stderr.isatty()
    if not off:
        disable_progress_bars()
    try:
        yield
    finally:
        client.removeFilter(_is_news)
        if not off:
            enable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    return "allow_patterns" not in record.getMessage()


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
