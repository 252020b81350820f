"""Regression from the pooled embedding to codes: ridge, in closed form, and a perceptron trained by reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.methods.method import Method, NetworkMethod, Settings, State, reconstruct, whole
from lorag.networks.readers import PooledNetwork

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition

__all__ = ["Mlp", "Ridge"]

_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Ridge(Method):
    """Linear map from the pooled embedding. Its penalty is chosen on held-out training tasks, or by leaving experts out."""

    name = "ridge"
    baseline = True
    weight: Tensor
    bias: Tensor
    centre: Tensor

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Solves the regression in its dual form, so that the code's length costs one product.

        Rows are single descriptions; each expert's rows share one target.
        """
        data.require_experts(self.name)
        train, held = data.training_experts, data.validation_experts
        x = torch.stack([one.pooled for i in train for one in data.embeddings[i]]).double()
        target = torch.cat([torch.full((len(data.embeddings[i]),), row) for row, i in enumerate(train)])
        y = data.codes[train].double()
        self.centre, self.bias = x.mean(0).float(), y[target].mean(0).float()
        x, y = x - self.centre, y - self.bias
        gram = x.T @ x
        by_expert = torch.zeros(len(train), x.shape[1], dtype=torch.float64).index_add(0, target, x)
        moment = by_expert.T @ y
        best, self.weight = float("inf"), torch.zeros_like(moment).float()
        for penalty in _PENALTIES:
            weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), moment).float()
            error = self._error(weight, data, held) if held else _left_out_error(x, y, target, gram, moment, penalty)
            if error < best:
                best, self.weight = error, weight

    def _error(self, weight: Tensor, data: TrainingSet, held: Sequence[int]) -> float:
        pooled = torch.stack([torch.stack([one.pooled for one in data.embeddings[i]]).mean(0) for i in held])
        guessed = (pooled - self.centre) @ weight + self.bias
        return (guessed - data.codes[list(held)]).square().mean().item()

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The predicted code, repeated."""
        code = (condition.embedding.pooled - self.centre) @ self.weight + self.bias
        return code.expand(count, -1).clone()

    def state(self) -> State:
        """The linear map, in fp16."""
        return State({"weight": self.weight.half(), "bias": self.bias.half(), "centre": self.centre}, {})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts the linear map back."""
        self.weight, self.bias, self.centre = (tensors[name].float() for name in ("weight", "bias", "centre"))


def _left_out_error(x: Tensor, y: Tensor, target: Tensor, gram: Tensor, moment: Tensor, penalty: float) -> float:
    """Mean squared error (per value) of each expert's code when its own rows take no part in the regression.

    In closed form: an expert's rows X leave the inverse S of the penalised Gram matrix as S + S Xᵀ (I − X S Xᵀ)⁻¹ X S, and
    all of them leave together, because another wording of the same expert would give its code away.

    Args:
        x: Centred rows (b, e).
        y: Centred codes of the experts (n, c).
        target: Expert of each row (b,).
        gram: xᵀx (e, e).
        moment: Σ of row times code (e, c).
        penalty: Added to the Gram matrix.
    """
    inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))
    directions, shares = [], []
    for expert in range(len(y)):
        rows = x[target == expert]
        mean = rows.mean(0)
        reach = rows @ inverse
        without = torch.linalg.solve(torch.eye(len(rows), dtype=rows.dtype) - reach @ rows.T, reach @ mean)
        directions.append(inverse @ mean + reach.T @ without)
        shares.append(directions[-1] @ rows.sum(0))
    guessed = torch.stack(directions) @ moment - torch.stack(shares)[:, None] * y
    return (guessed - y).square().mean().item()


@dataclass
class MlpSettings(Settings):
    """Size and training of the perceptron.

    Attributes:
        width: Of both hidden layers.
        dropout: After each hidden layer.
        steps: Optimizer steps of reconstruction.
        learning_rate: Peak rate.
        batch: Descriptions in a step.
    """

    width: int = 384
    dropout: float = 0.1
    steps: int = 1500
    learning_rate: float = 1e-3
    batch: int = 64


class Mlp(NetworkMethod):
    """A perceptron on the pooled embedding, trained to reconstruct the experts' codes."""

    name = "mlp"
    settings_type = MlpSettings
    settings: MlpSettings

    def build(self, shape: Mapping[str, Any]) -> nn.Module:
        """The untrained perceptron, for lengths of `embedding` and `code`."""
        return PooledNetwork(whole(shape, "embedding"), whole(shape, "code"), self.settings.width, self.settings.dropout)

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Trains it by reconstruction, stopping early on held-out training tasks."""
        data.require_experts(self.name)
        self.start({"embedding": data.embedding_size, "code": data.space.size}, loop)
        reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)
