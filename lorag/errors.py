"""Errors that lorag raises on purpose: every message says what, got, expected and the remedy."""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "AdapterError",
    "AlphaRangeError",
    "ArtifactError",
    "BankError",
    "BaseMismatchError",
    "BaseModelError",
    "ConfigError",
    "DescriptionError",
    "DtypeOverflowError",
    "ExtraTensorError",
    "FactorShapeError",
    "FormatVersionError",
    "GeneratorError",
    "LayoutError",
    "LoragError",
    "MissingDependencyError",
    "MissingPrefixError",
    "MissingTensorError",
    "NonFiniteError",
    "NormRangeError",
    "PeftTypeError",
    "RankRangeError",
    "ServedNameError",
    "StorageError",
    "StoreFullError",
    "TaskError",
    "UndescribedError",
    "UnknownTaskError",
    "UnknownTaskWarning",
    "UnsupportedLoraError",
    "warn_caller",
]


_LONGEST = 800  # characters of a part of a message: what comes from a file may be megabytes


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def printable(text: str) -> str:
    """Text from a file as it may be shown: what would move a terminal's cursor, or forge another line, is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LoragError(Exception):
    """Root of all errors raised on purpose; the command line turns it into one line and exit code 1.

    Args:
        what: What went wrong, naming the file, key or argument.
        got: The offending value, shortened by the caller where it may be long.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        parts = [_short(what)]
        if got is not None:
            parts.append(f"got {_short(got)}")
        if expected is not None:
            parts.append(f"expected {_short(expected)}")
        text = "; ".join(parts)
        if remedy is not None:
            text = f"{text}. {remedy}"
        super().__init__(printable(text))
        self.what, self.got, self.expected, self.remedy = what, got, expected, remedy


class ConfigError(LoragError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DescriptionError(LoragError, ValueError):
    """A task description cannot be used."""


class UnknownTaskError(DescriptionError):
    """No task of the bank is like a description, so that an adapter for it would be worth nothing."""


class UnknownTaskWarning(UserWarning):
    """An adapter was made for a description that no task of the bank is like."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns of what a caller of lorag asked for, and names the line in which the caller did: the nearest outside of lorag."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class TaskError(LoragError, ValueError):
    """A task suite's files break their contract."""


class LayoutError(LoragError, ValueError):
    """Target modules and factor shapes do not fit each other or the base model."""


class AdapterError(LoragError, ValueError):
    """A LoRA adapter is malformed or unsafe to use."""


class BankError(LoragError, ValueError):
    """A bank of experts is malformed, inconsistent or lacks what was asked for."""


class BaseModelError(LoragError, ValueError):
    """A base model cannot be had, or is not the one that the adapter, bank or generator belongs to."""


class GeneratorError(LoragError, ValueError):
    """A generator is malformed, unknown or does not fit its weight space."""


class ArtifactError(LoragError, ValueError):
    """A file or folder is not what its reader needs: wrong format, version, name or checksum."""


class StorageError(LoragError, OSError):
    """Reading or writing failed for a reason outside lorag: full disk, permissions, a vanished folder."""


class ServedNameError(LoragError, ValueError):
    """A client asked a server for a model by a name that cannot be used."""


class StoreFullError(LoragError):
    """A server's folder of adapters holds as many, or as many bytes, as it may."""


class MissingDependencyError(LoragError, ImportError):
    """An optional package is needed and not installed."""


# --- what can be wrong with an adapter; docs/importing.md lists them with what to do ------------------------------


class MissingPrefixError(AdapterError):
    """Tensor names lack PEFT's prefix `base_model.model.`; PEFT would load none of them, silently."""


class MissingTensorError(AdapterError):
    """A factor has no partner, or a module that must have factors has none."""


class ExtraTensorError(AdapterError):
    """A file holds tensors that the layout has no place for."""


class FactorShapeError(AdapterError):
    """A or B is transposed, does not match r, or holds no floats."""


class NonFiniteError(ArtifactError, AdapterError):
    """A weight, a setting or another number is NaN or infinite."""


class AlphaRangeError(AdapterError):
    """A lora_alpha is not a number, is 0 or absurdly large."""


class RankRangeError(AdapterError):
    """A rank is not a whole number, is below 1 or absurdly large."""


class DtypeOverflowError(AdapterError):
    """Values do not fit the type that they are cast to."""


class NormRangeError(AdapterError):
    """An adapter changes nothing, or its norm lies far outside those of the bank."""


class PeftTypeError(AdapterError):
    """An adapter is of another PEFT method than LoRA."""


class UnsupportedLoraError(AdapterError):
    """A setting makes more of the adapter than the ΔW of its factors: DoRA, biases, trained tokens and the like."""


class UndescribedError(AdapterError):
    """Nothing says what an adapter is for."""


class BaseMismatchError(BaseModelError):
    """An adapter belongs to another base model: another name, revision, weights or layout."""


class FormatVersionError(ArtifactError):
    """A file is of a format version that this version of lorag does not know."""
