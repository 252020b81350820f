"""A header that lies about its own length or about where tensors lie: refused from the first bytes, at no cost."""

import struct

import pytest

from lorag.errors import ArtifactError


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_is_not_believed(folder, refused, length):
    """Nothing is allocated for a header of exbibytes."""
    raw = folder.weights.read_bytes()
    folder.weights.write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(folder.read, ArtifactError, "adapter_model.safetensors")


def _moved(name, offsets):
    def change(header):
        keys = [key for key in header if key != "__metadata__"]
        header[keys[name]]["data_offsets"] = offsets(header, keys)
        return header

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    "offsets",
    [
        lambda header, keys: header[keys[0]]["data_offsets"],  # two tensors share their bytes
        lambda header, keys: [0, 8],
        lambda header, keys: [2**62, 2**62 + 64],
        lambda header, keys: [-64, 0],
        lambda header, keys: [64, 0],
        lambda header, keys: ["0", "64"],
        lambda header, keys: [0.0, 64.0],
        lambda header, keys: [[[[0]]], [[[64]]]],
        lambda header, keys: None,
        lambda header, keys: {"start": 0},
    ],
)
def test_overlaps_gaps_and_offsets_outside_are_refused(folder, refused, offsets):
    """Tensors follow each other without gap or overlap, and fill the file."""
    folder.header(_moved(3, offsets))
    refused(folder.read, ArtifactError, "inconsistent|cut short")


def test_bytes_that_no_tensor_claims_are_refused(folder, refused):
    """A tail could hide anything."""
    folder.weights.write_bytes(folder.weights.read_bytes() + b"\x80\x04.")
    refused(folder.read, ArtifactError, "tail")


def test_a_tensor_named_twice_is_refused(folder, refused):
    """Readers differ in which of the two they take."""

    def twice(header):
        import json

        text = json.dumps(header)
        return (text[:-1] + ", " + text[1:]).encode()

    folder.header(twice)
    refused(folder.read, ArtifactError, "twice")
