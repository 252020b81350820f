"""Descriptions of tasks, composed from frames and from words of each task; wordings for evaluation never occur in training."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorag.errors import TaskError
from lorag.worlds.smollm2.files import read
from lorag.worlds.smollm2.formats import CASES, Format, answers

__all__ = ["PARTS", "Phrases", "describe"]

PARTS = ("train", "validation", "eval")
_ATTEMPTS = 400


@dataclass(frozen=True)
class Phrases:
    """The words of one task: for training and, last, for evaluation alone.

    Attributes:
        noun: What an input is: "message".
        texts: By kind. "do": imperatives; "say": whole descriptions; "clause": statements to be checked;
            "thing" and "things": noun phrases to be detected, in the singular and in the plural.
        held: The same for evaluation alone.
        labels: Classes that descriptions list.
        listed: Whether every description lists the classes, since nothing else says which they are.
        first: Whole descriptions that evaluation always has.
    """

    noun: str
    texts: Mapping[str, Sequence[str]]
    held: Mapping[str, Sequence[str]]
    labels: tuple[str, ...] = ()
    listed: bool = False
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, noun: str, words: Mapping[str, Sequence[str]]) -> Phrases:
        """Of words by kind, of which those for evaluation alone stand under `eval_` and the kind."""
        held = {kind.removeprefix("eval_"): texts for kind, texts in words.items() if kind.startswith("eval_")}
        return cls(noun, {kind: texts for kind, texts in words.items() if not kind.startswith("eval_")}, held)


def describe(phrases: Phrases, form: Format, part: str, count: int, rng: random.Random, *, known: bool) -> tuple[str, ...]:
    """Writes distinct descriptions of a task.

    Args:
        phrases: The task's words.
        form: The form of its answers.
        part: Whose frames are used: "train", "validation" or "eval".
        count: How many.
        rng: Source of every choice.
        known: Whether the task's words occur in training; if so, those for evaluation are used for evaluation alone.

    Raises:
        TaskError: If the words do not give as many.
    """
    if part != "eval":
        pools = phrases.texts
    elif known:
        pools = phrases.held
    else:
        pools = {kind: [*phrases.held.get(kind, ()), *phrases.texts.get(kind, ())] for kind in {**phrases.texts, **phrases.held}}
    choices = [(kind, text) for kind in sorted(pools) for text in pools[kind]]
    written: dict[str, None] = dict.fromkeys(phrases.first if part == "eval" and not form.name else ())
    for _ in range(_ATTEMPTS):
        if len(written) == count:
            return tuple(written)
        kind, text = rng.choice(choices)
        written[_form(_task(kind, text, phrases, form, part, rng), form, part, rng)] = None
    raise TaskError(
        "the words of a task give too few descriptions", got=f"{len(written)}, such as {next(iter(written))!r}", expected=str(count)
    )


def _task(kind: str, text: str, phrases: Phrases, form: Format, part: str, rng: random.Random) -> str:
    """What to do, without the form of the answer; where a frame names the two answers, they are those of the form."""
    frames = read("wordings/frames")
    values = {kind: text, kind.capitalize(): _capital(text), "noun": phrases.noun}
    shuffled = rng.sample(phrases.labels, len(phrases.labels))
    if kind == "say":
        text = text if rng.random() < 0.6 else text[:1].lower() + text[1:]
        return f"{text}{'' if text.endswith('?') else ':'} {', '.join(shuffled)}" if phrases.listed else text
    if phrases.labels and kind == "do" and (phrases.listed or rng.random() < 0.7):
        kind = "labels"
        values |= {"labels": ", ".join(shuffled)}
        values |= {f"labels_{word}": f"{', '.join(shuffled[:-1])} {word} {shuffled[-1]}" for word in ("or", "and")}
    if kind in ("clause", "thing", "things"):
        values |= dict(zip(("yes", "no"), map(CASES[form.case], answers(form.words)), strict=True))
    return rng.choice(frames[kind][part]).format(**values)


def _form(task: str, form: Format, part: str, rng: random.Random) -> str:
    """Adds what says the form; the words of yes and no only where the task does not name them already."""
    formats, added = read("wordings/formats"), []
    pool = "eval" if part == "eval" else "train"
    for factor, name in (("words", form.words), ("case", form.case), ("wrap", form.wrap)):
        if name == "plain":
            continue
        text = rng.choice(formats[factor][name][pool])
        if factor == "words" and name != "initial":
            yes, no = map(CASES[form.case], answers(name))
            if yes in task and no in task.replace(yes, "", 1):
                continue
            text = text.replace("{yes}", yes).replace("{no}", no)
        added.append(text)
    if not added:
        return task
    rng.shuffle(added)
    words = ", ".join(added)
    frame = rng.choice(read("wordings/frames")["format"][part])
    task = task.rstrip(".")
    if task.endswith(("?", "!")):
        frame = re.sub(r"\{task\}[.,;]", "{task}", frame)
    return frame.replace("{task}", task).replace("{form}", words).replace("{Form}", _capital(words))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
