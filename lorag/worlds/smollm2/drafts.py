"""Tasks before they get descriptions and formats: what is asked, in which words, with which examples, on which side."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorag.worlds.smollm2.detectors import detector
from lorag.worlds.smollm2.files import read, read_glosses
from lorag.worlds.smollm2.label_pools import KEPT, Label
from lorag.worlds.smollm2.sources import Source, sample
from lorag.worlds.smollm2.wordings import Phrases

if TYPE_CHECKING:
    from lorag.tasks.suite import Example, Task

__all__ = ["Draft", "Limits", "draft_detectors", "draft_sources", "draft_subsets"]

_LARGE = 6  # a label set of this size is cut into subsets that are tasks of their own
_LISTED = 16  # most labels that a description lists
_FEWEST = 24  # training examples of a subset that is worth a task
_DETECTORS = 6  # most detectors of a held-out family
_KINDS = ("do", "say", "clause", "thing")


@dataclass(frozen=True)
class Limits:
    """What a task gets of examples."""

    train: int = 64
    test: int = 32


@dataclass(frozen=True)
class Draft:
    """A task without descriptions.

    Attributes:
        task: With examples; its descriptions are still the source's.
        kind: "text", "labels" or "yes_no".
        side: "train", "validation", "unseen_label" or "unseen_task".
        phrases: Its words.
    """

    task: Task
    kind: str
    side: str
    phrases: Phrases


def draft_sources(sources: Iterable[Source], held: Set[str], sides: Mapping[tuple[str, str], str], limits: Limits) -> list[Draft]:
    """Takes the source tasks; those of training lose the texts and the labels that are held out.

    Args:
        sources: Source tasks.
        held: Texts that training must not see.
        sides: (family, label) -> side, of labels that are held out.
        limits: Numbers of examples.
    """
    aliases, renamed = read("sources")["aliases"], read("sources")["labels"]
    drafts = []
    for source in sources:
        names = renamed.get(source.family, {}) | renamed.get(source.task.name, {})
        alias_of = aliases.get(source.task.name, {})
        side = sides.get((source.family, source.task.name), source.side)
        rows: list[Example] = []
        for row in source.task.examples:
            label = alias_of.get(row.output, row.output)
            if side != "train" or (row.input not in held and (source.family, label) not in sides):
                rows.append(replace(row, output=row.output if source.task.labels is None else names.get(label, label)))
        labels = None if source.task.labels is None else tuple(sorted({row.output for row in rows}))
        yes_no = labels is not None and set(labels) == {"yes", "no"}
        train = max(limits.train, 2 * len(labels or ()))
        task = replace(source.task, labels=labels, examples=sample(rows, train, limits.test, source.task.name))
        phrases = _phrases(source, labels)
        drafts.append(Draft(task, "text" if labels is None else "yes_no" if yes_no else "labels", side, phrases))
    return drafts


def _phrases(source: Source, labels: tuple[str, ...] | None) -> Phrases:
    """The words of tasks.yaml."""
    written = read("wordings/tasks")[source.task.name]
    texts = {kind: list(written[kind]) for kind in _KINDS if kind in written}
    held = {kind: list(written[f"eval_{kind}"]) for kind in _KINDS if f"eval_{kind}" in written}
    glosses = read_glosses().get(source.task.name, {"labels": {}})["labels"]
    for entry in (glosses[label] for label in ("yes", "Yes") if label in glosses and "clause" in texts):
        texts["clause"] += entry["glosses"][:-KEPT]
        held["clause"] += entry["glosses"][-KEPT:]
    listed = labels is not None and 2 < len(labels) <= _LISTED
    return Phrases(source.noun, texts, held, tuple(labels or ()) if listed else (), first=tuple(written.get("eval_first", ())))


def draft_subsets(drafts: Iterable[Draft], count: int, limits: Limits) -> list[Draft]:
    """Cuts large label sets of training into subsets of two to five labels, which descriptions list."""
    drawn = []
    for draft in drafts:
        labels = draft.task.labels
        if draft.kind != "labels" or draft.side != "train" or labels is None or len(labels) < _LARGE:
            continue
        rng = random.Random(zlib.crc32(draft.task.name.encode()))
        for number in range(max(1, count * len(labels) // 10)):
            chosen = tuple(rng.sample(labels, rng.randint(2, 5)))
            rows = [row for row in draft.task.examples if row.output in chosen]
            name = f"{draft.task.name}_subset{number + 1}"
            task = replace(draft.task, name=name, labels=tuple(sorted(chosen)), examples=sample(rows, limits.train, limits.test, name))
            if len(task.split("train")) >= _FEWEST and len(task.split("test")) >= _FEWEST // 3:
                drawn.append(replace(draft, task=task, phrases=replace(draft.phrases, labels=chosen, listed=True)))
    return drawn


def draft_detectors(labels: Iterable[Label], limits: Limits) -> list[Draft]:
    """One detector for each label; negatives are never of a held-out label, but for those of a held-out family.

    A held-out family gets a few, of single labels first, and none for what training has a detector of.
    """
    labels = list(labels)
    taught = {label.concept for label in labels if label.side == "train"}
    drafts = []
    families: Counter[str] = Counter()
    for label in sorted(labels, key=lambda label: (bool(label.members), zlib.crc32(label.name.encode()))):
        families[label.family] += label.side == "unseen_task" and label.concept not in taught
        if label.side == "unseen_task" and (label.concept in taught or families[label.family] > _DETECTORS):
            continue
        home = "unseen_task" if label.side == "unseen_task" else "train"
        task = detector(label, [other for other in labels if other.side == home], limits.train, limits.test)
        drafts.append(Draft(task, "yes_no", label.side, label.phrases))
    return sorted(drafts, key=lambda draft: draft.task.name)
