"""Templates of pages and cards: jinja2, in which nothing from outside becomes markup."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Markup", "render"]


@functools.cache
def _environment(package: str, escape: Callable[[str], str]) -> Environment:
    def escaped(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape(str(value)))  # noqa: S704 - escaped by the room's own rule

    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(package: str, name: str, escape: Callable[[str], str], /, **values: Any) -> str:  # noqa: ANN401 - whatever the template shows
    """Fills a template of a package.

    Args:
        package: The package, in whose folder the template lies.
        name: Its file.
        escape: Turns text into what cannot be taken for markup; values of `Markup` are taken as they are.
        values: What the template names. A name that is missing is an error.
    """
    return _environment(package, escape).get_template(name).render(values)
