"""Files that came from elsewhere: plain files only, no larger than expected, judged by their first bytes and not by their name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorag.errors import ArtifactError

__all__ = ["check_part", "decode_text", "is_foreign_link", "looks_like", "read_bounded", "require_plain"]

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
