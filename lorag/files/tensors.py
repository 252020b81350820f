"""Safetensors files: headers checked before anything is allocated, written atomically and reproducibly."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorag.errors import ArtifactError
from lorag.files.artifacts import looks_like, parse_json, require_plain
from lorag.files.atomic import write_bytes

__all__ = ["TensorSpec", "load_tensors", "read_header", "save_tensors", "tensor_bytes"]

_MAX_HEADER = 8 * 2**20
_MAX_TENSORS = 40_000
_MAX_AXES = 8
_MAX_ELEMENTS = 2**48  # also of tensors without elements, whose other axes may say anything
_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}

_MORE_DTYPES = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}  # that a base model may hold

# name -> (dtype as safetensors spells it, shape)
TensorSpec = dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: Path, most: int = _MAX_HEADER, *, every_type: bool = False) -> tuple[TensorSpec, dict[str, str]]:
    """Reads names, types and shapes of a safetensors file, and its metadata, without allocating a tensor.

    Args:
        path: The file.
        most: Largest header in bytes; Python's form of it takes some six times as much.
        every_type: Whether tensors may be of types that lorag does not compute with, such as 8-bit floats.

    Raises:
        ArtifactError: If the file is not a safetensors file, or its header lies about sizes or offsets.
    """
    size = require_plain(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= length <= size - 8 or start[8:9] != b"{":
                got = f"a header of {length} bytes, in {size}" if start[8:9] == b"{" else looks_like(start)
                raise ArtifactError(f"{path} is not a safetensors file", got=got, expected="the length of its header, and the header")
            if length > most:
                raise ArtifactError(f"{path} has too large a header", got=f"{length} bytes", expected=f"at most {most}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", got=error.strerror or error) from error
    header = parse_json(raw, f"the header of {path}", _MAX_TENSORS * 10)  # an entry has two lists of two and three fields
    metadata = header.pop("__metadata__", {})
    if len(header) > _MAX_TENSORS or not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path} has an unusable header", got=f"{len(header)} tensors", expected=f"at most {_MAX_TENSORS}")
    spec: TensorSpec = {}
    end = 0
    try:
        placed = sorted((*_place(name, entry, every_type), name) for name, entry in header.items())
        for start_, end_, name in placed:
            dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
            if start_ != end or end_ - start_ != tensor_bytes(dtype, shape):
                raise ValueError(f"offsets [{start_}, {end_}] of {name[:60]!r}, {dtype} {shape}")
            end = end_
            spec[name] = (dtype, shape)
    except ArtifactError:  # which is a ValueError, too
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} has an inconsistent safetensors header", got=str(error)[:160]) from error
    if end != size - 8 - length:
        raise ArtifactError(f"{path} is cut short or has a tail", got=f"{size} bytes", expected=f"{8 + length + end}")
    return spec, metadata


def _place(name: str, entry: dict[str, Any], every_type: bool) -> tuple[int, int]:
    """Start and end of a tensor in the data, once its type and shape are found to be possible."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in _MORE_DTYPES and not every_type:
        raise ArtifactError(
            f"a tensor has a type that lorag does not compute with: {name[:120]!r}",
            got=dtype,
            expected=", ".join(_DTYPE_BYTES),
            remedy="Convert it: load it, call .float(), and save it again.",
        )
    if not isinstance(dtype, str) or not (dtype in _DTYPE_BYTES or every_type and dtype in _MORE_DTYPES):
        raise ValueError(f"type {dtype!r:.40} of {name[:60]!r}, where lorag reads {', '.join(_DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(type(axis) is int and 0 <= axis <= _MAX_ELEMENTS for axis in shape):
        raise ValueError(f"shape {shape!r:.60} of {name[:60]!r}")
    if math.prod(max(1, axis) for axis in shape) > _MAX_ELEMENTS:
        raise ValueError(f"shape {shape!r:.60} of {name[:60]!r}")
    if type(start) is not int or type(end) is not int:
        raise ValueError(f"offsets {entry['data_offsets']!r:.60} of {name[:60]!r}")
    return start, end


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file."""
    return (_DTYPE_BYTES | _MORE_DTYPES)[dtype] * math.prod(shape)


def load_tensors(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Loads the tensors of a checked safetensors file whose names start with `prefix`, which is removed."""
    from safetensors import SafetensorError

    spec, _ = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name[len(prefix) :]: file.get_tensor(name) for name in spec if name.startswith(prefix)}
    except (SafetensorError, OSError, RuntimeError) as error:  # the library is stricter still, for instance about UTF-8
        raise ArtifactError(f"{path} is not a safetensors file", got=str(error)[:120]) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, tensors in sorted order so that equal contents give equal bytes."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    data = _sorted_header(save(ordered, dict(metadata or {})))
    write_bytes(path, data)


def _sorted_header(data: bytes) -> bytes:
    """Rewrites the header with sorted keys: the library orders the metadata by a hash that changes from run to run."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
