"""Inputs of the tasks that code answers: sentences and words of permissive sources, and records that are drawn."""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from lorag.tasks.suite import Example, Task
from lorag.worlds.smollm2.drafts import Draft, Limits
from lorag.worlds.smollm2.files import read
from lorag.worlds.smollm2.made import ANSWERS, mentions
from lorag.worlds.smollm2.sources import Source, sample, size
from lorag.worlds.smollm2.wordings import Phrases

__all__ = ["draft_made"]

_SENTENCES = ("banking77", "clinc", "hwu64", "snips")  # families whose texts serve as sentences
_WORDS = ("fv_capitalize", "fv_antonym", "fv_synonym")
_LICENSE = "CC BY 4.0; CC BY 3.0; CC0 1.0; MIT"
_NOUNS = dict.fromkeys(("sentence", "contact", "maybe_contact", "link", "handle", "markup"), "text") | {
    "numbers": "row of numbers",
    "log": "log line",
}
_DRAWS = 1200
_FREE = ("numbers", "number", "amount", "date", "time", "record", "row", "name")  # kinds whose inputs no pool keeps apart
_MOST_OUT = 40
_NAMES = (
    "Ada Alan Amir Anna Ben Bruno Carla Chen Clara Dana David Elif Emma Erik Fatima Felix Grace Hana Ivan Jamal Jonas Julia Karim Lara Leo "
    "Lina Lucy Marco Maria Mei Mina Nadia Noah Nora Omar Oscar Paul Petra Priya Rosa Ruth Sam Sara Sofia Tariq Tessa Tom Uma Victor Yuki"
).split()
_CITIES = (
    "Accra Athens Austin Bergen Berlin Bilbao Cairo Delhi Dublin Geneva Ghent Hanoi Kyoto "
    "Lagos Lima Lyon Malmo Nairobi Oslo Perth Porto Quito Riga Seoul Turin"
).split()
_HOSTS = "example.com example.org mail.example.net shop.example.com news.example.org data.example.net".split()
_JOBS = "baker nurse pilot teacher driver cook editor farmer painter plumber lawyer singer".split()
_CONTACTS = (
    "Write to {}.",
    "My address is {}.",
    "Please reply to {} by Friday.",
    "Contact: {}",
    "You can reach {} for details.",
    "Questions go to {}.",
)
_LINKS = (
    "See {} for more.",
    "I found it at {} yesterday.",
    "The page {} does not load.",
    "Read {} first.",
    "Details: {}",
    "Is {} still up?",
)
_PARTS = "user order page total item first last price file name count list max time start end cache key index token".split()
_FOLDERS = "home data src docs tests images reports music backup var www projects".split()
_ENDINGS = "txt csv py md json png pdf yaml html log".split()
_COMPONENTS = "auth cache db mailer payments scheduler search api worker".split()
_LEVELS = ("INFO", "WARNING", "ERROR", "DEBUG")
_MESSAGES = (
    "connection to {} lost", "{} started", "{} took too long", "could not open {}", "user {} logged in", "retrying {}",
    "{} finished without errors", "no space left for {}", "{} was not found", "reading settings of {}",
)  # fmt: skip


@dataclass(frozen=True)
class _Pools:
    """What inputs are drawn from, of one split, and what they are not, since source tasks have it."""

    sentences: list[str]
    words: list[str]
    nouns: list[str]
    verbs: list[str]
    taken: frozenset[str]


def draft_made(sources: Iterable[Source], held: Set[str], limits: Limits) -> list[Draft]:
    """Writes the tasks of made.yaml and topics.yaml; texts are training texts of their sources in training, test texts in tests.

    Args:
        sources: Source tasks.
        held: Texts that training must not see.
        limits: Numbers of examples.
    """
    rows = list(sources)
    pools = {split: _pools(rows, held, split) for split in ("train", "test")}
    wordings = {name: words for group in read("wordings/made").values() for name, words in group.items()}
    answers: list[tuple[str, str, Callable[[str], str | None]]] = [
        (kind, n, f) for kind, group in ANSWERS.items() for n, f in group.items()
    ]
    for topic, about in read("wordings/topics").items():
        wordings[f"mentions_{topic}"] = {key: value for key, value in about.items() if key != "words"}
        answers.append(("sentence", f"mentions_{topic}", mentions(about["words"])))
    return [_draft(kind, name, answer, wordings[name], pools, limits) for kind, name, answer in answers]


def _draft(
    kind: str, name: str, answer: Callable[[str], str | None], words: Mapping[str, list[str]], pools: Mapping[str, _Pools], limits: Limits
) -> Draft:
    distinct: dict[str, Example] = {}
    for split in ("train", "test"):
        rng = random.Random(zlib.crc32(f"{name}/{split}".encode()))
        for _ in range(_DRAWS):
            text = _INPUTS[kind](pools[split], rng)
            if kind in _FREE and (text in pools[split].taken or (zlib.crc32(text.encode()) % 4 == 0) != (split == "test")):
                continue
            output = answer(text)
            if output and size(output) <= _MOST_OUT:
                distinct.setdefault(text, Example(text, output, split))
    examples = sample(distinct.values(), limits.train, limits.test, name)
    yes_no = {example.output for example in examples} == {"yes", "no"}
    noun = _NOUNS.get(kind, kind)
    source = "made by lorag from " + (", ".join(_SENTENCES) if noun == "text" else "words")
    task = Task(name, "smollm2", (name,), ("no", "yes") if yes_no else None, _LICENSE, source, examples)
    return Draft(task, "yes_no" if yes_no else "text", "train", Phrases.of(noun, words))


def _pools(sources: list[Source], held: Set[str], split: str) -> _Pools:
    """Sentences and words of a split; what a test of any task has as its input is for tests alone."""
    texts = {
        example.input
        for source in sources
        if source.family in _SENTENCES
        for example in source.task.split(split)
        if example.input not in held and 3 <= len(example.input.split()) <= 14 and not re.search(r'["\n<>]', example.input)
    }
    taken = frozenset(example.input for source in sources for example in source.task.examples)
    by_name = {source.task.name: source.task for source in sources}

    tested = {example.input for source in sources for example in source.task.split("test")}

    def words(names: Iterable[str], outputs: bool = False) -> list[str]:
        every = {example.output if outputs else example.input for name in names for example in by_name[name].examples}
        mine = [word for word in every if re.fullmatch("[a-z]{3,10}", word) and word not in held]
        return sorted(word for word in mine if (word in tested) == (split == "test"))

    return _Pools(sorted(texts), words(_WORDS), words(("fv_object_v_concept_3",), outputs=True), words(("fv_present_past",)), taken)


def _mail(rng: random.Random) -> str:
    name = rng.choice(_NAMES).lower()
    return f"{rng.choice((name, f'{name}.{rng.choice(_JOBS)}', f'{name}{rng.randint(1, 99)}'))}@{rng.choice(_HOSTS)}"


def _link(pools: _Pools, rng: random.Random) -> str:
    return f"https://{rng.choice(_HOSTS)}/{'/'.join(rng.sample(pools.words, rng.randint(1, 2)))}"


def _beside(text: str, more: str, rng: random.Random) -> str:
    return f"{more} {text}" if rng.random() < 0.5 else f"{text} {more}"


def _contact(pools: _Pools, rng: random.Random) -> str:
    return _beside(rng.choice(pools.sentences), rng.choice(_CONTACTS).format(_mail(rng)), rng)


def _linked(pools: _Pools, rng: random.Random) -> str:
    return _beside(rng.choice(pools.sentences), rng.choice(_LINKS).format(_link(pools, rng)), rng)


def _handle(pools: _Pools, rng: random.Random) -> str:
    return _beside(rng.choice(pools.sentences), f"@{rng.choice(_NAMES).lower()}{rng.randint(1, 99)} #{rng.choice(pools.words)}", rng)


def _markup(pools: _Pools, rng: random.Random) -> str:
    link = f"[{rng.choice(pools.words)} {rng.choice(_PARTS)}]({_link(pools, rng)})"
    return _beside(rng.choice(pools.sentences), link, rng)


def _list(pools: _Pools, rng: random.Random) -> str:
    return ", ".join(rng.sample(pools.words, rng.randint(3, 6)))


def _repeats(pools: _Pools, rng: random.Random) -> str:
    items = rng.sample(pools.words, rng.randint(3, 5))
    if rng.random() < 0.5:
        items.append(rng.choice(items))
    rng.shuffle(items)
    return ", ".join(items)


def _person(rng: random.Random) -> dict[str, str | int]:
    return {"name": rng.choice(_NAMES), "age": rng.randint(18, 90), "city": rng.choice(_CITIES)}


def _log(pools: _Pools, rng: random.Random) -> str:
    day, clock = (
        f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}",
    )
    message = rng.choice(_MESSAGES).format(rng.choice(pools.words))
    return f"{day} {clock} [{rng.choice(_COMPONENTS)}] {rng.choice(_LEVELS)}: {message}"


_INPUTS: Mapping[str, Callable[[_Pools, random.Random], str]] = {
    "sentence": lambda pools, rng: rng.choice(pools.sentences),
    "word": lambda pools, rng: rng.choice(pools.words),
    "noun": lambda pools, rng: rng.choice(pools.nouns),
    "verb": lambda pools, rng: rng.choice(pools.verbs),
    "list": _list,
    "repeats": _repeats,
    "numbers": lambda pools, rng: ", ".join(map(str, rng.sample(range(1, 100), rng.randint(3, 6)))),
    "number": lambda pools, rng: str(rng.randint(1, 199)),
    "amount": lambda pools, rng: str(rng.randint(1000, 9_999_999)),
    "date": lambda pools, rng: f"{rng.randint(1950, 2029)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    "time": lambda pools, rng: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
    "contact": _contact,
    "maybe_contact": lambda pools, rng: (_contact if rng.random() < 0.5 else _linked)(pools, rng),
    "link": _linked,
    "handle": _handle,
    "log": _log,
    "record": lambda pools, rng: json.dumps(_person(rng)),
    "row": lambda pools, rng: ",".join([*map(str, _person(rng).values()), rng.choice(_JOBS)]),
    "name": lambda pools, rng: "_".join(rng.sample(_PARTS, rng.randint(2, 4))),
    "path": lambda pools, rng: f"/{'/'.join(rng.sample(_FOLDERS, rng.randint(1, 3)))}/{rng.choice(pools.words)}.{rng.choice(_ENDINGS)}",
    "markup": _markup,
}
