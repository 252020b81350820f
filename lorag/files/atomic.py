"""Atomic writes: a kill at any moment, a full disk or another process leaves what was there before. Files are written aside and renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lorag.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "finish_replacing",
    "flush_folder",
    "locked",
    "replace_together",
    "require_empty",
    "sweep",
    "write_atomically",
    "write_bytes",
    "write_folder",
    "writing",
]

_JOURNAL = ".replacing"  # files of a folder that are complete and only wait to be moved into place
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a full disk, a quota, too large a file, a disk that is only read
_ABANDONED = 3600.0  # seconds after which an unfinished sibling is taken for the debris of a killed process


def _system_failure(error: BaseException) -> OSError | None:
    """What the system says where room was wanting, whatever was made of it since: an error of another kind, or a text alone."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause
        number = re.search(r"\(os error (\d+)\)", str(cause))  # of libraries written in Rust
        if number is not None and int(number[1]) in _FULL:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns failures of the system while `path` is written into StorageError."""
    try:
        yield
    except Exception as failure:
        error = failure if isinstance(failure, OSError) else _system_failure(failure)
        if error is None:
            raise
        cause = error.__cause__ if isinstance(error, StorageError) and isinstance(error.__cause__, OSError) else error
        raise StorageError(
            f"writing {path} failed: {cause.strerror or cause}",
            remedy="Free space or choose another folder; what was written before is intact.",
        ) from cause


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary sibling of `path`, flushes it to disk and renames it into place.

    Raises:
        StorageError: If the system fails; the file that was there before is intact then.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:40]}."
        sweep(path.parent, prefix)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
        os.close(handle)
        sibling = Path(name)
        try:
            write(sibling)
            with sibling.open("rb+") as file:
                os.fsync(file.fileno())
            sibling.chmod(0o644)
            sibling.replace(path)
        finally:
            sibling.unlink(missing_ok=True)
        flush_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """`write_atomically` of bytes that are at hand."""

    def write(sibling: Path) -> None:
        sibling.write_bytes(data)

    write_atomically(path, write)


def require_empty(path: Path) -> None:
    """Raises StorageError if there is something at `path` already that is not an empty folder."""
    with writing(path):
        usable = not path.exists() or path.is_dir() and not any(path.iterdir())
    if not usable:
        raise StorageError(f"{path} is not an empty folder", remedy="Choose a new one.")


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on an empty temporary sibling of the folder `path`, which must be new or empty, and renames it into place.

    Raises:
        StorageError: If there is something at `path`, or the system fails; there is no folder then.
    """
    require_empty(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:40]}."
        sweep(path.parent, prefix)
        sibling = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".tmp"))
        try:
            write(sibling)
            for entry in (*sibling.rglob("*"), sibling):
                entry.chmod(0o755 if entry.is_dir() else 0o644)
                if entry.is_dir():
                    flush_folder(entry)
                    continue
                with entry.open("rb+") as opened:
                    os.fsync(opened.fileno())
            if path.is_dir():
                path.rmdir()
            sibling.rename(path)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)
        flush_folder(path.parent)


def replace_together(folder: Path, write: Callable[[Path], None], last: str) -> None:
    """Replaces files of a folder that belong together: after a kill at any moment all of them are the old or the new ones.

    New files are written elsewhere first. One rename decides; what is left to do then, `finish_replacing` does again after
    a kill. While they are moved into place the file `last` is absent, so that no reader takes old and new for one.

    Args:
        folder: The folder; its other files are left alone.
        write: Writes the new files into the empty folder that it is given.
        last: The file without which nobody reads the folder.

    Raises:
        StorageError: If the system fails; the files that were there before are intact then.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder, ".new.")
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".new.", suffix=".tmp"))
        try:
            write(staging)
            flush_folder(staging)
            with _alone(folder):
                _move_into_place(folder, last)
                staging.rename(folder / _JOURNAL)
                flush_folder(folder)
                _move_into_place(folder, last)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def finish_replacing(folder: Path, last: str) -> None:
    """Does what a killed `replace_together` left undone; a folder without such a rest is not touched."""
    if (folder / _JOURNAL).is_dir():
        with writing(folder), _alone(folder):
            _move_into_place(folder, last)


def _move_into_place(folder: Path, last: str) -> None:
    journal = folder / _JOURNAL
    if journal.is_symlink() or not journal.is_dir():
        return
    names = sorted(path.name for path in journal.iterdir())
    if last in names:
        (folder / last).unlink(missing_ok=True)
        names = [name for name in names if name != last] + [last]
    for name in names:
        (journal / name).replace(folder / name)
    journal.rmdir()
    flush_folder(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder itself locked, which leaves no file behind; where folders cannot be locked, nothing is held."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(file: Path, seconds: float, remedy: str) -> Iterator[None]:
    """Holds a file locked, for which other processes wait up to so many seconds; it is left behind.

    Raises:
        StorageError: If another process holds it longer, for which the remedy is meant, or if it cannot be locked.
    """
    lock = FileLock(file, timeout=seconds)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StorageError(f"another process holds {file} for too long", remedy=remedy) from error
    except OSError as error:
        raise StorageError(f"{file} cannot be locked: {error.strerror or error}", remedy="Is its folder writable?") from error
    try:
        yield
    finally:
        lock.release()


def flush_folder(folder: Path) -> None:
    """Writes the names of a folder to disk, so that renames survive a power cut in their order; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path, prefix: str) -> None:
    """Removes what processes that were killed an hour ago or more left unfinished."""
    for entry in [entry for entry in os.scandir(folder) if entry.name.startswith(prefix) and entry.name.endswith(".tmp")]:
        with contextlib.suppress(OSError):  # another process may sweep too
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
