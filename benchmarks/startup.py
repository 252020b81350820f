"""What a user waits for before anything is computed: `import lorag`, `lorag --help`, and the embedded generator's first adapter.

Each is the median over fresh processes with warm file caches, start of the interpreter included; `python -c pass` is that part.
Importing the package loads neither torch nor transformers, and the command line imports them inside commands alone: both are
bounded by the interpreter and by typer. The first adapter is bounded by importing torch and transformers and by
loading the text embedder; "the next adapter" is a later description in the same process. SmolLM2's adapters change 36 modules
(rank 5, .9 MB a folder); most of the time is the gate, which reads the description in other words too.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.machine import median_seconds
from lorag.generator.generate import default_generator, open_generator

__all__ = ["TITLE", "measure"]

TITLE = "Import and start-up"

_HELP = "import sys; sys.argv = ['lorag', '--help']; from lorag.cli.main import main; main()"
_FIRST = "from lorag import generate_lora; generate_lora('summarise legal text')"


def measure(quick: bool) -> list[dict[str, str | float]]:
    """Seconds for each, with the target where there is one; `quick` takes one process of each and no adapter."""
    repeats = 1 if quick else 9
    found = [
        _row("python -c pass", _process("pass", repeats), "", repeats),
        _row("import lorag", _process("import lorag", repeats), 0.3, repeats),
        _row("lorag --help", _process(_HELP, repeats), 0.5, repeats),
    ]
    if quick:
        return found
    found.append(_row("first adapter, a process of its own", _process(_FIRST, 3), "", 3))
    generator = default_generator()
    texts = iter(f"summarise legal text number {number}" for number in range(100))
    found.append(_row("the next adapter", median_seconds(lambda: generator.generate(next(texts)), 15), "", 15))
    condition, rng = generator.condition("summarise legal text"), torch.Generator().manual_seed(0)
    decoding = median_seconds(lambda: generator.space.decode(generator.method.generate(condition, rng), generator.rank), 15)
    found.append(_row("of it, network and decoding", decoding, "", 15))
    real = open_generator("smollm2")
    topics = iter(f"say yes if the customer asks about topic number {number}" for number in range(100))
    with tempfile.TemporaryDirectory() as folder:
        found.append(_row("SmolLM2: from text to an adapter", median_seconds(lambda: real.generate(next(topics)), 15), "", 15))
        whole = median_seconds(lambda: real.generate(next(topics)).save_pretrained(folder), 15)
    return [*found, _row("SmolLM2: from text to a PEFT folder", whole, 0.5, 15)]


def _row(what: str, seconds: float, target: float | str, repeats: int) -> dict[str, str | float]:
    return {"what": what, "seconds": round(seconds, 3), "target": target, "repeats": repeats}


def _process(code: str, repeats: int) -> float:
    """Median seconds of a fresh interpreter that runs this; one run before is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        command = [sys.executable, "-W", "ignore", "-c", code]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - our own lines
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
