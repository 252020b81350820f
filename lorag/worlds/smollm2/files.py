"""The world's own YAML: wordings, formats, sources, held-out labels and glosses of labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

__all__ = ["read", "read_glosses"]


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Reads one file, such as "sources" or "wordings/frames"."""
    return yaml.safe_load(resources.files("lorag.worlds.smollm2").joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


@functools.cache
def read_glosses() -> Mapping[str, Mapping[str, Any]]:
    """Reads labels/*.yaml: source task -> noun and, by label, concept, glosses and noun phrase."""
    folder = resources.files("lorag.worlds.smollm2").joinpath("labels")
    files = sorted((path for path in folder.iterdir() if path.name.endswith(".yaml")), key=lambda path: path.name)
    entries = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
    return {entry["task"]: entry for entry in entries}
