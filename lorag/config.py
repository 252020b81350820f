"""Settings: structured configs, presets that hold values only, and KEY=VALUE overrides, all checked by OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorag.errors import ArtifactError, ConfigError
from lorag.files.artifacts import looks_like, read_bounded
from lorag.files.yaml_values import parse_yaml, uninterpolated

__all__ = ["from_plain", "load_config", "preset_names", "read_settings", "recipe_names", "to_plain"]

T = TypeVar("T")
_MAX_BYTES = 32 * 1024
_RECIPES = "recipes"
_PARTS = frozenset(("add", "build", "train"))  # of a recipe, each the settings of one command


def preset_names() -> list[str]:
    """Names of the presets that ship in lorag/configs."""
    return _shipped()


def recipe_names() -> list[str]:
    """Names of the recipes that ship in lorag/configs/recipes: presets with a part for each command, for bases that people use."""
    return _shipped(_RECIPES)


def _shipped(*folders: str) -> list[str]:
    inside = resources.files("lorag").joinpath("configs", *folders)
    return sorted(path.name.removesuffix(".yaml") for path in inside.iterdir() if path.name.endswith(".yaml"))


def _read(preset: str, part: str | None) -> dict[str, Any]:
    path, recipe = Path(preset), preset.removeprefix(f"{_RECIPES}/")
    if preset in preset_names():
        raw = resources.files("lorag").joinpath("configs", f"{preset}.yaml").read_bytes()
    elif recipe in recipe_names():
        raw = resources.files("lorag").joinpath("configs", _RECIPES, f"{recipe}.yaml").read_bytes()
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        raw = _read_file(path)
    else:
        raise ConfigError("no such preset or YAML file", got=repr(preset)[:80], expected=", ".join([*preset_names(), *recipe_names()]))
    value = parse_yaml(raw, preset)
    if not isinstance(value, dict):
        raise ConfigError(f"{preset} holds no mapping", got=looks_like(raw[:64]) if b":" not in raw else None)
    if not value or not _PARTS.issuperset(value):
        return value
    if part not in value or not isinstance(value[part], dict):
        raise ConfigError(f"{preset} has no settings for this command", got=", ".join(value), expected=part)
    return value[part]


def _read_file(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_BYTES, named=True)
    except ArtifactError as error:
        raise ConfigError(str(error)) from error


def load_config(schema: type[T], preset: str | None = None, overrides: Sequence[str] = (), part: str | None = None) -> T:
    """Builds a config dataclass from its defaults, a preset, and overrides such as `settings.steps=100`.

    Args:
        schema: The dataclass.
        preset: Name of a shipped preset or recipe, or path of a YAML file.
        overrides: KEY=VALUE strings, later ones winning.
        part: Where the preset is a recipe, the part of it that is meant: "add", "build" or "train".

    Raises:
        ConfigError: Naming the key that is unknown or has a value of the wrong type, or the part that a recipe lacks.
    """
    return _merge(schema, _read(preset, part) if preset else {}, read_settings(overrides))


def read_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads KEY=VALUE strings, later ones winning; dots in keys make groups.

    Raises:
        ConfigError: If one cannot be read.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError("a setting cannot be read", got=repr(override)[:80], expected="KEY=VALUE")
        _put(settings, key.split("."), parse_yaml(text, f"the setting {key[:60]}"), key)
    return settings


def from_plain(schema: type[T], values: Mapping[str, Any], outer: str = "") -> T:
    """Builds a config dataclass from its JSON form; what is left out has its default.

    Args:
        schema: The dataclass.
        values: Its JSON form.
        outer: What stands before its keys where a user writes them, such as "settings.".

    Raises:
        ConfigError: Naming the key that is unknown or has a value of the wrong type.
    """
    return _merge(schema, uninterpolated(dict(values), "a stored config"), outer=outer)


def _put(into: dict[str, Any], keys: Sequence[str], value: Any, whole: str) -> None:  # noqa: ANN401 - YAML is any value
    *outer, last = keys
    for key in outer:
        into = into.setdefault(key, {})
        if not isinstance(into, dict):
            raise ConfigError("a setting is a value and a group of settings at once", got=whole[:80])
    if isinstance(value, dict) and isinstance(into.get(last), dict):
        for key, child in value.items():
            _put(into[last], [key], child, whole)
    else:
        into[last] = value


def _refuse_renamed(schema: Any, values: Any, outer: str = "") -> None:  # noqa: ANN401 - a dataclass, and YAML or JSON
    """Raises ConfigError, with its new name, for a key that a dataclass or one inside it lists in `RENAMED`."""
    renamed, types = getattr(schema, "RENAMED", {}), get_type_hints(schema)
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if key in renamed:
            new = renamed[key] if "=" in renamed[key] else f"{outer}{renamed[key]}"
            raise ConfigError(f"{outer}{key} has another name now", got=f"{outer}{key}", expected=new, remedy=f"Write {new}.")
        if is_dataclass(types.get(key)):
            _refuse_renamed(types[key], value, f"{outer}{key}.")


def _merge(schema: type[T], *parts: Any, outer: str = "") -> T:  # noqa: ANN401 - dictionaries and OmegaConf's own
    for part in parts:
        _refuse_renamed(schema, part, outer)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *parts))  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        names = ", ".join(schema.__dataclass_fields__)  # type: ignore[attr-defined]
        what = next(iter(str(error).strip().splitlines()), type(error).__name__)
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{outer}{key}: {what}" if key else what, expected=f"settings among {names}") from error


def to_plain(config: object) -> dict[str, Any]:
    """JSON form of a config dataclass."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]
