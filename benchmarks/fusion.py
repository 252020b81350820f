"""Fusion: one adapter for 2, 4 or 8 tasks, by every method, against the single experts and adapters trained on the same examples.

`python -m benchmarks.fusion --generator DIR [--plain DIR] [--sets 2,4,8,long-tailed] [--seeds 3] [--draws 4] [--limit 16]
[--held-out] [--json FILE]` on the sandbox, and `python -m benchmarks.fusion --bank DIR --suite smollm2 --sets 2,4,8` on any bank.

On the sandbox the tasks of a set lie in different domains, so that their inputs tell them apart, and differ in skill, and in style
as far as there are styles. `--held-out` draws them from the tasks that the generator's training held out. Of another bank, experts
that score at least .8 on their own tasks are drawn, each with another source. With `--json` every finished set is written at once,
and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.adapters.merging import merge
from lorag.bank.bank import AdapterBank, find_bank
from lorag.bank.experts import train_group
from lorag.base.runner import Runner
from lorag.evaluation.statistics import bootstrap
from lorag.evaluation.tables import interval
from lorag.files.artifacts import read_json, write_json
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.refine import refine
from lorag.methods.support_examples import few_examples, learn_weights
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task, TaskSuite
from lorag.training.controls import train_together
from lorag.training.fuse import fuse_experts
from lorag.training.regmean import regmean
from lorag.training.split import RunTasks, SplitRule
from lorag.worlds.sandbox.build import SandboxConfig
from lorag.worlds.sandbox.grid import Cell, splits

EXAMPLES = 8  # of each task, that refinement sees
RARE = 8  # training examples of the rare task of a long-tailed set
LONG_TAILED = 4  # tasks of such a set
GOOD = 0.8  # least score of an expert on its own task, for a set of another bank than the sandbox's
TRAINING = replace(SandboxConfig().experts, checkpoints=1)  # as the bank's experts were trained


@dataclass(frozen=True)
class World:
    """What all sets are fused and scored with."""

    bank: AdapterBank
    suite: TaskSuite
    runner: Runner
    generator: LoraGenerator | None
    plain: LoraGenerator | None
    limit: int
    steps: int

    @property
    def rank(self) -> int:
        """Of what is trained or rebuilt."""
        return self.generator.rank if self.generator else self.bank.adapter(self.bank.names[0]).rank

    def scores(self, adapters: Sequence[LoraAdapter] | None, tasks: Sequence[Task]) -> list[float]:
        """Score of adapter number i on task number i; one adapter serves all."""
        runner, own = self.runner, None
        if adapters is not None:
            own = Factors.stack([one.factors for one in adapters] * (len(tasks) // len(adapters)), runner.device)
        return [round(score[runner.objective.metric], 4) for score in runner.scores(own, tasks, limit=self.limit)]


def draw_set(size: int, rng: random.Random, among: Container[str]) -> list[str]:
    """Names of bank tasks of different domains and skills, and of different styles while there are any left."""
    pool: list[Cell] = [cell for cell in splits()["train"] if cell.name in among]
    rng.shuffle(pool)
    chosen: list[Cell] = []
    for fresh in (True, False):
        for cell in pool:
            apart = all(cell.domain != other.domain and cell.skill != other.skill for other in chosen)
            if len(chosen) < size and apart and (not fresh or all(cell.style != other.style for other in chosen)):
                chosen.append(cell)
    return sorted(cell.name for cell in chosen)


def draw_good(size: int, rng: random.Random, world: World) -> list[str]:
    """Names of experts that learned their tasks, each with another source."""
    pool = [expert.name for expert in world.bank.experts if (expert.score or 0) >= GOOD]
    rng.shuffle(pool)
    chosen: dict[str, str] = {}
    for name, task in zip(pool, world.suite.of_experts(pool), strict=True):
        if len(chosen) < size:
            chosen.setdefault(task.name.split("_")[0], name)
    if len(chosen) < size:
        raise SystemExit(f"the bank's good experts have {len(chosen)} sources, fewer than {size}")
    return sorted(chosen.values())


def held_out(generator: LoraGenerator, bank: AdapterBank) -> list[str]:
    """The bank's tasks that taught the generator nothing, for they chose when its training stopped."""
    rule = SplitRule.stated(generator.origin["config"])
    split = rule.split(bank.names, RunTasks.named("sandbox", len(bank)))
    return [bank.names[row] for row in split.validation if row < len(bank)]


def joint(world: World, tasks: Sequence[Task]) -> LoraAdapter:
    """One adapter of the generator's rank trained on all examples of the tasks together."""
    mixed = replace(tasks[0], name="joint", examples=tuple(example for task in tasks for example in task.split("train")))
    config = replace(TRAINING, batch=TRAINING.batch * len(tasks))
    return train_group(world.runner, [mixed], world.rank, config)[0][-1]


def refined(world: World, adapter: LoraAdapter, support: Sequence[Task], seed: int) -> LoraAdapter:
    """The steps on examples that `icm_refined` takes at its end, from another start: what the latents are worth."""
    pairs = [(example.input, example.output) for task in support for example in task.examples]
    return refine(world.runner, adapter, pairs, world.steps, seed)


def methods(world: World, names: Sequence[str], tasks: Sequence[Task], seed: int) -> dict[str, Callable[[], LoraAdapter]]:
    """Every way to one adapter, in rising cost."""
    experts = list(world.bank.adapters(names))
    support = [few_examples(task, EXAMPLES, seed) for task in tasks]

    @functools.cache
    def learned(per_module: bool) -> LoraAdapter:
        weights = learn_weights(world.runner, experts, support, per_module=per_module, steps=world.steps, seed=seed)
        return world.bank.fuse(names, "cat", weights=weights)

    def fused(generator: LoraGenerator, **more: Any) -> LoraAdapter:  # noqa: ANN401 - settings of fuse_experts
        return fuse_experts(generator, world.bank, names, seed=seed, steps=world.steps, **more)

    made: dict[str, Callable[[], LoraAdapter]] = {
        "mean": lambda: world.bank.fuse(names, "mean"),
        "task_arithmetic": lambda: world.bank.fuse(names, "task_arithmetic"),
        "sum": lambda: world.bank.fuse(names, "task_arithmetic", coefficient=1.0),
        "ties": lambda: world.bank.fuse(names, "ties"),
        "dare_ties": lambda: world.bank.fuse(names, "dare_ties", rng=torch.Generator().manual_seed(seed)),
        "lego": lambda: world.bank.fuse(names, "lego", rank=world.rank),
        "tsv": lambda: world.bank.fuse(names, "tsv"),
        "regmean": lambda: regmean(world.runner, experts, tasks, seed=seed),
        "learned_weights": lambda: learned(False),
        "cat": lambda: learned(True),
        "fresh": lambda: train_together(world.runner, support, rank=world.rank, steps=world.steps, seed=seed),
    }
    if world.generator is not None:
        latent = world.generator
        made["mean_refined"] = lambda: refined(world, world.bank.fuse(names, "mean"), support, seed)
        made["cat_refined"] = lambda: refined(world, learned(True), support, seed)
        made["icm_uniform"] = lambda: fused(latent)
        made["icm_conflict"] = lambda: fused(latent, rule="conflict")
        made["icm_learned"] = lambda: fused(latent, rule="learned", suite=world.suite)
        made["icm_worst"] = lambda: fused(latent, rule="learned", reduction="worst", suite=world.suite)
        made["icm_refined"] = lambda: fused(latent, rule="learned", suite=world.suite, refine_steps=world.steps)
        made["joint"] = lambda: joint(world, tasks)
    if world.plain is not None:
        plain = world.plain
        made["plain_uniform"] = lambda: fused(plain)
        made["plain_learned"] = lambda: fused(plain, rule="learned", suite=world.suite)
    return made


def run_set(world: World, names: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Scores of each task, by method."""
    tasks = world.suite.of_experts(names)
    found = {"base": world.scores(None, tasks), "single": world.scores(list(world.bank.adapters(names)), tasks)}
    for name, make in methods(world, names, tasks, seed).items():
        found[name] = world.scores([make()], tasks)
    return found


def run_long_tailed(world: World, names: Sequence[str], seed: int) -> dict[str, list[float]]:
    """The same where the first task has 8 examples in all, and its expert was trained on them; its score comes first."""
    latent = world.generator
    if latent is None:
        raise SystemExit("long-tailed sets need --generator")
    tasks = world.suite.of_experts(names)
    few = few_examples(tasks[0], RARE, seed)
    expert = train_group(world.runner, [few], 4, TRAINING)[0][-1]
    expert = replace(expert, base_model=world.bank.base.model.name)
    suite = TaskSuite([few, *tasks[1:]])
    support = [few_examples(task, EXAMPLES, seed) for task in suite]
    others = list(world.bank.adapters(names[1:]))

    def fused(**more: Any) -> LoraAdapter:  # noqa: ANN401 - settings of fuse_experts
        own = {names[0]: expert}
        return fuse_experts(latent, world.bank, names, adapters=own, seed=seed, steps=world.steps, suite=suite, **more)

    made: dict[str, Callable[[], LoraAdapter]] = {
        "mean": lambda: merge([expert, *others]),
        "icm_uniform": lambda: fused(),
        "icm_learned": lambda: fused(rule="learned"),
        "icm_worst": lambda: fused(rule="learned", reduction="worst"),
        "mean_refined": lambda: refined(world, merge([expert, *others]), support, seed),
        "icm_refined": lambda: fused(rule="learned", refine_steps=world.steps),
    }
    found = {"base": world.scores(None, tasks), "single": world.scores([expert, *others], tasks)}
    return found | {name: world.scores([make()], tasks) for name, make in made.items()}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over tasks, worst task, and share of the single experts' score kept, by kind of set and method."""
    summary: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row["scores"] for row in rows if row["kind"] == kind]
        table = {}
        for name in mine[0]:
            means = [sum(scores[name]) / len(scores[name]) for scores in mine]
            single = [sum(scores["single"]) / len(scores["single"]) for scores in mine]
            table[name] = {
                "mean": round(sum(means) / len(means), 4),
                "ci95": bootstrap(torch.tensor(means)),
                "worst_task": round(sum(min(scores[name]) for scores in mine) / len(mine), 4),
                "kept": round(sum(means) / max(sum(single), 1e-9), 4),
            }
            if kind.startswith("long"):
                table[name]["rare_task"] = round(sum(scores[name][0] for scores in mine) / len(mine), 4)
        summary[kind] = {"sets": len(mine), "methods": table}
    return summary


def main() -> None:
    """Draws sets, fuses and scores each, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", help="icm_fusion generator of the sandbox's bank")
    parser.add_argument("--plain", help="another icm_fusion generator to compare with, such as one with settings.sets.steps=0")
    parser.add_argument("--bank", default="sandbox", help="of other experts than the sandbox's, without a generator")
    parser.add_argument("--suite", default="sandbox", help="the tasks of the bank's experts")
    parser.add_argument("--sets", default="2,4,8,long-tailed", help="sizes of sets, and long-tailed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=4, help="sets of each size and seed")
    parser.add_argument("--limit", type=int, default=16, help="test examples of a task")
    parser.add_argument("--steps", type=int, default=100, help="gradient steps of what learns")
    parser.add_argument("--held-out", action="store_true", help="sets of tasks that the generator did not learn from")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sandbox = given.bank == "sandbox"
    if bool(given.generator) != sandbox:
        raise SystemExit("the sandbox's bank needs --generator, and another bank takes none")
    bank = find_bank(given.bank)
    generator = LoraGenerator.from_pretrained(given.generator) if given.generator else None
    plain = LoraGenerator.from_pretrained(given.plain, embedder=generator.embedder) if generator and given.plain else None
    runner = generator.runner() if generator else Runner.open(bank.base, "auto", "fast")
    suite = find_tasks("sandbox", "train") if sandbox else find_tasks(given.suite)
    world = World(bank, suite, runner, generator, plain, given.limit, given.steps)
    settings = {
        "generator": generator.revision if generator else given.bank,
        "plain": None if plain is None else plain.revision,
        "limit": given.limit,
        "steps": given.steps,
    } | ({"held_out": True} if given.held_out else {})
    among = held_out(generator, bank) if generator and given.held_out else bank.names
    rows: list[dict[str, Any]] = []
    if given.json and given.json.exists():
        before = read_json(given.json)
        if before["settings"] != settings:
            raise SystemExit(f"{given.json} holds other settings; choose another file, or delete it")
        rows = before["rows"]
    jobs = [(kind, LONG_TAILED if kind == "long-tailed" else int(kind)) for kind in given.sets.split(",")]
    todo = [(kind, size, seed, draw) for kind, size in jobs for seed in range(given.seeds) for draw in range(given.draws)]
    done = {(row["kind"], row["seed"], row["draw"]) for row in rows}
    for kind, size, seed, draw in tqdm(todo, desc="sets"):
        if (kind, seed, draw) in done:
            continue
        rng = random.Random(f"{kind}/{seed}/{draw}")
        names = draw_set(size, rng, among) if sandbox else draw_good(size, rng, world)
        scores = (run_long_tailed if kind == "long-tailed" else run_set)(world, names, seed)
        rows.append({"kind": kind, "seed": seed, "draw": draw, "tasks": names, "scores": scores})
        if given.json:
            write_json(given.json, {"settings": settings, "summary": summarise(rows), "rows": rows})
    for kind, part in summarise(rows).items():
        print(f"\n{kind} tasks, {part['sets']} sets\n{'method':<20}{'mean':>7}{'95 % interval':>18}{'worst':>8}{'kept':>7}")
        for name, row in part["methods"].items():
            rare = f"   rare {row['rare_task']:.3f}" if "rare_task" in row else ""
            print(f"{name:<20}{row['mean']:>7.3f}{interval(row):>18}{row['worst_task']:>8.3f}{row['kept']:>7.3f}{rare}")


if __name__ == "__main__":
    main()
