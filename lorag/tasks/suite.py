"""Tasks: descriptions and examples, read from folders of tasks.jsonl and examples.jsonl.gz, and split by task."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorag.errors import ArtifactError, ConfigError, DescriptionError, TaskError
from lorag.files.artifacts import read_json, safe_name, write_json
from lorag.files.atomic import write_bytes
from lorag.files.images import ImageFile, copy_images
from lorag.files.json_lines import read_json_lines
from lorag.tasks.descriptions import MAX_DESCRIPTION, check_description

__all__ = ["MAX_DESCRIPTION", "Example", "Task", "TaskSuite", "check_description", "connected", "read_pairs"]

_MAX_TASKS, _MAX_EXAMPLES = 256 * 2**20, 2_000_000_000  # characters of tasks.jsonl, and of examples.jsonl.gz unpacked


@dataclass(frozen=True)
class Example:
    """One labelled text of a task; of an image, the input is an `ImageFile`."""

    input: str
    output: str
    split: str


@dataclass(frozen=True)
class Task:
    """A task: what it is called, how people describe it, and its examples.

    Attributes:
        name: Distinct in a suite.
        suite: Where it comes from.
        descriptions: Wordings to learn from and, of held-out tasks, to be described with.
        labels: The closed set of its outputs, if it has one.
        license: Of its examples.
        source: Of its examples.
        examples: Inputs and outputs.
        inputs: "text" or "image".
        free_text: Whether many outputs would do, as of a summary, so that ROUGE-L says more than exact match.
        eval_descriptions: Wordings of a training task that are kept for evaluation.
    """

    name: str
    suite: str
    descriptions: tuple[str, ...]
    labels: tuple[str, ...] | None
    license: str
    source: str
    examples: tuple[Example, ...] = ()
    inputs: str = "text"
    free_text: bool = False
    eval_descriptions: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name under which a bank keeps the task's expert: safe in files, whatever the task is called."""
        return safe_name(self.name)

    @property
    def variant_of(self) -> str:
        """The name up to its first plus. If a task has that name, this one asks the same in another answer format."""
        return self.name.split("+")[0]

    def split(self, name: str) -> tuple[Example, ...]:
        """Examples of "train" or "test"."""
        return tuple(example for example in self.examples if example.split == name)


class TaskSuite:
    """An ordered collection of tasks with distinct names.

    Args:
        tasks: The tasks.
        splits: Names of the tasks of each split.
    """

    def __init__(self, tasks: Iterable[Task], splits: Mapping[str, Sequence[str]] | None = None) -> None:
        self.tasks = tuple(tasks)
        self.splits = dict(splits or {})
        self._by_name = {task.name: task for task in self.tasks}
        if len(self._by_name) != len(self.tasks):
            names = [task.name for task in self.tasks]
            raise TaskError("a task name occurs twice", got=next(name for name in names if names.count(name) > 1))

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, name: str) -> Task:
        if name not in self._by_name:
            raise TaskError("no task has this name", got=repr(name)[:80], remedy="List the names with lorag info.")
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(self._by_name)

    def select(self, names: Sequence[str]) -> TaskSuite:
        """The suite of these tasks, in this order."""
        return TaskSuite(self[name] for name in names)

    def of_split(self, split: str) -> TaskSuite:
        """The tasks of a split.

        Raises:
            TaskError: If there is none of this name.
        """
        if split not in self.splits:
            raise TaskError(f"the suite has no split {split!r}", expected=" or ".join(self.splits) or "a splits.json beside tasks.jsonl")
        return self.select(self.splits[split])

    def of_experts(self, names: Sequence[str]) -> list[Task]:
        """The tasks of experts, in their order; an expert's name is its task's key.

        Raises:
            ConfigError: If one is missing.
        """
        by_key = {task.key: task for task in self}
        missing = [name for name in names if name not in by_key]
        if missing:
            raise ConfigError("tasks: the suite lacks tasks of experts", got=f"{len(missing)} such as {missing[0]}")
        return [by_key[name] for name in names]

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str | Path, split: str | None = None) -> TaskSuite:
        """Reads a suite, or a folder of suites.

        Args:
            folder: Holds tasks.jsonl and, but for suites of descriptions, examples.jsonl.gz; or folders that do. Where it holds
                splits.json, that maps names of splits to names of tasks.
            split: Of which the tasks are wanted; by default all are.

        Raises:
            TaskError: Naming file, line and field, if one is missing or wrong, if a label is unknown, or if an input
                occurs in both train and test of a task.
        """
        folder = Path(folder)
        if split is not None:
            return cls.from_folder(folder).of_split(split)
        if (folder / "tasks.jsonl").is_file():
            return cls(_read_suite(folder), _read_splits(folder))
        suites = sorted(child for child in folder.iterdir() if (child / "tasks.jsonl").is_file()) if folder.is_dir() else []
        if not suites:
            raise TaskError(f"{folder} is not a task suite", got="no tasks.jsonl in it or below it")
        return cls((task for child in suites for task in _read_suite(child)), _read_splits(folder))

    def save(self, folder: str | Path) -> Path:
        """Writes tasks.jsonl, examples.jsonl.gz, images and, if it has splits, splits.json; the same suite gives the same bytes."""
        folder = Path(folder)
        copy_images((example.input for task in self for example in task.examples), folder)
        lines = "".join(
            json.dumps(
                {
                    "name": task.name,
                    "suite": task.suite,
                    "descriptions": list(task.descriptions),
                    "labels": None if task.labels is None else list(task.labels),
                    "license": task.license,
                    "source": task.source,
                }
                | ({} if task.inputs == "text" else {"inputs": task.inputs})
                | ({"free_text": True} if task.free_text else {})
                | ({"eval_descriptions": list(task.eval_descriptions)} if task.eval_descriptions else {}),
                ensure_ascii=False,
            )
            + "\n"
            for task in self
        )
        raw = io.BytesIO()
        with gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
            for task in self:
                for example in task.examples:
                    row = {"task": task.name, "split": example.split, "input": example.input, "output": example.output}
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        write_bytes(folder / "examples.jsonl.gz", raw.getvalue())
        write_bytes(folder / "tasks.jsonl", lines.encode())
        if self.splits:
            write_json(folder / "splits.json", {name: list(names) for name, names in self.splits.items()})
        return folder

    def fingerprint(self) -> str:
        """Eight hex digits that any change of a task or example alters."""
        crc = 0
        for task in self:
            crc = zlib.crc32(repr(replace(task, examples=())).encode(), crc)
            for example in task.examples:
                crc = zlib.crc32(repr(example).encode(), crc)
        return f"{crc:08x}"


def _rows(path: Path, most: int, *, named: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        yield from read_json_lines(path, most, named=named)
    except ArtifactError as error:
        raise TaskError(str(error)) from error


def _field(row: Mapping[str, Any], key: str, where: str, kind: type) -> Any:  # noqa: ANN401 - of the kind asked for
    if key not in row:
        raise TaskError(f"{where}: field {key!r} is missing", expected=kind.__name__)
    if not isinstance(row[key], kind):
        raise TaskError(f"{where}: field {key!r} has the wrong type", got=type(row[key]).__name__, expected=kind.__name__)
    return row[key]


def _read_splits(folder: Path) -> dict[str, list[str]]:
    path = folder / "splits.json"
    splits = read_json(path) if path.is_file() else {}
    for split, names in splits.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TaskError(f"{path}: split {split!r} cannot be used", expected="a list of tasks' names")
    return splits


def _read_suite(folder: Path) -> list[Task]:
    tasks = _read_tasks(folder / "tasks.jsonl", folder.name)
    packed = folder / "examples.jsonl.gz"
    examples = _read_examples(packed, tasks) if packed.is_file() else {}
    return [replace(task, examples=tuple(examples.get(name, ()))) for name, task in tasks.items()]


def _read_tasks(path: Path, suite: str) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for where, row in _rows(path, _MAX_TASKS):
        name = _field(row, "name", where, str)
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise TaskError(f"{where}: field 'name' cannot be used", got=repr(name)[:80], expected="1 to 200 printable characters")
        if name in tasks:
            raise TaskError(f"{where}: task {name!r} occurs twice")
        descriptions = _texts(row, "descriptions", where)
        kept = _texts(row, "eval_descriptions", where) if "eval_descriptions" in row else ()
        if not descriptions:
            raise TaskError(f"{where}: task {name!r} has no description")
        if shared := set(descriptions) & set(kept):
            raise TaskError(f"{where}: a wording of task {name!r} is both for training and for evaluation", got=repr(min(shared))[:80])
        labels = row.get("labels")
        if labels is not None and (not isinstance(labels, list) or not all(isinstance(x, str) for x in labels)):
            raise TaskError(f"{where}: field 'labels' has the wrong type", expected="a list of str, or null")
        inputs = row.get("inputs", "text")
        if inputs not in ("text", "image"):
            raise TaskError(f"{where}: field 'inputs' cannot be used", got=repr(inputs)[:40], expected="text or image")
        tasks[name] = Task(
            name=name,
            inputs=inputs,
            suite=str(row.get("suite", suite)),
            descriptions=descriptions,
            labels=None if labels is None else tuple(labels),
            license=str(row.get("license", "unknown")),
            source=str(row.get("source", "unknown")),
            free_text=_field(row, "free_text", where, bool) if "free_text" in row else False,
            eval_descriptions=kept,
        )
    return tasks


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    try:
        return tuple(check_description(text) for text in _field(row, key, where, list))
    except DescriptionError as error:
        raise TaskError(f"{where}: {error}") from error


def _read_examples(path: Path, tasks: Mapping[str, Task]) -> dict[str, list[Example]]:
    """The examples of each task that has any."""
    examples: dict[str, list[Example]] = {}
    seen: dict[tuple[str, str], str] = {}
    for where, row in _rows(path, _MAX_EXAMPLES):
        name, split, text, output = (_field(row, key, where, str) for key in ("task", "split", "input", "output"))
        if name not in tasks:
            raise TaskError(f"{where}: field 'task' names no task of tasks.jsonl", got=repr(name)[:80])
        if split not in ("train", "test"):
            raise TaskError(f"{where}: field 'split' cannot be used", got=repr(split)[:40], expected="train or test")
        labels = tasks[name].labels
        if labels is not None and output not in labels:
            raise TaskError(f"{where}: unknown label", got=repr(output)[:60], expected=f"one of the {len(labels)} labels of {name}")
        if seen.setdefault((name, text), split) != split:
            raise TaskError(f"{where}: the same input is in train and test of {name}", got=repr(text[:60]), remedy="Remove one.")
        example = Example(_image(text, path.parent, where) if tasks[name].inputs == "image" else text, output, split)
        examples.setdefault(name, []).append(example)
    return examples


def _image(relative: str, folder: Path, where: str) -> ImageFile:
    """An image's path, of a file that is there; it is opened when it is used."""
    image = ImageFile(relative, folder)
    try:
        image.path()
    except ArtifactError as error:
        raise TaskError(f"{where}: field 'input' names no image of the suite: {error}") from error
    return image


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Reads (input, output) pairs from JSON lines, for instance a few examples of a new task.

    Raises:
        TaskError: Naming the line, if one is not `{"input": ..., "output": ...}`.
    """
    rows = _rows(Path(path), _MAX_TASKS, named=True)
    return [(_field(row, "input", where, str), _field(row, "output", where, str)) for where, row in rows]


def connected(marks: Sequence[Set[str]]) -> list[list[int]]:
    """Groups of indices that share marks, directly or through others; of what tasks share, such as texts or a source."""
    groups: list[tuple[set[str], list[int]]] = []
    for index, marked in enumerate(marks):
        near = [group for group in groups if not group[0].isdisjoint(marked)]
        groups = [group for group in groups if group not in near]
        groups.append((set(marked).union(*(others for others, _ in near)), sorted([index, *(i for _, members in near for i in members)])))
    return sorted(members for _, members in groups)
