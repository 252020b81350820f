"""Objectives of language models: answers that follow a text, or texts alone, scored by teacher forcing."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.base.objectives.base import Objective, take, task_rng, test_examples, training_examples
from lorag.base.objectives.prompts import CHAT, make_prompts, require_input
from lorag.base.row_adapters import Cores, RowAdapters, Stacked
from lorag.errors import ConfigError, TaskError
from lorag.tasks.suite import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CausalLM", "Seq2SeqLM", "TokenRows", "pad_rows", "rouge_l"]

# Where less is better, the negative is the metric: gaps and gains take more for better.
_METRICS = ("exact_match", "token_accuracy", "log_likelihood", "rouge_l", "neg_perplexity", "neg_bits_per_character")
_MOST_NATS = 700.0  # a token; beyond it a perplexity is no number


@dataclass(frozen=True)
class TokenRows:
    """Rows of prompt and answer tokens, and which adapter's run each belongs to."""

    arguments: dict[str, Tensor]
    targets: Tensor  # (b, t) answer tokens, -100 elsewhere
    tasks: int


class _LanguageModel(Objective):
    """What causal and encoder-decoder models share: teacher forcing gives losses and the exact match of greedy decoding."""

    generates = True
    _rows_at_once = 512

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_length: int = 256,
        rouge: bool = False,
        metric: str = "exact_match",
        system: str | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length)
        template = self._usual_template() if template is None else template
        if metric not in _METRICS or metric == "rouge_l" and not rouge:
            raise ConfigError("objective.metric cannot be used", got=repr(metric), expected=f"{' or '.join(_METRICS)} (with rouge)")
        self.template, self.rouge, self.metric, self.system = template, rouge, metric, system

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_objective` that build it again."""
        more = {"rouge": self.rouge, "metric": self.metric, "system": self.system}
        chosen = {key: value for key, value in more.items() if value not in (False, "exact_match", None)}
        return {"template": self.template, "max_length": self.max_length, **chosen}

    def _usual_template(self) -> str:
        return "{input}\n"

    @abc.abstractmethod
    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> TokenRows:
        """Tokenises equal-sized groups of (input, output)."""

    @abc.abstractmethod
    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        """Logits (b, t, v) that predict `batch.targets`."""

    def sample(self, tasks: Sequence[Task], count: int, seed: str) -> TokenRows:
        """Draws `count` training examples a task."""
        drawn = [task_rng(task, seed).choices(training_examples(task), k=count) for task in tasks]
        return self._encode(tasks, [[(example.input, example.output) for example in group] for group in drawn])

    def _encode(self, tasks: Sequence[Task], groups: Sequence[Sequence[tuple[str, str]]]) -> TokenRows:
        """Tokenises equal-sized groups, one a task, all of whose outputs must fit."""
        batch = self.encode(groups)
        if batch.targets.shape[1] > self.max_length + 1:
            longest = int((batch.targets != -100).sum(1).argmax())
            raise TaskError(
                f"an output of task {tasks[longest // len(groups[0])].name!r} does not fit",
                got=f"{int((batch.targets[longest] != -100).sum())} tokens",
                expected=f"at most {self.max_length}, and the one that ends it",
                remedy="Raise objective_settings.max_length, or leave that example out.",
            )
        return batch

    def losses(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
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
        """Exact match, token accuracy, mean log-likelihood, perplexity, bits per character; ROUGE-L if the objective was made with it.

        Exact match is that of greedy decoding, without decoding: a greedy answer equals the reference if and only if
        every token of the reference is the likeliest one after the tokens before it. Perplexity (a token) and bits per
        character are of the answers' own text, without the end token: for language modelling as ICM-LoRA (arXiv 2501.17635)
        measures it, a suite's inputs are empty and its outputs are the texts.
        """
        found: list[dict[str, float]] = []
        tests = [test_examples(task, limit) for task in tasks]
        width = max(len(test) for test in tests)
        step = max(1, self._rows_at_once // width)
        for start in range(0, len(tasks), step):
            part = tests[start : start + step]
            padded = [[(e.input, e.output) for e in (test * width)[:width]] for test in part]
            batch = self._encode(tasks[start : start + step], padded)
            own = take(adapters, start, start + len(part))
            with nullcontext(rows.model) if own is None else rows.use(own) as model:
                logits = self._logits(model, batch).float()
                answers = self._answers(model, [text for group in padded for text, _ in group], batch)
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
                score |= _density(likelihood[mine], known[mine], test)
                score |= self.compare(answers[mine], test) if self.writes else {}
                plain = self.metric.removeprefix("neg_")
                if plain not in score:
                    raise TaskError(f"task {tasks[start + index].name!r} has no text to measure", expected=f"outputs, for {self.metric}")
                if plain != self.metric:
                    score[self.metric] = -score[plain]
                found.append(score)
        return found

    @property
    def word_for_word(self) -> bool:  # type: ignore[override]
        """Whether `metric` is exact match."""
        return self.metric == "exact_match"

    def _answers(self, model: nn.Module, inputs: Sequence[str], batch: TokenRows) -> list[str]:
        """Written answers, with room for the longest reference; none if scores do not need them."""
        return self.generate(model, inputs, max_new_tokens=max(64, batch.targets.shape[1])) if self.writes else []

    @property
    def writes(self) -> bool:
        """Whether scores need answers that are written out."""
        return self.rouge

    def compare(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Scores of written answers."""
        return {"rouge_l": sum(rouge_l(a, e.output) for a, e in zip(answers, examples, strict=True)) / len(examples)}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _density(likelihood: Tensor, known: Tensor, examples: Sequence[Example]) -> dict[str, float]:
    """Perplexity and bits per character from log-likelihoods (b, t) of answers, whose last known token is the end."""
    text = known & (known.cumsum(1) < known.sum(1, keepdim=True))
    lost = -likelihood[text].double().sum().item()
    tokens, characters = int(text.sum()), sum(len(example.output) for example in examples)
    if not tokens or not characters:
        return {}
    perplexity, bits = math.exp(min(lost / tokens, _MOST_NATS)), lost / math.log(2) / characters
    return {"perplexity": perplexity, "bits_per_character": bits}


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of tokens as (b, t), filled up with a value on the right, or on the left."""
    tensors = [torch.tensor(list(row)[::-1] if left else row, dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return padded.flip(1) if left else padded


class CausalLM(_LanguageModel):
    """Answers follow the prompt and end with the token that ends a turn.

    Args:
        tokenizer: The base model's.
        template: "chat", the tokenizer's own chat template, or text with one `{input}`; by default "chat" where the tokenizer
            has a chat template, and otherwise the input and a line break.
        max_length: Most tokens of a prompt; of longer ones the beginning of the input is left out.
        rouge: Whether scores hold ROUGE-L, for which answers are written out.
        metric: The score that evaluations report.
        system: System text of the chat template; None leaves it to the template.
    """

    name, kind = "causal_lm", "causal_lm"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_length: int = 256,
        rouge: bool = False,
        metric: str = "exact_match",
        system: str | None = None,
    ) -> None:
        super().__init__(tokenizer, template, max_length, rouge, metric, system)
        self.prompts = make_prompts(tokenizer, self.template, system, max_length)

    def _usual_template(self) -> str:
        return CHAT if getattr(self.tokenizer, "chat_template", None) else super()._usual_template()

    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> TokenRows:
        """Prompts padded on the left and answers on the right, so that all answers start in one column."""
        rows = self.prompts.rows([pair for group in groups for pair in group])
        prompts, answers = [prompt for prompt, _ in rows], [answer for _, answer in rows]
        pad = self.tokenizer.pad_token_id
        left, right = pad_rows(prompts, pad, left=True), pad_rows(answers, pad)
        mask = torch.cat([pad_rows([[1] * len(p) for p in prompts], 0, left=True), pad_rows([[1] * len(a) for a in answers], 0)], 1)
        arguments = {
            "input_ids": torch.cat([left, right], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        }
        return TokenRows(arguments, pad_rows(answers, -100), len(groups))

    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        arguments = {key: value.to(model.device) for key, value in batch.arguments.items()}
        width = batch.targets.shape[1]
        return model(**arguments, logits_to_keep=width + 1, use_cache=False).logits[:, :width]

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """Last layer's states at the prompts' last position (b, h)."""
        prompts = self.prompts.prompts(inputs)
        ids = pad_rows(prompts, self.tokenizer.pad_token_id, left=True)
        mask = pad_rows([[1] * len(p) for p in prompts], 0, left=True)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        found: Any = model(**{k: v.to(model.device) for k, v in arguments.items()}, output_hidden_states=True, logits_to_keep=1)
        return found.hidden_states[-1][:, -1].float()

    def generate(self, model: nn.Module, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to inputs, one a row."""
        writer: Any = model
        prompts = self.prompts.prompts(inputs)
        ids = pad_rows(prompts, self.tokenizer.pad_token_id, left=True).to(writer.device)
        mask = pad_rows([[1] * len(p) for p in prompts], 0, left=True).to(writer.device)
        output = writer.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.prompts.stops),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [self.prompts.read(row) for row in output[:, ids.shape[1] :].tolist()]


class Seq2SeqLM(_LanguageModel):
    """The encoder reads `template.format(input=...)`, the decoder writes the answer."""

    name, kind = "seq2seq_lm", "seq2seq_lm"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_length: int = 256,
        rouge: bool = False,
        metric: str = "exact_match",
    ) -> None:
        super().__init__(tokenizer, template, max_length, rouge, metric)
        require_input(self.template)

    def encode(self, groups: Sequence[Sequence[tuple[str, str]]]) -> TokenRows:
        """Encoder rows and decoder targets, both padded on the right."""
        flat = [pair for group in groups for pair in group]
        texts = [self.template.format(input=text) for text, _ in flat]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        answers = [[*self._ids(answer), self.tokenizer.eos_token_id] for _, answer in flat]
        arguments = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}
        return TokenRows(arguments, pad_rows(answers, -100), len(groups))

    @torch.inference_mode()
    def hidden(self, model: PreTrainedModel, inputs: Sequence[str]) -> Tensor:
        """The encoder's last states, averaged over tokens (b, h): a decoder has read nothing yet."""
        texts = [self.template.format(input=text) for text in inputs]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt").to(model.device)
        encoder: Any = model.get_encoder()
        states = encoder(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).last_hidden_state.float()
        mask = read["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def _logits(self, model: PreTrainedModel, batch: TokenRows) -> Tensor:
        arguments = {key: value.to(model.device) for key, value in batch.arguments.items()}
        return model(**arguments, labels=batch.targets.to(model.device), use_cache=False).logits

    def generate(self, model: nn.Module, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to inputs, one a row."""
        writer: Any = model
        read = self.tokenizer(
            [self.template.format(input=text) for text in inputs],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(writer.device)
        output = writer.generate(
            input_ids=read["input_ids"], attention_mask=read["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False
        )
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
