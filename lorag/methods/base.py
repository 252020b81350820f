"""The interface of all generators: fitted on a bank's codes and descriptions, they turn conditions into codes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorag.base.runner import Runner
from lorag.config import from_plain
from lorag.errors import ConfigError, GeneratorError, LoragError
from lorag.methods.training_loop import TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.cvae import ConditionReader
from lorag.text.conditioning import Condition, Conditioner
from lorag.text.embedding import Embedding

__all__ = ["Generator", "NetworkGenerator", "ReaderSettings", "Settings", "collate", "draw"]


_MOST_LAYERS = 256


def _check_layers(name: str, count: int) -> None:
    if not 0 <= count <= _MOST_LAYERS:
        raise ConfigError(f"method.{name} cannot be used", got=count, expected=f"0 to {_MOST_LAYERS}")


@dataclass
class Settings:
    """Settings of a generator; subclasses add fields."""


@dataclass
class ReaderSettings(Settings):
    """How a method reads descriptions.

    Attributes:
        queries: Learned queries of the transformer that reads the description.
        layers: Of the transformer.
        heads: Of its attention.
        dropout: In the transformer and before the features.
        word_dropout: Share of a description's tokens hidden in training.
        noise: Gaussian noise on its vectors in training, as a share of their own size.
    """

    queries: int = 8
    layers: int = 1
    heads: int = 4
    dropout: float = 0.1
    word_dropout: float = 0.1
    noise: float = 0.2

    def reader(self, embedding: int, vector: int, *, width: int, features: int) -> ConditionReader:
        """An untrained reader of descriptions (length e of their vectors) and task vectors (length v), 0 where there is none.

        Raises:
            ConfigError: If there are more layers than can be meant; these settings may stand inside others.
        """
        _check_layers("layers", self.layers)
        return ConditionReader(
            embedding,
            vector,
            width=width,
            queries=self.queries,
            layers=self.layers,
            heads=self.heads,
            hidden=features,
            dropout=self.dropout,
            word_dropout=self.word_dropout,
            noise=self.noise,
        )


class Generator(abc.ABC):
    """Turns a condition into codes.

    Args:
        settings: An instance of the class's own `settings_type`.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    settings: Settings

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.settings_type()

    @classmethod
    def with_settings(cls, values: Mapping[str, Any]) -> Generator:
        """Makes one from plain values.

        Raises:
            ConfigError: Naming a setting that is unknown or of the wrong type.
        """
        known = {field.name for field in fields(cls.settings_type)}
        unknown = set(values) - known
        if unknown:
            raise ConfigError(f"method.{min(unknown)} is no setting of {cls.name}", expected=", ".join(sorted(known)) or "no setting")
        settings = from_plain(cls.settings_type, values)
        for name in ("layers", "depth"):  # what is built takes time for each, even of a file that is refused then
            _check_layers(name, getattr(settings, name, 0))
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

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs."""

    @abc.abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""

    def restore_whole(self, tensors: Mapping[str, Tensor], conditioner: Conditioner, size: int, use: Callable[[Tensor], object]) -> None:
        """`restore`, then a trial on one condition: what does not fit together shows now, and not at a user's first task.

        Args:
            tensors: As `restore` takes them.
            conditioner: The generator's.
            size: Length c of a code.
            use: What is done with codes (1, c).

        Raises:
            GeneratorError: If tensors and settings do not make a generator of such codes.
        """
        try:
            self.restore(tensors)
            if self.needs_task_vectors:
                return
            vector = nn.functional.normalize(torch.ones(conditioner.centroids.shape[1]), dim=0)
            codes = self.generate(conditioner(Embedding(vector, vector[None])), torch.Generator().manual_seed(0))
            if codes.shape != (1, size) or not codes.isfinite().all():
                raise ValueError(f"codes {tuple(codes.shape)}, where {(1, size)} finite values are expected")
            use(codes)
        except LoragError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise GeneratorError(f"stored tensors and settings do not fit {self.name}", got=repr(error)[:160]) from error

    @property
    def needs_task_vectors(self) -> bool:
        """Whether conditions must carry a task vector, which takes example inputs."""
        return False

    @property
    def learns_from_tasks(self) -> bool:
        """Whether `fit` trains on examples of tasks, through the base model."""
        return False

    def shares(self, condition: Condition) -> Tensor | None:
        """How much each expert counts (n,) in what `generate` makes; None if all are learned from together."""
        return None

    def values(self) -> dict[str, Any]:
        """Settings as plain values."""
        return asdict(self.settings) if is_dataclass(self.settings) else {}

    def size(self) -> int:
        """Number of stored values."""
        return sum(tensor.numel() for tensor in self.tensors().values())


def collate(embeddings: Sequence[Embedding], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Stacks embeddings on a device: pooled (b, e), tokens (b, t, e), and a mask (b, t) that is true at real tokens."""
    pooled = torch.stack([one.pooled for one in embeddings])
    tokens = nn.utils.rnn.pad_sequence([one.tokens for one in embeddings], batch_first=True)
    lengths = torch.tensor([len(one.tokens) for one in embeddings])
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    return pooled.to(device), tokens.to(device), mask.to(device)


def draw(data: TrainingSet, rows: Sequence[int], loop: TrainingLoop) -> list[Embedding]:
    """One description of each of some tasks, at random."""
    picks = torch.randint(2**31, (len(rows),), generator=loop.rng).tolist()
    return [data.embeddings[i][pick % len(data.embeddings[i])] for i, pick in zip(rows, picks, strict=True)]


class NetworkGenerator(Generator):
    """A generator around one deterministic network from embeddings to a code."""

    network: nn.Module | None = None

    @abc.abstractmethod
    def build(self, embedding: int, code: int) -> nn.Module:
        """Makes the untrained network."""

    def predict(self, embeddings: Sequence[Embedding], *more: Tensor | None) -> Tensor:
        """Codes (b, c), with gradients if the network is training; `more` is what a method's network takes besides descriptions."""
        if self.network is None:
            raise GeneratorError(f"{self.name} is not fitted")
        device = next(self.network.parameters()).device
        return self.network(*collate(embeddings, device), *(None if one is None else one.to(device) for one in more))

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated."""
        with torch.inference_mode():
            return self.predict([condition.embedding]).cpu().expand(count, -1).clone()

    def tensors(self) -> dict[str, Tensor]:
        """The network's parameters, and the sizes that `restore` builds it with."""
        if self.network is None:
            raise GeneratorError(f"{self.name} is not fitted")
        return {**self.network.state_dict(), "sizes": torch.tensor(self.sizes)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Builds the network and loads its parameters."""
        try:
            self.sizes = tuple(tensors["sizes"].tolist())
            with torch.device("meta"):
                network = self.build(*self.sizes)
            state = {name: value.float() for name, value in tensors.items() if name != "sizes"}
            network.load_state_dict(state, assign=True)
        except (KeyError, RuntimeError, TypeError) as error:
            raise GeneratorError(f"stored tensors do not fit {self.name}", got=str(error)[:160]) from error
        self.network = network.requires_grad_(False).eval()

    sizes: tuple[int, int]
