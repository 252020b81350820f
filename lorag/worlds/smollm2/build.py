"""Build the suite of real tasks: drafts, formats drawn for them, descriptions, and the splits by task."""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorag.files.atomic import write_bytes
from lorag.tasks.suite import Task, TaskSuite
from lorag.worlds.smollm2.drafts import Draft, Limits, draft_detectors, draft_sources, draft_subsets
from lorag.worlds.smollm2.files import read
from lorag.worlds.smollm2.formats import CASES, PLAIN, WRAPS, Format, answers
from lorag.worlds.smollm2.label_pools import pool_labels
from lorag.worlds.smollm2.made_inputs import draft_made
from lorag.worlds.smollm2.passages import draft_passages
from lorag.worlds.smollm2.sources import notice, read_sources, size
from lorag.worlds.smollm2.wordings import describe

__all__ = ["SPLITS", "build_tasks"]

SPLITS = ("train", "validation", "unseen_format", "unseen_label", "unseen_task")
_WORDINGS = {"train": 28, "validation": 6, "eval": 8}
_KEPT = 4  # wordings of a training task that are kept for evaluation
_FORMATTED = {"text": 4, "labels": 3, "yes_no": 1}  # training tasks in other forms, of each draft
_HELD_FORMATS = {"validation": 8, "unseen_format": 20}  # of each kind
_IN_FORM = Limits(48, 16)
_ANSWERED = tuple(name for name, about in read("wordings/formats")["words"].items() if "answers" in about)
_WORDS = {"text": ("plain",), "labels": ("plain", "initial"), "yes_no": ("plain", *_ANSWERED)}
_MOST_OUT, _LONGEST = 48, 3  # of `size`; how many of the longest outputs are measured


def build_tasks(sources: Path, out: Path) -> Mapping[str, int]:
    """Writes the suite, with splits.json and NOTICE.

    Args:
        sources: Folder of the source suites.
        out: Folder of the new suite.

    Returns:
        Number of tasks of each split.
    """
    rows = read_sources(sources)
    sides = {
        (family, label): side.replace("validation_label", "validation")
        for side, families in read("held_out").items()
        for family, labels in families.items()
        for label in labels
    }
    held = {e.input for row in rows if row.side != "train" or (row.family, row.task.name) in sides for e in row.task.examples}
    labels = pool_labels(rows, sides, held)
    held |= {text for label in labels if label.side != "train" for texts in label.texts.values() for text in texts}
    limits = Limits()
    whole = draft_sources(rows, held, sides, replace(limits, train=10_000, test=10_000))
    drafts = [
        *draft_sources(rows, held, sides, limits),
        *draft_subsets(whole, 2, limits),
        *draft_detectors(labels, limits),
        *draft_made(rows, held, limits),
    ]
    tasks: list[Task] = []
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    passages = [(draft, PLAIN, draft.side) for draft in draft_passages(rows, held, limits)]  # in no other form
    for draft, form, split in [*_grid(drafts), *passages]:
        tasks.append(_task(draft, form, split))
        splits[split].append(tasks[-1].name)
    TaskSuite(tasks, splits).save(out)
    write_bytes(out / "NOTICE", notice(rows).encode())
    return {name: len(names) for name, names in splits.items()}


def _grid(drafts: Sequence[Draft]) -> list[tuple[Draft, Format, str]]:
    """Every draft in plain form, then in others; the forms of held-out combinations are drawn first."""
    held: dict[str, list[tuple[Format, str]]] = {}
    rng = random.Random(13)
    training = [draft for draft in drafts if draft.side == "train"]
    fitting = {draft.task.name: _fitting(draft) for draft in training}
    for split, count in _HELD_FORMATS.items():
        for kind in _FORMATTED:
            chosen = [draft.task.name for draft in rng.sample(training, len(training)) if draft.kind == kind and fitting[draft.task.name]]
            for name in chosen[:count]:
                taken = [form for form, _ in held.get(name, [])]
                held.setdefault(name, []).append((_draw(fitting[name], rng, taken), split))
    formatted = []
    for draft in drafts:
        formatted.append((draft, PLAIN, draft.side))
        if draft.side != "train":
            continue
        mine, forms = held.get(draft.task.name, []), fitting[draft.task.name]
        formatted += [(draft, form, split) for form, split in mine]
        taken = [form for form, _ in mine]
        for _ in range(min(_FORMATTED[draft.kind], len(forms) - len(taken))):
            taken.append(_draw(forms, rng, taken))
            formatted.append((draft, taken[-1], "train"))
    return formatted


def _fitting(draft: Draft) -> list[Format]:
    """The forms that change a task's answers and leave no doubt about them."""
    outputs = sorted({example.output for example in draft.task.examples})
    verbatim = draft.task.name in read("sources")["verbatim"]
    formats = []
    named = set(draft.task.name.split("_"))  # "negative" as the answer whether something is negative would be a trap
    for words in _WORDS[draft.kind] if "do" not in draft.phrases.texts or draft.kind != "yes_no" else ("plain",):
        if words in _ANSWERED and named & set(answers(words)):
            continue
        if words == "initial" and len({output[:1] for output in outputs}) < len(outputs):
            continue
        worded = [Format(words).apply(output) for output in outputs]
        for case, change in CASES.items():
            if case != "plain" and (verbatim or sum(change(text) != text for text in worded) < 0.8 * len(worded)):
                continue
            formats += [Format(words, case, wrap) for wrap in WRAPS if _wraps(wrap, worded)]
    return [form for form in formats if form != PLAIN]


def _wraps(wrap: str, outputs: Sequence[str]) -> bool:
    marks = {"stop": ".!?", "exclaim": ".!?", "quoted": '"', "code": "`", "bold": "*", "json": '"'}.get(wrap, "")
    at_end = wrap in ("stop", "exclaim")
    if any(mark in (text[-1:] if at_end else text) for mark in marks for text in outputs):
        return False
    return all(size(WRAPS[wrap](text)) <= _MOST_OUT for text in heapq.nlargest(_LONGEST, outputs, len))


def _draw(forms: Iterable[Format], rng: random.Random, taken: Sequence[Format]) -> Format:
    """A form that the task does not have yet; mostly of one part, at times of two or three."""
    free = [form for form in forms if form not in taken]
    wanted = rng.choices((1, 2, 3), (12, 7, 1))[0]
    best = [form for form in free if form.name.count("+") + 1 == wanted] or free
    return rng.choice(best)


def _task(draft: Draft, form: Format, split: str) -> Task:
    """The task of the suite: answers in their form, descriptions of the split's own wordings."""
    name = draft.task.name if form == PLAIN else f"{draft.task.name}+{form.name}"
    rows = draft.task.examples
    if form != PLAIN and split == "train":
        rows = tuple(row for part, most in (("train", _IN_FORM.train), ("test", _IN_FORM.test)) for row in draft.task.split(part)[:most])
    labels = None if draft.task.labels is None else tuple(sorted({form.apply(label) for label in draft.task.labels}))
    rng = random.Random(zlib.crc32(name.encode()))
    part = split if split in ("train", "validation") else "eval"
    training = draft.side == "train"
    texts = describe(draft.phrases, form, part, _WORDINGS[part], rng, known=training)
    kept = describe(draft.phrases, form, "eval", _KEPT, rng, known=True) if split == "train" else ()
    return replace(
        draft.task,
        name=name,
        suite="smollm2",
        labels=labels,
        descriptions=texts,
        eval_descriptions=kept,
        examples=tuple(replace(row, output=form.apply(row.output)) for row in rows),
    )
