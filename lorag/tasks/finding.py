"""Suites by name: folders, and those that ship with lorag."""

from __future__ import annotations

from pathlib import Path

from lorag.files.artifacts import embedded, read_json
from lorag.tasks.suite import TaskSuite

__all__ = ["TRAIN", "VALIDATION", "WITHOUT_EXPERT", "find_split", "find_tasks"]

# The split of a suite whose tasks have training examples but no expert.
WITHOUT_EXPERT = "without_expert"
TRAIN, VALIDATION = "train", "validation"  # the splits from which a run without a bank learns
_SHIPPED = ("sandbox", "smollm2")


def find_tasks(name: str, split: str | None = None) -> TaskSuite:
    """Reads a suite by folder, or by the name of one that ships: "sandbox" or "smollm2"."""
    return TaskSuite.from_folder(_suite_folder(name), split)


def find_split(name: str, split: str) -> TaskSuite | None:
    """A split of a suite, or None if its splits.json does not name it."""
    listed = _suite_folder(name) / "splits.json"
    return find_tasks(name, split) if listed.is_file() and read_json(listed).get(split) else None


def _suite_folder(name: str) -> Path:
    return embedded(f"data/{name}/tasks") if name in _SHIPPED else Path(name)
