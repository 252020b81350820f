"""Safetensors files: headers checked before anything is allocated, written atomically and reproducibly."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorag.artifacts import parse_json, write_atomically
from lorag.errors import ArtifactError

__all__ = ["TensorSpec", "load_tensors", "read_header", "save_tensors"]

_MAX_HEADER = 32 * 2**20
_MAX_TENSORS = 200_000
_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}

# name -> (dtype as safetensors spells it, shape)
TensorSpec = dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: Path) -> tuple[TensorSpec, dict[str, str]]:
    """Reads names, types and shapes of a safetensors file, and its metadata, without allocating a tensor.

    Raises:
        ArtifactError: If the file is no safetensors file, or its header lies about sizes or offsets.
    """
    if not path.is_file():
        raise ArtifactError("a file is missing", got=path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ArtifactError(f"{path} is not a safetensors file", got=f"a first word of {start!r}", expected="the length of its header")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ArtifactError(f"{path} is not a safetensors file", got=f"a header starting {raw[:8]!r}")
    header = parse_json(raw, f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if len(header) > _MAX_TENSORS or not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path} has an unusable header", got=f"{len(header)} tensors", expected=f"at most {_MAX_TENSORS}")
    spec: TensorSpec = {}
    end = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape = tuple(entry["shape"])
            bytes_ = _DTYPE_BYTES[entry["dtype"]]
            for axis in shape:
                if type(axis) is not int or axis < 0:
                    raise ValueError(f"shape {shape}")
                bytes_ *= axis
            if list(entry["data_offsets"]) != [end, end + bytes_] or any(type(offset) is not int for offset in entry["data_offsets"]):
                raise ValueError(f"offsets {entry['data_offsets']} of {name[:60]!r}")
            end += bytes_
            spec[name] = (entry["dtype"], shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} has an inconsistent safetensors header", got=str(error)[:120]) from error
    if end != size - 8 - length:
        raise ArtifactError(f"{path} is cut short or has a tail", got=f"{size} bytes", expected=f"{8 + length + end}")
    return spec, metadata


def load_tensors(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Loads the tensors of a checked safetensors file whose names start with `prefix`, which is removed."""
    from safetensors import SafetensorError

    spec, _ = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name[len(prefix) :]: file.get_tensor(name) for name in spec if name.startswith(prefix)}
    except SafetensorError as error:  # the library is stricter still, for instance about UTF-8
        raise ArtifactError(f"{path} is not a safetensors file", got=str(error)[:120]) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, tensors in sorted order so that equal contents give equal bytes."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    data = _sorted_header(save(ordered, dict(metadata or {})))
    write_atomically(path, lambda sibling: _write_bytes(sibling, data))


def _sorted_header(data: bytes) -> bytes:
    """Rewrites the header with sorted keys: the library orders the metadata by a hash that changes from run to run."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
