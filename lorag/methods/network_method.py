"""Methods around one network from descriptions to a code, and their reconstruction of the experts' codes."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.method import Method, Settings, State, check_layers, nested, part
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.networks.readers import ConditionReader

if TYPE_CHECKING:
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition
    from lorag.text.embedding import Embedding

__all__ = ["NetworkMethod", "ReaderSettings", "collate", "draw", "reconstruct"]

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
        """An untrained reader of descriptions (length e of their vectors) and task vectors (length v), 0 where there is none.

        Raises:
            ConfigError: If there are more layers than can be meant; these settings may stand inside others.
        """
        check_layers("layers", self.layers)
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
