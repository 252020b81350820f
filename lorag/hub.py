"""Folders from and to the hub: only safetensors, JSON, YAML and text ever travel."""

from __future__ import annotations

from pathlib import Path

from lorag.errors import ArtifactError, StorageError

__all__ = ["fetch", "push"]

_PATTERNS = ["*.json", "*.jsonl", "*.jsonl.gz", "*.safetensors", "*.yaml", "*.md"]


def fetch(path: str | Path, kind: str, revision: str | None = None) -> Path:
    """Returns a local folder: the path itself, or the snapshot of a hub repository `user/name`.

    Raises:
        ArtifactError: If there is neither.
    """
    local = Path(path)
    if local.is_dir():
        return local
    text = str(path)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ArtifactError(f"no {kind} at {text}", got="no such folder", expected="a folder, or a hub id such as user/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"no {kind} at {text}",
            got=f"neither a folder nor reachable on the hub: {str(error).strip().splitlines()[0][:120]}",
            remedy="Check the name, the network and HF_HUB_OFFLINE.",
        ) from error


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Uploads a folder to `user/name` on the hub and returns the commit's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_PATTERNS)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise StorageError(
            f"uploading to {repository} failed: {str(error).strip().splitlines()[0][:120]}",
            remedy="Log in with `hf auth login` and check the name.",
        ) from error
    return str(commit.commit_url)
