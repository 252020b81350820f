"""YAML that holds values only, read as if hostile: no tags, anchors, doubled keys or interpolation, and bounded nesting."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from lorag.errors import ConfigError

__all__ = ["parse_yaml", "uninterpolated"]

_MAX_DEPTH = 32
_PLAIN = (str, int, float, bool, type(None))


def parse_yaml(raw: bytes | str, origin: object) -> Any:  # noqa: ANN401 - YAML is any value
    """Parses YAML that holds values only: text, finite numbers, true, false, null, lists and mappings with text as keys.

    Anchors, aliases, tags, merge keys, keys that occur twice, and nesting beyond 32 levels are refused while the text is
    scanned, before any value exists: a few hundred bytes of aliases can stand for billions of values.

    Raises:
        ConfigError: Naming the origin and the line.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ConfigError(f"{origin}, line {event.start_mark.line + 1} uses YAML anchors", remedy="Write the values out.")
            if getattr(event, "tag", None) is not None:
                raise ConfigError(
                    f"{origin}, line {event.start_mark.line + 1} uses a YAML tag", got=str(event.tag)[:40], remedy="Write plain values."
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ConfigError(f"{origin} is nested too deeply", expected=f"at most {_MAX_DEPTH} levels")
        loader = _Values(text)
        try:
            return _checked(loader.get_single_data(), origin)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # ValueError: no UTF-8, the date 2001-99-99
        raise ConfigError(f"{origin} is not valid YAML", got=str(error)[:160]) from error


class _Values(yaml.SafeLoader):
    """A SafeLoader to which keys that occur twice and `<<` are errors, dates are text, and 1e-3 is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[:40]!r} occurs twice", node.start_mark)


_Values.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.Inf|\.INF)$|\.nan$|\.NaN$|\.NAN$"),
    list("-+0123456789."),
)


def _checked(value: Any, origin: object) -> Any:  # noqa: ANN401 - YAML is any value
    """Returns a value that consists of plain ones; the nesting is bounded already."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{origin} has a key that is not text", got=repr(key)[:40], remedy="Put it in quotes.")
            _checked(child, origin)
    elif isinstance(value, list):
        for child in value:
            _checked(child, origin)
    elif not isinstance(value, _PLAIN) or isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"{origin} holds a value that is not a plain one", got=repr(value)[:40], expected="text, a finite number, true or false"
        )
    elif isinstance(value, str):
        uninterpolated(value, origin)
    return value


def uninterpolated(value: Any, origin: object) -> Any:  # noqa: ANN401 - JSON is any value
    """Returns a value without OmegaConf's `${…}`, which would read other settings and the environment."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{origin} uses interpolation", got=repr(value)[:80], expected="a plain value")
    for child in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        uninterpolated(child, origin)
    return value
