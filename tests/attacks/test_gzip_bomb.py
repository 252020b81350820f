"""Examples that unfold: a gigabyte of blanks, of one line or of empty lines in a file of a megabyte is refused on the way."""

import gzip
import json
import time

import pytest

from lorag.errors import TaskError
from lorag.tasks.suite import TaskSuite, read_pairs

ROW = {"task": "a", "split": "train", "input": "x", "output": "y"}


@pytest.fixture
def suite(tmp_path):
    """A suite of one task, without examples."""
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"name": "a", "descriptions": ["d"]}) + "\n")
    return tmp_path


def _bomb(path, chunk, count):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(count):
            file.write(chunk)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "count"),
    [
        (b" " * 2**20, 300),
        (b'{"task": "a", "input": "' + b"x" * 2**20, 1),
        (b"\n" * 2**20, 30),
        (b" " * 900_000 + b"\n", 300),
        (b"\0" * 2**20, 100),
    ],
    ids=["one line of blanks", "one string", "empty lines", "lines of blanks", "zeros"],
)
def test_bombs_are_refused(suite, refused, chunk, count):
    """With never more than one line's limit held, and before much of it is unpacked."""
    _bomb(suite / "examples.jsonl.gz", chunk, count)
    before = time.process_time()
    refused(lambda: TaskSuite.from_folder(suite), TaskError, "examples.jsonl.gz")
    assert time.process_time() - before < 10


def test_rows_without_end_are_refused(suite, refused):
    """Each of them sound, and all of them the same: what unfolds a hundredfold is not text."""
    _bomb(suite / "examples.jsonl.gz", json.dumps({**ROW, "input": "x" * 100_000}).encode() + b"\n", 300)
    refused(lambda: TaskSuite.from_folder(suite), TaskError, "too large")


def test_cut_and_damaged_archives_are_refused(suite, refused):
    """Truncated, with a wrong checksum, with bytes flipped, not gzip at all, a folder."""
    path = suite / "examples.jsonl.gz"
    whole = gzip.compress(json.dumps(ROW).encode())
    for raw in (whole[:-4], whole[:12], whole[:-8] + b"\0" * 8, whole[:15] + b"\xff\xff" + whole[17:], b"text", b"", b"\x1f\x8b"):
        path.write_bytes(raw)
        if raw:
            refused(lambda: TaskSuite.from_folder(suite), TaskError, "examples.jsonl.gz")
    path.write_bytes(whole)
    assert len(TaskSuite.from_folder(suite)["a"].examples) == 1


def test_a_line_of_a_plain_file_is_bounded_too(suite, refused):
    """tasks.jsonl, and the few examples that a person passes."""
    (suite / "tasks.jsonl").write_text('{"name": "' + "x" * 2_000_000 + '"}')
    refused(lambda: TaskSuite.from_folder(suite), TaskError, "too long")
    refused(lambda: read_pairs(suite / "tasks.jsonl"), TaskError, "too long")
    refused(lambda: read_pairs(suite / "missing.jsonl"), TaskError, "missing.jsonl")


def test_splits_of_other_things_are_refused(suite, refused):
    """A split is a list of names."""
    for odd in ({}, "a", [["a"]], [None], 3, [{}]):
        (suite / "splits.json").write_text(json.dumps({"test": odd}))
        refused(lambda: TaskSuite.from_folder(suite, "test"), TaskError, "splits.json")
