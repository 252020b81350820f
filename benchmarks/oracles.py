"""Scores of adapters trained on held-out tasks of SmolLM2's suite, the upper end of its ladder: `python -m benchmarks.oracles [FILE]`.

Every third task of `unseen_label` and `unseen_task` and every fourth of `unseen_format`; 64 training examples at most, 60 steps, one seed,
16 test examples, bf16; beside it adapters from four examples. What the run writes ships as data/smollm2/oracles.json, where
`lorag evaluate` finds it. Bounded by training: half a second per step and task on one core with AVX-512.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorag.evaluation.folders import open_ladder
from lorag.files.artifacts import write_json
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import TaskSuite

__all__ = ["measure"]

EVERY = {"unseen_label": 3, "unseen_format": 4, "unseen_task": 3}
METHODS = ("base", "fresh_4", "fresh_64")


def measure(folder: Path, to: Path) -> None:
    """Scores the tasks, split by split, and writes them after each.

    Args:
        folder: Gets the suite of the tasks.
        to: JSON file that gets the reports.
    """
    chosen = {name: list(find_tasks("smollm2", name))[::step] for name, step in EVERY.items()}
    names = {name: [task.name for task in tasks] for name, tasks in chosen.items()}
    TaskSuite([task for tasks in chosen.values() for task in tasks], names).save(folder)
    ladder = open_ladder(["smollm2"], tasks=str(folder), split=list(EVERY), methods=METHODS, dtype="bfloat16")
    reports = {}
    for name, one in ladder.each():
        reports[name] = one.evaluate(seeds=1, limit=16)
        write_json(to, {"splits": reports})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("data/smollm2/oracles.json"))
    parser.add_argument("--suite", type=Path, default=Path("runs/oracles"), help="folder that gets the suite of these tasks")
    given = parser.parse_args()
    measure(given.suite, given.file)
