"""ICM-LoRA: one conditional VAE for all tasks, conditioned on a description, a task vector, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.errors import ConfigError, GeneratorError
from lorag.methods.functional import task_vectors
from lorag.methods.kernel import ExpertRegression, KernelSettings
from lorag.methods.method import ReaderSettings, collate, draw, nested, part, whole
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.methods.vae import Diagnostics, VaeMethod, VaeStage, negative_elbo, squared_error
from lorag.networks.conv_vae import ConvVae
from lorag.networks.vae import ConditionalVae
from lorag.spaces.principal_codes import PrincipalCodes, StandardCodes

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition
    from lorag.text.embedding import Embedding

__all__ = ["IcmLora"]


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # pooled, tokens, mask, task vectors


@dataclass
class IcmLoraSettings(ReaderSettings):
    """Form, size and training, beside those of the reader, which are for codes.

    Attributes:
        stack: "codes", a VAE over principal coordinates of the codes, or "conv", the published network over codes as they
            are; with `space=flat_factors` these are the raw factors of the paper.
        condition: "description", "examples" (the task vector, as published) or "both".
        latent: Number of latents; null is 64 for codes, and 256, as published, for conv.
        beta: Weight of the KL, as published.
        temperature: Factor on the noise at use: 1 samples z ~ N(0, I), as published, 0 takes z = 0.
        steps: Of training. Published: 2,000 epochs.
        learning_rate: Peak rate; null is 1e-3 for codes, and 2e-4, as published, for conv.
        batch: Experts in a step; null is 64 for codes, and 2, as published, for conv, whose batch normalisation needs two.
        components: Principal coordinates for codes; 0 takes all.
        width: Of the transformer that reads the description, for codes.
        hidden: Features of the condition, and width of encoder and decoder, for codes.
        kernel: Of the regression over experts to which the VAE adds, for codes from descriptions; with `steps: 0` there is none,
            and the VAE's own linear map of the condition is all that it adds to.
    """

    stack: str = "codes"
    condition: str = "description"
    latent: int | None = None
    beta: float = 0.005
    temperature: float = 1.0
    steps: int = 1500
    learning_rate: float | None = None
    batch: int | None = None
    components: int = 0
    width: int = 192
    hidden: int = 384
    kernel: KernelSettings = field(default_factory=KernelSettings)


class IcmLora(VaeMethod[ConditionalVae | ConvVae]):
    """In-Context Meta LoRA generation (arXiv 2501.17635, IJCAI 2025), without the faults of its released code.

    Kept: prior N(0, I), loss = squared error averaged over elements + 0.005 · KL, one latent for a whole adapter, and for
    `stack="conv"` the published network. Repaired: reconstruction and target must have one shape; each task has its own
    condition; the task vector comes from the base model without an adapter; the normaliser comes from the training experts and never from
    a checkpoint of the task that is generated. Chosen, because not published: the samples of a task are its final code plus noise with
    the deviations of its checkpoints, of which `TrainingSet` keeps no more; the network over codes, whose reader sees descriptions
    with augmentation in training; and early stopping by the squared error of z = 0 on held-out training tasks.
    """

    name = "icm_lora"
    settings_type = IcmLoraSettings
    settings: IcmLoraSettings
    vector_mean: Tensor
    vector_scale: Tensor
    regression: ExpertRegression | None = None

    def __init__(self, settings: IcmLoraSettings | None = None) -> None:
        super().__init__(settings)
        s = self.settings
        for key, value, choices in (("stack", s.stack, ("codes", "conv")), ("condition", s.condition, ("description", "examples", "both"))):
            if value not in choices:
                raise ConfigError(f"settings.{key} is unknown", got=repr(value), expected=" or ".join(choices))
        s.kernel.check("settings.kernel.{}".format)
        conv = s.stack == "conv"
        self.latent, self.batch, self.learning_rate = (256, 2, 2e-4) if conv else (64, 64, 1e-3)
        self.latent = self.latent if s.latent is None else s.latent
        self.batch = self.batch if s.batch is None else s.batch
        self.learning_rate = self.learning_rate if s.learning_rate is None else s.learning_rate
        if conv and self.batch < 2:
            raise ConfigError("settings.batch: the published network normalises over the batch", got=s.batch, expected="2 or more")
        if s.temperature < 0 or s.beta < 0:
            raise ConfigError("settings.temperature and settings.beta must not be negative", got=f"{s.temperature}, {s.beta}")
        self.coordinates_type = StandardCodes if conv else PrincipalCodes

    @property
    def reads(self) -> bool:
        """Whether descriptions are part of the condition."""
        return self.settings.condition != "examples"

    @property
    def regresses(self) -> bool:
        """Whether the VAE adds to a regression over experts."""
        return self.reads and self.settings.stack == "codes" and self.settings.kernel.steps > 0

    @property
    def needs_task_vectors(self) -> bool:
        """Whether conditions must carry a task vector."""
        return self.sees

    @property
    def sees(self) -> bool:
        """Whether task vectors are part of the condition."""
        return self.settings.condition != "description"

    def build(self, shape: Mapping[str, Any]) -> ConditionalVae | ConvVae:
        """The untrained network for lengths of `embedding` and task `vector`, 0 where there is none, and number of `elements`."""
        embedding, vector, elements = (whole(shape, name) for name in ("embedding", "vector", "elements"))
        s = self.settings
        if s.stack == "conv":
            return ConvVae(elements, embedding + vector, self.latent)
        condition = s.reader(embedding, vector, width=s.width, features=s.hidden)
        return ConditionalVae(condition, elements, latent=self.latent, hidden=s.hidden, width=s.hidden)

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Trains the VAE on the training experts.

        Raises:
            GeneratorError: If task vectors are asked for, and there are no examples of the experts' tasks.
        """
        data.require_experts(self.name)
        s, training, held = self.settings, data.training_experts, data.validation_experts
        training_codes = data.codes[training]
        self.coordinates = (
            StandardCodes.fit(training_codes, data.space.parts) if s.stack == "conv" else PrincipalCodes.fit(training_codes, s.components)
        )
        vectors = self._fit_vectors(data, runner)
        embedding = data.embedding_size if self.reads else 0
        self.shape = {"embedding": embedding, "vector": 0 if vectors is None else vectors.shape[1], "elements": self.coordinates.size}
        coordinates = self.coordinates.to_coordinates(data.codes)
        learned = ExpertRegression.learn(self.name, s.kernel, coordinates, data, loop) if self.regresses else None
        stage = _Stage(data, loop, self.start(loop), self, coordinates, vectors, learned)
        steps = LoopSettings(s.steps, self.learning_rate, validate_every=100)
        loop.run(f"{self.name} reconstruction", stage.network, stage.batch, stage.validate if held else None, steps)
        self.diagnostics = stage.diagnostics()
        if learned is not None:
            self.regression = learned.with_others(coordinates, data, held)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Codes of `count` samples of z; with temperature 0 the code of z = 0, repeated.

        Raises:
            GeneratorError: If the method needs a task vector, and the condition has none that fits.
        """
        vector = None
        network = self.fitted()
        if self.sees:
            if condition.task_vector is None:
                raise GeneratorError(
                    f"{self.name} with condition={self.settings.condition} needs a task vector, and the condition has none",
                    remedy="Give a few examples of the task: examples=[(input, output), …].",
                )
            if condition.task_vector.shape != self.vector_mean.shape:
                raise GeneratorError(
                    "a task vector does not fit", got=tuple(condition.task_vector.shape), expected=tuple(self.vector_mean.shape)
                )
            vector = self._normalise(condition.task_vector.float().cpu())[None]
        device = next(network.parameters()).device
        with torch.inference_mode():
            h = network.read(*self.inputs([condition.embedding], vector, device))
            start = None
            if self.regression is not None:
                start = self.regression([condition.embedding], condition.masked).to(device)
            return self.sample(h, rng, count, self.settings.temperature, start).clone()

    def inputs(self, embeddings: Sequence[Embedding], vectors: Tensor | None, device: torch.device) -> _Inputs:
        """What the network reads: pooled, tokens, mask and normalised task vectors, empty where they are not asked for."""
        pooled, tokens, mask = collate(embeddings, device)
        return pooled if self.reads else pooled[:, :0], tokens, mask, None if vectors is None else vectors.to(device)

    def _fit_vectors(self, data: TrainingSet, runner: Runner | None) -> Tensor | None:
        """Normalised task vectors (n, v) of all experts, by mean and deviation of the training experts' alone."""
        if not self.sees:
            return None
        if runner is None or not data.tasks:
            raise GeneratorError(
                f"{self.name} with condition={self.settings.condition} needs examples of the experts' tasks, and there are none",
                remedy="Give their suite with tasks=PATH, or take settings.condition=description.",
            )
        rows = sorted([*data.training_experts, *data.validation_experts])
        raw = task_vectors(runner, [data.tasks[i] for i in rows]).detach().float().cpu().clone()
        vectors = raw.new_zeros(len(data.codes), raw.shape[1])
        vectors[rows] = raw
        learned_from = vectors[data.training_experts]
        self.vector_mean, spread = learned_from.mean(0), learned_from.std(0, correction=0)
        # What all tasks share to the last digit says nothing of any, and must not be divided by.
        self.vector_scale = torch.where(spread > 1e-6 * learned_from.abs().amax(0), spread, torch.ones_like(spread))
        return self._normalise(vectors)

    def _normalise(self, vectors: Tensor) -> Tensor:
        return (vectors - self.vector_mean) / self.vector_scale

    def more_tensors(self) -> dict[str, Tensor]:
        """The task vectors' normaliser, and the regression."""
        stored = {"vector.mean": self.vector_mean, "vector.scale": self.vector_scale} if self.sees else {}
        if self.regression is not None:
            stored |= nested(regression={name: value.cpu() for name, value in self.regression.tensors().items()})
        return stored

    def load_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts normaliser and regression back. What is stored decides whether there is one, and not the setting."""
        if self.sees:
            self.vector_mean, self.vector_scale = tensors["vector.mean"].float(), tensors["vector.scale"].float()
        stored = part(tensors, "regression")
        self.regression = ExpertRegression.from_tensors(self.settings.kernel, whole(self.shape, "embedding"), stored) if stored else None
        if self.regression is not None and self.regression.values.shape[1] != self.coordinates.size:
            raise ValueError(f"experts of {self.regression.values.shape[1]} for {self.coordinates.size} coordinates")

    def size(self) -> int:
        """Number of parameters of network and kernel; experts and their coordinates are a base, as a weight space is."""
        kernel = 0 if self.regression is None else sum(parameter.numel() for parameter in self.regression.kernel.parameters())
        return super().size() + kernel


@dataclass(frozen=True)
class _Stage(VaeStage[ConditionalVae | ConvVae]):
    """The training of the VAE on experts, which adds to a regression where one is learned.

    Attributes:
        method: Whose network it is.
        coordinates: Of the experts' codes (n, p).
        vectors: Their normalised task vectors (n, v), if they are asked for.
        regression: What the VAE adds to, if it does.
    """

    method: IcmLora
    coordinates: Tensor
    vectors: Tensor | None
    regression: ExpertRegression | None

    def batch(self, module: nn.Module, step: int) -> Batch:
        """Codes of some experts with the noise of their checkpoints, each with one of its descriptions."""
        method, data, rng = self.method, self.data, self.loop.rng
        training = data.training_experts
        rows = torch.tensor(training)[torch.randint(len(training), (method.batch,), generator=rng)].tolist()
        noise = torch.randn(method.batch, data.codes.shape[1], generator=rng)
        x = method.coordinates.to_coordinates(data.codes[rows] + data.deviations[rows] * noise).to(self.device)
        z = torch.randn(method.batch, method.latent, generator=rng).to(self.device)
        drawn = draw(data, rows, self.loop)
        start = self._start(rows, drawn)
        x = x if start is None else x - start

        def losses(share: slice) -> Tensor:
            read = self._inputs(rows[share], drawn[share])
            return negative_elbo(module(x[share], z[share], *read), x[share], method.settings.beta, each=True)

        return Batch(method.batch, losses)

    def validate(self, _: nn.Module) -> float:
        """Squared error of z = 0 on held-out experts."""
        pairs = [(i, one) for i in self.data.validation_experts for one in self.data.embeddings[i][: 8 if self.method.reads else 1]]
        with torch.no_grad():
            rows, texts = [i for i, _ in pairs], [one for _, one in pairs]
            h, start = self.network.read(*self._inputs(rows, texts)), self._start(rows, texts)
            guessed, right = self.network.decode(h.new_zeros(len(h), self.method.latent), h), self.coordinates[rows].to(self.device)
            return squared_error(guessed if start is None else guessed + start, right).mean().item() / right.shape[1]

    def diagnostics(self) -> Diagnostics:
        """Of the trained network, on the training experts."""
        self.network.eval()
        rows = self.data.training_experts
        with torch.no_grad():
            texts = [self.data.embeddings[i][0] for i in rows]
            h, start = self.network.read(*self._inputs(rows, texts)), self._start(rows, texts)
            x = self.coordinates[rows].to(self.device)
            return self.method.diagnose(x if start is None else x - start, h, self.data.space.zero.cpu(), start)

    def _inputs(self, rows: Sequence[int], embeddings: Sequence[Embedding]) -> _Inputs:
        return self.method.inputs(embeddings, None if self.vectors is None else self.vectors[list(rows)], self.device)

    def _start(self, rows: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor | None:
        """What the regression predicts (b, p) of experts that it is not given; None without one."""
        return None if self.regression is None else self.regression.leave_group_out(embeddings, self.data.masked(rows))
