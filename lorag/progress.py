"""The progress of long work: tqdm's bar on a terminal, a plain line now and then anywhere else, nothing where that is asked for."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Generic, Required, TypeAlias, TypedDict, TypeVar, Unpack, overload

from tqdm.auto import tqdm

__all__ = ["Bar", "Lines", "progress_bar", "quiet_loading"]

T = TypeVar("T")
_FIRST, _EVERY = 10.0, 30.0  # seconds until the first line, and, unless asked otherwise, between lines
_LONG = 2.0  # seconds from which it is worth a line that something is done


class Lines(Generic[T]):
    """Progress for logs and pipes: whole lines on standard error, without carriage returns. Has of tqdm's methods what lorag uses.

    Args:
        iterable: What is gone through, if it is not advanced by `update`.
        desc: What is being done.
        total: Steps in all; by default the iterable's length, if it has one.
        initial: Steps that were done before.
        leave: Whether it is worth saying when it is done.
        every: Seconds between lines.
    """

    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        *,
        desc: str,
        total: int | None = None,
        initial: int = 0,
        leave: bool = True,
        every: float = _EVERY,
    ) -> None:
        self.iterable, self.desc, self.initial, self.leave, self.every = iterable, desc, initial, leave, every
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n, self._details, self._closed = initial, "", False
        self._began = time.monotonic()
        self._next = self._began + _FIRST

    def __iter__(self) -> Iterator[T]:
        for one in () if self.iterable is None else self.iterable:
            yield one
            self.update()
        self.close()

    def __enter__(self) -> Lines[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Advances it, and says so if the last line is long ago."""
        self.n += n
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.every
            self.write(self._line(now - self._began))

    def set_postfix(self, values: Mapping[str, object] | None = None, **more: object) -> None:
        """Numbers that the next line shows."""
        self._details = ", ".join(f"{key} {value}" for key, value in {**(values or {}), **more}.items())

    def write(self, text: str) -> None:
        """Writes a line of its own."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Says that it is done, if it took long; it may be called again."""
        took = time.monotonic() - self._began
        if not self._closed and self.leave and took >= _LONG:
            self.write(self._line(took))
        self._closed = True

    def _line(self, took: float) -> str:
        if self.total is None:
            parts = [f"{self.desc}: {self.n}"]
        else:
            parts = [f"{self.desc}: {self.n} of {self.total} ({self.n / max(1, self.total):.0%})"]
        parts.append(f"{tqdm.format_interval(took)} so far")
        done = self.n - self.initial
        if self.total is not None and done > 0 and self.n < self.total:
            parts.append(f"{tqdm.format_interval(took / done * (self.total - self.n))} left")
        return ", ".join([*parts, self._details] if self._details else parts)


Bar: TypeAlias = "tqdm[Any] | Lines[Any]"


class BarSettings(TypedDict, total=False):
    """What bars and lines have in common.

    Attributes:
        desc: What is being done.
        total: Steps in all; by default the iterable's length, if it has one.
        initial: Steps that were done before, by default 0.
        leave: Whether the finished bar stays, as it does by default.
    """

    desc: Required[str]
    total: int | None
    initial: int
    leave: bool


@overload
def progress_bar(iterable: None = None, *, disable: bool = False, every: float = _EVERY, **settings: Unpack[BarSettings]) -> Bar: ...


@overload
def progress_bar(
    iterable: Iterable[T], *, disable: bool = False, every: float = _EVERY, **settings: Unpack[BarSettings]
) -> tqdm[T] | Lines[T]: ...


def progress_bar(
    iterable: Iterable[T] | None = None, *, disable: bool = False, every: float = _EVERY, **settings: Unpack[BarSettings]
) -> tqdm[T] | Lines[T]:
    """A bar with the time that is left, or lines that say it where standard error is not a terminal.

    Args:
        iterable: What is gone through; without it, `update` advances.
        disable: Shows nothing.
        every: Seconds between lines.
        settings: `desc`, which must be given, and the others of `BarSettings`.
    """
    # In a notebook tqdm.auto has a class of its own, which draws a widget.
    if disable or sys.stderr.isatty() or tqdm.__module__ == "tqdm.auto":
        return tqdm(iterable, disable=disable, **settings)
    return Lines(iterable, every=every, **settings)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers' bars for reading local shards off the terminal; ours are for work that takes time."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
