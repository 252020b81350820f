"""What objectives of language models share: answers that follow a text, scored by teacher forcing; padding, batches, metrics."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.base.objectives.base import Objective, select, task_rng, test_examples, training_examples
from lorag.base.objectives.text_metrics import balanced_accuracy, density, lenient_match, rouge_l
from lorag.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorag.base.row_adapters import Cores, RowAdapters, Stacked
    from lorag.tasks.suite import Example, Task

__all__ = ["LanguageModel", "TokenRows", "pad_rows"]

# Where less is better, the negative is the metric: gaps and gains take more for better.
_METRICS = ("exact_match", "token_accuracy", "log_likelihood", "rouge_l", "lenient_match", "neg_perplexity", "neg_bits_per_character")
_RUN = 16  # examples of a task that are scored in one run of rows
_JUDGED = 1024  # answer tokens whose logits are judged at once
_LONGER = 1.25  # a batch is parted where tasks get longer by this factor


@dataclass(frozen=True)
class TokenRows:
    """Rows of prompt and answer tokens, and which adapter's run each belongs to."""

    arguments: dict[str, Tensor]
    targets: Tensor  # (b, t) answer tokens, -100 elsewhere
    tasks: int


class LanguageModel(Objective):
    """What causal and encoder-decoder models share: teacher forcing gives losses and the exact match of greedy decoding.

    Args:
        tokenizer: The base model's.
        template: Text with one `{input}`; by default the input and a line break.
        max_length: Most tokens of a prompt.
        rouge: Whether scores hold ROUGE-L, for which answers are written out.
        metric: The score that evaluations report.
    """

    generates = True
    tokens_at_once = 16_384  # of a batch that is scored
    tokens_of_a_part = 512  # that make it worthwhile to part a batch

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_length: int = 256,
        rouge: bool = False,
        metric: str = "exact_match",
    ) -> None:
        super().__init__(tokenizer, max_length)
        template = self._usual_template() if template is None else template
        if metric not in _METRICS or metric in ("rouge_l", "lenient_match") and not rouge:
            raise ConfigError(
                "objective_settings.metric cannot be used", got=repr(metric), expected=f"{' or '.join(_METRICS)} (with rouge)"
            )
        self.template, self.rouge, self.metric = template, rouge, metric

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        more = {"rouge": self.rouge, "metric": self.metric}
        chosen = {key: value for key, value in more.items() if value not in (False, "exact_match")}
        return {"template": self.template, "max_length": self.max_length, **chosen}

    def _usual_template(self) -> str:
        return "{input}\n"

    @abc.abstractmethod
    def _tokenised(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, list[int]]]:
        """What is read, and the tokens of the answer, for each (input, output)."""

    @abc.abstractmethod
    def _collate(self, rows: Sequence[tuple[Any, list[int]]], tasks: int) -> TokenRows:
        """Rows in equal runs, one run per task, as one batch."""

    def _size(self, row: tuple[Any, list[int]]) -> int:
        """Tokens that a row takes."""
        return len(row[0]) + len(row[1])

    @abc.abstractmethod
    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        """Logits (b, t, v) that predict `batch.targets`."""

    def _answer_logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        """Logits (k, v) of the k answer tokens of a batch, row after row."""
        logits = self._logits(model, batch)
        return logits[(batch.targets != -100).to(logits.device)]

    def predictions(self, model: PreTrainedModel, groups: Sequence[Sequence[tuple[str, str]]]) -> Tensor:
        """Log-probabilities (k, v) of the next token at the k answer tokens of equal-sized groups of (input, output), row after row."""
        return F.log_softmax(self._answer_logits(model, self.encode(groups)).float(), -1)

    def prompt_tokens(self, inputs: Sequence[str]) -> list[int]:
        """Tokens of the prompt of each input."""
        if not self.reads_texts:
            return super().prompt_tokens(inputs)
        return [len(prompt) for prompt, _ in self._tokenised([(text, "") for text in inputs])]

    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> TokenRows:
        """Tokenises equal-sized groups of (input, output)."""
        return self._collate(self._tokenised([pair for group in groups for pair in group]), len(groups))

    def _rows(self, task: Task, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, list[int]]]:
        """What is read and the answer's tokens for each (input, output) of a task, whose outputs must fit."""
        rows = self._tokenised(pairs)
        longest = max(len(answer) for _, answer in rows)
        if longest > self.max_length + 1:
            raise TaskError(
                f"an output of task {task.name!r} does not fit",
                got=f"{longest} tokens",
                expected=f"at most {self.max_length}, and the one that ends it",
                remedy="Raise objective_settings.max_length, or leave that example out.",
            )
        return rows

    def _drawn(self, tasks: Sequence[Task], count: int, seed: str) -> list[list[tuple[Any, list[int]]]]:
        drawn = [task_rng(task, seed).choices(training_examples(task), k=count) for task in tasks]
        return [self._rows(task, [(e.input, e.output) for e in group]) for task, group in zip(tasks, drawn, strict=True)]

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> TokenRows:
        """Draws `count` training examples per task."""
        return self._collate([row for group in self._drawn(tasks, count, seed) for row in group], len(tasks))

    def sample_parts(self, tasks: Sequence[Task], count: int, seed: str, most: int | None = None) -> list[tuple[list[int], TokenRows]]:
        """What `sample` draws, in parts of tasks of about one length, so that few tokens are padding."""
        drawn = self._drawn(tasks, count, seed)
        lengths = [max(self._size(row) for row in group) for group in drawn]
        parts: list[list[int]] = []
        for task in sorted(range(len(tasks)), key=lambda number: lengths[number]):
            longest = lengths[parts[-1][-1]] if parts else 0
            full = bool(parts) and most is not None and (len(parts[-1]) + 1) * count * lengths[task] > most
            if not parts or full or lengths[task] > _LONGER * longest and len(parts[-1]) * count * longest >= self.tokens_of_a_part:
                parts.append([task])
            else:
                parts[-1].append(task)
        return [(sorted(part), self._collate([row for task in sorted(part) for row in drawn[task]], len(part))) for part in parts]

    def losses(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        """Mean cross-entropy of the answers' tokens, one value per task."""
        logits = self._answer_logits(model, batch)
        answered = batch.targets != -100
        each = F.cross_entropy(logits.float(), batch.targets[answered].to(logits.device), reduction="none")
        run = torch.arange(batch.tasks).repeat_interleave(len(batch.targets) // batch.tasks)
        run = run[:, None].expand_as(batch.targets)[answered].to(logits.device)
        total = torch.zeros(batch.tasks, device=logits.device, dtype=each.dtype)
        return total.index_add(0, run, each) / torch.bincount(run, minlength=batch.tasks)

    @torch.inference_mode()
    def scores(
        self, rows: RowAdapters, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0
    ) -> list[dict[str, float]]:
        """Exact match, token accuracy, mean log-likelihood, perplexity, bits per character; of written answers, more.

        Of tasks with a closed set of labels also balanced accuracy, by the same greedy answers.

        Exact match is that of greedy decoding, without decoding: a greedy answer equals the reference if and only if
        every token of the reference is the likeliest one after the tokens before it. Perplexity (a token) and bits per
        character are of the answers' own text, without the end token: for language modelling as ICM-LoRA (arXiv 2501.17635)
        measures it, a suite's inputs are empty and its outputs are the texts.

        With `rouge`, and of tasks of free text, answers are also written out: ROUGE-L and lenient match. Where an answer is an
        exact match, the reference is what would be written, so that only the others are.
        """
        tests = [test_examples(task, limit) for task in tasks]
        encoded = [self._rows(task, [(e.input, e.output) for e in test]) for task, test in zip(tasks, tests, strict=True)]
        sizes = [[self._size(row) for row in chosen] for chosen in encoded]
        right: list[list[Tensor]] = [[torch.empty(0)] * len(test) for test in tests]
        likely = [list(chosen) for chosen in right]
        for batch in _batches([range(len(test)) for test in tests], sizes, self.tokens_at_once):
            flat = [encoded[task][place] for task, places in batch for place in places]
            collated = self._collate(flat, len(batch))
            chosen = select(adapters, [task for task, _ in batch])
            with nullcontext(rows.model) if chosen is None else rows.use(chosen) as model:
                guessed, likelihood = self._judge(model, collated)
            lengths = (collated.targets != -100).sum(1).tolist()
            pairs = [(task, place) for task, places in batch for place in places]
            for (task, place), hit, logs in zip(pairs, guessed.split(lengths), likelihood.split(lengths), strict=True):
                right[task][place], likely[task][place] = hit, logs
        exact = [[bool(hit.all()) for hit in chosen] for chosen in right]
        writes = [self.writes or task.free_text for task in tasks]
        answered = [chosen if write else [True] * len(chosen) for chosen, write in zip(exact, writes, strict=True)]
        written = self._written(rows, adapters, tests, encoded, sizes, answered)
        results = []
        for number, test in enumerate(tests):
            score = {
                "exact_match": sum(exact[number]) / len(test),
                "token_accuracy": torch.cat(right[number]).float().mean().item(),
                "log_likelihood": torch.cat(likely[number]).mean().item(),
            }
            if tasks[number].labels is not None:
                score["balanced_accuracy"] = balanced_accuracy(exact[number], [example.output for example in test])
            score |= density(torch.cat([logs[:-1] for logs in likely[number]]), [example.output for example in test])
            score |= self.compare(written[number], test) if writes[number] else {}
            plain = self.metric.removeprefix("neg_")
            if plain not in score:
                raise TaskError(f"task {tasks[number].name!r} has no text to measure", expected=f"outputs, for {self.metric}")
            if plain != self.metric:
                score[self.metric] = -score[plain]
            results.append(score)
        return results

    @torch.inference_mode()
    def judge(self, model: PreTrainedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
        """Of each (input, answer): whether each token of the answer is the likeliest, and its log-likelihood; the last one ends it."""
        batch = self.encode([pairs])
        lengths = (batch.targets != -100).sum(1).tolist()
        right, likely = self._judge(model, batch)
        return list(zip(right.split(lengths), likely.split(lengths), strict=True))

    def _judge(self, model: PreTrainedModel, batch: TokenRows) -> tuple[Tensor, Tensor]:
        """Whether each answer token (k,) is the likeliest, and its log-likelihood (k,)."""
        logits = self._answer_logits(model, batch)
        targets = batch.targets[batch.targets != -100].to(logits.device)
        right, likely = [], []
        for part, wanted in zip(logits.split(_JUDGED), targets.split(_JUDGED), strict=True):
            precise = part.float()
            right.append(precise.argmax(-1) == wanted)
            likely.append(-F.cross_entropy(precise, wanted, reduction="none"))
        return torch.cat(right).cpu(), torch.cat(likely).cpu()

    def _written(
        self,
        rows: RowAdapters,
        adapters: Stacked | Cores | None,
        tests: Sequence[Sequence[Example]],
        encoded: Sequence[Sequence[Any]],
        sizes: Sequence[Sequence[int]],
        answered: Sequence[Sequence[bool]],
    ) -> list[list[str]]:
        """The greedy answer to every test example, written out unless it is known to be the reference."""
        answers = [[example.output for example in test] for test in tests]
        left = [[place for place, right in enumerate(of_task) if not right] for of_task in answered]
        for batch in _batches(left, sizes, self.tokens_at_once):
            pairs = [(task, place) for task, places in batch for place in places]
            room = max(16, 2 * max(len(encoded[task][place][1]) for task, place in pairs))
            chosen = select(adapters, [task for task, _ in batch])
            with nullcontext(rows.model) if chosen is None else rows.use(chosen) as model:
                texts = self.generate(model, [tests[task][place].input for task, place in pairs], max_new_tokens=room)
            for (task, place), text in zip(pairs, texts, strict=True):
                answers[task][place] = text
        return answers

    @property
    def word_for_word(self) -> bool:  # type: ignore[override]
        """Whether `metric` is exact match."""
        return self.metric == "exact_match"

    @property
    def writes(self) -> bool:
        """Whether scores need answers that are written out."""
        return self.rouge

    def compare(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Scores of written answers."""
        pairs = [(answer, example.output) for answer, example in zip(answers, examples, strict=True)]
        return {
            "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
            "lenient_match": sum(lenient_match(*pair) for pair in pairs) / len(pairs),
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _batches(places: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]], most: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Examples of several tasks in batches of about one length: equal runs of places, each of one task.

    Args:
        places: Of each task, which of its examples.
        sizes: Tokens of each task's examples.
        most: Tokens of a batch, padding included; a single run may have more.

    Yields:
        (task, places) of equal numbers of places; where a task has too few left, its last one comes again.
    """
    runs = []
    for task, rows in enumerate(places):
        order = sorted(rows, key=lambda place: sizes[task][place])
        runs += [(sizes[task][order[start : start + _RUN][-1]], task, order[start : start + _RUN]) for start in range(0, len(order), _RUN)]
    batch: list[tuple[int, list[int]]] = []
    width = 0
    for size, task, run in sorted(runs):
        if batch and (len(batch) + 1) * max(width, len(run)) * size > most:
            yield [(one, [*rows, *rows[-1:] * (width - len(rows))]) for one, rows in batch]
            batch, width = [], 0
        batch.append((task, run))
        width = max(width, len(run))
    if batch:
        yield [(one, [*rows, *rows[-1:] * (width - len(rows))]) for one, rows in batch]


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of tokens as (b, t), filled up with a value on the right, or on the left."""
    tensors = [torch.tensor(list(row)[::-1] if left else row, dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return padded.flip(1) if left else padded
