"""Files: safe names and paths, strict JSON within limits, manifests with checksums.

Only safetensors and JSON are written here, and nothing else is read. A folder is complete when its manifest exists,
because the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorag.errors import ArtifactError, FormatVersionError, NonFiniteError
from lorag.files.atomic import finish_replacing, replace_together, write_atomically, write_bytes, writing
from lorag.files.plain import check_part, is_foreign_link, looks_like, read_bounded

__all__ = [
    "GENERATOR_FORMAT",
    "check_manifest",
    "embedded",
    "finish_replacing",
    "read_json",
    "replace_together",
    "require_name",
    "resolve_inside",
    "safe_name",
    "sha256",
    "slug",
    "write_atomically",
    "write_json",
    "write_manifest",
    "writing",
]

GENERATOR_FORMAT = 3  # of generators; in 2, sizes of networks were tensors; in 1, tokens' vectors came from the embedder's last layer
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MAX_JSON = 64 * 2**20
_MAX_VALUES = 4_000_000  # of one file; each takes up to 64 bytes, however short its text
_MAX_DEPTH = 64
_LONGEST_PATH = 1024


def require_name(name: str, what: str = "name") -> str:
    """Returns `name` if it can safely name a file, an expert or a task.

    Raises:
        ArtifactError: If it holds anything but lower-case letters, digits, `_` and `-`, or names a device under Windows.
    """
    if not isinstance(name, str) or not _is_safe(name):
        raise ArtifactError(
            f"{what} cannot be used",
            got=repr(name)[:80],
            expected="1 to 64 of a-z, 0-9, _ and -, the first a letter or digit, and no device of Windows such as con or nul",
            remedy="Rename it.",
        )
    return name


def _is_safe(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and check_part(name) is None


def slug(text: str) -> str:
    """Turns free text into a safe name: words, then eight digits of its hash, so that different texts differ."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'task'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def safe_name(text: str) -> str:
    """Returns `text` if it is a safe name already, else its slug."""
    return text if _is_safe(text) else slug(text)


def resolve_inside(root: Path, relative: str) -> Path:
    """Returns `root / relative`, which must be a plain path below `root` that passes through no link.

    The rules of POSIX and of Windows hold on every system, so that a folder means the same everywhere.

    Raises:
        ArtifactError: If it is absolute, has a drive, a backslash, `..` or a part that is not a plain name everywhere, or if a
            link is on the way.
    """
    if not isinstance(relative, str) or len(relative) > _LONGEST_PATH:
        raise ArtifactError(f"a path in {root} cannot be used", got=repr(relative)[:80], expected="a plain relative path")
    path = root
    for part in relative.split("/"):
        wrong = check_part(part)
        if wrong is not None:
            raise ArtifactError(
                f"a path in {root} leaves its folder or names no plain file",
                got=f"{relative!r:.80} with {wrong}",
                expected="a plain relative path",
            )
        path = path / part
        if is_foreign_link(path):
            raise ArtifactError("a link was found where a file belongs", got=path, remedy="Replace it by the file itself.")
    return path


def write_json(path: Path, value: object) -> None:
    """Writes JSON with sorted keys; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


class _NotFiniteError(ValueError):
    """A number that no setting may be."""


def _no_constant(name: str) -> None:
    raise _NotFiniteError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NotFiniteError(f"{text[:20]} is not a finite number")
    return number


def parse_json(text: str | bytes, origin: object, most: int = _MAX_VALUES) -> Any:  # noqa: ANN401 - JSON is any value
    """Parses JSON strictly: no NaN, no infinity (nor a number too large for a float, such as 1e999), no key twice."""
    try:
        text = (text if isinstance(text, str) else text.decode("utf-8")).removeprefix("\ufeff")  # json would also take UTF-16
        if text.count(",") + text.count("[") + text.count("{") > most:
            raise ValueError(f"more than {most} values")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except _NotFiniteError as error:
        raise NonFiniteError(f"{origin} is not valid JSON", got=str(error)[:120], remedy="Replace it by a number.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin} is not valid JSON", got=str(error)[:120]) from error


def read_json(path: Path, most: int = _MAX_JSON) -> dict[str, Any]:
    """Reads a JSON object of at most `most` bytes strictly.

    Raises:
        ArtifactError: If the file is missing, no plain file, too large, not UTF-8, not strict JSON, nested too deeply or not
            an object.
    """
    raw = read_bounded(path, most)
    if not re.match(rb"(\xef\xbb\xbf)?\s*[{\[]", raw):
        raise ArtifactError(f"{path} is not valid JSON", got=looks_like(raw[:64]), expected="a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text", got=str(error)[:120]) from error
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds no JSON object", got=type(value).__name__)
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        inner = (child.values() if isinstance(child, dict) else child for child in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return value
    raise ArtifactError(f"{path} is nested too deeply", expected=f"at most {_MAX_DEPTH} levels")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", got=error.strerror or error) from error


def write_manifest(
    folder: Path, name: str, fields: Mapping[str, object], files: list[str], known: Mapping[str, Mapping[str, object]] | None = None
) -> None:
    """Writes `folder/name` last: the fields, and size and sha256 of each file. Its existence means complete.

    Files whose size and sha256 are `known` from the manifest before are not read again: what was damaged since stays noticed.
    """
    listed = {
        file: (known or {}).get(file) or {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
        for file in sorted(files)
    }
    write_json(folder / name, {**fields, "files": listed})


def check_manifest(folder: Path, name: str, kind: str, version: int, *, contents: bool = True, older: str = "") -> dict[str, Any]:
    """Reads a manifest and checks kind, format version, and every listed file's size and, with `contents`, checksum.

    Args:
        folder: The folder.
        name: Of the manifest.
        kind: What it must be.
        version: In which format.
        contents: Whether checksums are checked too.
        older: What to do with the format before that.

    Raises:
        ArtifactError: If the folder is not a complete `kind` of a known version, or a file differs.
    """
    if not (folder / name).is_file():
        raise ArtifactError(f"{folder} is not a complete lorag {kind}", got=f"no {name}", remedy="Check the path, or build it again.")
    manifest = read_json(folder / name)
    if manifest.get("kind") != kind or manifest.get("format") != version:
        raise (FormatVersionError if manifest.get("kind") == kind else ArtifactError)(
            f"{folder / name} cannot be read",
            got=f"kind {str(manifest.get('kind'))[:40]!r}, format {str(manifest.get('format'))[:20]}",
            expected=f"kind {kind!r}, format {version}",
            remedy=older if older and manifest.get("format") == version - 1 else "Update lorag, or rebuild the folder.",
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
            or (contents and sha256(path) != entry.get("sha256"))
        ):
            raise ArtifactError(f"{path} is missing or differs from its manifest", remedy="Copy or build the folder again.")
    return manifest


def embedded(name: str) -> Path:
    """Path of a folder that ships with lorag, such as `checkpoints/sandbox-lm` or `data/sandbox/bank`.

    In a wheel `checkpoints` and `data` lie inside the package, in a checkout beside it.
    """
    package = Path(__file__).resolve().parents[1]
    tried = [package / name, package.parent / name]
    for path in tried:
        if path.exists():
            return path
    raise ArtifactError(
        f"the embedded {name} is missing",
        got=f"nothing at {' or '.join(map(str, tried))}",
        remedy="Install lorag again, or rebuild it: lorag sandbox build.",
    )
