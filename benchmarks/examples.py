"""What a few examples add to a description, and what they reach without one: a curve over their number, on held-out tasks.

Adapters from the same examples, scored on the shipped test texts: `generated` starts from the adapter that the description gave and
takes `--steps` careful gradient steps; `fresh` starts as experts do and takes as many steps at the experts' rate; `fresh_long` takes the
experts' own number of steps. Without examples, `fresh` is the bare base model. `read` and `read_alone` take no step: a generator that
reads examples makes the adapter, with the description or without; `few_shot` shows description and examples to the bare base model.
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
from lorag.base.objectives.prompts import with_description, with_shots
from lorag.base.runner import Runner
from lorag.evaluation.statistics import bootstrap
from lorag.files.artifacts import write_json
from lorag.generator.files import DEFAULT
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.refine import refine_tasks
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task
from lorag.worlds.sandbox.build import SandboxConfig
from lorag.worlds.sandbox.grid import build_suite, splits

CHUNK = 32
_ROWS = ("generated", "fresh", "fresh_long", "read", "read_alone", "few_shot")


@dataclass(frozen=True)
class Setting:
    """What all points of the curve share.

    Attributes:
        generator: Makes the adapters to start from.
        runner: Its base model.
        tests: Held-out tasks.
        limit: Most test texts of each.
        steps: Gradient steps of each row that takes some.
        learning_rate: Peak rate of refinement; None is refinement's own.
    """

    generator: LoraGenerator
    runner: Runner
    tests: tuple[Task, ...]
    limit: int
    steps: dict[str, int]
    learning_rate: float | None

    def score(self, adapters: Sequence[LoraAdapter] | None, tests: Sequence[Task] | None = None) -> list[float]:
        """Score of each task on its test texts, or on those of other tasks in their place."""
        found, tests = [], self.tests if tests is None else tests
        for start in range(0, len(tests), CHUNK):
            own = None
            if adapters is not None:
                own = Factors.stack([one.factors for one in adapters[start : start + CHUNK]], self.runner.device)
            scores = self.runner.scores(own, tests[start : start + CHUNK], limit=self.limit)
            found += [score[self.runner.objective.metric] for score in scores]
        return found


@dataclass(frozen=True)
class Point:
    """One description of each task, the adapters that it gave, and so many examples of one seed."""

    seed: int
    texts: Sequence[str]
    start: Sequence[LoraAdapter]
    known: Sequence[Task]
    count: int


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
    methods: Sequence[str] = ("generated", "fresh", "fresh_long"),
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores of methods for each number of examples and each seed.

    Args:
        generator: Makes the adapters to start from.
        counts: Numbers of examples.
        seeds: Each shows another description and draws other examples.
        tasks: Held-out tasks.
        steps: Gradient steps of `generated` and `fresh`.
        limit: Most test texts of each task.
        learning_rate: Peak rate of refinement; by default refinement's own.
        methods: Names of rows.
        quiet: No progress bar.
    """
    runner = generator.runner()
    tests, pools = held_out(tasks, 2 * max(counts, default=0))  # twice as many, so that seeds differ even at the most
    lengths = {"generated": steps, "fresh": steps, "fresh_long": SandboxConfig().experts.steps}
    setting = Setting(generator, runner, tuple(tests), limit, lengths, learning_rate)
    points: dict[str, dict[int, list[list[float]]]] = {name: {count: [] for count in counts} for name in methods}
    with tqdm(total=seeds * len(counts) * len(methods), desc="examples", disable=quiet) as bar:
        for seed in range(seeds):
            texts = [task.descriptions[seed % len(task.descriptions)] for task in tests]
            start = [generator.generate(text, seed=seed, on_unknown="ignore") for text in texts]
            for count in counts:
                point = Point(seed, texts, start, [few(task, count, seed) for task in pools], count)
                for name in methods:
                    points[name][count].append(_row(name, setting, point))
                    bar.update()
    return {
        "generator": {"method": generator.method.name, "revision": generator.revision},
        "metric": runner.objective.metric,
        "tasks": [task.name for task in tests],
        "test_examples": limit,
        "steps": {name: lengths.get(name, 0) for name in methods},
        "methods": {name: {str(count): _summary(found) for count, found in by_count.items()} for name, by_count in points.items()},
    }


def _row(name: str, setting: Setting, point: Point) -> list[float]:
    """Scores of one row at one point."""
    generator, runner, known = setting.generator, setting.runner, point.known
    if name == "few_shot":
        return setting.score(None, _prompted(setting, point))
    if not point.count:
        return setting.score(None if name in ("read_alone", "fresh", "fresh_long") else point.start)
    if name in ("read", "read_alone"):
        pairs = [[(example.input, example.output) for example in task.split("train")] for task in known]
        if name == "read_alone":
            return setting.score([generator.generate(generator.read_examples(some, seed=point.seed)) for some in pairs])
        told = zip(point.texts, pairs, strict=True)
        return setting.score([generator.generate(text, seed=point.seed, examples=some, on_unknown="ignore") for text, some in told])
    if name == "generated":
        return setting.score(refine_tasks(runner, point.start, known, setting.steps[name], point.seed, setting.learning_rate))
    recipe = SandboxConfig().experts
    config = replace(recipe, steps=setting.steps[name], batch=min(recipe.batch, point.count), checkpoints=1, seed=point.seed)
    return setting.score([late[-1] for late in train_group(runner, known, generator.rank, config)])


def _prompted(setting: Setting, point: Point) -> list[Task]:
    """The tests with description and examples in their prompts."""
    prompted = []
    for task, test, text in zip(point.known, setting.tests, point.texts, strict=True):
        shown = replace(task, examples=(*task.split("train"), *test.split("test")))
        prompted.append(with_shots(shown, text, point.count, point.seed) if point.count else with_description(shown, [text]))
    return prompted


def _summary(found: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean over tasks and seeds, its interval over tasks, and the mean of each seed."""
    scores = torch.tensor(found, dtype=torch.float64)
    interval = [round(bound, 4) for bound in bootstrap(scores.mean(0))]
    return {"score": round(scores.mean().item(), 4), "interval": interval, "per_seed": [round(one, 4) for one in scores.mean(1).tolist()]}


def format_curve(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    counts = list(next(iter(report["methods"].values())))
    lines = [f"{report['metric']} on {len(report['tasks'])} held-out tasks, by number of examples"]
    lines.append(f"{'adapter':<14}{'steps':>6}" + "".join(f"{count:>21}" for count in counts))
    for name, points in report["methods"].items():
        shown = [
            f"{points[count]['score']:.3f} ({points[count]['interval'][0]:.3f}-{points[count]['interval'][1]:.3f})" for count in counts
        ]
        lines.append(f"{name:<14}{report['steps'][name]:>6}" + "".join(f"{one:>21}" for one in shown))
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
    parser.add_argument("--methods", default="generated,fresh,fresh_long", help="rows: these, read, read_alone, few_shot")
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    given = parser.parse_args(arguments)
    unknown = set(given.methods.split(",")) - {*_ROWS}
    if unknown:
        parser.error(f"no row {min(unknown)}; there are {', '.join(_ROWS)}")
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
        methods=given.methods.split(","),
    )
    print(format_curve(report))
    if given.json is not None:
        write_json(given.json, report)


if __name__ == "__main__":
    main()
