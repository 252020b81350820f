"""Ten thousand spoiled adapters, banks, generators, suites, configs and states end in LoragError, in little memory."""

import os
import random
import re
import subprocess
import sys

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_targets import TARGETS, make_seeds

from .conftest import ROOT

pytestmark = pytest.mark.slow


def test_ten_thousand_cases_end_in_a_named_error():
    """Two processes with 512 MiB each beyond their start; no other exception, no value that is not a number, nothing endless."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzz", "--quiet", "--cases", "5000", "--memory", "512"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [*command, "--start", str(start)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for start in (0, 5000)
    ]
    for process in running:
        said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, said[-4000:]
        assert "5000 cases of seed 0: 0 escapes" in said
        accepted = sum(int(count) for count in re.findall(r"accepted +(\d+)", said))
        assert 500 < accepted < 4000, "the fuzzer spoils too little, or nothing but what any reader notices"
        for target in TARGETS:
            assert re.search(rf"^{target} +(?!accepted)\w", said, re.M) or target == "import", f"nothing of {target} was refused"


def test_the_fuzzer_notices_an_escape(monkeypatch):
    """A reader that fails with another exception, or forgets itself, is reported with its case's number."""

    def careless(folder, rng):
        raise KeyError("r")

    monkeypatch.setitem(fuzz.TARGETS, "adapter", fuzz.TARGETS["adapter"].__class__("adapter", 1.0, careless))
    report = fuzz.run(20)
    assert report.escapes and "KeyError" in report.escapes[0][2]


def test_a_case_can_be_run_again(tmp_path):
    """Seed and number decide all that is done to a folder."""
    (files, *_) = make_seeds(tmp_path)["bank"]
    spoiled = [fuzz.spoil(files, random.Random(f"0/{number}")) for number in range(50)]
    again = [fuzz.spoil(files, random.Random(f"0/{number}")) for number in range(50)]
    assert spoiled == again and len({str(files) for files, _ in spoiled}) > 40


def test_valid_folders_are_accepted(tmp_path):
    """What is spoiled was sound: every target reads its folders as they are."""
    seeds = make_seeds(tmp_path / "seeds")
    for name, target in TARGETS.items():
        for number, files in enumerate(seeds[target.kind]):
            if target.kind == "config" and b"experts:" in files["config.yaml"]:
                continue  # a bank's config, which is not a training run's
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            fuzz._write(folder, files, random.Random(1))
            target.read(folder, random.Random(0))
