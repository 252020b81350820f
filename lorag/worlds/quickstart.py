"""The main job in one go on the embedded default: train a generator, use it on unseen descriptions, and check that it works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorag.base.objectives import make_objective
from lorag.config import load_config
from lorag.evaluation.folders import open_ladder
from lorag.evaluation.ladder import format_table
from lorag.generator.generate import generate_loras
from lorag.tasks.finding import find_tasks
from lorag.training.train import TrainConfig, train

__all__ = ["quickstart"]

_METHODS = ("base", "mean", "multitask", "nearest", "top_k", "ridge", "house", "house_shuffled", "house_junk", "oracle")
_SHOWN = 3


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
    yield f'\nnext: lorag generate "your description" --out my-adapter --generator {out / "generator"}'
