"""Descriptions that a bank of text tasks cannot serve: what a gate learns to refuse, and what its refusals are measured on.

Robots, gibberish, empty praise, other languages, and tasks of other kinds, some of which sound like tasks of the embedded
world. One part is for fitting and another for testing (`unknown.yaml`). Where a bank does serve some of them, its gate
leaves those out that lie as near to its experts as half of its own held-out tasks do; or give a list of your own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lorag.errors import ConfigError
from lorag.files.yaml_values import parse_yaml
from lorag.tasks.descriptions import check_description

__all__ = ["PARTS", "read_unknown", "unknown_tasks"]

PARTS = ("fit", "test")
_FILE = "unknown.yaml"


@functools.cache
def _shipped() -> Mapping[str, Mapping[str, list[str]]]:
    raw = resources.files("lorag.tasks").joinpath(_FILE).read_bytes()
    return _checked(parse_yaml(raw, _FILE), _FILE)


def unknown_tasks(part: str) -> dict[str, list[str]]:
    """The shipped descriptions of a part, "fit" or "test", by kind."""
    if part not in PARTS:
        raise ConfigError("part of the unknown tasks cannot be used", got=repr(part), expected=" or ".join(PARTS))
    return {kind: list(parts[part]) for kind, parts in _shipped().items()}


def read_unknown(path: str | Path, part: str) -> dict[str, list[str]]:
    """Reads a list of one's own: YAML that maps kinds to `fit` and `test`, each a list of descriptions.

    Raises:
        ConfigError: If it has another form.
        DescriptionError: If a description cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("there is no such file", got=path, expected="YAML: kind -> fit, test -> descriptions")
    kinds = _checked(parse_yaml(path.read_bytes(), str(path)), str(path))
    return {kind: list(parts[part]) for kind, parts in kinds.items() if part in PARTS}


def _checked(value: Any, origin: str) -> Mapping[str, Mapping[str, list[str]]]:  # noqa: ANN401 - YAML is any value
    form = "kind -> fit, test -> descriptions"
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{origin} holds no kinds of descriptions", got=type(value).__name__, expected=form)
    for kind, parts in value.items():
        if not isinstance(parts, dict) or set(parts) != set(PARTS) or not all(isinstance(texts, list) for texts in parts.values()):
            raise ConfigError(f"{origin}: {kind} cannot be used", expected=form)
        for texts in parts.values():
            for text in texts:
                check_description(text)
        if set(parts["fit"]) & set(parts["test"]):
            raise ConfigError(f"{origin}: {kind} has descriptions in both parts", got=min(set(parts["fit"]) & set(parts["test"])))
    return value
