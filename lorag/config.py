"""Settings: structured configs, presets that hold values only, and KEY=VALUE overrides, all checked by OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorag.errors import ConfigError

__all__ = ["from_plain", "load_config", "preset_names", "to_plain"]

T = TypeVar("T")
_MAX_BYTES = 1_000_000


def preset_names() -> list[str]:
    """Names of the presets that ship in lorag/configs."""
    return sorted(
        path.name.removesuffix(".yaml") for path in resources.files("lorag").joinpath("configs").iterdir() if path.name.endswith(".yaml")
    )


def _read(preset: str) -> dict[str, Any]:
    path = Path(preset)
    if preset in preset_names():
        text = resources.files("lorag").joinpath("configs", f"{preset}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") and path.is_file() and path.stat().st_size <= _MAX_BYTES:
        text = path.read_text(encoding="utf-8")
    else:
        raise ConfigError("no such preset or YAML file", got=repr(preset)[:80], expected=", ".join(preset_names()))
    if "&" in text or "*" in text:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
                raise ConfigError(f"{preset} uses YAML anchors", remedy="Write the values out.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{preset} is not valid YAML", got=str(error)[:160]) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{preset} holds no mapping")
    return value


def load_config(schema: type[T], preset: str | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds a config dataclass from its defaults, a preset, and overrides such as `settings.steps=100`.

    Args:
        schema: The dataclass.
        preset: Name of a shipped preset, or path of a YAML file.
        overrides: KEY=VALUE strings, later ones winning.

    Raises:
        ConfigError: Naming the key that is unknown or has a value of the wrong type.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError("a setting cannot be read", got=repr(override)[:80], expected="KEY=VALUE")
        if "${" in override:
            raise ConfigError("a setting uses interpolation", got=repr(override)[:80], expected="a plain value")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
    except yaml.YAMLError as error:
        raise ConfigError("a setting cannot be read", got=" ".join(overrides)[:80], expected="KEY=VALUE, the value in YAML") from error
    return _merge(schema, _read(preset) if preset else {}, given)


def from_plain(schema: type[T], values: Mapping[str, Any]) -> T:
    """Builds a config dataclass from its JSON form; what is left out has its default.

    Raises:
        ConfigError: Naming the key that is unknown or has a value of the wrong type.
    """
    return _merge(schema, dict(values))


def _merge(schema: type[T], *parts: Any) -> T:  # noqa: ANN401 - dictionaries and OmegaConf's own
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *parts))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        known = ", ".join(schema.__dataclass_fields__)  # type: ignore[attr-defined]
        what = str(error).strip().splitlines()[0]
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {what}" if key else what, expected=f"settings among {known}") from error


def to_plain(config: object) -> dict[str, Any]:
    """JSON form of a config dataclass."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]
