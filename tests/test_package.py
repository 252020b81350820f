"""The package: a wheel of the tree holds everything that the first command needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import sys
from pathlib import Path
import lorag
from lorag.files.artifacts import GENERATOR_FORMAT, check_manifest, embedded
from lorag.config import preset_names
from lorag.worlds.sandbox.world import DOMAINS, domain
from lorag.worlds.sandbox.wordings import read
home = Path(sys.argv[1]).resolve()
assert Path(lorag.__file__).resolve().is_relative_to(home), lorag.__file__
for folder, names in (("checkpoints", ("sandbox-lm", "house", "multitask")), ("data/sandbox", ("tasks", "bank", "oracles"))):
    for name in names:
        assert embedded(f"{folder}/{name}").resolve().is_relative_to(home), name
check_manifest(embedded("data/sandbox/bank"), "bank.json", "bank", 1)
check_manifest(embedded("checkpoints/house"), "generator.json", "generator", GENERATOR_FORMAT)
assert preset_names() and all(domain(name) for name in DOMAINS) and read("skills")
assert (Path(lorag.__file__).parent / "py.typed").exists()
adapter = lorag.generate_lora("summarise legal text")
print("sound", adapter.rank)
"""


def _run(*command, **more):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_an_installed_wheel_works_away_from_the_checkout(tmp_path):
    """Built from tracked files alone, installed elsewhere and used from another folder: code, grammars and artifacts are inside."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ".", cwd=tree)
    (wheel,) = tmp_path.glob("lorag-*.whl")
    assert wheel.stat().st_size < 90e6
    _run(*pip, "install", "-q", "--no-deps", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    assert "sound" in _run(sys.executable, "-W", "ignore", "-c", CHECK, site, cwd=tmp_path, env=environment)
    assert "generate" in _run(sys.executable, "-m", "lorag.cli", "--help", cwd=tmp_path, env=environment)
    assert not list(site.glob("tests")) and not list(site.glob("benchmarks"))
