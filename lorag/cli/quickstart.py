"""The main job in one go on the embedded worlds: train a generator, use it on unseen descriptions, and check that it works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorag.base.runner import Runner
from lorag.config import load_config
from lorag.evaluation.folders import open_ladder
from lorag.evaluation.side_by_side import side_by_side
from lorag.evaluation.tables import format_table, interval
from lorag.files.artifacts import embedded, read_json
from lorag.generator.generate import generate_loras, open_generator
from lorag.tables import Table, render
from lorag.tasks.finding import find_tasks
from lorag.training.train import TrainConfig, train

if TYPE_CHECKING:
    from lorag.tasks.suite import Example

__all__ = ["quickstart", "shipped_ladder", "show_real_model"]

_METHODS = ("base", "mean", "multitask", "nearest", "top_k", "ridge", "house", "house_shuffled", "house_junk", "oracle")
_SHOWN = 3
_REAL, _LABELS, _WORDS = "smollm2", "unseen_label", 32
_REAL_TASKS = ("clickbait_is_clickbait", "address_city", "legal_plain_summary")  # of sources that nothing in training shares


def quickstart(out: Path, *, quiet: bool = False) -> Iterator[str]:
    """Runs the main job and yields what there is to read.

    Args:
        out: Folder that gets the trained generator and an adapter.
        quiet: No progress bars.
    """
    yield "1. Train a generator from the embedded bank of experts"
    config = load_config(TrainConfig, "quick", [f"out={out / 'generator'}"])
    generator = train(config, quiet=quiet)
    yield f"   {out / 'generator'}: {len(generator.conditioner.names)} experts seen, validation in metrics.jsonl\n"
    yield "2. Generate adapters for descriptions of tasks that no expert was trained on, and load them into the base model"
    held_out = find_tasks("sandbox", "test")
    tasks = [
        held_out["legal-summarise-plain"],
        *[task for task in held_out if task.name != "legal-summarise-plain"][:: len(held_out) // _SHOWN],
    ]
    texts = ["summarise legal text", *[task.descriptions[0] for task in tasks[1 : _SHOWN + 1]]]
    adapters = generate_loras(texts, generator=generator)
    runner = Runner.open(generator.base, config.device)
    for text, task, adapter in zip(texts, tasks, adapters, strict=False):
        example = task.split("test")[0]
        with torch.inference_mode():
            adapted = adapter.apply_to(generator.base.model.load(config.device))
            answers = {"base": runner.generate([example.input]), "adapter": runner.objective.generate(adapted, [example.input])}
        yield from _answers(text, example, answers)
    folder = adapters[0].save_pretrained(out / "adapter")
    yield f"   {folder}: the first of them, for PEFT\n"
    yield "3. The ladder: every control beside it, on held-out tasks"
    ladder = open_ladder([str(out / "generator")], methods=_METHODS, quiet=quiet)
    report = ladder.evaluate(seeds=1, limit=16, quiet=quiet)
    yield format_table(report)
    yield f'\nnext: lorag generate "your description" --out my-adapter --generator {out / "generator"}\n'
    yield from show_real_model(out / "smollm2-adapter", quiet=quiet)


def show_real_model(out: Path, *, quiet: bool = False) -> Iterator[str]:
    """Generates for real tasks of sources that the shipped SmolLM2 generator never saw, and yields what there is to read.

    Args:
        out: Folder that gets the first adapter.
        quiet: No progress bars.
    """
    yield "4. A real language model: SmolLM2-135M-Instruct, on tasks of sources that its generator never saw"
    generator = open_generator(_REAL)
    runner = Runner.open(generator.base, dtype="fast")
    suite = find_tasks(_REAL, "unseen_task")
    for number, name in enumerate(_REAL_TASKS):
        task = suite[name]
        description, example = task.descriptions[0], task.split("test")[0]
        adapter = generator.generate(description, on_unknown="ignore")
        if number == 0:
            adapter.save_pretrained(out)
        yield from _answers(
            description, example, side_by_side(runner, adapter, [example.input], description=description, max_new_tokens=_WORDS).columns
        )
    yield f"   {out}: the first of them, for PEFT\n"
    yield shipped_ladder()
    yield f'\nnext: lorag generate "your description" --generator {_REAL} --out my-adapter'


def shipped_ladder() -> str:
    """What `lorag evaluate --generator smollm2` measured before it was shipped: on new labels balanced accuracy, otherwise exact match."""
    stored = read_json(embedded(f"data/{_REAL}/ladder.json"))["splits"]
    rows = sorted(
        next(iter(stored.values()))["methods"], key=lambda row: sum(report["methods"][row]["score"] for report in stored.values())
    )

    def shown(row: dict[str, Any], *, labels: bool) -> str:
        of = row["measures"]["balanced_accuracy"] if labels and "measures" in row else row
        return f"{of['score']:.3f}  {interval(of)}"

    cells = [[name, *(shown(report["methods"][name], labels=split == _LABELS) for split, report in stored.items())] for name in rows]
    header = [_REAL, *(f"{split}, {len(report['tasks'])} tasks" for split, report in stored.items())]
    title = "The shipped ladder: tasks that training never saw, exact match (unseen_label: balanced accuracy, of oracles exact match)"
    return render(Table(header, cells, title))


def _answers(description: str, example: Example, answers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What was asked, the one answer of each, and the right one."""
    yield f'   "{description}"'
    for label, text in {"text": example.input, **{name: answer for name, (answer,) in answers.items()}, "right": example.output}.items():
        yield f"     {label:<9} {_one_line(text)}"


def _one_line(text: str, most: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
