"""Sizes that would take the machine down if they were allocated: in the config, in a shape, in the number of axes."""

import pytest

from lorag.adapters.adapter import LoraAdapter
from lorag.errors import AdapterError, ArtifactError, LoragError
from lorag.files.tensors import load_tensors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [200_000, 2**31, 2**63, 10**30, -1, 0, 1.5, True, "8", None, [8]])
def test_impossible_ranks_are_refused_from_the_config(folder, refused, rank):
    """r = 200,000 is an error of its own, before the weights are looked at."""
    folder.weights.unlink()
    folder.configure(r=rank)
    refused(folder.read, AdapterError, " r ")


@pytest.mark.parametrize("pattern", [{"q_proj": 200_000}, {"q_proj": "8"}, {"q_proj": None}, [1], "q_proj"])
def test_impossible_ranks_of_single_modules_are_refused(folder, refused, pattern):
    """Patterns count too."""
    folder.configure(rank_pattern=pattern)
    refused(folder.read, LoragError, "rank_pattern")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [[2**40, 2**40], [2**62, 4], [0, 2**62], [0, 2**40, 2**40], [1] * 100_000, [2**60] * 100_000, [-2, -8], [16.0], [True, 16], "ab", 16],
    ids=lambda shape: str(shape)[:30],
)
def test_impossible_shapes_are_refused_from_the_header(folder, refused, shape):
    """Neither a product that overflows, nor a million axes, nor a shape without elements that says anything else."""

    def change(header):
        key = next(key for key in header if key != "__metadata__")
        header[key]["shape"] = shape
        return header

    folder.header(change)
    refused(folder.read, LoragError)
    refused(lambda: load_tensors(folder.weights), ArtifactError, "shape")


def test_a_sparse_file_of_gibibytes_is_refused_from_its_header(folder, refused):
    """Offsets that are right, in a file that takes no space: the shape does not fit the layout, and no value is read."""
    size = 2**34

    def change(header):
        key = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
        start = header[key]["data_offsets"][0]
        header[key] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, start + size]}
        change.end = start + size
        return header

    folder.header(change)
    with folder.weights.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        file.truncate(8 + length + change.end)
    refused(folder.read, AdapterError)
    refused(lambda: LoraAdapter.from_pretrained(folder.path), LoragError)
