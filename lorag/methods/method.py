"""What a method is: fitted on tasks, it turns the condition of a description into codes; how it is stored; methods around one network."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.config import from_plain
from lorag.errors import ConfigError, GeneratorError, LoragError
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.networks.readers import ConditionReader

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition
    from lorag.text.embedding import Embedding

__all__ = [
    "Method",
    "NetworkMethod",
    "ReaderSettings",
    "Settings",
    "State",
    "check_layers",
    "collate",
    "draw",
    "nested",
    "part",
    "reconstruct",
    "whole",
]

_MOST_LAYERS = 256


@dataclass
class Settings:
    """Settings of a method; subclasses add fields."""


def check_layers(key: str, count: int) -> None:
    """Refuses more layers than can be meant: what is built takes time for each, even of a file that is refused then.

    Raises:
        ConfigError: Naming the setting.
    """
    if not 0 <= count <= _MOST_LAYERS:
        raise ConfigError(f"{key} cannot be used", got=count, expected=f"0 to {_MOST_LAYERS}")


class State(NamedTuple):
    """A fitted method as it is stored: tensors, and JSON values from which, with the settings, what holds them is built."""

    tensors: dict[str, Tensor]
    shape: dict[str, Any]


class Method(abc.ABC):
    """Turns conditions into codes.

    Attributes:
        name: Its key in `METHODS`.
        settings_type: Of its settings.
        baseline: Whether it is a baseline that learned methods must beat. It owes no controls with other descriptions itself, and if
            it takes a bank alone, `lorag evaluate` fits it and scores it in every ladder.
        learns_pairs: Whether it has `learn_pairs`.

    Args:
        settings: An instance of the class's own `settings_type`.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    baseline: ClassVar[bool] = False
    learns_pairs: ClassVar[bool] = False
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
            check_layers(f"settings.{name}", getattr(settings, name, 0))
        return cls(settings)

    def go_on_from(self, other: Method) -> None:
        """Takes over what another of its kind has learned, so that `fit` goes on from there.

        Raises:
            GeneratorError: If it can only begin anew.
        """
        raise GeneratorError(
            f"{self.name} cannot go on from a trained generator", got=other.name, expected="aligned", remedy="Leave out start."
        )

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

    def learn_pairs(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None, steps: int) -> None:
        """Learns, once fitted, to read (input, output) pairs; all else of the method stays as it is.

        Raises:
            GeneratorError: If the method cannot, is not fitted, or there is no base model.
        """
        raise GeneratorError(f"{self.name} does not learn to read examples", expected="method house")

    @abc.abstractmethod
    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Codes (count, c) for one condition; methods without randomness repeat one code."""

    # --- what it needs -------------------------------------------------------------------------------------------

    @property
    def needs_task_vectors(self) -> bool:
        """Whether conditions must carry a task vector, which takes example inputs."""
        return False

    @property
    def reads_pairs(self) -> bool:
        """Whether a condition with (input, output) pairs gives the code that these ask for, whatever the description."""
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

    def try_out(self, condition: Condition, size: int, use: Callable[[Tensor], object]) -> None:
        """A trial on one condition: what does not fit together shows now, and not at a user's first task.

        Args:
            condition: Any of the generator's conditions.
            size: Length c of a code.
            use: What is done with codes (1, c).

        Raises:
            GeneratorError: If state and settings do not make a method of such codes.
        """
        if self.needs_task_vectors:
            return
        with self._fitting_together():
            codes = self.generate(condition, torch.Generator().manual_seed(0))
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


# --- methods around one network ---------------------------------------------------------------------------------------


_WORDINGS = 8  # of each held-out task, that validation reads


@dataclass
class ReaderSettings(Settings):
    """How a method reads descriptions.

    Attributes:
        queries: Learned queries of the transformer that reads the description.
        layers: Of the transformer.
        heads: Of its attention.
        dropout: In the transformer and before the features.
        word_dropout: Share of a description's tokens masked in training.
        noise: Gaussian noise on its vectors in training, as a share of their own size.
    """

    queries: int = 8
    layers: int = 1
    heads: int = 4
    dropout: float = 0.1
    word_dropout: float = 0.1
    noise: float = 0.2

    def reader(self, embedding: int, vector: int, *, width: int, features: int) -> ConditionReader:
        """An untrained reader of descriptions (length e of their vectors) and task vectors (length v), 0 where there is none."""
        return ConditionReader(
            embedding,
            vector,
            width=width,
            queries=self.queries,
            layers=self.layers,
            heads=self.heads,
            features=features,
            dropout=self.dropout,
            word_dropout=self.word_dropout,
            noise=self.noise,
        )


def collate(embeddings: Sequence[Embedding], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Stacks embeddings on a device: pooled (b, e), tokens (b, t, e), and a mask (b, t) that is true at real tokens."""
    pooled = torch.stack([one.pooled for one in embeddings])
    tokens = nn.utils.rnn.pad_sequence([one.tokens for one in embeddings], batch_first=True)
    lengths = torch.tensor([len(one.tokens) for one in embeddings])
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    return pooled.to(device), tokens.to(device), mask.to(device)


def draw(data: TrainingSet, tasks: Sequence[int], loop: TrainingLoop) -> list[Embedding]:
    """One description of each of some tasks, at random."""
    picks = torch.randint(2**31, (len(tasks),), generator=loop.rng).tolist()
    return [data.embeddings[i][pick % len(data.embeddings[i])] for i, pick in zip(tasks, picks, strict=True)]


class NetworkMethod(Method):
    """A method around one deterministic network; what the network is follows from the settings and a shape alone.

    Attributes:
        network: The network.
        shape: What `build` made it from; JSON values.
    """

    network: nn.Module | None = None
    shape: dict[str, Any]

    @abc.abstractmethod
    def build(self, shape: Mapping[str, Any]) -> nn.Module:
        """Makes the untrained network."""

    def start(self, shape: dict[str, Any], loop: TrainingLoop) -> nn.Module:
        """Builds the network from the loop's seed on its device, unless there is one, which then goes on learning."""
        if self.network is None:
            self.shape = shape
            with loop.seeded():
                self.network = self.build(shape)
            self.network.to(loop.accelerator.device)
        return self.network

    def predict(self, embeddings: Sequence[Embedding], *more: Tensor | None) -> Tensor:
        """Codes (b, c), with gradients if the network is training; `more` is what a method's network takes besides descriptions."""
        if self.network is None:
            raise self.unfitted()
        device = next(self.network.parameters()).device
        return self.network(*collate(embeddings, device), *(None if one is None else one.to(device) for one in more))

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated."""
        with torch.inference_mode():
            return self.predict([condition.embedding]).cpu().expand(count, -1).clone()

    def state(self) -> State:
        """The network's parameters, and the shape from which it is built."""
        if self.network is None:
            raise self.unfitted()
        return State(nested(network=self.network.state_dict()), dict(self.shape))

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Builds the network and loads its parameters."""
        with torch.device("meta"):
            network = self.build(shape)
        network.load_state_dict(part(tensors, "network"), assign=True)
        self.network, self.shape = network.requires_grad_(False).eval(), dict(shape)


def reconstruct(method: NetworkMethod, data: TrainingSet, loop: TrainingLoop, steps: int, learning_rate: float, batch: int) -> None:
    """Trains a method's network, once started, on random (expert, description) pairs; without experts nothing happens.

    In a shared subspace, codes are cores divided by one number per module, so their squared distance is ‖ΔW − ΔW'‖²
    summed over modules with one weight each. Validation is the same distance on held-out experts.
    """
    training, held = torch.tensor(data.training_experts), data.validation_experts
    if method.network is None:
        raise method.unfitted()
    if not len(training):
        return
    device = loop.accelerator.device

    def loss(_: nn.Module, step: int) -> Batch:
        rows = training[torch.randint(len(training), (batch,), generator=loop.rng)].tolist()
        drawn = draw(data, rows, loop)
        return Batch(batch, lambda share: _distance(method.predict(drawn[share]), data.codes[rows[share]].to(device)))

    def validate(_: nn.Module) -> float:
        distances = []
        with torch.no_grad():
            for i in held:
                guessed = method.predict(data.embeddings[i][:_WORDINGS])
                distances.append(_distance(guessed, data.codes[i].to(device).expand(len(guessed), -1)))
        return torch.stack(distances).mean().item()

    settings = LoopSettings(steps, learning_rate, validate_every=100)
    loop.run(f"{method.name} reconstruction", method.network, loss, validate if held else None, settings)


def _distance(guessed: Tensor, right: Tensor) -> Tensor:
    if guessed.shape != right.shape:  # a silent broadcast here once pulled a published method to the batch mean
        raise AssertionError(f"codes {tuple(guessed.shape)} against {tuple(right.shape)}")
    return F.mse_loss(guessed, right)
