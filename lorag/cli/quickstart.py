"""The main job in one go on the embedded worlds: train a generator, use it on unseen descriptions, and check that it works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorag.adapters.factors import Factors
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner
from lorag.config import load_config
from lorag.evaluation.folders import open_ladder
from lorag.evaluation.ladder import format_table
from lorag.generator.generate import generate_loras, open_generator
from lorag.tasks.finding import find_tasks
from lorag.training.train import TrainConfig, train

__all__ = ["quickstart", "show_real_model"]

_METHODS = ("base", "mean", "multitask", "nearest", "top_k", "ridge", "house", "house_shuffled", "house_junk", "oracle")
_SHOWN = 3
_REAL, _WORDS = "smollm2", 32
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
    tokenizer = generator.base.model.tokenizer()
    objective: Any = make_objective(generator.base.objective, tokenizer, generator.base.settings)
    for text, task, adapter in zip(texts, tasks, adapters, strict=False):
        example = task.split("test")[0]
        with torch.inference_mode():
            plain = objective.generate(generator.base.model.load(config.device), [example.input])[0]
            answer = objective.generate(adapter.apply_to(generator.base.model.load(config.device)), [example.input])[0]
        yield f'   "{text}"'
        yield f"     text      {example.input}"
        yield f"     base      {plain}"
        yield f"     adapted   {answer}"
        yield f"     right     {example.output}"
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
    runner = Runner.open(generator.base, dtype="bfloat16")
    suite = find_tasks(_REAL, "unseen_task")
    for number, name in enumerate(_REAL_TASKS):
        task = suite[name]
        description, text = task.descriptions[0], task.split("test")[0]
        adapter = generator.generate(description, on_unknown="ignore")
        if number == 0:
            adapter.save_pretrained(out)
        stacked = Factors.stack([adapter.factors], runner.device)
        answers = {
            "base": runner.generate([text.input], max_new_tokens=_WORDS),
            "prompted": runner.generate([f"{description}\n\n{text.input}"], max_new_tokens=_WORDS),
            "adapted": runner.generate([text.input], stacked, max_new_tokens=_WORDS),
        }
        yield f'   "{description}"'
        yield f"     text      {_one_line(text.input)}"
        for label, (answer,) in answers.items():
            yield f"     {label:<9} {_one_line(answer)}"
        yield f"     right     {_one_line(text.output)}"
    yield f'   {out}: the first of them, for PEFT\n\nnext: lorag generate "your description" --generator {_REAL} --out my-adapter'


def _one_line(text: str, most: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
