"""Inputs to prompts: what a user would write before them without an adapter, chat templates, written templates."""

from __future__ import annotations

import abc
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorag.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorag.tasks.suite import Example, Task

__all__ = ["CHAT", "Conversation", "Prompts", "draw_shots", "make_prompts", "require_input", "with_description", "with_shots"]


class Conversation(str):
    """An input after examples: earlier turns where prompts are chats, and one text anywhere else.

    Attributes:
        description: What is to be done; it opens the first turn.
        shots: Inputs and outputs of the examples.
        last: The input that is to be answered.
    """

    description: str
    shots: tuple[tuple[str, str], ...]
    last: str

    def __new__(cls, description: str, shots: Sequence[tuple[str, str]], last: str) -> Conversation:  # noqa: D102 - the class says it
        parts = [description, *(f"Input: {text}\nOutput: {answer}" for text, answer in shots), f"Input: {last}\nOutput:"]
        prompt = super().__new__(cls, "\n\n".join(parts))
        prompt.description, prompt.shots, prompt.last = description, tuple(shots), last
        return prompt

    def __getnewargs__(self) -> tuple[str, tuple[tuple[str, str], ...], str]:  # type: ignore[override]  # copies keep the parts
        return self.description, self.shots, self.last

    @property
    def turns(self) -> list[str]:
        """What user and assistant say in turn; the user's last turn is to be answered."""
        said = [text for shot in self.shots for text in shot] + [self.last]
        return [f"{self.description}\n\n{said[0]}", *said[1:]]

    def shorter(self) -> str:
        """The same without its first example; without any left, a plain text."""
        return Conversation(self.description, self.shots[1:], self.last) if len(self.shots) > 1 else f"{self.description}\n\n{self.last}"


def with_description(task: Task, descriptions: Sequence[str]) -> Task:
    """A task whose inputs begin with a description; where there are several, examples take them in turn.

    Raises:
        TaskError: If the inputs are not texts.
    """
    _require_texts(task)
    count = len(descriptions)
    said = (replace(e, input=f"{descriptions[i % count]}\n\n{e.input}") for i, e in enumerate(task.examples))
    return replace(task, examples=tuple(said))


def draw_shots(task: Task, count: int, seed: int) -> list[Example]:
    """Training examples of a task, at most `count`: different outputs first, so that of yes and no both are shown.

    Raises:
        TaskError: If there is no training example.
    """
    drawn = list(task.split("train"))
    if not drawn:
        raise TaskError(f"task {task.name!r} has no training examples")
    random.Random(f"{seed}/{task.name}").shuffle(drawn)
    seen: dict[str, int] = {}
    turns = []
    for example in drawn:
        turns.append(seen.get(example.output, 0))
        seen[example.output] = turns[-1] + 1
    return [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: turns[i])[:count]]


def with_shots(task: Task, description: str, count: int, seed: int) -> Task:
    """A task whose test inputs come after a description and `count` training examples, the same ones before each of them.

    Raises:
        TaskError: If the inputs are not texts, or there is no training example.
    """
    _require_texts(task)
    shots = [(shot.input, shot.output) for shot in draw_shots(task, count, seed)]
    test = (replace(example, input=Conversation(description, shots, example.input)) for example in task.split("test"))
    return replace(task, examples=tuple(test))


def _require_texts(task: Task) -> None:
    if task.inputs != "text":
        raise TaskError(f"no description can be put before the inputs of task {task.name!r}", got=task.inputs, expected="text")


# --- templates --------------------------------------------------------------------------------------------------------


CHAT = "chat"
_PROBE, _ANSWER = "a3f81c", "b7d402"  # texts that no template contains
_DAY = "26 Jul 2024"  # some templates state the date: a fixed one, so that the same seed gives the same bytes on any day
_REMEDY = "Write a template instead: objective_settings.template='{input}\\n'"


class Prompts(abc.ABC):
    """Turns inputs into prompts, and outputs into the answers that follow them, as tokens.

    Attributes:
        end: The token that ends an answer.
        stops: Tokens at which a written answer ends, `end` among them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: int, max_length: int) -> None:
        self.tokenizer, self.end, self.max_length = tokenizer, end, max_length
        self.stops = tuple(dict.fromkeys(token for token in (end, tokenizer.eos_token_id) if token is not None))

    @abc.abstractmethod
    def texts(self, inputs: Sequence[str]) -> list[str]:
        """Prompts as text."""

    @abc.abstractmethod
    def prompts(self, inputs: Sequence[str]) -> list[list[int]]:
        """Prompts of at most `max_length` tokens; long inputs lose their beginning."""

    @abc.abstractmethod
    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of each (input, output), the answer with the token that ends it."""

    def read(self, tokens: Sequence[int]) -> str:
        """The text of a written answer."""
        kept = next((tokens[:place] for place, token in enumerate(tokens) if token in self.stops), tokens)
        return str(self.tokenizer.decode(list(kept), skip_special_tokens=True))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


class Written(Prompts):
    """A template that somebody wrote, with one `{input}`; the prompt begins with the tokenizer's bos token, once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int) -> None:
        super().__init__(tokenizer, tokenizer.eos_token_id, max_length)
        self.template = template

    def texts(self, inputs: Sequence[str]) -> list[str]:
        """Prompts as text."""
        return [self.template.format(input=text) for text in inputs]

    def prompts(self, inputs: Sequence[str]) -> list[list[int]]:
        """Prompts of at most `max_length` tokens and the bos token; long ones lose their beginning."""
        begin = self.tokenizer.bos_token_id
        prompts = []
        for ids in self._ids(self.texts(inputs)):
            start = [] if begin is None else [begin]
            ids = ids[1:] if ids[:1] == start != [] else ids
            # A first token needs something before it: where a tokenizer begins texts with nothing, the end of another one.
            prompts.append(start + ids[-self.max_length :] or [self.tokenizer.eos_token_id])
        return prompts

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of each (input, output), the answer with the token that ends it."""
        answers = self._ids([answer for _, answer in pairs])
        return [(prompt, [*ids, self.end]) for prompt, ids in zip(self.prompts([text for text, _ in pairs]), answers, strict=True)]


class Chat(Prompts):
    """The tokenizer's chat template: an input is a user's turn, the answer the assistant's, ended as the template ends it.

    Args:
        tokenizer: With a chat template.
        system: System text; None leaves it to the template, which may have one of its own. Where a template takes no system
            turn, the text stands before the input.
        max_length: Most tokens of a prompt.

    Raises:
        ConfigError: If the tokenizer has no chat template, or it cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None, max_length: int) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("objective_settings.template=chat needs a tokenizer with a chat template", got="none", remedy=_REMEDY)
        self.tokenizer, self.system, self._merged = tokenizer, system, False
        prompt = self._probe()
        whole = self._render([*self._turns(_PROBE), {"role": "assistant", "content": _ANSWER}], False)
        before, mark, tail = whole.partition(_ANSWER)
        if not mark or _PROBE not in prompt:
            raise ConfigError("the tokenizer's chat template leaves texts out", got=whole[:80], remedy=_REMEDY)
        self._lead = before[len(prompt) :] if before.startswith(prompt) else ""
        super().__init__(tokenizer, self._end(tail), max_length)
        frame = len(self._ids([prompt])[0]) - len(self._ids([_PROBE])[0])
        if frame >= max_length:
            raise ConfigError(
                "objective_settings.max_length has no room for the chat template", got=max_length, expected=f"more than {frame} tokens"
            )

    def texts(self, inputs: Sequence[str]) -> list[str]:
        """Prompts as text."""
        return [self._render(self._turns(text), True) for text in inputs]

    def prompts(self, inputs: Sequence[str]) -> list[list[int]]:
        """Prompts of at most `max_length` tokens; of a long input the beginning is left out, and never the template's own text."""
        return [ids for _, ids in self._fitted(inputs)]

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of each (input, output), the answer with the token that ends it.

        Both are tokenised together, as a conversation is; where that joins tokens across the border, apart.
        """
        fitted = self._fitted([text for text, _ in pairs])
        together = self._ids([text + self._lead + answer for (text, _), (_, answer) in zip(fitted, pairs, strict=True)])
        apart = self._ids([self._lead + answer for _, answer in pairs])
        rows = []
        for (_, prompt), whole, alone in zip(fitted, together, apart, strict=True):
            answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
            rows.append((prompt, [*answer, self.end]))
        return rows

    def read(self, tokens: Sequence[int]) -> str:
        """The text of a written answer, without what the template puts before every answer."""
        return super().read(tokens).removeprefix(self._lead)

    def _fitted(self, inputs: Sequence[str]) -> list[tuple[str, list[int]]]:
        texts = self.texts(inputs)
        fitting = []
        for given, text, ids in zip(inputs, texts, self._ids(texts), strict=True):
            while len(ids) > self.max_length and given:
                if isinstance(given, Conversation):
                    given = given.shorter()
                else:
                    pieces = self._ids([given])[0][len(ids) - self.max_length :]
                    given = str(self.tokenizer.decode(pieces)) if pieces else ""
                text = self._render(self._turns(given), True)
                ids = self._ids([text])[0]
            fitting.append((text, ids))
        return fitting

    def _probe(self) -> str:
        """A prompt that the template takes; decides where the system text goes."""
        if self.system is None:
            return self._render(self._turns(_PROBE), True)
        try:
            prompt = self._render(self._turns(_PROBE), True)
            if self.system.strip() in prompt:
                return prompt
        except ConfigError:  # that it takes no system turn, or none of anything, which the next line tells
            pass
        self._merged = True
        return self._render(self._turns(_PROBE), True)

    def _turns(self, text: str) -> list[dict[str, str]]:
        said = text.turns if isinstance(text, Conversation) else [text]
        if self.system and self._merged:
            said = [f"{self.system}\n\n{said[0]}", *said[1:]]
        turns = [{"role": "assistant" if place % 2 else "user", "content": content} for place, content in enumerate(said)]
        return turns if self.system is None or self._merged else [{"role": "system", "content": self.system}, *turns]

    def _render(self, turns: list[dict[str, str]], open_end: bool) -> str:
        try:
            rendered: Any = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_end, date_string=_DAY)
            return str(rendered)
        except Exception as error:  # a template is a program, and raises what it likes
            got = f"{type(error).__name__}: {error}"[:160]
            raise ConfigError("the tokenizer's chat template cannot be used", got=got, remedy=_REMEDY) from error

    def _end(self, tail: str) -> int:
        """The special token with which the template ends an answer, or else the tokenizer's own end token."""
        first = self._ids([tail.lstrip()])[0][:1] if tail.strip() else []
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        return first[0] if first and first[0] in special | {self.tokenizer.eos_token_id} else self.tokenizer.eos_token_id


def require_input(template: str) -> None:
    """Raises ConfigError unless a written template has one place for the input."""
    try:
        usable = template.count("{input}") == 1 and _PROBE in template.format(input=_PROBE)
    except (KeyError, IndexError, ValueError, AttributeError):  # other braces
        usable = False
    if not usable:
        raise ConfigError("objective_settings.template cannot be used", got=repr(template), expected="text with one {input}, or chat")


def make_prompts(tokenizer: PreTrainedTokenizerBase, template: str, system: str | None, max_length: int) -> Prompts:
    """Makes the prompts of a template: "chat", or text with one `{input}`.

    Raises:
        ConfigError: If it cannot be used.
    """
    if template == CHAT:
        return Chat(tokenizer, system, max_length)
    require_input(template)
    if system is not None:
        raise ConfigError(
            "objective_settings.system belongs to a chat template",
            got=f"template {template!r}",
            remedy="Write the system text into the template.",
        )
    return Written(tokenizer, template, max_length)
