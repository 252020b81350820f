"""Files: safe names and paths, atomic writes, manifests with checksums, limits read from headers before allocation.

Only safetensors and JSON are written here, and nothing else is read. A folder is complete when its manifest exists,
because the manifest is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.errors import ArtifactError, StorageError

if TYPE_CHECKING:
    pass

__all__ = [
    "check_manifest",
    "embedded",
    "read_json",
    "require_name",
    "resolve_inside",
    "safe_name",
    "sha256",
    "slug",
    "write_atomically",
    "write_json",
    "write_manifest",
]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MAX_JSON = 64 * 2**20


def require_name(name: str, what: str = "name") -> str:
    """Returns `name` if it can safely name a file, an expert or a task.

    Raises:
        ArtifactError: If it holds anything but lower-case letters, digits, `_` and `-`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArtifactError(
            f"{what} cannot be used",
            got=repr(name)[:80],
            expected="1 to 64 of a-z, 0-9, _ and -, the first a letter or digit",
            remedy="Rename it.",
        )
    return name


def slug(text: str) -> str:
    """Turns free text into a safe name: words, then eight digits of its hash, so that different texts differ."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'task'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def safe_name(text: str) -> str:
    """Returns `text` if it is a safe name already, else its slug."""
    return text if _NAME.fullmatch(text) else slug(text)


def resolve_inside(root: Path, relative: str) -> Path:
    """Returns `root / relative`, which must be a plain path below `root` that passes through no link.

    Raises:
        ArtifactError: If it is absolute, has a drive, a backslash or `..`, or if a link is on the way.
    """
    parts = relative.split("/")
    if not relative or "\\" in relative or ":" in relative or "\0" in relative or any(p in ("", ".", "..") for p in parts):
        raise ArtifactError(f"a path in {root} leaves its folder", got=repr(relative)[:80], expected="a plain relative path")
    path = root
    for part in parts:
        path = path / part
        try:
            linked = path.is_symlink()
        except OSError as error:  # a name longer than the file system takes
            raise ArtifactError(f"a path in {root} cannot be used", got=repr(relative)[:80]) from error
        if linked:
            raise ArtifactError("a link was found where a file belongs", got=path, remedy="Replace it by the file itself.")
    return path


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"writing {path} failed: {error.strerror or error}",
            remedy="Free space or choose another folder; what was written before is intact.",
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary sibling of `path`, flushes it to disk and renames it into place."""
    with _storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
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


def write_json(path: Path, value: object) -> None:
    """Writes JSON with sorted keys; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, lambda sibling: _write_text(sibling, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def parse_json(text: str | bytes, origin: object) -> Any:  # noqa: ANN401 - JSON is any value
    """Parses JSON strictly: no NaN, no infinity (nor a number too large for a float, such as 1e999), no key twice."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")  # json would also take UTF-16
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin} is not valid JSON", got=str(error)[:120]) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object strictly.

    Raises:
        ArtifactError: If the file is missing, too large, not UTF-8, not strict JSON or not an object.
    """
    if not path.is_file():
        raise ArtifactError("a file is missing", got=path)
    if path.stat().st_size > _MAX_JSON:
        raise ArtifactError(f"{path} is too large for a JSON file", got=f"{path.stat().st_size} bytes", expected=f"at most {_MAX_JSON}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text", got=str(error)[:120]) from error
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds no JSON object", got=type(value).__name__)
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, name: str, fields: Mapping[str, object], files: list[str]) -> None:
    """Writes `folder/name` last: the fields, and size and sha256 of each file. Its existence means complete."""
    listed = {file: {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)} for file in sorted(files)}
    write_json(folder / name, {**fields, "files": listed})


def check_manifest(folder: Path, name: str, kind: str, version: int) -> dict[str, Any]:
    """Reads a manifest and checks kind, format version, and every listed file's size and checksum.

    Raises:
        ArtifactError: If the folder is not a complete `kind` of a known version, or a file differs.
    """
    if not (folder / name).is_file():
        raise ArtifactError(f"{folder} is not a complete lorag {kind}", got=f"no {name}", remedy="Check the path, or build it again.")
    manifest = read_json(folder / name)
    if manifest.get("kind") != kind or manifest.get("format") != version:
        raise ArtifactError(
            f"{folder / name} cannot be read",
            got=f"kind {str(manifest.get('kind'))[:40]!r}, format {str(manifest.get('format'))[:20]}",
            expected=f"kind {kind!r}, format {version}",
            remedy="Update lorag, or rebuild the folder.",
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtifactError(f"{folder / name} lists no files")
    for file, entry in files.items():
        path = resolve_inside(folder, file)
        if (
            not isinstance(entry, dict)
            or not path.is_file()
            or path.stat().st_size != entry.get("bytes")
            or sha256(path) != entry.get("sha256")
        ):
            raise ArtifactError(f"{path} is missing or differs from its manifest", remedy="Copy or build the folder again.")
    return manifest


def embedded(name: str) -> Path:
    """Path of a folder that ships with lorag, such as `checkpoints/sandbox-lm` or `data/sandbox/bank`.

    In a wheel `checkpoints` and `data` lie inside the package, in a checkout beside it.
    """
    package = Path(__file__).resolve().parent
    tried = [package / name, package.parent / name]
    for path in tried:
        if path.exists():
            return path
    raise ArtifactError(
        f"the embedded {name} is missing",
        got=f"nothing at {' or '.join(map(str, tried))}",
        remedy="Install lorag again, or rebuild it: lorag sandbox build.",
    )
