"""Errors that lorag raises on purpose: every message says what, got, expected and the remedy."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "ArtifactError",
    "BankError",
    "BaseModelError",
    "ConfigError",
    "DescriptionError",
    "GeneratorError",
    "LayoutError",
    "LoragError",
    "MissingDependencyError",
    "StorageError",
    "TaskError",
]


class LoragError(Exception):
    """Root of all errors raised on purpose; the command line turns it into one line and exit code 1.

    Args:
        what: What went wrong, naming the file, key or argument.
        got: The offending value, shortened by the caller where it may be long.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        text = "; ".join(parts)
        if remedy is not None:
            text = f"{text}. {remedy}"
        super().__init__(text)
        self.what, self.got, self.expected, self.remedy = what, got, expected, remedy


class ConfigError(LoragError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DescriptionError(LoragError, ValueError):
    """A task description cannot be used."""


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


class MissingDependencyError(LoragError, ImportError):
    """An optional package is needed and not installed."""
