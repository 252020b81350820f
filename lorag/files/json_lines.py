"""Files of one JSON object per line, packed or not, read with limits: never more than one line's is held."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorag.errors import ArtifactError
from lorag.files.artifacts import parse_json, require_plain

__all__ = ["read_json_lines"]

_MAX_LINE = 1_000_000
_MAX_BLANK = 100_000
_MAX_RATIO, _RATIO_FREE = 100, 10_000_000  # text shrinks to a fifth or a twentieth; gzip of nothing but blanks to a thousandth


def read_json_lines(path: Path, most: int, *, named: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the objects of a file one by one, each with where it stands: file and line. Empty lines are passed over.

    Args:
        path: The file; one that ends in `.gz` is unpacked on the way.
        most: Characters that it may have, unpacked.
        named: Whether a person named the very file, and may mean a link.

    Raises:
        ArtifactError: If the file cannot be read, a line is too long or is not a JSON object, or there is more than it may hold.
    """
    size = require_plain(path, named=named)
    packed = path.suffix == ".gz"
    most = min(most, _RATIO_FREE + _MAX_RATIO * size) if packed else most
    total = blank = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), ""), start=1):
                where = f"{path}, line {number}"
                total += len(line)
                if len(line) > _MAX_LINE:
                    raise ArtifactError(f"{where} is too long", expected=f"at most {_MAX_LINE} characters")
                blank += not line.strip()
                if total > most or blank > _MAX_BLANK:
                    raise ArtifactError(
                        f"{path} is too large for what it holds", expected=f"at most {most} characters, {_MAX_BLANK} empty lines"
                    )
                if line.strip():
                    value = parse_json(line, where)
                    if not isinstance(value, dict):
                        raise ArtifactError(f"{where} holds no JSON object")
                    yield where, value
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read", got=str(error)[:120]) from error
