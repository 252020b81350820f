"""A few examples, if there are some: gradient steps on them from a generated adapter."""

from __future__ import annotations

from collections.abc import Sequence

from lorag.adapter import LoraAdapter
from lorag.errors import TaskError
from lorag.experts import ExpertConfig, train_group
from lorag.objectives import Objective
from lorag.row_adapters import RowAdapters
from lorag.tasks import Example, Task

__all__ = ["check_examples", "refine"]

_RATE = 3e-3
_BATCH = 8


def check_examples(examples: Sequence[tuple[str, str]], refine_steps: int) -> list[tuple[str, str]]:
    """Checked examples.

    Raises:
        TaskError: If one is no pair of texts, or if steps are asked for without examples.
    """
    if refine_steps < 0:
        raise TaskError("refine_steps must not be negative", got=refine_steps)
    if isinstance(examples, str | bytes):
        raise TaskError("examples must be a list of (input, output)", got=type(examples).__name__)
    for number, pair in enumerate(examples):
        fits = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        if not fits:
            raise TaskError(f"examples[{number}] cannot be used", got=repr(pair)[:80], expected='("an input", "its output")')
    if refine_steps and not examples:
        raise TaskError("refine_steps needs examples", remedy="Give examples=[(input, output), …], or refine_steps=0.")
    return [(text, answer) for text, answer in examples]


def refine(
    rows: RowAdapters,
    objective: Objective,
    adapter: LoraAdapter,
    examples: Sequence[tuple[str, str]],
    steps: int,
    seed: int = 0,
    learning_rate: float = _RATE,
) -> LoraAdapter:
    """Trains an adapter further on a few examples, as experts are trained but at a lower rate.

    Args:
        rows: The base model.
        objective: How tasks are learned.
        adapter: Where to start.
        examples: (input, output) of the task. A label is an output.
        steps: Gradient steps.
        seed: Seed of sampling.
        learning_rate: Peak rate of Adam.

    Returns:
        The refined adapter, of scaling 1.
    """
    labels = tuple(dict.fromkeys(answer for _, answer in examples)) if objective.kind == "encoder" else None
    known = tuple(Example(text, answer, "train") for text, answer in examples)
    task = Task("examples", "user", ("a few examples",), labels, "unknown", "the user", known)
    config = ExpertConfig(steps=steps, batch=_BATCH, learning_rate=learning_rate, checkpoints=1, seed=seed)
    ((refined,),) = train_group(rows, objective, [task], adapter.rank, config, start=[adapter])
    return LoraAdapter(adapter.layout, refined.factors, refined.alpha, adapter.base_model, adapter.task_type)
