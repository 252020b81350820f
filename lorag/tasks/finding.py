"""Suites by name: folders, and those that ship with lorag."""

from __future__ import annotations

from pathlib import Path

from lorag.files.artifacts import embedded
from lorag.tasks.suite import TaskSuite

__all__ = ["TRAIN", "VALIDATION", "WITHOUT_EXPERT", "find_tasks"]

# The split of a suite whose tasks have training examples but no expert.
WITHOUT_EXPERT = "without_expert"
TRAIN, VALIDATION = "train", "validation"  # the splits from which a run without a bank learns
_SHIPPED = ("sandbox", "smollm2")


def find_tasks(name: str, split: str | None = None) -> TaskSuite:
    """Reads a suite by folder, or by the name of one that ships: "sandbox" or "smollm2"; all of its tasks, or those of a split."""
    return TaskSuite.from_folder(embedded(f"data/{name}/tasks") if name in _SHIPPED else Path(name), split)
