"""What an objective is: how tasks are sampled, learned and scored with one kind of base model.

Everything runs n tasks at once: a batch holds equal runs of rows, one run per task, so that `RowAdapters` can give each
task its own adapter.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.base.row_adapters import Cores, RowAdapters, Stacked
from lorag.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorag.tasks.suite import Example, Task

__all__ = ["Objective", "select", "take", "task_rng", "test_examples", "training_examples"]


def take(adapters: Stacked | Cores | None, start: int, end: int) -> Stacked | Cores | None:
    """Adapters `start` to `end` of a stack."""
    if adapters is None:
        return None
    if isinstance(adapters, Cores):
        return Cores(adapters.bases_in, {name: m[start:end] for name, m in adapters.values.items()}, adapters.bases_out)
    return {name: (a[start:end], b[start:end]) for name, (a, b) in adapters.items()}


def select(adapters: Stacked | Cores | None, indices: Sequence[int]) -> Stacked | Cores | None:
    """Adapters of a stack by their numbers, in that order; differentiable. A single one serves all tasks."""
    if adapters is None:
        return None
    values = adapters.values if isinstance(adapters, Cores) else adapters
    first: Any = next(iter(values.values()))
    count, device = (first[0] if isinstance(first, tuple) else first).shape[0], (first[0] if isinstance(first, tuple) else first).device
    if count == 1 or list(indices) == list(range(count)):
        return adapters
    rows = torch.tensor(list(indices), device=device)
    if isinstance(adapters, Cores):
        return Cores(adapters.bases_in, {name: m[rows] for name, m in adapters.values.items()}, adapters.bases_out)
    return {name: (a[rows], b[rows]) for name, (a, b) in adapters.items()}


class Objective(abc.ABC):
    """How tasks are learned and scored with one kind of base model.

    Attributes:
        name: Its key in `OBJECTIVES`.
        kind: The kind of base model that it needs.
        metric: The score that evaluations report.
        tokenizer: The base model's.
        generates: Whether it writes answers (`generate`); what does not chooses among candidates by `hidden`.
        reads_texts: Whether inputs are texts, which a user can type.
        needs_processor: Whether it takes a processor, which reads images, instead of a tokenizer.
        closed_labels: Whether a task's outputs are a closed set of labels.
        draws_when_scoring: Whether the scores of one adapter depend on the seed.
        word_for_word: Whether `metric` is exact match, so that an adapter that scores 1 on its training examples has learned them.
    """

    name: str
    kind: str
    metric: str
    generates = False
    reads_texts = True
    needs_processor = False
    closed_labels = False
    draws_when_scoring = False
    word_for_word = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again, without the tokenizer."""

    @abc.abstractmethod
    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> Any:  # noqa: ANN401 - its own batch
        """Draws a training batch of `count` examples per task from the tasks' training split.

        What is drawn for a task depends on the seed and the task alone, not on the tasks beside it.
        """

    def sample_parts(self, tasks: Sequence[Task], count: int, seed: str, most: int | None = None) -> list[tuple[list[int], Any]]:
        """What `sample` draws, in parts that are best run one after the other: the tasks of each, and its batch.

        Args:
            tasks: The tasks.
            count: Examples of each.
            seed: Of what is drawn.
            most: About how many tokens a part may have, if the objective can tell; None sets no bound.
        """
        return [(list(range(len(tasks))), self.sample(tasks, count, seed))]

    @abc.abstractmethod
    def losses(self, model: PreTrainedModel, batch: Any) -> Tensor:  # noqa: ANN401 - its own batch
        """Mean loss of each task (n,) in a batch; the model's rows are already adapted."""

    @abc.abstractmethod
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """What the model makes of inputs: one vector per row (b, h), of which ICM-LoRA's task vector is the mean."""

    @abc.abstractmethod
    def scores(
        self, rows: RowAdapters, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0
    ) -> list[dict[str, float]]:
        """Scores adapter number i on the test split of task number i.

        Args:
            rows: The base model.
            adapters: n adapters, or None for the bare base model.
            tasks: n tasks.
            limit: Most test examples used of each task.
            seed: Seed of what an objective draws, such as the labelled texts of prototypes.
        """

    def read(self, inputs: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments with which the model reads inputs, and which tokens (b, t) are of an input's own.

        Raises:
            ConfigError: If this objective's inputs are not read token by token.
        """
        raise ConfigError(f"objective {self.name} does not read inputs token by token", expected="a causal language model")

    def read_pairs(self, model: PreTrainedModel, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """What the model makes of each (input, output), the output being read and not written: one vector per pair (p, v).

        Raises:
            ConfigError: If this objective's outputs are not read after their inputs.
        """
        raise ConfigError(f"objective {self.name} does not read pairs", expected="a causal language model")

    def generate(self, model: nn.Module, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to inputs, one per row, of at most `max_new_tokens` tokens.

        Raises:
            ConfigError: If this objective writes no answers.
        """
        raise ConfigError(f"objective {self.name} writes no answers", expected="an objective that generates text")

    def judge(self, model: PreTrainedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
        """Of each (input, answer): whether each token of the answer is the likeliest, and its log-likelihood; the last one ends it.

        Raises:
            ConfigError: If this objective writes no answers.
        """
        raise ConfigError(f"objective {self.name} writes no answers", expected="an objective that generates text")

    def prompt_tokens(self, inputs: Sequence[str]) -> list[int]:
        """Tokens of the prompt of each input.

        Raises:
            ConfigError: If this objective has no prompts of text.
        """
        raise ConfigError(f"objective {self.name} has no prompts", expected="an objective of texts that generates text")

    def check_examples(self, task: Task) -> None:
        """Raises TaskError unless the training examples of a task suffice to learn from."""
        training_examples(task)


def task_rng(task: Task, seed: str) -> random.Random:
    """The stream of choices of one task; not a torch generator, because only Python lists are drawn from."""
    return random.Random(f"{seed}/{task.name}")


def training_examples(task: Task) -> tuple[Example, ...]:
    """Training examples of a task, of which there must be some."""
    examples = task.split("train")
    if not examples:
        raise TaskError(f"task {task.name!r} has no training examples")
    return examples


def test_examples(task: Task, limit: int) -> list[Example]:
    """The first `limit` test examples of a task, of which there must be some."""
    examples = list(task.split("test")[:limit])
    if not examples:
        raise TaskError(f"task {task.name!r} has no test examples")
    return examples
