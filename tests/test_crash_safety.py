"""Crash safety: real processes on the toy world, killed, crowded and starved of disk; what was finished stays finished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("build", "add", "train", "generate")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One run of the killing bench: eight random kills, one kill at every single call, three writers at once, a full disk."""
    path = tmp_path_factory.mktemp("kills") / "found.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kills", "--kills", "8", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_loses_nothing_that_was_finished(found, command):
    """kill -9 at random times and calls: each expert, state and adapter that was reported is there, and the end is the same bytes."""
    assert found[command]["wrong"] == []
    assert found[command]["kills"] == 2


def test_a_kill_at_any_call_leaves_old_or_new(found):
    """An adapter that is overwritten, and a bank that is added to, at every call that changes the file system, before and after it."""
    assert found["every call"]["wrong"] == []
    assert found["every call"]["kills"] > 60


def test_processes_that_add_to_one_bank_lose_nothing(found):
    """Three at once; all sixteen experts are there."""
    assert found["together"] == {"processes": 3, "experts": 16, "wrong": []}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_in_a_clear_error(found, command):
    """StorageError naming file, cause and remedy; what was there before is there still."""
    assert [line for line in found["full disk"]["wrong"] if line.startswith(command)] == []
    said = found["full disk"]["said"][command]
    assert "StorageError" in said and "File too large" in said and "Free space" in said
