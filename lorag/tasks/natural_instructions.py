"""Super-NaturalInstructions task files to a suite: definitions become descriptions, and inputs stand alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorag.errors import DescriptionError, TaskError
from lorag.files.artifacts import read_bounded, read_json
from lorag.tasks.derived import hold_out_groups
from lorag.tasks.descriptions import check_description
from lorag.tasks.suite import Example, Task, TaskSuite

__all__ = ["Limits", "import_instructions"]

_MOST_FILES = 10_000
_MAX_LIST = 2**22
_SUITE = "super-naturalinstructions"


@dataclass(frozen=True)
class Limits:
    """What is taken of each task.

    Attributes:
        train: Most training examples.
        test: Most test examples; at most a quarter of what there is.
        longest: Most characters of an example, input and output together; longer ones are passed over.
        language: Of inputs and outputs; "all" takes any.
    """

    train: int = 200
    test: int = 32
    longest: int = 4000
    language: str = "English"


def import_instructions(
    source: Path, out: Path, limits: Limits | None = None, *, held_out: float = 0.1, test_tasks: Path | None = None, seed: int = 0
) -> Mapping[str, int]:
    """Writes a suite of tasks in the format of Super-NaturalInstructions (Wang et al. 2022), with a splits.json.

    A task's definition becomes its description and stays out of the inputs, since it is the adapter that must know it. Where an
    instance has several outputs the first is taken. Which instances are taken, for training or for tests, depends on seed, task
    and text alone. Tasks that share a source data set fall on the same side of the split of tasks.

    Args:
        source: Folder with one JSON file per task.
        out: Folder of the new suite.
        limits: What is taken of each task.
        held_out: Share of the tasks held out, about.
        test_tasks: File with names of the tasks to hold out instead, one per line; names that are not there do not matter.
        seed: Seed of both choices.

    Returns:
        Number of tasks of the splits "train" and "test", and of files "skipped": of another language, or without enough
        usable examples or a usable definition.

    Raises:
        TaskError: Naming a file that is not such a task, or if nothing is left.
        ArtifactError: Naming a file that is not strict JSON, or is too large.
    """
    limits = limits or Limits()
    files = sorted(source.glob("*.json"))
    if not files or len(files) > _MOST_FILES:
        raise TaskError(f"{source} cannot be imported", got=f"{len(files)} JSON files", expected=f"1 to {_MOST_FILES}, one per task")
    kept: list[tuple[Task, set[str]]] = []
    for file in files:
        imported = _task(file, limits, seed)
        if imported is not None:
            kept.append(imported)
    tasks = [task for task, _ in kept]
    if test_tasks is None:
        test = hold_out_groups(tasks, [marks for _, marks in kept], held_out, random.Random(seed))
    else:
        test = {line.strip() for line in read_bounded(test_tasks, _MAX_LIST, named=True).decode("utf-8", "replace").splitlines()}
    splits = {"train": [t.name for t in tasks if t.name not in test], "test": [t.name for t in tasks if t.name in test]}
    if not splits["train"]:
        raise TaskError(f"{source} leaves no task to train on", got=f"{len(files)} files, {len(tasks)} usable tasks")
    TaskSuite(tasks, splits).save(out)
    return {name: len(names) for name, names in splits.items()} | {"skipped": len(files) - len(tasks)}


def _task(file: Path, limits: Limits, seed: int) -> tuple[Task, set[str]] | None:
    """A task and its source data sets, or None if it is not wanted or nothing of it can be used."""
    row = read_json(file)
    instances = row.get("Instances")
    if not isinstance(instances, list) or "Definition" not in row:
        raise TaskError(f"{file} is not a Super-NaturalInstructions task", expected='"Definition" and a list "Instances"')
    languages = {*_texts(row, "Input_language", file), *_texts(row, "Output_language", file)}
    if limits.language != "all" and languages - {limits.language}:
        return None
    try:
        descriptions = tuple(check_description(" ".join(text.split())) for text in _texts(row, "Definition", file))
    except DescriptionError:
        return None
    sources = [text.strip().lower() for text in _texts(row, "Source", file) if text.strip()]
    examples = _examples(instances, file, limits, seed)
    if not descriptions or len(examples) < 2:
        return None
    licences = sorted({text.strip() for text in _texts(row, "Instance License", file)})
    licence = licences[0] if len(licences) == 1 and len(licences[0]) <= 60 else "unknown"
    task = Task(file.stem, _SUITE, descriptions, None, licence, ", ".join(sources) or file.stem, tuple(examples))
    return task, set(sources) or {file.stem}


def _examples(instances: list[Any], file: Path, limits: Limits, seed: int) -> list[Example]:
    pairs: dict[str, str] = {}
    for number, instance in enumerate(instances):
        if not isinstance(instance, dict) or not isinstance(instance.get("input"), str):
            raise TaskError(f"{file}: instance {number} has no text as input")
        outputs = _texts(instance, "output", file)
        text, answer = instance["input"].strip(), outputs[0].strip() if outputs else ""
        if text and answer and len(text) + len(answer) <= limits.longest:
            pairs.setdefault(text, answer)
    order = sorted(pairs, key=lambda text: hashlib.sha256(f"{seed}/{file.stem}/{text}".encode("utf-8", "replace")).digest())
    test = min(limits.test, max(1, len(order) // 4))
    chosen = order[: test + limits.train]
    return [Example(text, pairs[text], "test" if place < test else "train") for place, text in enumerate(chosen)]


def _texts(row: Mapping[str, Any], key: str, file: Path) -> list[str]:
    """A field that holds one text or a list of texts; older files have the one, newer ones the other."""
    value = row.get(key, [])
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise TaskError(f"{file}: field {key!r} has the wrong type", got=type(value).__name__, expected="text, or a list of texts")
    return listed
