"""The ladder: every method and every control on the same examples of tasks that no expert was trained on.

A generator that does not beat `mean`, `multitask`, `top_k` and its own shuffled control has learned nothing from the
description, whatever it gains over `base`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.base.objectives import Objective, make_objective
from lorag.base.row_adapters import RowAdapters
from lorag.errors import BankError, ConfigError
from lorag.evaluation.reproduction import Reproduction
from lorag.generator.lora_generator import LoraGenerator
from lorag.progress import Bar, progress_bar
from lorag.tasks.suite import Task, TaskSuite

__all__ = ["BASELINES", "CONTROLS", "bootstrap", "evaluate", "format_table", "is_learned", "shown_descriptions"]

# Meaningless where a description is due; adapters made from them show what a generator gives to anything at all.
JUNK = (
    "the quick brown fox jumps over the lazy dog",
    "lorem ipsum dolor sit amet consectetur",
    "qwerty asdf zxcv 12345",
    "thank you so much, you are wonderful",
    "blue seven window yesterday perhaps",
    "aaaa bbbb cccc dddd",
)
CONTROLS = ("base", "base_prompted", "oracle")
BASELINES = ("random", "mean", "nearest", "top_k", "ridge", "sg_mixture")
_RESAMPLES = 2000
_CHUNK = 32


@dataclass(frozen=True)
class _Run:
    """What every method is scored with."""

    rows: RowAdapters
    objective: Objective
    tasks: tuple[Task, ...]
    limit: int

    def score(self, adapters: Sequence[LoraAdapter] | None, seed: int, tasks: Sequence[Task] | None = None) -> list[float]:
        """Score of adapter number i on task number i."""
        tasks = self.tasks if tasks is None else tuple(tasks)
        found: list[float] = []
        for start in range(0, len(tasks), _CHUNK):
            part = tasks[start : start + _CHUNK]
            own = None
            if adapters is not None:
                own = Factors.stack([adapter.factors for adapter in adapters[start : start + _CHUNK]], self.rows.model.device)
            scores = self.objective.scores(self.rows, own, part, limit=self.limit, seed=seed)
            found += [score[self.objective.metric] for score in scores]
        return found


def evaluate(
    tasks: TaskSuite,
    generators: Mapping[str, Sequence[LoraGenerator]],
    *,
    oracles: AdapterBank | None = None,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    limit: int = 32,
    reproduce: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores methods on tasks.

    Args:
        tasks: Tasks with test examples; a generator is shown one description of each, another for each seed.
        generators: Name to generators of that method; where there are several, seeds use them in turn.
        oracles: Experts of these very tasks, for the upper end of the gap.
        methods: Names to score, in this order; by default all that can be scored.
        seeds: Number of seeds.
        limit: Most test examples of each task.
        reproduce: Whether the oracles are the very bank that the generators learned from: how they give it back is then
            reported too.
        device: Where the base model runs.
        quiet: No progress bar.

    Returns:
        The report: suite, seeds, task names, and for each method its score, 95 % bootstrap interval over tasks, share of
        the gap between base and oracle closed, and score of each task; with `reproduce`, `Reproduction.report` as well.

    Raises:
        ConfigError: If a method is unknown, or generators have different bases.
    """
    everything = [one for group in generators.values() for one in group]
    if not everything or any(one.base != everything[0].base for one in everything):
        raise ConfigError("generators must share one base model, layout and objective")
    base = everything[0].base
    base.check()
    known = [name for name in _names(generators, oracles) if len(tasks) > 1 or not name.endswith("_shuffled")]
    if any(task.inputs != "text" for task in tasks):
        known.remove("base_prompted")  # no description can be put before an image
    chosen = list(methods) if methods else known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ConfigError("methods: cannot be scored here", got=", ".join(unknown), expected=", ".join(known))
    if oracles is not None:
        if (oracles.base.identity, oracles.base.layout) != (base.identity, base.layout):
            raise BankError("the oracles are of another base model or layout", got=oracles.base.model.name, expected=base.model.name)
        lost = [task.name for task in tasks if task.key not in oracles]
        if lost:
            raise BankError("the oracle bank lacks tasks", got=f"{len(lost)} such as {lost[0]}")
    model = base.model.load(device)
    objective = make_objective(base.objective, base.model.tokenizer(), base.settings)
    run = _Run(RowAdapters(model, base.layout), objective, tuple(tasks), limit)
    reproduction = Reproduction(oracles, [task.key for task in tasks]) if reproduce and oracles is not None else None
    wanted = [name for name in ("base", "oracle") if name in known and name not in chosen] + chosen
    per_seed: dict[str, list[list[float]]] = {}
    with progress_bar(total=len(wanted) * seeds, desc="evaluating", disable=quiet) as bar:
        for name in wanted:
            bar.set_postfix(method=name)
            per_seed[name] = _score_method(run, name, generators, oracles, reproduction, seeds, bar)
    report = _report(run, chosen, per_seed, seeds)
    if reproduction is not None:
        scores = {name: sum(map(sum, rows)) / (len(rows) * len(tasks)) for name, rows in per_seed.items()}
        report["reproduction"] = reproduction.report(generators, scores, scores["oracle"])
    return report


def is_learned(method: str) -> bool:
    """Whether a method claims to have learned from descriptions, so that it owes the shuffled and the junk control."""
    return method not in (*BASELINES, "multitask", "static")


def shown_descriptions(tasks: Iterable[Task], seed: int) -> list[str]:
    """The description of each task that generators are shown for a seed."""
    return [task.descriptions[seed % len(task.descriptions)] for task in tasks]


def _names(generators: Mapping[str, Sequence[LoraGenerator]], oracles: AdapterBank | None) -> list[str]:
    names = ["base", "base_prompted"]
    names += [name for name in generators]
    for name in generators:
        if is_learned(name):
            names += [f"{name}_shuffled", f"{name}_junk"]
    return names + (["oracle"] if oracles is not None else [])


def _score_method(
    run: _Run,
    name: str,
    generators: Mapping[str, Sequence[LoraGenerator]],
    oracles: AdapterBank | None,
    reproduction: Reproduction | None,
    seeds: int,
    bar: Bar,
) -> list[list[float]]:
    """Scores of each task, one list a seed."""
    if name in ("base", "oracle"):
        experts: Any = oracles  # a bank, or "oracle" would be no known name
        adapters = None if name == "base" else [experts.adapter(task.key) for task in run.tasks]
        found = [run.score(adapters, seed) for seed in range(seeds if _draws(run.objective) else 1)]
        bar.update(seeds)
        return found
    found = []
    for seed in range(seeds):
        shown = shown_descriptions(run.tasks, seed)
        if name == "base_prompted":
            prompted = [
                replace(task, examples=tuple(replace(e, input=f"{text}\n{e.input}") for e in task.examples))
                for task, text in zip(run.tasks, shown, strict=True)
            ]
            found.append(run.score(None, seed, prompted))
        else:
            source, change = _parse(name, generators)
            made = generators[source][seed % len(generators[source])]
            adapters = [made.generate(text, seed=seed, on_unknown="ignore") for text in change(shown, seed)]
            if reproduction is not None and name in generators:
                reproduction.add(name, adapters)
            found.append(run.score(adapters, seed))
        bar.update()
    return found


def _draws(objective: Objective) -> bool:
    """Whether scores depend on a seed even for a fixed adapter."""
    return hasattr(objective, "draws")


def _parse(name: str, generators: Mapping[str, object]) -> tuple[str, Callable[[list[str], int], list[str]]]:
    if name in generators:
        return name, lambda texts, seed: texts
    source, _, control = name.rpartition("_")
    return source, _shuffled if control == "shuffled" else _junk


def _shuffled(texts: list[str], seed: int) -> list[str]:
    """Gives each task the description of another: a rotation of a random order leaves none in its place."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    moved = dict(zip(order, order[1:] + order[:1], strict=True))
    return [texts[moved[i]] for i in range(len(texts))]


def _junk(texts: list[str], seed: int) -> list[str]:
    return [JUNK[(i + seed) % len(JUNK)] for i in range(len(texts))]


def _report(run: _Run, chosen: Sequence[str], per_seed: Mapping[str, list[list[float]]], seeds: int) -> dict[str, Any]:
    per_task = {name: torch.tensor(rows).mean(0) for name, rows in per_seed.items()}
    floor = per_task["base"].mean().item()
    ceiling = per_task["oracle"].mean().item() if "oracle" in per_task else None
    methods: dict[str, Any] = {}
    for name in chosen:
        values = per_task[name]
        score = values.mean().item()
        gap = None if ceiling is None or abs(ceiling - floor) < 1e-9 else round((score - floor) / (ceiling - floor), 4)
        methods[name] = {
            "score": round(score, 4),
            "ci95": bootstrap(values),
            "gap_closed": gap,
            "per_task": {task.name: round(value, 4) for task, value in zip(run.tasks, values.tolist(), strict=True)},
        }
        if len(per_seed[name]) > 1:
            methods[name]["per_seed"] = [round(sum(row) / len(row), 4) for row in per_seed[name]]
    differences = {}
    for name in chosen:
        for control in ("shuffled", "junk"):
            other = f"{name}_{control}"
            if other in per_task:
                values = per_task[name] - per_task[other]
                differences[f"{name} - {other}"] = {"difference": round(values.mean().item(), 4), "ci95": bootstrap(values)}
    return {
        "suite": "+".join(sorted({task.suite for task in run.tasks})),
        "metric": run.objective.metric,
        "examples": run.limit,
        "seeds": seeds,
        "tasks": [task.name for task in run.tasks],
        "methods": methods,
        "differences": differences,
    }


def bootstrap(values: torch.Tensor) -> list[float]:
    """95 % percentile interval (Efron 1979) of the mean of values (n,), one a task."""
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=rng)
    means = values[picks].mean(1).sort().values
    return [round(means[int(_RESAMPLES * q)].item(), 4) for q in (0.025, 0.975)]


def format_table(report: Mapping[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report['suite']}: {len(report['tasks'])} tasks, {report['examples']} examples each, {report['seeds']} seeds, {report['metric']}",
        "",
        f"{'method':<22}{'score':>8}{'95 % interval':>18}{'gap closed':>12}",
    ]
    for name, row in report["methods"].items():
        low, high = row["ci95"]
        gap = "" if row["gap_closed"] is None else f"{row['gap_closed']:.3f}"
        lines.append(f"{name:<22}{row['score']:>8.3f}{f'{low:.3f} to {high:.3f}':>18}{gap:>12}")
    for name, row in report["differences"].items():
        low, high = row["ci95"]
        lines.append(f"\n{name}: {row['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
    if "reproduction" in report:
        lines += ["", f"{'given back':<22}{'score kept':>12}{'ΔW error':>12}{'generator':>12}{'bank':>12}"]
        for name, row in report["reproduction"].items():
            kept = "" if row["score_kept"] is None else f"{row['score_kept']:.3f}"
            sizes = "".join(f"{row[key] / 1e6:>9.2f} MB" for key in ("bytes", "bank_bytes"))
            lines.append(f"{name:<22}{kept:>12}{row['delta_error']:>12.3f}{sizes}")
    return "\n".join(lines)
