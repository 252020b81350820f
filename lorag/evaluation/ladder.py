"""The ladder: every method and every control on the same examples of tasks that no expert was trained on.

A generator that does not beat `mean`, `multitask`, `top_k` and its own shuffled control has learned nothing from the
description, whatever it gains over `base`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorag.bank.bank import AdapterBank
from lorag.base.objectives.prompts import with_description, with_shots
from lorag.base.runner import Runner
from lorag.errors import BankError, ConfigError
from lorag.evaluation.oracles import OracleScores
from lorag.evaluation.reproduction import Reproduction
from lorag.evaluation.rivals import WITH_EXAMPLES, random_like, train_fresh
from lorag.evaluation.scoring import Scorer, longer_prompts
from lorag.evaluation.statistics import Scores, differences, summarise
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import BankBase
    from lorag.evaluation.oracles import Oracles
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.tasks.suite import Task, TaskSuite

__all__ = ["CONTROLS", "baseline_rows", "evaluate", "learned_rows", "shown_descriptions"]

# Meaningless where a description is due; adapters made from them show what a generator gives to anything at all.
JUNK = (
    "the quick brown fox jumps over the lazy dog",
    "lorem ipsum dolor sit amet consectetur",
    "qwerty asdf zxcv 12345",
    "thank you so much, you are wonderful",
    "blue seven window yesterday perhaps",
    "aaaa bbbb cccc dddd",
)
CONTROLS = ("base", "base_prompted", "few_shot", "random_init", "oracle")
_SHOTS = 4
_EVERY = 10.0  # seconds between signs of life


def evaluate(
    tasks: TaskSuite,
    generators: Mapping[str, Sequence[LoraGenerator]],
    *,
    oracles: Oracles | None = None,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    limit: int = 32,
    reproduce: bool = False,
    write: bool = False,
    runner: Runner | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores methods on tasks.

    Args:
        tasks: Tasks with test examples; a generator is shown one description of each, another for each seed.
        generators: Name to generators of that method; where there are several, seeds use them in turn.
        oracles: Experts of these very tasks, or of some of them, or the scores of such experts, for the upper end of the gap.
        methods: Names to score, in this order; by default all that take no training. `few_shot_K` shows K examples in the prompt,
            `fresh_K` trains an adapter on K examples.
        seeds: Number of seeds.
        limit: Most test examples of each task.
        reproduce: Whether the oracles are the very bank that the generators learned from: how they give it back is then
            reported too.
        write: Whether answers are written out for all tasks, for lenient match; by default only where the text is free.
        runner: The base model, if it is loaded already.
        device: Where the base model runs.
        dtype: In which precision.
        quiet: No progress bar.

    Returns:
        The report: suite, seeds, task names; for each method its score, 95 % bootstrap interval over tasks, share of
        the gap between base and oracle closed, score of each task, further measures, and prompt tokens of a request; differences
        of each generator to its controls and rivals; with `reproduce`, `Reproduction.report` as well.

    Raises:
        ConfigError: If a method is unknown, or generators have different bases.
        BankError: If the oracles are of another base, or of none of the tasks, or their scores are of another metric.
    """
    base = _shared_base(generators)
    base.check()
    if oracles is not None:
        _check_oracles(oracles, base, tasks)
    runner = Runner.open(base, device, dtype) if runner is None else runner
    if isinstance(oracles, OracleScores) and oracles.metric != runner.objective.metric:
        raise BankError("the oracles' scores are of another metric", got=oracles.metric, expected=runner.objective.metric)
    names = _names(tasks, generators, oracles, runner)
    chosen = _known(methods, names) if methods else names
    wanted = [name for name in ("base", "oracle") if name in names and name not in chosen] + chosen
    reproduction = None
    if reproduce and isinstance(oracles, AdapterBank) and all(task.key in oracles for task in tasks):
        reproduction = Reproduction(oracles, [task.key for task in tasks])
    fixed = 1 if not runner.objective.draws_when_scoring else seeds
    total = sum((fixed if name in ("base", "oracle") else seeds) for name in wanted) * len(tasks)
    scores = Scores(tuple(tasks), runner.objective.metric)
    with progress_bar(total=total, desc="evaluating", disable=quiet, every=_EVERY) as bar:
        scorer = Scorer(runner, longer_prompts(runner, base), limit, write, bar)
        for seed in range(seeds):
            rows = _Rows(tuple(tasks), generators, oracles, scorer, seed, reproduction)
            for name in wanted:
                if seed < fixed or name not in ("base", "oracle"):
                    bar.set_postfix(method=name, seed=seed)
                    rows.score(name, scores)
    baselines, learned = baseline_rows(generators), learned_rows(generators)
    report: dict[str, Any] = {
        "suite": "+".join(sorted({task.suite for task in tasks})),
        "metric": runner.objective.metric,
        "examples": limit,
        "seeds": seeds,
        "tasks": list(tasks.names),
        "methods": {name: summarise(scores, name) for name in chosen},
        "differences": differences(scores, {name: _rivals(name, baselines, scores) for name in chosen if name in learned}),
    }
    if reproduction is not None:
        report["reproduction"] = reproduction.report(generators, {name: scores.mean(name) for name in wanted}, scores.mean("oracle"))
    return report


def baseline_rows(generators: Mapping[str, Sequence[LoraGenerator]]) -> list[str]:
    """Rows of generators that are baselines, in the ladder's order."""
    return [name for name, group in generators.items() if group[0].method.baseline]


def learned_rows(generators: Mapping[str, Sequence[LoraGenerator]]) -> list[str]:
    """Rows of generators that claim to have learned from descriptions, and so owe the shuffled and the junk control."""
    return [name for name, group in generators.items() if not group[0].method.baseline]


def shown_descriptions(tasks: Iterable[Task], seed: int) -> list[str]:
    """The description of each task that generators are shown for a seed: of a training task, one that is kept for evaluation."""
    shown = [(task.eval_descriptions or task.descriptions) for task in tasks]
    return [texts[seed % len(texts)] for texts in shown]


def _shared_base(generators: Mapping[str, Sequence[LoraGenerator]]) -> BankBase:
    """The base model, layout and objective of all generators."""
    everything = [one for group in generators.values() for one in group]
    if not everything or any(one.base != everything[0].base for one in everything):
        raise ConfigError("generators must share one base model, layout and objective")
    return everything[0].base


def _check_oracles(oracles: Oracles, base: BankBase, tasks: TaskSuite) -> None:
    if isinstance(oracles, OracleScores):
        if not oracles.covers(tasks):
            raise BankError("the oracles' scores lack tasks", got=f"all {len(tasks)} such as {tasks.names[0]}")
        return
    if oracles.base.layout != base.layout or not base.model.has_identity(oracles.base.identity):
        raise BankError("the oracles are of another base model or layout", got=oracles.base.model.name, expected=base.model.name)
    if not any(task.key in oracles for task in tasks):
        raise BankError("the oracle bank lacks tasks", got=f"all {len(tasks)} such as {tasks.names[0]}")


def _known(methods: Sequence[str], names: Sequence[str]) -> list[str]:
    """The methods, each of which is a row that takes no training, or one that takes a number of examples."""
    unknown = [name for name in methods if name not in names and not (WITH_EXAMPLES.fullmatch(name) and "few_shot" in names)]
    if unknown:
        raise ConfigError("methods: cannot be scored here", got=", ".join(unknown), expected=", ".join([*names, "few_shot_K", "fresh_K"]))
    return list(methods)


def _names(tasks: TaskSuite, generators: Mapping[str, Sequence[LoraGenerator]], oracles: Oracles | None, runner: Runner) -> list[str]:
    """All rows that take no training, in order."""
    texts = all(task.inputs == "text" for task in tasks)
    prompts = texts and runner.objective.generates and runner.objective.reads_texts
    names = ["base"]
    names += ["base_prompted"] if texts else []
    names += ["few_shot"] if prompts and all(task.split("train") for task in tasks) else []
    names.append("random_init")
    names += generators
    for name in learned_rows(generators):
        names += [f"{name}_shuffled"] if len(tasks) > 1 else []
        names.append(f"{name}_junk")
        names += [f"{name}_prompted"] if prompts else []
    return names + (["oracle"] if oracles is not None else [])


def _rivals(name: str, baselines: Sequence[str], scores: Scores) -> list[str]:
    """What the score of a generator is compared with: its controls, what takes no generator, all baselines, and the oracle."""
    controls = [f"{name}_shuffled", f"{name}_junk", f"{name}_prompted"]
    numbered = [other for other in scores.rows if other == "few_shot" or WITH_EXAMPLES.fullmatch(other)]
    rivals = (*controls, "base_prompted", *numbered, "random_init", *baselines, "oracle")
    return [other for other in rivals if other in scores.rows]


class _Rows:
    """Scores rows for one seed. Adapters that several rows need are made once."""

    def __init__(
        self,
        tasks: tuple[Task, ...],
        generators: Mapping[str, Sequence[LoraGenerator]],
        oracles: Oracles | None,
        scorer: Scorer,
        seed: int,
        reproduction: Reproduction | None,
    ) -> None:
        self.tasks, self.generators, self.oracles, self.scorer, self.seed = tasks, generators, oracles, scorer, seed
        self.reproduction = reproduction
        self.shown = shown_descriptions(tasks, seed)
        self.learned = learned_rows(generators)
        self.subject = next(iter(self.learned or generators))  # whose size an untrained adapter has
        self._kept: dict[str, list[LoraAdapter]] = {}

    def score(self, name: str, scores: Scores) -> None:
        """Scores one row, and adds it."""
        if name == "oracle" and isinstance(self.oracles, OracleScores):
            metric, known = self.oracles.metric, self.oracles.scores
            scores.add(name, {task.name: {metric: known[task.name]} for task in self.tasks if task.name in known})
            self.scorer.bar.update(len(self.tasks))
            return
        tasks, adapters, prompted = self._requests(name)
        if self.reproduction is not None and name in self.generators and adapters is not None:
            self.reproduction.add(name, adapters)
        of_tasks = self.scorer.score(adapters, tasks, self.seed, prompted)
        self.scorer.bar.update(len(self.tasks) - len(tasks))  # those without an oracle
        if self.seed == 0:
            scores.prompt_tokens[name] = self.scorer.prompt_tokens(tasks, prompted)
        scores.add(name, {task.name: one for task, one in zip(tasks, of_tasks, strict=True)})

    def _requests(self, name: str) -> tuple[Sequence[Task], list[LoraAdapter] | None, bool]:
        """Tasks of a row, its adapters, and whether the tasks' inputs are prompts."""
        examples = WITH_EXAMPLES.fullmatch(name)
        if name == "base":
            return self.tasks, None, False
        if name == "oracle" and isinstance(self.oracles, AdapterBank):
            with_oracle = [task for task in self.tasks if task.key in self.oracles]
            return with_oracle, [self.oracles.adapter(task.key) for task in with_oracle], False
        if name == "base_prompted":
            return self._prompted(), None, True
        if name == "few_shot" or examples and examples[1] == "few_shot":
            count = int(examples[2]) if examples else _SHOTS
            said = zip(self.tasks, self.shown, strict=True)
            return [with_shots(task, text, count, self.seed) for task, text in said], None, True
        if examples:
            rank = self.generators[self.subject][0].rank
            fresh = train_fresh(self.scorer.runner, self.tasks, int(examples[2]), rank, self.seed, self.scorer.bar)
            return self.tasks, fresh, False
        if name == "random_init":
            return self.tasks, [random_like(one, self.seed) for one in self._matched(self.subject)], False
        if name in self.generators:
            prompted = self._made(name).method.prompted
            return self._prompted() if prompted else self.tasks, self._matched(name), prompted
        source, _, control = name.rpartition("_")
        if control == "prompted":
            return self._prompted(), self._matched(source), True
        return self.tasks, self._generate(source, (_shuffled if control == "shuffled" else _junk)(self.shown, self.seed)), False

    def _prompted(self) -> list[Task]:
        return [with_description(task, [text]) for task, text in zip(self.tasks, self.shown, strict=True)]

    def _made(self, source: str) -> LoraGenerator:
        return self.generators[source][self.seed % len(self.generators[source])]

    def _matched(self, source: str) -> list[LoraAdapter]:
        """What a generator makes of the tasks' own descriptions; kept if further rows need it."""
        if source in self._kept:
            return self._kept[source]
        adapters = self._generate(source, self.shown)
        if source in self.learned or source == self.subject:
            self._kept[source] = adapters
        return adapters

    def _generate(self, source: str, texts: Sequence[str]) -> list[LoraAdapter]:
        adapters = []
        for adapter in self._made(source).generate_many(texts, seed=self.seed, on_unknown="ignore"):
            adapters.append(adapter)
            self.scorer.bar.update(0)
        return adapters


def _shuffled(texts: list[str], seed: int) -> list[str]:
    """Gives each task the description of another: a rotation of a random order leaves none in its place."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    moved = dict(zip(order, order[1:] + order[:1], strict=True))
    return [texts[moved[i]] for i in range(len(texts))]


def _junk(texts: list[str], seed: int) -> list[str]:
    return [JUNK[(i + seed) % len(JUNK)] for i in range(len(texts))]
