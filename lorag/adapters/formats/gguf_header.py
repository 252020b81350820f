"""The header of a GGUF file, read within bounds before the library sees it, which takes a header at its word."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorag.errors import ArtifactError
from lorag.files.artifacts import looks_like, require_plain

__all__ = ["GgufHeader", "is_gguf", "read_gguf_header", "says_adapter"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# An adapter has no vocabulary: its header is small, and one that claims more is not read on.
_MOST_FIELDS, _MOST_ITEMS, _MOST_TENSORS = 2048, 65_536, 40_000
_LONGEST_KEY, _LONGEST_TEXT = 1024, 8 * 2**20
_MOST_AXES, _MOST_VALUES = 4, 2**40
_LARGEST_HEADER = 16 * 2**20  # bytes of all fields and names together


@dataclass(frozen=True)
class GgufHeader:
    """What a header states.

    Attributes:
        fields: Numbers and texts by key; lists are passed over.
        shapes: Shape of each tensor, outermost axis first, as torch has it.
    """

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def is_gguf(file: Path) -> bool:
    """Whether a file starts as GGUF does.

    Raises:
        ArtifactError: If it is not a plain file, or cannot be read.
    """
    require_plain(file)
    try:
        with file.open("rb") as opened:
            return opened.read(4) == _MAGIC
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read", got=error.strerror or error) from error


def says_adapter(start: bytes) -> bool:
    """Whether the first bytes of a GGUF file state `general.type` adapter."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    return start.startswith(_MAGIC) and text("general.type") + struct.pack("<I", _TEXT) + text("adapter") in start


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header of a GGUF file of an adapter's size.

    Raises:
        ArtifactError: If it is not a GGUF file, of an unknown version, cut short, or larger than an adapter's header is.
    """
    require_plain(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start != _MAGIC:
                raise ArtifactError(f"{path} is not a GGUF file", got=looks_like(start + file.read(60)), expected="GGUF")
            return _Reader(file, path).header()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", got=error.strerror or error) from error


class _Reader:
    """Reads numbers, texts and lists from a file, none larger than allowed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._bytes_left, self._items_left = _LARGEST_HEADER, _MOST_ITEMS

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version not in _VERSIONS:
            raise ArtifactError(f"GGUF file {self._path} cannot be read", got=f"version {version}", expected="2 or 3, little-endian")
        tensors, fields = self._count(_MOST_TENSORS, "tensors"), self._count(_MOST_FIELDS, "fields")
        values: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text(_LONGEST_KEY)
            value = self._value(self._number("I"), key)
            if key in values:
                raise self._damaged(f"{key[:60]!r} twice")
            values[key] = value
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(tensors):
            name = self._text(_LONGEST_KEY)
            axes = self._number("I")
            if axes > _MOST_AXES or name in shapes:
                raise self._damaged(f"{axes} axes of {name[:60]!r}" if axes > _MOST_AXES else f"{name[:60]!r} twice")
            shape = tuple(self._number("Q") for _ in range(axes))[::-1]  # GGUF counts from the innermost
            if math.prod(max(1, axis) for axis in shape) > _MOST_VALUES:
                raise self._damaged(f"shape {shape} of {name[:60]!r}")
            self._number("I"), self._number("Q")  # type and place, which the library checks against the file
            shapes[name] = shape
        return GgufHeader(values, shapes)

    def _damaged(self, got: object) -> ArtifactError:
        return ArtifactError(f"GGUF file {self._path} is cut short or damaged", got=got, remedy="Download it again.")

    def _bytes(self, count: int) -> bytes:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise self._too_large(f"a header above {_LARGEST_HEADER} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise self._damaged(f"an end after {len(data)} of {count} bytes")
        return data

    def _number(self, kind: str) -> Any:  # noqa: ANN401 - a number or a truth value
        return struct.unpack(f"<{kind}", self._bytes(struct.calcsize(f"<{kind}")))[0]

    def _count(self, most: int, what: str) -> int:
        count = int(self._number("Q"))
        if count > most:
            raise self._too_large(f"{count} {what}", f"at most {most}")
        return count

    def _too_large(self, got: str, expected: str | None = None) -> ArtifactError:
        return ArtifactError(f"GGUF file {self._path} is larger than an adapter is", got=got, expected=expected)

    def _text(self, longest: int) -> str:
        data = self._bytes(self._count(longest, "bytes of a text"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text that is not UTF-8") from error

    def _value(self, kind: int, key: str) -> Any:  # noqa: ANN401
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text(_LONGEST_TEXT)
        if kind != _LIST:
            raise self._damaged(f"type {kind} of {key[:60]!r}")
        inner, count = self._number("I"), self._count(self._items_left, f"values of {key[:60]!r}")
        self._items_left -= count
        if inner in _SCALARS:
            self._bytes(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _TEXT:
            for _ in range(count):
                self._text(_LONGEST_TEXT)
        else:
            raise self._damaged(f"a list of type {inner} in {key[:60]!r}")
        return None
