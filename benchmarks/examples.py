"""What a few examples add to a description, and what they reach without one: a curve over their number, on held-out tasks.

Three adapters a task, from the same examples, scored on the shipped test texts: `generated` starts from the adapter that
the description gave and takes `--steps` careful gradient steps; `fresh` starts as experts do and takes as many steps at
the experts' rate; `fresh_long` takes the experts' own number of steps. Without examples, `fresh` is the bare base model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.experts import train_group
from lorag.base.runner import Runner
from lorag.files.artifacts import write_json
from lorag.generator.files import DEFAULT
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.refine import refine_tasks
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task
from lorag.worlds.sandbox.build import SandboxConfig
from lorag.worlds.sandbox.grid import build_suite, splits

CHUNK = 32


@dataclass(frozen=True)
class Setting:
    """What all points of the curve share."""

    runner: Runner
    tests: tuple[Task, ...]
    limit: int

    def score(self, adapters: Sequence[LoraAdapter] | None) -> float:
        """Mean score on the test texts."""
        found = []
        for start in range(0, len(self.tests), CHUNK):
            own = None
            if adapters is not None:
                own = Factors.stack([one.factors for one in adapters[start : start + CHUNK]], self.runner.device)
            scores = self.runner.scores(own, self.tests[start : start + CHUNK], limit=self.limit)
            found += [score[self.runner.objective.metric] for score in scores]
        return sum(found) / len(found)


def held_out(count: int, examples: int) -> tuple[list[Task], list[Task]]:
    """Test tasks as shipped, spread over the grid, and the same tasks with training examples that no test text occurs in."""
    tests = list(find_tasks("sandbox", "test"))
    tests = tests[:: max(1, len(tests) // count)][:count]
    cells = {cell.name: cell for cell in splits()["test"]}
    spare = max(len(task.examples) for task in tests)
    suite = build_suite(tuple(cells[task.name] for task in tests), train=examples + spare, test=0, descriptions=1, wording="eval")
    pools = []
    for task in tests:
        seen = {example.input for example in task.examples}
        fresh = tuple(example for example in suite[task.name].split("train") if example.input not in seen)
        pools.append(replace(task, examples=fresh[:examples]))
    return tests, pools


def few(task: Task, count: int, seed: int) -> Task:
    """The task with `count` examples; more examples of one seed are the same ones and others."""
    order = list(task.examples)
    random.Random(f"{seed}/{task.name}").shuffle(order)
    return replace(task, examples=tuple(order[:count]))


def curve(
    generator: LoraGenerator,
    counts: Sequence[int],
    *,
    seeds: int,
    tasks: int,
    steps: int,
    limit: int,
    learning_rate: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores of the three adapters for each number of examples and each seed.

    Args:
        generator: Makes the adapters to start from.
        counts: Numbers of examples.
        seeds: Each shows another description and draws other examples.
        tasks: Held-out tasks.
        steps: Gradient steps of `generated` and `fresh`.
        limit: Most test texts of each task.
        learning_rate: Peak rate of refinement; by default refinement's own.
        quiet: No progress bar.
    """
    runner = generator.runner()
    tests, pools = held_out(tasks, 2 * max(counts, default=0))  # twice as many, so that seeds differ even at the most
    setting = Setting(runner, tuple(tests), limit)
    recipe = SandboxConfig().experts
    lengths = {"fresh": steps, "fresh_long": recipe.steps}
    points: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in ("generated", *lengths)}
    with tqdm(total=seeds * len(counts), desc="examples", disable=quiet) as bar:
        for seed in range(seeds):
            start = [generator.generate(task.descriptions[seed % len(task.descriptions)], seed=seed) for task in tests]
            for count in counts:
                known = [few(task, count, seed) for task in pools]
                refined = refine_tasks(runner, start, known, steps, seed, learning_rate) if count else start
                points["generated"][count].append(setting.score(refined))
                for name, length in lengths.items():
                    fresh = None
                    if count:
                        config = replace(recipe, steps=length, batch=min(recipe.batch, count), checkpoints=1, seed=seed)
                        fresh = [late[-1] for late in train_group(runner, known, generator.rank, config)]
                    points[name][count].append(setting.score(fresh))
                bar.update()
    return {
        "generator": {"method": generator.method.name, "revision": generator.revision},
        "metric": runner.objective.metric,
        "tasks": [task.name for task in tests],
        "test_examples": limit,
        "steps": {"generated": steps, **lengths},
        "methods": {
            name: {
                str(count): {"score": round(sum(found) / len(found), 4), "per_seed": [round(one, 4) for one in found]}
                for count, found in by_count.items()
            }
            for name, by_count in points.items()
        },
    }


def format_curve(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    counts = list(next(iter(report["methods"].values())))
    lines = [f"{report['metric']} on {len(report['tasks'])} held-out tasks, by number of examples"]
    lines.append(f"{'adapter':<14}{'steps':>6}" + "".join(f"{count:>9}" for count in counts))
    for name, points in report["methods"].items():
        lines.append(f"{name:<14}{report['steps'][name]:>6}" + "".join(f"{points[count]['score']:>9.3f}" for count in counts))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.examples", description=__doc__.splitlines()[0])
    parser.add_argument("--generator", default=None, help="generator folder on the sandbox's base; the embedded one by default")
    parser.add_argument("--counts", default="0,1,4,16,64", help="numbers of examples, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=60, help="held-out tasks; 12 take a few minutes")
    parser.add_argument("--steps", type=int, default=20, help="gradient steps on the examples")
    parser.add_argument("--limit", type=int, default=32, help="most test texts of each task")
    parser.add_argument("--learning-rate", type=float, default=None, help="peak rate of refinement; its own by default")
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    given = parser.parse_args(arguments)
    generator = LoraGenerator.from_pretrained(given.generator or DEFAULT)
    torch.manual_seed(0)
    report = curve(
        generator,
        sorted({int(count) for count in given.counts.split(",")}),
        seeds=given.seeds,
        tasks=given.tasks,
        steps=given.steps,
        limit=given.limit,
        learning_rate=given.learning_rate,
    )
    print(format_curve(report))
    if given.json is not None:
        write_json(given.json, report)


if __name__ == "__main__":
    main()
