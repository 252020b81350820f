"""Objectives of sentence encoders: a text is classified by its nearest label text, or by its nearest class prototype."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lorag.base.objectives.base import Objective, take, task_rng, test_examples, training_examples
from lorag.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorag.base.row_adapters import Cores, RowAdapters, Stacked
    from lorag.tasks.suite import Task

__all__ = ["LabelMatching", "Prototypes"]


@dataclass(frozen=True)
class _Texts:
    """Rows of texts in equal runs, one run per task, and what is right about them."""

    arguments: dict[str, Tensor]
    tasks: int
    target: Tensor  # (n, q) class of each query
    ways: Tensor  # (n,) classes of each task; runs are padded to the most


class _Encoder(Objective):
    """Mean-pooled, unit-length embeddings, as sentence encoders are used."""

    kind, metric = "encoder", "accuracy"
    closed_labels = True
    _texts_per_class = 1  # what a class needs among the training examples
    rows_at_once = 256

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 64, temperature: float = 0.05) -> None:
        super().__init__(tokenizer, max_length)
        self.temperature = temperature

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        return {"max_length": self.max_length, "temperature": self.temperature}

    def check_examples(self, task: Task) -> None:
        """Raises TaskError unless the training examples of a task tell at least two classes apart."""
        inputs: dict[str, set[str]] = {}
        for example in training_examples(task):
            inputs.setdefault(example.output, set()).add(example.input)
        least = self._texts_per_class
        usable = sum(len(texts) >= least for texts in inputs.values())
        if usable < 2:
            each = "two different inputs each" if least == 2 else "an example each"
            raise TaskError(
                f"the examples are too few for {self.name}",
                got=f"{usable} such of {len(inputs)} outputs",
                expected=f"at least two outputs with {each}",
                remedy="Add examples of other classes, or take refine_steps=0.",
            )

    def _arguments(self, texts: Sequence[str]) -> dict[str, Tensor]:
        read = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return dict(read)

    @staticmethod
    def _embed(model: PreTrainedModel, arguments: dict[str, Tensor]) -> Tensor:
        """Unit-length embeddings (b, e)."""
        on_device = {key: value.to(model.device) for key, value in arguments.items()}
        hidden = model(**on_device).last_hidden_state
        mask = on_device["attention_mask"][..., None].float()
        return F.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """The inputs' embeddings (b, h)."""
        return self._embed(model, self._arguments(inputs))

    def _embed_all(self, rows: RowAdapters, adapters: Stacked | Cores | None, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        """Embeds a list of texts for each adapter: n lists of any lengths to n matrices."""
        vectors = []
        for index, texts in enumerate(groups):
            adapter = take(adapters, index, index + 1)
            # Sorted by length, a batch has little padding.
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            parts = []
            with nullcontext(rows.model) if adapter is None else rows.use(adapter) as model:
                for start in range(0, len(order), self.rows_at_once):
                    chunk = [texts[i] for i in order[start : start + self.rows_at_once]]
                    parts.append(self._embed(model, self._arguments(chunk)))
            embedded = torch.cat(parts)
            vectors.append(embedded[torch.tensor(order, device=embedded.device).argsort()])
        return vectors


def _labels(task: Task) -> tuple[str, ...]:
    if not task.labels or len(task.labels) < 2:
        raise TaskError(f"task {task.name!r} has no closed set of labels", remedy="Use a language-model objective for it.")
    return task.labels


def _by_label(task: Task) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {label: [] for label in _labels(task)}
    for example in training_examples(task):
        groups[example.output].append(example.input)
    return {label: texts for label, texts in groups.items() if texts}


class LabelMatching(_Encoder):
    """The nearest label text wins: cosine between the embeddings of a text and of each label."""

    name = "label_matching"
    _most_labels = 16  # labels seen at once in training: the right ones and random others

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> _Texts:
        """Draws `count` examples per task, with up to 16 of its labels."""
        drawn = []
        for task in tasks:
            rng = task_rng(task, seed)
            examples = rng.choices(training_examples(task), k=count)
            right = list(dict.fromkeys(example.output for example in examples))
            others = [label for label in _labels(task) if label not in right]
            rng.shuffle(others)
            drawn.append((examples, right + others[: max(0, self._most_labels - len(right))]))
        widest = max(len(labels) for _, labels in drawn)
        texts, targets = [], []
        for examples, labels in drawn:
            texts += [example.input for example in examples] + labels + labels[:1] * (widest - len(labels))
            targets.append([labels.index(example.output) for example in examples])
        ways = torch.tensor([len(labels) for _, labels in drawn])
        return _Texts(self._arguments(texts), len(tasks), torch.tensor(targets), ways)

    def losses(self, model: PreTrainedModel, batch: _Texts) -> Tensor:
        """Cross-entropy over cosines divided by the temperature."""
        embedded = rearrange(self._embed(model, batch.arguments), "(n b) e -> n b e", n=batch.tasks)
        count = batch.target.shape[1]
        return _class_losses(embedded[:, :count], embedded[:, count:], batch, self.temperature)

    @torch.inference_mode()
    def scores(
        self, rows: RowAdapters, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0
    ) -> list[dict[str, float]]:
        """Accuracy and macro-F1 over all labels of each task."""
        tests = [test_examples(task, limit) for task in tasks]
        groups = [[e.input for e in test] + list(_labels(task)) for test, task in zip(tests, tasks, strict=True)]
        results = []
        for embedded, test, task in zip(self._embed_all(rows, adapters, groups), tests, tasks, strict=True):
            texts, labels = embedded[: len(test)], embedded[len(test) :]
            guessed = (texts @ labels.T).argmax(-1).tolist()
            right = [_labels(task).index(example.output) for example in test]
            results.append({"accuracy": _accuracy(guessed, right), "macro_f1": _macro_f1(guessed, right)})
        return results


class Prototypes(_Encoder):
    """The nearest prototype wins: a class is the mean embedding of a few labelled texts; label names are never seen."""

    name = "prototypes"
    draws_when_scoring = True
    _texts_per_class = 2  # one for the prototype, and one that should find it

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 64,
        temperature: float = 0.05,
        shots: int = 8,
        draws: int = 5,
        ways: int = 8,
    ) -> None:
        super().__init__(tokenizer, max_length, temperature)
        self.shots, self.draws, self.ways = shots, draws, ways

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        return {**super().settings(), "shots": self.shots, "draws": self.draws, "ways": self.ways}

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> _Texts:
        """Draws an episode per task: up to `ways` classes, `count` supports and `count` queries of each."""
        episodes = []
        for task in tasks:
            rng = task_rng(task, seed)
            groups = {label: texts for label, texts in _by_label(task).items() if len(texts) >= 2}
            chosen = rng.sample(sorted(groups), min(self.ways, len(groups)))
            if len(chosen) < 2:
                raise TaskError(f"task {task.name!r} has fewer than two classes with two training texts")
            episode = []
            for label in chosen:
                texts = rng.sample(groups[label], min(2 * count, len(groups[label])))
                half = len(texts) // 2
                episode.append((rng.choices(texts[:half], k=count - half) + texts[:half], (texts[half:] * count)[:count]))
            episodes.append([([*support[:count]], query) for support, query in episode])
        widest = max(len(episode) for episode in episodes)
        texts, targets = [], []
        for episode in episodes:
            padded = episode + episode[:1] * (widest - len(episode))
            texts += [text for support, _ in padded for text in support] + [text for _, query in padded for text in query]
            targets.append([way if way < len(episode) else -100 for way in range(widest) for _ in range(count)])
        ways = torch.tensor([len(episode) for episode in episodes])
        return _Texts(self._arguments(texts), len(tasks), torch.tensor(targets), ways)

    def losses(self, model: PreTrainedModel, batch: _Texts) -> Tensor:
        """Cross-entropy of the queries over cosines to the prototypes of their episode."""
        embedded = rearrange(self._embed(model, batch.arguments), "(n b) e -> n b e", n=batch.tasks)
        half = embedded.shape[1] // 2
        widest = int(batch.ways.max())
        supports = rearrange(embedded[:, :half], "n (w s) e -> n w s e", w=widest)
        return _class_losses(embedded[:, half:], F.normalize(supports.mean(2), dim=-1), batch, self.temperature)

    @torch.inference_mode()
    def scores(
        self, rows: RowAdapters, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0
    ) -> list[dict[str, float]]:
        """Accuracy and macro-F1, averaged over draws of the prototypes' labelled texts (from the training split)."""
        measured = []
        for index, task in enumerate(tasks):
            rng = random.Random(seed)
            test = [example for example in test_examples(task, limit)]
            groups = _by_label(task)
            names = sorted(groups)
            test = [example for example in test if example.output in groups]
            if not test:
                raise TaskError(f"no class of the test examples of task {task.name!r} has a training example to make a prototype of")
            draws = [[rng.sample(groups[n], min(self.shots, len(groups[n]))) for n in names] for _ in range(self.draws)]
            supports = list(dict.fromkeys(text for draw in draws for group in draw for text in group))
            place = {text: number for number, text in enumerate(supports)}
            adapter = take(adapters, index, index + 1)
            (embedded,) = self._embed_all(rows, adapter, [[e.input for e in test] + supports])
            texts, labelled = embedded[: len(test)], embedded[len(test) :]
            right = [names.index(example.output) for example in test]
            results = []
            for draw in draws:
                means = torch.stack([labelled[[place[text] for text in group]].mean(0) for group in draw])
                guessed = (texts @ F.normalize(means, dim=-1).T).argmax(-1).tolist()
                results.append((_accuracy(guessed, right), _macro_f1(guessed, right)))
            accuracy, macro = (sum(values) / len(values) for values in zip(*results, strict=True))
            measured.append({"accuracy": accuracy, "macro_f1": macro})
        return measured


def _class_losses(queries: Tensor, classes: Tensor, batch: _Texts, temperature: float) -> Tensor:
    """Mean cross-entropy (n,) of queries (n, q, e) over classes (n, w, e), of which only each task's own count."""
    logits = torch.einsum("nqe,nwe->nqw", queries, classes) / temperature
    padding = torch.arange(classes.shape[1], device=logits.device)[None] >= batch.ways.to(logits.device)[:, None]
    logits = logits.masked_fill(padding[:, None], float("-inf"))
    target = batch.target.to(logits.device)
    real = target != -100
    each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100).view_as(target)
    return (each * real).sum(1) / real.sum(1)


def _accuracy(guessed: Sequence[int], right: Sequence[int]) -> float:
    return sum(g == r for g, r in zip(guessed, right, strict=True)) / len(right)


def _macro_f1(guessed: Sequence[int], right: Sequence[int]) -> float:
    """Mean over the classes that occur, guessed or right, of their F1."""
    total, classes = 0.0, set(guessed) | set(right)
    for label in classes:
        hits = sum(g == r == label for g, r in zip(guessed, right, strict=True))
        total += 2 * hits / (guessed.count(label) + right.count(label))
    return total / len(classes)
