"""Suites by name: folders, and those that ship with lorag."""

from __future__ import annotations

from pathlib import Path

from lorag.files.artifacts import embedded
from lorag.tasks.suite import TaskSuite, read_splits

__all__ = ["TRAIN", "VALIDATION", "WITHOUT_EXPERT", "find_split", "find_splits", "find_tasks"]

# The split of a suite whose tasks have training examples but no expert.
WITHOUT_EXPERT = "without_expert"
TRAIN, VALIDATION = "train", "validation"  # the splits from which a run without a bank learns
_SHIPPED = ("sandbox", "smollm2")


def find_tasks(name: str, split: str | None = None) -> TaskSuite:
    """Reads a suite by folder, or by the name of one that ships: "sandbox" or "smollm2"."""
    return TaskSuite.from_folder(_suite_folder(name), split)


def find_splits(name: str) -> dict[str, list[str]]:
    """Names of the tasks of each split of a suite; empty if it has no splits."""
    return read_splits(_suite_folder(name))


def find_split(name: str, split: str) -> TaskSuite | None:
    """A split of a suite, or None if it does not have it."""
    return find_tasks(name, split) if find_splits(name).get(split) else None


def _suite_folder(name: str) -> Path:
    return embedded(f"data/{name}/tasks") if name in _SHIPPED else Path(name)
