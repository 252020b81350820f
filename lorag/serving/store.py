"""Immutable adapter folders that several servers share: each named by the hash of its content, never rewritten, never deleted.

An engine reads an adapter's folder again after it evicted the adapter, and its prefix cache takes one path for one adapter. So a
folder appears complete, by one rename, and stays as it is:

    adapters/HASH/      a PEFT folder; HASH is of its files' names and contents
    requests/KEY.json   which adapter a request was answered with; KEY is a hash too
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorag.errors import ArtifactError, StoreFullError
from lorag.files.artifacts import read_json, sha256, write_json
from lorag.files.atomic import flush_folder, locked, sweep, writing

__all__ = ["AdapterStore", "StoreLimits", "Usage", "content_hash"]

_ADAPTERS, _REQUESTS = "adapters", "requests"
_HASH = re.compile(r"[0-9a-f]{40}")
_WAIT = 60.0  # seconds for the lock; what is done under it takes milliseconds


@dataclass(frozen=True)
class StoreLimits:
    """How many adapters a store may hold, and how many bytes they may take together."""

    adapters: int = 1000
    bytes: int = 4 * 2**30


@dataclass(frozen=True)
class Usage:
    """What a store holds."""

    adapters: int
    bytes: int


def content_hash(folder: Path) -> str:
    """Forty hex digits that any change of a folder's file names or contents alters."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()[:40]


class AdapterStore:
    """A folder of adapter folders. Open one with `open`.

    Args:
        folder: Where it is.
        limits: What it may hold.
    """

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        self.folder, self.limits = folder, limits
        self._verified: set[str] = set()

    @classmethod
    def open(cls, folder: str | Path, limits: StoreLimits | None = None) -> AdapterStore:
        """Opens a store, or starts one that only its owner can read.

        Raises:
            StorageError: If the folder cannot be made or written to.
        """
        folder = Path(folder).absolute()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for part in (_ADAPTERS, _REQUESTS):
                (folder / part).mkdir(exist_ok=True)
            sweep(folder / _ADAPTERS, ".new.")
        return cls(folder, StoreLimits() if limits is None else limits)

    def find(self, key: str) -> Path | None:
        """The folder that a request was answered with before, unless it is gone.

        Args:
            key: Hash of the request, 40 hex digits.

        Raises:
            ArtifactError: If the folder was changed since.
        """
        link = self._link(key)
        if not link.is_file():
            return None
        name = read_json(link).get("adapter")
        if not isinstance(name, str) or _HASH.fullmatch(name) is None:
            raise ArtifactError(f"{link} cannot be read", remedy="Delete it while no server runs.")
        folder = self.folder / _ADAPTERS / name
        if not folder.is_dir():
            return None
        self._verify(folder)
        return folder

    def check_room(self) -> None:
        """Raises StoreFullError if not even an empty adapter would fit."""
        self._check(self.usage(), 0)

    def usage(self) -> Usage:
        """Counts what is there."""
        count = size = 0
        for entry in os.scandir(self.folder / _ADAPTERS):
            if _HASH.fullmatch(entry.name):
                count += 1
                size += sum(file.stat(follow_symlinks=False).st_size for file in os.scandir(entry.path))
        return Usage(count, size)

    def add(self, key: str, write: Callable[[Path], object]) -> Path:
        """Writes an adapter into a folder of its own and remembers it as the answer to a request.

        Args:
            key: Hash of the request, 40 hex digits.
            write: Writes the adapter into the empty folder that it is given.

        Returns:
            The folder; the one that was there if it has the same content.

        Raises:
            StoreFullError: If it would exceed a limit; nothing is left of it then.
            StorageError: If the system fails, as on a full disk; nothing is left of it then.
        """
        link, adapters = self._link(key), self.folder / _ADAPTERS
        with writing(adapters):
            staging = Path(tempfile.mkdtemp(dir=adapters, prefix=".new.", suffix=".tmp"))
            try:
                write(staging)
                flush_folder(staging)
                name = content_hash(staging)
                size = sum(path.stat().st_size for path in staging.iterdir())
                with locked(self.folder / ".lock", _WAIT, "Does a server hang?"):
                    target = adapters / name
                    if target.is_dir():
                        self._verify(target)
                    else:
                        self._check(self.usage(), size)
                        staging.chmod(0o755)  # under a folder that only the owner enters
                        staging.rename(target)
                        flush_folder(adapters)
                        self._verified.add(name)
                    write_json(link, {"adapter": name})
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return target

    def _link(self, key: str) -> Path:
        if _HASH.fullmatch(key) is None:
            raise ArtifactError("a request's key cannot be used", got=repr(key)[:60], expected="40 hex digits")
        return self.folder / _REQUESTS / f"{key}.json"

    def _verify(self, folder: Path) -> None:
        """Compares a folder with its name, once per process."""
        if folder.name not in self._verified:
            if content_hash(folder) != folder.name:
                raise ArtifactError(f"{folder} was changed after it was written", remedy="Delete it while no server runs.")
            self._verified.add(folder.name)

    def _check(self, usage: Usage, more: int) -> None:
        remedy = "What was asked for before is still served. Raise max_adapters or max_bytes, or start with an empty folder."
        if usage.adapters >= self.limits.adapters:
            raise StoreFullError(
                "no more adapters fit", got=f"{usage.adapters} adapters", expected=f"fewer than {self.limits.adapters}", remedy=remedy
            )
        if usage.bytes + more > self.limits.bytes:
            raise StoreFullError(
                "no more adapters fit", got=f"{usage.bytes + more} bytes", expected=f"at most {self.limits.bytes}", remedy=remedy
            )
