"""Lorag's own cache: what is made once from something else and can be made again, such as converted base models."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorag.errors import StorageError
from lorag.files.atomic import locked, write_folder

__all__ = ["cache_folder", "cached_folder"]

logger = logging.getLogger(__name__)

_PATIENCE = 900.0  # seconds that another process may take to make the same folder
_warned: set[Path] = set()


def cache_folder() -> Path:
    """The folder of the cache: LORAG_CACHE, or the place that the system has for caches.

    Where that place cannot be written to, as under a read-only home, it is a folder of the user's own among the temporary
    files, with a warning.

    Raises:
        StorageError: If LORAG_CACHE cannot be written to.
    """
    chosen = os.environ.get("LORAG_CACHE")
    if chosen:
        folder = Path(chosen).expanduser()
        if not _is_writable(folder):
            raise StorageError(f"the cache {folder} cannot be written to", remedy="Set LORAG_CACHE to a folder that can.")
        return folder
    folder = _usual_place()
    if _is_writable(folder):
        return folder
    substitute = _temporary_place()
    if folder not in _warned:
        _warned.add(folder)
        logger.warning("%s cannot be written to; using %s. Set LORAG_CACHE to a lasting folder.", folder, substitute)
    return substitute


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made once: by one process while others wait, complete or absent.

    Args:
        name: What it is called, with whatever tells its contents from others, such as a digest.
        make: Fills the empty folder that it is given.

    Raises:
        StorageError: If it cannot be written.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f".{folder.name}.lock"), _PATIENCE, "End it, or remove that file."):
        if not folder.is_dir():
            write_folder(folder, make)
    return folder


def _usual_place() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lorag" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorag"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorag"


def _temporary_place() -> Path:
    """A folder that belongs to this user alone, so that nobody else can put weights there.

    Raises:
        StorageError: If it belongs to somebody else, or cannot be made.
    """
    owner = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"lorag-{owner}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror or error}", remedy="Set LORAG_CACHE to a folder.") from error
    foreign = hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022)
    if folder.is_symlink() or foreign:
        raise StorageError(f"{folder} belongs to somebody else", remedy="Set LORAG_CACHE to a folder of your own.")
    return folder


def _is_writable(folder: Path) -> bool:
    """Whether a folder, or the nearest one above it that exists, can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
