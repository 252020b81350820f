"""Regression over experts with a learned kernel: what a new description's code is, given the experts' and how alike they are.

The kernel is learned by leaving groups out: in each step some experts are taken out, their codes are predicted from the others',
and the error teaches the reader which words ask for the same weights. The regression itself is solved anew each time and learns
no expert itself. (Learning through a solved regression: Bertinetto et al., arXiv 1805.08136.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.errors import ConfigError, GeneratorError
from lorag.methods.method import Method, ReaderSettings, Settings, State, check_layers, collate, draw, part, whole
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.networks.experts import ExpertKernel
from lorag.spaces.principal_codes import PrincipalCodes

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition
    from lorag.text.embedding import Embedding

__all__ = ["ExpertRegression", "Kernel", "KernelSettings", "can_regress", "regress_codes"]

_WORDINGS = 8  # of each held-out task, that validation reads
_AT_ONCE = 256


@dataclass
class KernelSettings(ReaderSettings):
    """Size and training of the kernel.

    Attributes:
        width: Of the transformer that reads the description.
        features: Number of features that it makes of a description.
        groups: Into which they fall; a divisor of their number.
        experts: Most experts that count at use; of a larger bank so many are drawn.
        batch: Most experts in a step of training.
        asked: Share of these that are taken out and predicted from the others; 0 takes out each in turn, with all of its group, in closed
            form, so that every description that is read is also predicted.
        steps: Of training.
        learning_rate: Peak rate.
    """

    width: int = 192
    features: int = 192
    groups: int = 6
    experts: int = 4096
    batch: int = 512
    asked: float = 0.25
    steps: int = 1000
    learning_rate: float = 1e-3

    def check(self, key: Callable[[str], str] = "settings.{}".format) -> None:
        """Refuses values from which no kernel can be made or learned.

        Args:
            key: From the name of a setting here to the key under which a user writes it.

        Raises:
            ConfigError: Naming that key.
        """
        check_layers(key("layers"), self.layers)
        for name, least in (("features", 1), ("experts", 2), ("batch", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{key(name)} cannot be used", got=getattr(self, name), expected=f"at least {least}")
        if self.groups < 1 or self.features % self.groups:
            got = f"{self.features} features in {self.groups} groups"
            raise ConfigError(f"{key('groups')} must divide {key('features')}", got=got)
        if not 0 <= self.asked < 1:
            raise ConfigError(f"{key('asked')} cannot be used", got=self.asked, expected="a share from 0 to below 1")

    def kernel(self, embedding: int) -> ExpertKernel:
        """The untrained kernel for vectors of length e."""
        return ExpertKernel(self.reader(embedding, 0, width=self.width, features=self.features), embedding, self.groups)


class ExpertRegression:
    """Experts, and the kernel with which they are regressed upon.

    Args:
        kernel: The learned kernel.
        indices: The experts' places in the bank (l,), int64.
        features: Of the experts' descriptions (l, f).
        values: Of the experts (l, p), zero where nothing is known.
    """

    def __init__(self, kernel: ExpertKernel, indices: Tensor, features: Tensor, values: Tensor) -> None:
        self.kernel, self.indices, self.features, self.values = kernel, indices, features, values
        self._inverse: Tensor | None = None

    @property
    def embedding(self) -> int:
        """Length e of the vectors that the kernel reads."""
        return self.kernel.embedding

    @classmethod
    def learn(cls, name: str, settings: KernelSettings, values: Tensor, data: TrainingSet, loop: TrainingLoop) -> ExpertRegression:
        """Learns a kernel on the training experts, and stops at the state that is best on the held-out ones.

        Args:
            name: Names the stage.
            settings: Of the kernel.
            values: What is to be predicted, of each expert of the bank (n, p); their mean square should be near 1.
            data: The bank.
            loop: Runs the stage.

        Returns:
            The regression on the training experts alone; `with_others` adds more.

        Raises:
            GeneratorError: If experts are so much alike that none is left to learn from.
        """
        device, values = loop.accelerator.device, values.to(loop.accelerator.device)
        with loop.seeded():
            kernel = settings.kernel(data.embedding_size).to(device)
        training, held = torch.tensor(data.training_experts), data.validation_experts
        counting = sorted(training[torch.randperm(len(training), generator=loop.rng)[: settings.experts]].tolist())

        def nobody_else() -> GeneratorError:
            return GeneratorError(f"{name}: an expert has no others to be predicted from", got=f"{len(training)} training experts")

        def each_in_turn(drawn: list[int]) -> Batch:
            together = data.masked(drawn)[:, drawn].to(device)
            if together.all():
                raise nobody_else()
            texts = draw(data, drawn, loop)

            def losses(share: slice) -> Tensor:
                return kernel.residuals(kernel(*collate(texts, device)), values[drawn], together)[share].square().mean()

            return Batch(len(drawn), losses)

        def loss(_: nn.Module, step: int) -> Batch:
            drawn = training[torch.randperm(len(training), generator=loop.rng)[: settings.batch]].tolist()
            if not settings.asked:
                return each_in_turn(drawn)
            asked = drawn[: max(1, round(len(drawn) * settings.asked))]
            others = _others(data, drawn, asked)
            if not others:  # few large families: of one alone the others may be left
                asked = asked[:1]
                others = _others(data, drawn, asked)
            if not others:
                raise nobody_else()
            texts = draw(data, [*others, *asked], loop)

            def losses(share: slice) -> Tensor:
                features, question = (kernel(*collate(some, device)) for some in (texts[: len(others)], texts[len(others) :][share]))
                return F.mse_loss(kernel.weights(question, features) @ values[others], values[asked[share]])

            return Batch(len(asked), losses)

        def validate(_: nn.Module) -> float:
            predict = cls.of(kernel, values, data, counting, 4)
            each = [F.mse_loss(*torch.broadcast_tensors(predict(data.embeddings[i][:_WORDINGS]), values[i])) for i in held]
            return torch.stack(each).mean().item()

        length = LoopSettings(settings.steps, settings.learning_rate, validate_every=50)
        loop.run(f"{name} kernel", kernel, loss, validate if held else None, length)
        return cls.of(kernel.requires_grad_(False).eval(), values, data, counting)

    @classmethod
    def of(
        cls, kernel: ExpertKernel, values: Tensor, data: TrainingSet, rows: Sequence[int], descriptions: int | None = None
    ) -> ExpertRegression:
        """The regression on the experts at some rows of a bank, whose values (n, p) are given; of their first descriptions alone, if so."""
        features = _features(kernel, data, rows, descriptions)
        return cls(kernel, torch.tensor(list(rows)), features, values[list(rows)].to(features))

    def with_others(self, values: Tensor, data: TrainingSet, rows: Sequence[int]) -> ExpertRegression:
        """The regression of given values (n, p) on these experts and those at some more rows of the bank."""
        features = self.features
        if rows:
            features = torch.cat([features, _features(self.kernel, data, rows)])
        indices, order = torch.cat([self.indices, torch.tensor(list(rows), dtype=torch.int64)]).sort()
        return ExpertRegression(self.kernel, indices, features[order.to(features.device)], values[indices.to(values.device)].to(features))

    def __call__(self, embeddings: Sequence[Embedding], masked: Tensor | None = None) -> Tensor:
        """Values (b, p) for descriptions, without experts that are masked (n,)."""
        seen = torch.ones(len(self.indices), dtype=torch.bool) if masked is None else ~masked[self.indices]
        with torch.no_grad():
            asked = _read(self.kernel, embeddings)
            if seen.all():
                return self.kernel.similarity(asked, self.features) @ self._solved() @ self.values
            if not seen.any():
                return self.values.new_zeros(len(asked), self.values.shape[1])
            seen = seen.to(self.features.device)
            return self.kernel.weights(asked, self.features[seen]) @ self.values[seen]

    def leave_group_out(self, embeddings: Sequence[Embedding], masked: Tensor) -> Tensor:
        """Values (b, p) for descriptions, each without the experts (b, n) that are masked for it.

        In closed form: with A the inverse of the system and u = A k, experts E leave it by u − A[:, E] A[E, E]⁻¹ u[E].
        """
        inverse = self._solved()
        with torch.no_grad():
            weights = self.kernel.similarity(_read(self.kernel, embeddings), self.features) @ inverse
            for row, mask in zip(weights, masked[:, self.indices], strict=True):
                out = mask.nonzero()[:, 0].to(row.device)
                row -= inverse[:, out] @ torch.linalg.solve(inverse[out][:, out], row[out])
            return weights @ self.values

    def shares(self) -> Tensor:
        """What each expert adds to a prediction (l, p) when it is asked for with similarity 1: values are `similarity @ shares`."""
        return self._solved() @ self.values

    def _solved(self) -> Tensor:
        """Inverse of the system of all experts (l, l), worked out once."""
        if self._inverse is None:
            with torch.no_grad():
                self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.kernel.system(self.features))).float()
        return self._inverse

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs beside the settings."""
        network = {f"network.{name}": value for name, value in self.kernel.state_dict().items()}
        return {**network, "indices": self.indices, "features": self.features, "values": self.values}

    @classmethod
    def from_tensors(cls, settings: KernelSettings, embedding: int, tensors: Mapping[str, Tensor]) -> ExpertRegression:
        """Puts back what `tensors` gave, for vectors of length e.

        Raises:
            KeyError: If one is missing.
            RuntimeError: If they do not fit the settings.
            ValueError: If they do not fit together.
        """
        with torch.device("meta"):
            kernel = settings.kernel(embedding)
        kernel.load_state_dict(part(tensors, "network"), assign=True)
        indices, features, values = tensors["indices"].long(), tensors["features"].float(), tensors["values"].float()
        if indices.dim() != 1 or features.shape != (len(indices), settings.features) or values.dim() != 2 or len(values) != len(indices):
            raise ValueError(f"experts {tuple(indices.shape)}, {tuple(features.shape)}, {tuple(values.shape)}")
        if not len(indices) or (indices < 0).any():
            raise ValueError(f"places of {len(indices)} experts")
        return cls(kernel.requires_grad_(False).eval(), indices, features, values)


class Kernel(Method):
    """The mean of a Gaussian process over the experts' codes, whose kernel reads descriptions. By reconstruction alone."""

    name = "kernel"
    settings_type = KernelSettings
    settings: KernelSettings
    regression: ExpertRegression | None = None
    mean: Tensor

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.settings.check()

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Learns the kernel on the training experts; at use all experts count."""
        self.regression, self.mean = regress_codes(self.name, self.settings, data, loop, held=True)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated. Experts that the condition masks do not count, as where a task of the bank is treated as unseen."""
        if self.regression is None:
            raise self.unfitted()
        code = self.regression([condition.embedding], condition.masked).cpu() + self.mean
        return code.expand(count, -1).clone()

    def state(self) -> State:
        """Kernel, experts' features and codes (in fp16), and the codes' mean."""
        if self.regression is None:
            raise self.unfitted()
        tensors = {name: value.cpu() for name, value in self.regression.tensors().items()}
        return State({**tensors, "values": tensors["values"].half(), "mean": self.mean}, {"embedding": self.regression.embedding})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""
        self.mean = tensors["mean"].float()
        self.regression = ExpertRegression.from_tensors(self.settings, whole(shape, "embedding"), tensors)


def can_regress(data: TrainingSet) -> bool:
    """Whether the training experts differ and each has another of another group, from which it could be predicted."""
    training = data.training_experts
    codes = data.codes[training]
    return bool((codes != codes[:1]).any()) and not bool(data.masked(training)[:, training].all(1).any())


def regress_codes(
    name: str, settings: KernelSettings, data: TrainingSet, loop: TrainingLoop, *, held: bool
) -> tuple[ExpertRegression, Tensor]:
    """A regression on the training experts' codes, and where `held` on the held-out ones' too, with the mean (c,) that it adds to."""
    data.require_experts(name)
    coordinates = PrincipalCodes.fit(data.codes[data.training_experts])
    learned = ExpertRegression.learn(name, settings, coordinates.to_coordinates(data.codes), data, loop)
    more = data.validation_experts if held else []
    mean = data.codes[sorted([*learned.indices.tolist(), *more])].mean(0)
    return learned.with_others(data.codes - mean, data, more), mean


def _others(data: TrainingSet, drawn: Sequence[int], asked: Sequence[int]) -> list[int]:
    """Those drawn that are of no group of those asked for."""
    masked = data.masked(asked).any(0).tolist()
    return [i for i in drawn if not masked[i]]


def _features(kernel: ExpertKernel, data: TrainingSet, rows: Sequence[int], descriptions: int | None = None) -> Tensor:
    """Features (l, f) of the experts at some rows of a bank, each the mean over its first descriptions."""
    texts = [data.averaged(i)[:descriptions] for i in rows]
    flat = [one for texts_of_one in texts for one in texts_of_one]
    with torch.no_grad():
        parts = [_read(kernel, flat[start : start + _AT_ONCE]) for start in range(0, len(flat), _AT_ONCE)]
    return torch.stack([texts_of_one.mean(0) for texts_of_one in torch.cat(parts).split([len(texts_of_one) for texts_of_one in texts])])


def _read(kernel: ExpertKernel, embeddings: Sequence[Embedding]) -> Tensor:
    return kernel(*collate(embeddings, kernel.noise.device))
