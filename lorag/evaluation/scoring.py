"""Score adapters on tasks: several at once, of about one length, with progress shown after every few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorag.adapters.factors import Factors
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import BankBase
    from lorag.progress import Bar
    from lorag.tasks.suite import Task

__all__ = ["MEASURES", "Scorer", "longer_prompts"]

MEASURES = ("balanced_accuracy", "lenient_match", "rouge_l", "macro_f1")  # reported beside an objective's own metric
_TASKS, _CHARACTERS = 32, 40_000  # that are scored between two signs of life
_MOST_TOKENS = 2048  # of a prompt with examples


@dataclass(frozen=True)
class Scorer:
    """Scores adapter number i on task number i.

    Attributes:
        runner: The base model.
        prompted: The same model with room for prompts that hold a description and examples.
        limit: Most test examples of each task.
        write: Whether answers are written out for all tasks, and not only where the text is free: for lenient match.
        bar: Advances by one for each task.
    """

    runner: Runner
    prompted: Runner
    limit: int
    write: bool
    bar: Bar

    def score(self, adapters: Sequence[LoraAdapter] | None, tasks: Sequence[Task], seed: int, prompted: bool) -> list[dict[str, float]]:
        """The objective's scores of each task, in order.

        Args:
            adapters: As many as tasks, or None for the bare base model.
            tasks: n tasks.
            seed: Of what an objective draws.
            prompted: Whether inputs hold more than an input.
        """
        runner = self.prompted if prompted else self.runner
        scores: dict[int, dict[str, float]] = {}
        for chunk in _chunks(tasks, self.limit):
            stacked = None if adapters is None else Factors.stack([adapters[i].factors for i in chunk], runner.device)
            of_chunk = [replace(tasks[i], free_text=tasks[i].free_text or self.write) for i in chunk]
            scores |= zip(chunk, runner.scores(stacked, of_chunk, limit=self.limit, seed=seed), strict=True)
            self.bar.update(len(chunk))
        return [scores[i] for i in range(len(tasks))]

    def prompt_tokens(self, tasks: Sequence[Task], prompted: bool) -> float | None:
        """Mean number of tokens of a request; None if the objective's requests are not prompts."""
        objective = (self.prompted if prompted else self.runner).objective
        if not (objective.generates and objective.reads_texts):
            return None
        counts = [objective.prompt_tokens([example.input for example in task.split("test")[: self.limit]]) for task in tasks]
        means = [sum(of_task) / len(of_task) for of_task in counts if of_task]
        return round(sum(means) / len(means), 1) if means else None


def longer_prompts(runner: Runner, base: BankBase) -> Runner:
    """The same base model with an objective that takes prompts as long as the model reads, at most 2,048 tokens.

    An objective whose inputs are not prompts stays as it is.
    """
    if not (runner.objective.generates and runner.objective.reads_texts):
        return runner
    most = base.settings.get("max_length", runner.objective.max_length)
    positions = getattr(runner.model.config, "max_position_embeddings", None) or _MOST_TOKENS
    room = max(most, min(_MOST_TOKENS, positions - most - 1))  # answers have as much room as they had
    settings = {**base.settings, "max_length": room}
    return Runner(runner.model, runner.layout, make_objective(base.objective, base.model.tokenizer(), settings))


def _chunks(tasks: Sequence[Task], limit: int) -> Iterator[list[int]]:
    """Numbers of tasks, those of about one length together, so many that a chunk takes a few seconds."""
    sizes = [sum(len(str(e.input)) + len(e.output) for e in task.split("test")[:limit]) for task in tasks]
    chunk: list[int] = []
    for number in sorted(range(len(tasks)), key=lambda i: sizes[i]):
        if chunk and (len(chunk) == _TASKS or sum(sizes[i] for i in chunk) + sizes[number] > _CHARACTERS):
            yield chunk
            chunk = []
        chunk.append(number)
    if chunk:
        yield chunk
