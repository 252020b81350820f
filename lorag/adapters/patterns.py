"""Rank and alpha patterns: PEFT's expressions over module paths, matched within bounds of time and size."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

from lorag.errors import UnsupportedLoraError

__all__ = ["Patterns"]

_LONGEST, _MOST = 1000, 40_000  # characters of an expression, expressions
_MOST_REPEATS = 1000  # of all counted repeats together: compiling an expression takes as many copies of what is repeated
_SECONDS = 2.0  # for all that is asked of one config's pattern
_REMEDY = "Spell out the modules, or train with a simpler expression."
_PLAIN = re.compile(r"\^?[\w-]+(?:\.[\w-]+)*")


class Patterns:
    """Values by expression, as rank_pattern and alpha_pattern of a config state them.

    PEFT's rule: the first expression that matches the path of a module, or an end of it after a dot, decides.

    Args:
        values: Value by expression.
        where: File and key, for messages.

    Raises:
        UnsupportedLoraError: If an expression cannot be used, or is too large to be matched safely.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if len(values) > _MOST:
            raise UnsupportedLoraError(f"{where} is too large", got=f"{len(values)} keys", expected=f"at most {_MOST}")
        self._where, self._spent = where, 0.0
        self._entries = [(key, _compiled(key, where), value) for key, value in values.items()]
        self._values: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, module: str, default: float) -> float:
        """The value of a module, or the default where no expression matches its path.

        Raises:
            UnsupportedLoraError: If matching takes longer than an honest expression does.
        """
        if module not in self._values:
            self._values[module] = next(
                (value for key, expression, value in self._entries if self._matches(key, expression, module)), default
            )
        value: float = self._values[module]
        return value

    def _matches(self, key: str, expression: Any, module: str) -> bool:  # noqa: ANN401 - the library's type has no name of its own
        if _PLAIN.fullmatch(key) and not module.endswith(key.rpartition(".")[2].removeprefix("^")):
            return False  # told without the expression: configs may name every module
        start = time.monotonic()
        try:
            return expression.match(module, timeout=max(0.001, _SECONDS - self._spent)) is not None
        except TimeoutError as error:
            raise UnsupportedLoraError(
                f"{self._where}: an expression takes too long to match",
                got=repr(key)[:60],
                expected=f"{_SECONDS:g} seconds",
                remedy=_REMEDY,
            ) from error
        finally:
            self._spent += time.monotonic() - start


def _compiled(key: str, where: str) -> Any:  # noqa: ANN401
    """PEFT's expression for a key, compiled by a library that can be stopped."""
    import regex

    repeats = math.prod(max(1, int(count)) for count in re.findall(r"\d{1,9}", " ".join(re.findall(r"\{[\d,\s]*\}", key))))
    if len(key) > _LONGEST or repeats > _MOST_REPEATS or re.search(r"\{[^}]*\d{7}", key):
        raise UnsupportedLoraError(
            f"{where}: an expression is too large",
            got=repr(key)[:60],
            expected=f"at most {_LONGEST} characters, few repeats",
            remedy=_REMEDY,
        )
    try:
        re.compile(rf"(.*\.)?({key})$")  # what PEFT does with it: the other library takes more
        return regex.compile(rf"(.*\.)?({key})$")
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise UnsupportedLoraError(
            f"{where}: an expression cannot be used",
            got=f"{key[:60]!r}: {error}"[:120],
            expected="module names or expressions",
            remedy=_REMEDY,
        ) from error
