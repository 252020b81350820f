"""Objectives of language models: answers that follow a text, scored by teacher forcing."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.errors import ConfigError
from lorag.objectives.base import Objective, take, task_rng, test_examples, training_examples
from lorag.row_adapters import RowAdapters, Stacked
from lorag.tasks.suite import Task
from lorag.weights.weight_space import Cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CausalLM", "Seq2SeqLM", "rouge_l"]


@dataclass(frozen=True)
class _Tokens:
    """Rows of prompt and answer tokens, and which adapter's run each belongs to."""

    arguments: dict[str, Tensor]
    targets: Tensor  # (b, t) answer tokens, -100 elsewhere
    tasks: int


class _LanguageModel(Objective):
    """What causal and encoder-decoder models share: teacher forcing gives losses and the exact match of greedy decoding."""

    metric = "exact_match"
    _rows_at_once = 512

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "{input}\n", max_length: int = 256, rouge: bool = False) -> None:
        super().__init__(tokenizer, max_length)
        if template.count("{input}") != 1:
            raise ConfigError("objective.template cannot be used", got=repr(template), expected="one {input}")
        self.template, self.rouge = template, rouge

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        return {"template": self.template, "max_length": self.max_length} | ({"rouge": True} if self.rouge else {})

    @abc.abstractmethod
    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> _Tokens:
        """Tokenises equal-sized groups of (input, output)."""

    @abc.abstractmethod
    def _logits(self, model: PreTrainedModel, batch: _Tokens) -> Tensor:
        """Logits (b, t, v) that predict `batch.targets`."""

    @abc.abstractmethod
    def generate(self, model: nn.Module, inputs: Sequence[str]) -> list[str]:
        """Greedy answers to inputs, one a row."""

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> _Tokens:
        """Draws `count` training examples a task."""
        drawn = [task_rng(task, seed).choices(training_examples(task), k=count) for task in tasks]
        return self.encode([[(example.input, example.output) for example in group] for group in drawn])

    def losses(self, model: PreTrainedModel, batch: _Tokens) -> Tensor:
        """Mean cross-entropy of the answers' tokens, one value a task."""
        logits = self._logits(model, batch)
        targets = batch.targets.to(logits.device)
        known = targets != -100
        each = F.cross_entropy(logits[known].float(), targets[known], reduction="none")
        run = torch.arange(batch.tasks, device=logits.device).repeat_interleave(len(targets) // batch.tasks)
        run = run[:, None].expand_as(targets)[known]
        total = torch.zeros(batch.tasks, device=logits.device, dtype=each.dtype)
        return total.index_add(0, run, each) / torch.bincount(run, minlength=batch.tasks)

    @torch.inference_mode()
    def scores(
        self, rows: RowAdapters, adapters: Stacked | Cores | None, tasks: Sequence[Task], *, limit: int, seed: int = 0
    ) -> list[dict[str, float]]:
        """Exact match, token accuracy and mean log-likelihood; ROUGE-L too if the objective was made with it.

        Exact match is that of greedy decoding, without decoding: a greedy answer equals the reference if and only if
        every token of the reference is the likeliest one after the tokens before it.
        """
        found: list[dict[str, float]] = []
        tests = [test_examples(task, limit) for task in tasks]
        width = max(len(test) for test in tests)
        step = max(1, self._rows_at_once // width)
        for start in range(0, len(tasks), step):
            part = tests[start : start + step]
            padded = [[(e.input, e.output) for e in (test * width)[:width]] for test in part]
            batch = self.encode(padded)
            own = take(adapters, start, start + len(part))
            with nullcontext(rows.model) if own is None else rows.use(own) as model:
                logits = self._logits(model, batch).float()
                answers = self.generate(model, [text for group in padded for text, _ in group]) if self.rouge else []
            targets = batch.targets.to(logits.device)
            known = targets != -100
            right = (logits.argmax(-1) == targets) & known
            likelihood = torch.zeros_like(targets, dtype=torch.float32)
            likelihood[known] = -F.cross_entropy(logits[known], targets[known], reduction="none")
            for index, test in enumerate(part):
                mine = slice(index * width, index * width + len(test))
                score = {
                    "exact_match": (right | ~known)[mine].all(1).float().mean().item(),
                    "token_accuracy": (right[mine].sum() / known[mine].sum()).item(),
                    "log_likelihood": (likelihood[mine].sum() / known[mine].sum()).item(),
                }
                if self.rouge:
                    pairs = zip(answers[mine], test, strict=True)
                    score["rouge_l"] = sum(rouge_l(answer, example.output) for answer, example in pairs) / len(test)
                found.append(score)
        return found

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    tensors = [torch.tensor(list(row)[::-1] if left else row, dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return padded.flip(1) if left else padded


class CausalLM(_LanguageModel):
    """Answers follow the prompt `template.format(input=...)` and end with the end token."""

    name, kind = "causal_lm", "causal_lm"

    def _prompts(self, inputs: Sequence[str]) -> list[list[int]]:
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        tokenized = self.tokenizer([self.template.format(input=text) for text in inputs], add_special_tokens=False)
        return [start + ids[-self.max_length :] for ids in tokenized["input_ids"]]

    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> _Tokens:
        """Prompts padded on the left and answers on the right, so that all answers start in one column."""
        flat = [pair for group in groups for pair in group]
        prompts = self._prompts([text for text, _ in flat])
        answers = [
            ids + [self.tokenizer.eos_token_id] for ids in self.tokenizer([a for _, a in flat], add_special_tokens=False)["input_ids"]
        ]
        pad = self.tokenizer.pad_token_id
        left, right = _pad(prompts, pad, left=True), _pad(answers, pad)
        mask = torch.cat([_pad([[1] * len(p) for p in prompts], 0, left=True), _pad([[1] * len(a) for a in answers], 0)], 1)
        arguments = {
            "input_ids": torch.cat([left, right], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        }
        return _Tokens(arguments, _pad(answers, -100), len(groups))

    def _logits(self, model: PreTrainedModel, batch: _Tokens) -> Tensor:
        arguments = {key: value.to(model.device) for key, value in batch.arguments.items()}
        width = batch.targets.shape[1]
        return model(**arguments, logits_to_keep=width + 1, use_cache=False).logits[:, :width]

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """Last layer's states at the prompts' last position (b, h)."""
        prompts = self._prompts(inputs)
        ids = _pad(prompts, self.tokenizer.pad_token_id, left=True)
        mask = _pad([[1] * len(p) for p in prompts], 0, left=True)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        found: Any = model(**{k: v.to(model.device) for k, v in arguments.items()}, output_hidden_states=True, logits_to_keep=1)
        return found.hidden_states[-1][:, -1].float()

    def generate(self, model: nn.Module, inputs: Sequence[str]) -> list[str]:
        """Greedy answers, at most 64 tokens."""
        writer: Any = model
        prompts = self._prompts(inputs)
        ids = _pad(prompts, self.tokenizer.pad_token_id, left=True).to(writer.device)
        mask = _pad([[1] * len(p) for p in prompts], 0, left=True).to(writer.device)
        output = writer.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


class Seq2SeqLM(_LanguageModel):
    """The encoder reads `template.format(input=...)`, the decoder writes the answer."""

    name, kind = "seq2seq_lm", "seq2seq_lm"

    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> _Tokens:
        """Encoder rows and decoder targets, both padded on the right."""
        flat = [pair for group in groups for pair in group]
        texts = [self.template.format(input=text) for text, _ in flat]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        answers = [[*self._ids(answer), self.tokenizer.eos_token_id] for _, answer in flat]
        arguments = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}
        return _Tokens(arguments, _pad(answers, -100), len(groups))

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """The encoder's last states, averaged over tokens (b, h): a decoder has read nothing yet."""
        texts = [self.template.format(input=text) for text in inputs]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt").to(model.device)
        encoder: Any = model.get_encoder()
        states = encoder(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).last_hidden_state.float()
        mask = read["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def _logits(self, model: PreTrainedModel, batch: _Tokens) -> Tensor:
        arguments = {key: value.to(model.device) for key, value in batch.arguments.items()}
        return model(**arguments, labels=batch.targets.to(model.device), use_cache=False).logits

    def generate(self, model: nn.Module, inputs: Sequence[str]) -> list[str]:
        """Greedy answers, at most 64 tokens."""
        writer: Any = model
        read = self.tokenizer(
            [self.template.format(input=text) for text in inputs],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(writer.device)
        output = writer.generate(input_ids=read["input_ids"], attention_mask=read["attention_mask"], max_new_tokens=64, do_sample=False)
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of lower-case words (Lin 2004)."""
    a, b = answer.lower().split(), reference.lower().split()
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for column, other in enumerate(b, start=1):
            before, row[column] = row[column], before + 1 if word == other else max(row[column], row[column - 1])
    common = row[-1]
    return 0.0 if common == 0 else 2 * common / (len(a) + len(b))
