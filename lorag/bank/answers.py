"""Answers of experts to inputs that nobody labelled, and a filter that keeps those which look like the expert's task.

What one base model learned is carried to another as text, as in Trans-LoRA (arXiv 2405.17258); there a trained discriminator chooses
among inputs that a model wrote, here the expert's own likelihood chooses among inputs that are at hand.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.adapters.factors import Factors
from lorag.errors import ArtifactError
from lorag.files.artifacts import read_json, write_json

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.runner import Runner

__all__ = ["Answer", "agreement", "answer_inputs", "answers_in", "surest"]

_ROWS = 16  # inputs that are answered at once


@dataclass(frozen=True)
class Answer:
    """What an expert wrote.

    Attributes:
        input: What it read.
        output: Its greedy answer.
        ended: Whether it ended by itself, and not because it was cut off.
        sure: The geometric mean of the probabilities that it gave to the answer's tokens, the end among them.
    """

    input: str
    output: str
    ended: bool
    sure: float


def answer_inputs(runner: Runner, adapter: LoraAdapter, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[Answer]:
    """Greedy answers of a base model with an adapter, and how sure it is of each.

    Args:
        runner: The base model.
        adapter: An adapter of its layout.
        inputs: Texts.
        max_new_tokens: Where an answer is cut off.

    Raises:
        ConfigError: If the objective writes no answers.
    """
    if not inputs:
        return []
    stacked = Factors.stack([adapter.factors], runner.device)
    lengths = runner.objective.prompt_tokens(inputs)
    order = sorted(range(len(inputs)), key=lambda place: lengths[place])
    answered: dict[int, Answer] = {}
    for start in range(0, len(order), _ROWS):
        places = order[start : start + _ROWS]
        texts = runner.generate([inputs[place] for place in places], stacked, max_new_tokens=max_new_tokens)
        pairs = [(inputs[place], text) for place, text in zip(places, texts, strict=True)]
        with runner.use(stacked) as model:
            judged = runner.objective.judge(model, pairs)
        for place, (text, answer), (right, likely) in zip(places, pairs, judged, strict=True):
            answered[place] = Answer(text, answer, bool(right[-1]), round(math.exp(likely.mean().item()), 6))
    return [answered[place] for place in range(len(inputs))]


def answers_in(file: Path, runner: Runner, adapter: LoraAdapter, inputs: Sequence[str], *, max_new_tokens: int = 64) -> list[Answer]:
    """The same, from a JSON file if it holds the answers to these very inputs, else written to it.

    Raises:
        ConfigError: If the objective writes no answers.
        ArtifactError: If the file is not one of answers.
    """
    asked = hashlib.sha256(json.dumps([list(inputs), max_new_tokens]).encode()).hexdigest()
    if file.exists():
        stored = read_json(file)
        try:
            if stored["asked"] == asked:
                return [Answer(**one) for one in stored["answers"]]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{file} holds no answers", got=repr(error)[:80], remedy="Delete it.") from error
    answers = answer_inputs(runner, adapter, inputs, max_new_tokens=max_new_tokens)
    write_json(file, {"asked": asked, "answers": [asdict(one) for one in answers]})
    return answers


def surest(answers: Sequence[Answer], keep: float) -> list[Answer]:
    """Answers that ended and are not empty; of these the surest share, in their order."""
    sound = [one for one in answers if one.ended and one.output.strip()]
    least = sorted((one.sure for one in sound), reverse=True)[: math.ceil(keep * len(sound))]
    return [one for one in sound if least and one.sure >= least[-1]]


def agreement(runner: Runner, adapter: LoraAdapter, answers: Sequence[Answer]) -> float:
    """The share of answers that a base model with an adapter gives as well, by teacher forcing."""
    stacked, right = Factors.stack([adapter.factors], runner.device), 0
    for start in range(0, len(answers), _ROWS):
        with runner.use(stacked) as model:
            judged = runner.objective.judge(model, [(one.input, one.output) for one in answers[start : start + _ROWS]])
        right += sum(bool(tokens.all()) for tokens, _ in judged)
    return right / len(answers)
