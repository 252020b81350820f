"""One description of a held-out task, or several wordings of it: `python -m benchmarks.wordings [--generator G] [--split S]`.

Each task gets adapters from n of its wordings, in two draws that share none where there are enough. Exact match and, of labels,
balanced accuracy, on test examples; intervals by bootstrap over tasks. "Shuffled" gives each task the adapter of the next one.

Bounded by what the wordings say: each places the task elsewhere, and what they have in common is what is meant.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from lorag.adapters.factors import Factors
from lorag.base.runner import Runner
from lorag.evaluation.statistics import bootstrap
from lorag.generator.generate import open_generator
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task

__all__ = ["measure"]


def measure(
    name: str, split: str, counts: Sequence[int], limit: int, draws: int = 2, most: int | None = None
) -> list[dict[str, str | float]]:
    """Rows by number of wordings, and the shuffled control of the largest.

    Args:
        name: A shipped generator or a folder.
        split: Of the suite of that name.
        counts: Numbers of wordings.
        limit: Test examples of each task.
        draws: Sets of wordings, each counted from another place.
        most: Tasks, from the first.
    """
    generator = open_generator(name)
    runner = Runner.open(generator.base, dtype="fast")
    tasks = list(find_tasks(name, split))[:most]
    rows: list[dict[str, str | float]] = []
    for count in counts:
        values = []
        for draw in range(draws):
            factors = []
            for task in tasks:
                texts = [task.descriptions[(draw * count + i) % len(task.descriptions)] for i in range(count)]
                factors.append(generator.generate(texts[0], wordings=texts[1:], on_unknown="ignore").factors)
            values.append(_scores(runner, factors, tasks, limit))
        rows.append(_row(f"{count}", values))
        print(rows[-1], flush=True)
    rows.append(_row(f"{counts[-1]}, shuffled", [_scores(runner, factors[1:] + factors[:1], tasks, limit)]))
    print(rows[-1], flush=True)
    return rows


def _scores(runner: Runner, factors: Sequence[Factors], tasks: Sequence[Task], limit: int) -> dict[str, torch.Tensor]:
    scored = runner.scores(Factors.stack(factors, runner.device), tasks, limit=limit)
    keys = [key for key in ("exact_match", "balanced_accuracy") if all(key in one for one in scored)]
    return {key: torch.tensor([float(one[key]) for one in scored]) for key in keys}


def _row(wordings: str, values: Sequence[dict[str, torch.Tensor]]) -> dict[str, str | float]:
    row: dict[str, str | float] = {"wordings": wordings, "tasks": len(next(iter(values[0].values())))}
    for key in values[0]:
        mean = torch.stack([one[key] for one in values]).mean(0)
        low, high = bootstrap(mean)
        row |= {key: round(mean.mean().item(), 3), f"{key} low": round(low, 3), f"{key} high": round(high, 3)}
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--generator", default="smollm2")
    parser.add_argument("--split", default="unseen_label")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--tasks", type=int)
    given = parser.parse_args()
    measure(given.generator, given.split, [int(count) for count in given.counts.split(",")], given.limit, given.draws, given.tasks)
