"""Labels of the label sets, with their words and texts: what detectors are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorag.worlds.smollm2.files import read, read_glosses
from lorag.worlds.smollm2.sources import Source, size
from lorag.worlds.smollm2.wordings import Phrases

__all__ = ["KEPT", "Label", "pool_labels"]

KEPT = 2  # glosses of a label, the last ones, that are for evaluation alone
_ARTICLES = ("a", "an", "the", "some", "something", "somebody", "someone")
_MOST_IN = 110  # of `size`
_FEWEST_TRAIN, _FEWEST_TEST = 16, 6  # texts of a label that is worth a detector
_LARGE = 9  # a group of as many labels is not about any one of them
_EMPTY_WORDS = frozenset("a an the of to in on for by or and is with my your about asking request question not no be at from".split())


def _none() -> dict[str, list[str]]:
    return {"train": [], "test": []}


@dataclass
class Label:
    """A label of one label set, a group of such labels, or what a text mentions.

    Attributes:
        family: Of its source.
        set: The label set.
        name: Distinct in the set.
        side: The side of the split by task.
        phrases: Its words.
        concept: What it means; the same in two sets if they mean the same.
        license: Of its texts.
        source: Of its texts.
        texts: By split.
        against: Texts that it does not hold for, by split; where empty, other labels give them.
        members: Names of the labels that a group unites.
    """

    family: str
    set: str
    name: str
    side: str
    phrases: Phrases
    concept: str
    license: str
    source: str
    texts: dict[str, list[str]] = field(default_factory=_none)
    against: dict[str, list[str]] = field(default_factory=_none)
    members: tuple[str, ...] = ()

    @property
    def words(self) -> frozenset[str]:
        """Stems of what it is about; labels of other sets that share one are not negatives."""
        parts = re.findall(r"[a-z0-9]+", f"{self.name} {self.concept}".lower())
        return frozenset(word[:5] for word in parts if word not in _EMPTY_WORDS)

    @property
    def plain(self) -> bool:
        """Whether it is one label whose texts have no other of its set."""
        return not self.members and not self.against["train"]


def pool_labels(sources: Iterable[Source], sides: Mapping[tuple[str, str], str], held: Iterable[str] = ()) -> list[Label]:
    """Gathers the labels that have glosses; tasks of one family that name the same label share its texts.

    Args:
        sources: Source tasks.
        sides: (family, label) -> side, of labels whose side is not their family's.
        held: Texts that training must not see, beside those of held-out labels.
    """
    aliases, sets, glosses = read("sources")["aliases"], read("sources")["sets"], read_glosses()
    pools: dict[tuple[str, str], Label] = {}
    groups: list[Label] = []
    mentions: list[Label] = []
    for source in sources:
        about = glosses.get(source.task.name, {"labels": {}})
        alias_of, members = aliases.get(source.task.name, {}), sets.get(source.task.name, source.family)
        if "rule" in about:
            mentions += [_mention(source, about, label) for label in about["labels"]]
            continue
        if source.task.labels is None or {label.lower() for label in source.task.labels} <= {"yes", "no"}:
            continue
        for label, entry in about["labels"].items():
            name = alias_of.get(label, label)
            pools.setdefault((members, name), _label(source, members, name, sides.get((source.family, name), source.side), about, entry))
        for group, entry in about.get("groups", {}).items():
            name = f"{source.task.name.removeprefix(f'{source.family}_')} {group}"
            joined = _label(source, members, name, source.side, about, entry)
            joined.members = tuple(alias_of.get(member, member) for member in entry["members"])
            groups.append(joined)
    for source in sources:
        alias_of, members = aliases.get(source.task.name, {}), sets.get(source.task.name, source.family)
        for example in source.task.examples if source.task.labels is not None else ():
            at = pools.get((members, alias_of.get(example.output, example.output)))
            if at is not None and size(example.input) <= _MOST_IN and example.input not in at.texts[example.split]:
                at.texts[example.split].append(example.input)
    kept_out = set(held) | {text for label in pools.values() if label.side != "train" for texts in label.texts.values() for text in texts}
    for label in (*pools.values(), *mentions):
        if label.side == "train":
            label.texts = {split: [text for text in texts if text not in kept_out] for split, texts in label.texts.items()}
            label.against = {split: [text for text in texts if text not in kept_out] for split, texts in label.against.items()}
    united = [_unite(group, pools) for group in groups]
    every = (*pools.values(), *united, *mentions)
    return [label for label in every if len(label.texts["train"]) >= _FEWEST_TRAIN and len(label.texts["test"]) >= _FEWEST_TEST]


def _label(source: Source, members: str, name: str, side: str, about: Mapping[str, Any], entry: Mapping[str, Any]) -> Label:
    thing = "thing" if entry["noun_phrase"].split()[0] in _ARTICLES else "things"
    trained, kept = entry["glosses"][:-KEPT], entry["glosses"][-KEPT:]
    phrases = Phrases(about["noun"], {"clause": trained, thing: [entry["noun_phrase"]]}, {"clause": kept})
    return Label(source.family, members, name, side, phrases, entry["concept"], source.task.license, source.task.source)


def _mention(source: Source, about: Mapping[str, Any], label: str) -> Label:
    """What the outputs of an extraction task say: that something is there at all, or that it is among what is listed."""
    pool = _label(source, source.task.name, label, source.side, about, about["labels"][label])
    for example in source.task.examples:
        holds = example.output != "none" if about["rule"] == "present" else label in example.output.split(", ")
        (pool.texts if holds else pool.against)[example.split].append(example.input)
    return pool


def _unite(group: Label, labels: Mapping[tuple[str, str], Label]) -> Label:
    """Gives a group the texts of its members on its own side, if those are all of them or, of a large group, most."""
    members = [labels[group.set, name] for name in group.members if labels[group.set, name].side == group.side]
    dropped = len(group.members) - len(members)
    if dropped == 0 or len(group.members) >= _LARGE and 2 * dropped <= len(group.members):
        for split in group.texts:
            for member in members:
                group.texts[split] += [text for text in member.texts[split] if text not in group.texts[split]]
    return group
