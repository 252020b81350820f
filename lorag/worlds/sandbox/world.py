"""The sandbox's world: domains that state facts in short texts, and skills and styles that ask for them.

A text states everything that any skill of its domain may ask for, so that the text alone never tells which task
is meant. Randomness is a `random.Random`, not a torch generator: nothing here touches tensors.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

__all__ = ["DOMAINS", "SKILLS", "STYLES", "Domain", "Text", "answer", "domain", "write_text"]

DOMAINS = (
    "legal",
    "medical",
    "finance",
    "travel",
    "cooking",
    "sports",
    "weather",
    "tech_support",
    "real_estate",
    "education",
    "shopping",
    "news",
)
SKILLS = (
    "summarise",
    "person",
    "date",
    "amount",
    "place",
    "organisation",
    "sentiment",
    "urgency",
    "required",
    "count",
    "next_step",
)
_FIRST = (
    "Mara Tom Ines Otto Lena Hugo Nadia Felix Greta Ivan Tessa Ravi Clara Emil Zoe Amir Lucia Bruno Freya Oscar "
    "Dalia Pavel Nora Silas Yara Viktor Edith Malik Signe Theo"
).split()
_LAST = (
    "Quill Reyes Holt Marsh Vance Okoro Lindt Farrow Bose Tanaka Crane Novak Silva Thorne Webb Adeyemi Kessler "
    "Moran Paige Rossi Drake Haddad Jensen Kovac Larkin Mbeki Nolan Petrov Sato Winter"
).split()
_PLACES = (
    "Leeds Oslo Porto Turin Lagos Quito Perth Kyoto Dakar Lyon Cork Graz Bergen Malmo Tampere Izmir Cusco Adelaide "
    "Nairobi Utrecht Gdansk Bristol Denver Halifax"
).split()
_MONTHS = "January February March April May June July August September October November December".split()


@dataclass(frozen=True)
class Domain:
    """The grammar of one domain, as read from `domains/NAME.yaml`."""

    name: str
    note: str
    organisations: tuple[str, ...]
    amount: Mapping[str, int | str]
    fields: Mapping[str, tuple[str, ...]]
    items: Mapping[str, Any]
    sentiment: Mapping[str, tuple[str, ...]]
    urgency: Mapping[str, tuple[str, ...]]
    required: Mapping[str, tuple[str, ...]]
    next_step: tuple[str, ...]
    summary: str
    clauses: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Text:
    """One text with the facts that it states: plain answers by skill."""

    text: str
    answers: Mapping[str, str]


@functools.cache
def domain(name: str) -> Domain:
    """Reads one domain's grammar."""
    source = resources.files("lorag.worlds.sandbox").joinpath("domains", f"{name}.yaml").read_text(encoding="utf-8")
    return Domain(**yaml.safe_load(source))


def _cue(classes: Mapping[str, tuple[str, ...]], rng: random.Random) -> tuple[str, str]:
    label = rng.choice(list(classes))
    return label, rng.choice(classes[label])


def write_text(name: str, rng: random.Random) -> Text:
    """Writes one text of a domain.

    Args:
        name: One of `DOMAINS`.
        rng: Source of every choice.

    Returns:
        The text and the plain answer of every skill to it.
    """
    world = domain(name)
    low, high, step = (int(world.amount[key]) for key in ("low", "high", "step"))
    listed = rng.sample(list(world.items["list"]), rng.randint(2, 4))
    thing = rng.choice(world.required["things"])
    needed = rng.choice(("yes", "no"))
    sentiment, sentiment_cue = _cue(world.sentiment, rng)
    urgency, urgency_cue = _cue(world.urgency, rng)
    facts = {
        "person": f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
        "date": f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}",
        "place": rng.choice(_PLACES),
        "organisation": rng.choice(world.organisations),
        "amount": f"{rng.randrange(low, high + 1, step)} {world.amount['unit']}",
        "items": f"{', '.join(listed[:-1])} and {listed[-1]}",
        "sentiment": sentiment_cue,
        "urgency": urgency_cue,
        "required": rng.choice(world.required[needed]).format(thing=thing),
        "next_step": rng.choice(world.next_step),
    }
    facts |= {field: rng.choice(values) for field, values in world.fields.items()}
    clauses = [rng.choice(wordings) for wordings in world.clauses]
    rng.shuffle(clauses)
    body = clauses[0]
    for clause in clauses[1:]:
        body += rng.choice((". ", "; ")) + clause
    answers = {skill: facts[skill] for skill in ("person", "date", "amount", "place", "organisation", "next_step")}
    answers |= {
        "summarise": world.summary.format(**facts),
        "sentiment": sentiment,
        "urgency": urgency,
        "required": f"{needed}, {thing}",
        "count": f"{len(listed)} {world.items['noun']}",
    }
    return Text(body.format(**facts) + ".", answers)


_LABELS = {
    "summarise": "Summary",
    "person": "Person",
    "date": "Date",
    "amount": "Amount",
    "place": "Place",
    "organisation": "Organisation",
    "sentiment": "Mood",
    "urgency": "Urgency",
    "required": "Required",
    "count": "Count",
    "next_step": "Next",
}
# A style turns (plain answer, skill) into the answer as it must be written.
_STYLES: dict[str, Callable[[str, str], str]] = {
    "plain": lambda text, skill: text,
    "json": lambda text, skill: json.dumps({_LABELS[skill].lower(): text}),
    "bullet": lambda text, skill: f"- {text}",
    "upper": lambda text, skill: text.upper(),
    "label": lambda text, skill: f"{_LABELS[skill]}: {text}",
    "quoted": lambda text, skill: f'"{text}"',
}
STYLES = tuple(_STYLES)


def answer(text: Text, skill: str, style: str, note: str) -> str:
    """Answers a text.

    Args:
        text: The text.
        skill: What is asked.
        style: How it is written.
        note: A domain, whose note closes the answer. It is the text's own in every task; the base model has seen all
            notes after all texts, so that only the adapter knows which belongs there.
    """
    return _STYLES[style](f"{text.answers[skill]}, {domain(note).note}", skill)
