"""A file of a hundred thousand tiny tensors, or a header that unfolds to far more than its bytes: refused before it is parsed."""

import json
import struct

import pytest

from lorag.errors import ArtifactError
from lorag.files.tensors import read_header


def _write(path, header, data=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def _tiny(count):
    entries = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    return json.dumps(entries, separators=(",", ":")).encode(), b"\0" * count


@pytest.mark.slow
def test_a_hundred_thousand_tensors_are_refused(folder, refused):
    """By an adapter, which has two for each module, and by the reader of any file."""
    _write(folder.weights, *_tiny(100_000))
    refused(folder.read, ArtifactError)
    refused(lambda: read_header(folder.weights), ArtifactError, "values|tensors")


@pytest.mark.slow
def test_as_many_tensors_as_are_allowed_take_little(tmp_path, refused):
    """The limit itself keeps the promise: forty thousand tensors are read, and one byte too many refused, below 64 MiB."""
    header, data = _tiny(40_000)
    _write(tmp_path / "a.safetensors", header, data)
    assert len(read_header(tmp_path / "a.safetensors")[0]) == 40_000
    _write(tmp_path / "a.safetensors", header, data + b"\0")
    refused(lambda: read_header(tmp_path / "a.safetensors"), ArtifactError, "tail")


@pytest.mark.parametrize(
    "header",
    [b'{"a":[' + b"[]," * 2_500_000 + b"[]]}", b'{"a":' + b"[" * 4_000_000, b'{"a":"' + b"x" * 9_000_000 + b'"}', b" " * 8_000_000],
    ids=["empty lists", "open lists", "one string", "blanks"],
)
def test_headers_that_unfold_are_refused(tmp_path, refused, header):
    """Eight megabytes of empty lists would be two hundred as Python's objects."""
    _write(tmp_path / "a.safetensors", header)
    refused(lambda: read_header(tmp_path / "a.safetensors"), ArtifactError)


def test_an_endless_header_is_refused(tmp_path, refused):
    """A header of a gigabyte in a sparse file that has one."""
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30) + b"{")
        file.truncate(2**30 + 8)
    refused(lambda: read_header(path), ArtifactError, "too large a header")
