"""What a method is: fitted on tasks, it turns the condition of a description into codes; and how it is stored."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lorag.config import from_plain
from lorag.errors import ConfigError, GeneratorError, LoragError
from lorag.text.embedding import Embedding

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition, Conditioner

__all__ = ["Method", "Settings", "State", "check_layers", "nested", "part", "whole"]

_MOST_LAYERS = 256


@dataclass
class Settings:
    """Settings of a method; subclasses add fields."""


def check_layers(name: str, count: int) -> None:
    """Refuses more layers than can be meant: what is built takes time for each, even of a file that is refused then.

    Raises:
        ConfigError: Naming the setting.
    """
    if not 0 <= count <= _MOST_LAYERS:
        raise ConfigError(f"settings.{name} cannot be used", got=count, expected=f"0 to {_MOST_LAYERS}")


class State(NamedTuple):
    """A fitted method as it is stored: tensors, and JSON values from which, with the settings, what holds them is built."""

    tensors: dict[str, Tensor]
    shape: dict[str, Any]


class Method(abc.ABC):
    """Turns conditions into codes.

    Args:
        settings: An instance of the class's own `settings_type`.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    settings: Settings

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.settings_type()

    @classmethod
    def with_settings(cls, values: Mapping[str, Any]) -> Method:
        """Makes one from plain values.

        Raises:
            ConfigError: Naming a setting that is unknown, has another name now, or is of the wrong type.
        """
        names = {field.name for field in fields(cls.settings_type)}
        unknown = set(values) - names - set(getattr(cls.settings_type, "RENAMED", {}))
        if unknown:
            raise ConfigError(f"settings.{min(unknown)} is not a setting of {cls.name}", expected=", ".join(sorted(names)) or "no setting")
        settings = from_plain(cls.settings_type, values, "settings.")
        for name in ("layers", "depth"):
            check_layers(name, getattr(settings, name, 0))
        return cls(settings)

    @abc.abstractmethod
    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Learns from tasks.

        Args:
            data: Experts' codes, descriptions and examples.
            loop: Runs the stages of training.
            runner: The base model, for methods that learn from examples; None if there is none.

        Raises:
            GeneratorError: If the method needs experts or examples, and there are none.
        """

    @abc.abstractmethod
    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Codes (count, c) for one condition; methods without randomness repeat one code."""

    # --- what it needs -------------------------------------------------------------------------------------------

    @property
    def needs_task_vectors(self) -> bool:
        """Whether conditions must carry a task vector, which takes example inputs."""
        return False

    @property
    def learns_from_tasks(self) -> bool:
        """Whether `fit` trains on examples of tasks, through the base model."""
        return False

    @property
    def prompted(self) -> bool:
        """Whether its adapters are made for prompts that begin with the description."""
        return False

    def shares(self, condition: Condition) -> Tensor | None:
        """How much each expert counts (n,) in what `generate` makes; None if all are learned from together."""
        return None

    # --- files ---------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def state(self) -> State:
        """All that `restore` needs beside the settings.

        Raises:
            GeneratorError: If the method is not fitted.
        """

    @abc.abstractmethod
    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts back what `state` gave; whatever is wrong with it may raise its own error, which `restore` translates."""

    def restore(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts back what `state` gave.

        Raises:
            GeneratorError: If it does not fit together.
        """
        with self._fitting_together():
            self.load(tensors, shape)

    def try_out(self, conditioner: Conditioner, size: int, use: Callable[[Tensor], object]) -> None:
        """A trial on one condition: what does not fit together shows now, and not at a user's first task.

        Args:
            conditioner: The generator's.
            size: Length c of a code.
            use: What is done with codes (1, c).

        Raises:
            GeneratorError: If state and settings do not make a method of such codes.
        """
        if self.needs_task_vectors:
            return
        with self._fitting_together():
            vector = nn.functional.normalize(torch.ones(conditioner.centroids.shape[1]), dim=0)
            codes = self.generate(conditioner(Embedding(vector, vector[None])), torch.Generator().manual_seed(0))
            if codes.shape != (1, size) or not codes.isfinite().all():
                raise ValueError(f"codes {tuple(codes.shape)}, where {(1, size)} finite values are expected")
            use(codes)

    @contextmanager
    def _fitting_together(self) -> Iterator[None]:
        try:
            yield
        except LoragError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise GeneratorError(f"stored tensors do not fit {self.name}", got=repr(error)[:160]) from error

    def unfitted(self) -> GeneratorError:
        """The error of a method that is used before it is fitted or restored."""
        return GeneratorError(f"{self.name} is not fitted")

    def values(self) -> dict[str, Any]:
        """Settings as plain values."""
        return asdict(self.settings)

    def size(self) -> int:
        """Number of stored values."""
        return sum(tensor.numel() for tensor in self.state().tensors.values())


# --- stored values ----------------------------------------------------------------------------------------------------


def nested(**parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of several parts, each name behind its part's and a dot."""
    return {f"{prefix}.{name}": value for prefix, tensors in parts.items() for name, value in tensors.items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One part of what `nested` gave, in fp32; whole numbers stay whole."""
    selected = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
    return {name: value.float() if value.is_floating_point() else value for name, value in selected.items()}


def whole(shape: Mapping[str, Any], name: str, most: int = 2**31 - 1) -> int:
    """A number of a stored shape.

    Raises:
        ValueError: If it is not a whole number from 0 to `most`.
    """
    value = shape[name]
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} {value!r:.40}, where a whole number up to {most} is expected")
    return value
