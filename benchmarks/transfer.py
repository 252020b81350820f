"""What a bank keeps on another base model: `python -m benchmarks.transfer PART --work DIR`, on the sandbox.

`relatives`: copies of 24 experts on bases that were trained on further, by the cosine of the weights; with `--bank DIR --suite smollm2`
of a bank of SmolLM2, and beside them what its generator writes for labels that it never saw. `other`: a base of another width, depth and
seed is trained, and 24 experts come to it by the old experts' answers to the tasks' own inputs, by answers to one text file for all tasks,
and from labels. Exact match on 16 test texts of each task; intervals by bootstrap over tasks.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, find_bank
from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.bank.transferring import AnswerConfig, TransferConfig, task_inputs, transfer_bank
from lorag.base.base_model import BaseModel
from lorag.base.runner import Runner
from lorag.evaluation.statistics import bootstrap
from lorag.generator.generate import open_generator
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task, TaskSuite
from lorag.worlds.sandbox.base_lm import PretrainConfig, pretrain
from lorag.worlds.sandbox.grid import build_suite, splits

# Small enough for minutes of one core: the shipped base is 128 wide, 4 deep, and saw 32 texts per step.
OTHER = PretrainConfig(hidden_size=96, intermediate_size=288, layers=5, heads=4, steps=1000, texts=8, seed=1)
# As the shipped experts were trained.
EXPERTS = ExpertConfig(
    ["q_proj", "v_proj", "down_proj"],
    ranks=[4],
    group=24,
    steps=80,
    weight_decay=6.0,
    initial_scale=0.1,
    checkpoints=1,
    precision="float16",
    test_limit=0,
)
_MOVES = ((3e-4, 10), (5e-4, 10), (1e-3, 10), (1e-3, 40))  # rate and steps of training on


def chosen(suite: TaskSuite, count: int, seed: int) -> TaskSuite:
    """Some tasks of a suite, drawn among all."""
    return suite.select(sorted(random.Random(seed).sample(suite.names, count)))


def scores(bank: AdapterBank, base: BaseModel, tasks: Sequence[Task], *, bare: bool = False) -> torch.Tensor:
    """Exact match (n,) of each task's expert on a base; of experts that the bank lacks, that of the bare base."""
    zero = Factors.zeros(bank.base.layout)
    parts = [zero if bare or task.key not in bank else bank.adapter(task.key).factors for task in tasks]
    return _exact(Runner.open(replace(bank.base, model=base), "cpu"), parts, tasks)


def _exact(runner: Runner, parts: Sequence[Factors], tasks: Sequence[Task]) -> torch.Tensor:
    return torch.tensor([one["exact_match"] for one in runner.scores(Factors.stack(parts), tasks, limit=16)])


def share(values: torch.Tensor, floor: torch.Tensor, whole: torch.Tensor) -> str:
    """The share of the experts' gain that is kept, with an interval over tasks."""
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (2000, len(values)), generator=rng)
    shares = ((values - floor)[picks].mean(1) / (whole - floor)[picks].mean(1)).sort().values
    point = ((values - floor).mean() / (whole - floor).mean()).item()
    return f"{point:.3f} ({shares[50]:.3f} to {shares[1949]:.3f})"


def line(name: str, values: torch.Tensor, floor: torch.Tensor, whole: torch.Tensor) -> None:
    """Prints a row: mean score with its interval, and the share kept."""
    low, high = bootstrap(values.double())
    print(f"{name:44} {values.mean():.3f} ({low:.3f} to {high:.3f})   kept {share(values, floor, whole)}", flush=True)


def moved(folder: Path, bank: AdapterBank, suite: TaskSuite, rate: float, steps: int) -> BaseModel:
    """A bank's base, trained on with all weights on a suite's examples without instructions."""
    if not (folder / "model.safetensors").exists():
        runner, rng = Runner.open(bank.base, "cpu"), random.Random(1)
        model = runner.model.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        for step in range(steps):
            batch = runner.objective.sample(rng.sample(suite.tasks, 32), 2, f"move/{step}")
            optimizer.zero_grad()
            runner.objective.losses(model, batch).mean().backward()
            optimizer.step()
        model.to(torch.bfloat16).save_pretrained(folder)
        bank.base.model.tokenizer().save_pretrained(folder)
    return BaseModel(str(folder), "causal_lm")


def merged(folder: Path, bank: AdapterBank, expert: str, strength: float) -> BaseModel:
    """A bank's base with one of its experts merged in, at some strength."""
    if not (folder / "model.safetensors").exists():
        model = bank.base.model.load("cpu")
        with torch.no_grad():
            for name in bank.base.layout.names:
                weight: torch.Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
                weight += strength * bank.adapter(expert).delta(name)
        model.save_pretrained(folder)
        bank.base.model.tokenizer().save_pretrained(folder)
    return BaseModel(str(folder), "causal_lm")


def relatives(
    work: Path,
    bank: AdapterBank,
    suite: TaskSuite,
    tasks: TaskSuite,
    moves: Sequence[tuple[float, int]],
    merges: Sequence[float],
    generator: str | None,
) -> None:
    """Copies on bases that moved, with what a transfer says of them.

    Args:
        work: Gets bases and banks.
        bank: The old bank.
        suite: What bases are trained on with.
        tasks: Of experts of the bank.
        moves: Rate and steps of each base that is trained on.
        merges: Strength of each base that has another expert merged in.
        generator: Whose adapters for unseen labels are copied too.
    """
    names, dtype = [task.key for task in tasks], "auto" if generator is None else "fast"
    generated: list[tuple[str, Sequence[Task], Sequence[Factors]]] = []
    if generator is not None:
        opened, labels = open_generator(generator), find_tasks(generator, "unseen_label").tasks[: len(tasks)]
        generated = [("generated", labels, [opened.generate(task.descriptions[0], on_unknown="ignore").factors for task in labels])]
    zero, whole = Factors.zeros(bank.base.layout), dict[str, torch.Tensor]()

    def show(base: BaseModel, source: AdapterBank) -> None:
        """What adapters reach on a base, beside the bare one; what they reach on the base that comes first is the whole."""
        runner = Runner.open(replace(bank.base, model=base), "cpu", dtype)
        for name, some, parts in [("experts", tasks.tasks, [source.adapter(name).factors for name in names]), *generated]:
            values = _exact(runner, parts, some)
            line(f"  {name}", values, _exact(runner, [zero] * len(some), some), whole.setdefault(name, values))

    print("the old base itself")
    show(bank.base.model, bank)
    bases = {
        f"trained on, rate {rate:g}, {steps} steps": moved(work / f"moved-{rate:g}-{steps}", bank, suite, rate, steps)
        for rate, steps in moves
    }
    stranger = next(name for name in bank.names if name not in names)
    for strength in merges:
        bases[f"another expert merged in, {strength:g} of it"] = merged(work / f"merged-{strength:g}", bank, stranger, strength)
    config = TransferConfig(AnswerConfig(inputs=16))
    inputs = task_inputs(tasks, names)
    for number, (name, base) in enumerate(bases.items()):
        out = work / f"copied-{number}"
        done = transfer_bank(bank, out, base, by="copy", inputs=inputs, names=names, config=config, device="cpu", dtype=dtype)
        print(f"{name}: cosine {done.likeness.similarity:.4f}, moved {done.moved:.2f}, agreement {done.agreement:.3f}")
        show(base, done.bank)


def other(work: Path, tasks: TaskSuite, seed: int, keeps: Sequence[float], kinds: Sequence[str], lines: int) -> None:
    """A base of other shapes: answers to the tasks' own inputs, to four times as many of them, to a file's, and labels."""
    trained, bank = work / "other-base", find_bank("sandbox")
    if not (trained / "model.safetensors").exists():
        pretrain(trained, OTHER)
    base, names = BaseModel(str(trained), "causal_lm"), [task.key for task in tasks]
    recipe = replace(EXPERTS, seed=seed)
    labels = build_bank(work / f"labels-{seed}", tasks, base, "causal_lm", bank.base.settings, recipe, device="cpu")
    floor, whole = scores(labels, base, list(tasks), bare=True), scores(labels, base, list(tasks))
    line("bare base", floor, floor, whole)
    line("experts from 96 labelled examples", whole, floor, whole)
    own = task_inputs(tasks, names)
    texts = task_inputs(find_tasks("sandbox", "train"), bank.names).values()
    every = sorted({text for own_texts in texts for text in own_texts[:lines]})  # twelve domains, of which a task has one
    cells = tuple(cell for cell in splits()["train"] if cell.name in names)
    more = task_inputs(build_suite(cells, train=384, test=0, descriptions=1, wording="train"), names)
    sources: dict[str, Mapping[str, Sequence[str]]] = {"own": own, "more": more, "file": {name: every for name in names}}
    for source in kinds:
        for keep in keeps:
            folder = work / f"{source}-{seed}-{keep:g}-{lines}"
            done = transfer_bank(
                bank,
                folder,
                base,
                inputs=sources[source],
                names=names,
                config=TransferConfig(AnswerConfig(128 * lines, keep), replace(recipe, test_limit=32)),
                device="cpu",
                quiet=False,
            )
            right = [_precision(folder, task) for task in tasks] if source == "own" else []
            precise = f", answers right {sum(right) / len(right):.3f}" if right else ""
            values = scores(done.bank, base, list(tasks))
            kept, asked = (sum(counts) / len(tasks) for counts in zip(*done.kept.values(), strict=True))
            print(f"{asked:.0f} inputs, {kept:.0f} answers kept, agreement with old answers {done.agreement:.3f}{precise}")
            line(f"answers to {source} inputs, keep {keep:g}", values, floor, whole)


def _precision(folder: Path, task: Task) -> float:
    """The share of an old expert's answers that are the labels, which no step of the transfer saw."""
    truth = {example.input: example.output for example in task.split("train")}
    answers = json.loads((folder / "answers" / f"{task.key}.json").read_text(encoding="utf-8"))["answers"]
    return sum(truth[one["input"]] == one["output"] for one in answers) / len(answers)


def _move(text: str) -> tuple[float, int]:
    rate, _, steps = text.partition(":")
    return float(rate), int(steps)


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("part", choices=["relatives", "other"])
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", nargs="+", choices=["own", "more", "file"], default=["own", "file"])
    parser.add_argument("--lines", type=int, default=1, help="texts of the file from each task, and 128 times as many inputs at most")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--bank", default="sandbox", help="of relatives")
    parser.add_argument("--suite", default="sandbox", choices=["sandbox", "smollm2"], help="of relatives: the tasks of its experts")
    parser.add_argument(
        "--moves", nargs="*", type=_move, default=_MOVES, help="of relatives: RATE:STEPS by which all weights are trained on"
    )
    parser.add_argument("--merges", nargs="*", type=float, default=[1.0], help="of relatives: strength of another expert that is merged in")
    given = parser.parse_args()
    suite = find_tasks(given.suite, "train")
    if given.part == "relatives":
        bank = find_bank(given.bank)
        held = chosen(suite.select([task.name for task in suite if task.key in bank]), given.tasks, given.seed)
        relatives(given.work, bank, suite, held, given.moves, given.merges, None if given.suite == "sandbox" else given.suite)
    else:
        other(given.work, chosen(suite, given.tasks, given.seed), given.seed, given.keep, given.inputs, given.lines)


if __name__ == "__main__":
    main()
