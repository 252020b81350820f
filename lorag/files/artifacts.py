"""Files: plain ones from elsewhere, safe names and paths, strict JSON within limits, manifests with checksums.

What comes from elsewhere is a file and not a link, bounded, and judged by its first bytes. Only safetensors and JSON are
written here. A folder is complete when its manifest exists, because the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorag.errors import ArtifactError, FormatVersionError, NonFiniteError
from lorag.files.atomic import finish_replacing, replace_together, write_atomically, write_bytes, writing

__all__ = [
    "GENERATOR_FORMAT",
    "check_manifest",
    "check_part",
    "decode_text",
    "embedded",
    "finish_replacing",
    "is_foreign_link",
    "looks_like",
    "read_bounded",
    "read_json",
    "replace_together",
    "require_name",
    "require_plain",
    "resolve_inside",
    "safe_name",
    "sha256",
    "slug",
    "write_atomically",
    "write_json",
    "write_manifest",
    "writing",
]

# First bytes of what is met under a wrong name. A pickle is named first of all: opening one runs what it says.
_KINDS = (
    (re.compile(rb"\x80[\x02-\x05]"), "a pickle, which can run any code when it is opened"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a zip archive, such as torch.save writes around a pickle"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer in place of the file: fetch it with `git lfs pull`"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page, such as a download that failed leaves"),
    (re.compile(rb"\x1f\x8b"), "gzip data"),
    (re.compile(rb"BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!"), "a compressed archive"),
    (re.compile(rb"\x89HDF"), "an HDF5 file"),
    (re.compile(rb"\x93NUMPY"), "a NumPy file"),
    (re.compile(rb"GGUF|ggjt"), "a GGUF model"),
    (re.compile(rb"\x7fELF|MZ|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|#!"), "a program"),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|%PDF"), "a picture or document"),
    (re.compile(rb"[\s\S]{8}\{\s*\""), "a safetensors file"),
)
# Names that Windows keeps for devices, with any ending, and characters that it takes for something else: `a:b` is a
# second stream of the file `a`, and `a.` and `a ` are the file `a`.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\\/\x00-\x1f\x7f\ud800-\udfff]')
_LONGEST = 255


def looks_like(start: bytes) -> str:
    """Says what a file is by its first bytes, for a message to a person."""
    for pattern, name in _KINDS:
        if pattern.match(start):
            return name
    return f"a start of {start[:8]!r}" if start else "an empty file"


def check_part(part: str) -> str | None:
    """What keeps one part of a path from naming the same plain file on every system, or None."""
    if part in ("", ".", ".."):
        return "an empty part, `.` or `..`"
    if _FORBIDDEN.search(part):
        return "a character that is not part of a file's name on every system"
    if part[-1] in ". ":
        return "a dot or space at an end, which Windows drops"
    if _DEVICE.fullmatch(part.split(".")[0].rstrip(" ")):
        return "the name of a device under Windows"
    if len(part.encode()) > _LONGEST:
        return f"a part of more than {_LONGEST} bytes"
    return None


def is_foreign_link(path: Path) -> bool:
    """Whether a path is a link, other than those that make up the hub client's cache.

    That cache keeps a repository's files as links from `snapshots/<revision>/` to files of `blobs/` beside it: such a link
    leads nowhere but into its own repository.
    """
    if not path.is_symlink():
        return False
    for parent in path.parents:
        if parent.name == "snapshots":
            repository = Path(os.path.realpath(parent.parent))
            target = Path(os.path.realpath(path))
            return target.parent != repository / "blobs" or not target.is_file()
    return True


def require_plain(path: Path, most: int | None = None, *, named: bool = False) -> int:
    """Returns the size in bytes of a plain file.

    Args:
        path: The file.
        most: Bytes that it may have.
        named: Whether a person named the very file, and may mean a link; otherwise it was found in a folder from elsewhere.

    Raises:
        ArtifactError: If it is missing, a link, a folder, a device or a pipe, or too large.
    """
    try:
        if not named and is_foreign_link(path):
            raise ArtifactError("a link was found where a file belongs", got=path, remedy="Replace it by the file itself.")
        if not path.is_file():  # a pipe would block its reader for ever
            raise ArtifactError("a file is missing", got=path)
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a name that the system does not take; ArtifactError is a ValueError
        raise error if isinstance(error, ArtifactError) else ArtifactError("a file cannot be read", got=path) from error
    if most is not None and size > most:
        raise ArtifactError(f"{path} is too large for what it is", got=f"{size} bytes", expected=f"at most {most}")
    return size


def read_bounded(path: Path, most: int, *, named: bool = False) -> bytes:
    """Reads a plain file of at most `most` bytes, even if it grows meanwhile; the arguments are `require_plain`'s.

    Raises:
        ArtifactError: If it cannot be read, or is not plain or too large.
    """
    require_plain(path, most, named=named)
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", got=error.strerror or error) from error


def decode_text(raw: bytes, where: object) -> str:
    """Text of a file that a person or another tool wrote: without the byte order mark that editors put first, lines ended alike.

    UTF-8 is read with the mark and without, UTF-16 with it.

    Raises:
        ArtifactError: If it is neither.
    """
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        remedy = "Save it as UTF-8." if encoding == "utf-8-sig" else "It starts as UTF-16 does; save it as UTF-8."
        raise ArtifactError(f"{where} is not UTF-8 text", got=str(error)[:120], remedy=remedy) from error
    start = text[:4096]
    if start and start.count("\0") * 4 >= len(start) and encoding == "utf-8-sig":
        raise ArtifactError(f"{where} is not UTF-8 text", got="zero bytes, as UTF-16 without a mark has", remedy="Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- names, JSON, manifests --------------------------------------------------------------------------------------------


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
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


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
    folder: Path, name: str, fields: Mapping[str, object], files: list[str], unchanged: Mapping[str, Mapping[str, object]] | None = None
) -> None:
    """Writes `folder/name` last: the fields, and size and sha256 of each file. Its existence means complete.

    Files whose size and sha256 are `known` from the manifest before are not read again: what was damaged since stays noticed.
    """
    listed = {
        file: (unchanged or {}).get(file) or {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
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
