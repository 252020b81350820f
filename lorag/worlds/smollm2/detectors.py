"""Detectors: one yes/no task for each label, with negatives of its own set and of others."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorag.tasks.suite import Example, Task
from lorag.worlds.smollm2.files import read

if TYPE_CHECKING:
    from lorag.worlds.smollm2.label_pools import Label

__all__ = ["detector"]


def detector(label: Label, others: Sequence[Label], train: int, test: int) -> Task:
    """Writes the detector of a label: as many positives as negatives; these half from its own set, half from other sets.

    Groups, and sets that say something of any text, have negatives of their own set alone.

    Args:
        label: What to detect.
        others: Labels that may give negatives.
        train: Most training examples.
        test: Most test examples.
    """
    words = label.name.lower().replace("#", "sharp").replace("+", "plus").replace("'", "")
    name = f"{label.set}_is_{'_'.join(re.findall('[a-z0-9]+', words))}"
    rng = random.Random(zlib.crc32(name.encode()))
    near, far = _pools(label, [other for other in others if other.plain])
    examples: list[Example] = []
    used = {text for split in ("train", "test") for text in label.texts[split]}
    for split, most in (("train", train), ("test", test)):
        positives = rng.sample(label.texts[split], min(len(label.texts[split]), most // 2))
        wanted = len(positives)
        similar = _draw([pool[split] for pool in near], wanted - wanted // 2 if far else wanted, used, rng)
        negatives = similar + _draw([pool[split] for pool in far], wanted - len(similar), used, rng)
        rows = [Example(text, "yes", split) for text in positives[: len(negatives)]] + [Example(text, "no", split) for text in negatives]
        rng.shuffle(rows)
        examples += rows
    return Task(name, "smollm2", (label.concept,), ("yes", "no"), label.license, label.source, tuple(examples))


def _pools(label: Label, others: Sequence[Label]) -> tuple[list[dict[str, list[str]]], list[dict[str, list[str]]]]:
    """Texts that may be negatives, of the label's own set and of others; none of a label that may mean the same."""
    if label.against["train"]:
        return [label.against], []
    apart = [other for other in others if other.name not in (label.name, *label.members) and other.concept != label.concept]
    near = [other.texts for other in apart if other.set == label.set]
    if label.members or label.set in read("sources")["alone"]:
        return near, []
    return near, [other.texts for other in apart if other.family != label.family and not other.words & label.words]


def _draw(pools: Sequence[Sequence[str]], count: int, used: set[str], rng: random.Random) -> list[str]:
    """Texts of each pool in turn, none twice."""
    drawn: list[str] = []
    left = [rng.sample(pool, len(pool)) for pool in pools if pool]
    rng.shuffle(left)
    while len(drawn) < count and left:
        for pool in left:
            text = pool.pop()
            if text not in used and len(drawn) < count:
                used.add(text)
                drawn.append(text)
        left = [pool for pool in left if pool]
    return drawn
