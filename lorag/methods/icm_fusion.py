"""ICM-Fusion: a VAE whose latents are meta-trained to withstand gradient steps, so that experts can be fused in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorag.errors import ConfigError, GeneratorError
from lorag.methods.functional import task_vectors
from lorag.methods.fusion_stages import FusionTraining, SetSettings, codes_of
from lorag.methods.method import Method, Settings, State, nested, part, whole
from lorag.methods.vae import Diagnostics, gaussian_kl
from lorag.networks.vae import FusionVae, Gaussian, standard_normal
from lorag.spaces.principal_codes import PrincipalCodes
from lorag.text.conditioning import Condition, mixture

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet

__all__ = ["IcmFusion", "IcmFusionSettings"]

_CONDITIONS = ("description", "examples")


@dataclass
class IcmFusionSettings(Settings):
    """Size, training and use of the F-VAE. The paper states none of these values.

    Attributes:
        condition: What the task vector v is: "description" (pooled embedding), or "examples" (the base model's mean hidden
            state over inputs).
        coordinates: Principal coordinates of a code that the VAE sees; 0 takes all that the training experts span.
        latent: z.
        width: Of the hidden layers.
        kl: λ, weight of the KL divergence (summed over latents) against the squared error (mean over coordinates).
        steps: Steps of plain reconstruction.
        learning_rate: Their peak rate.
        batch: Experts in such a step.
        meta_steps: Steps of meta-training; 0 leaves a plain VAE and needs no examples.
        meta_learning_rate: Their peak rate.
        tasks: Tasks of a meta-batch.
        examples: Training examples of each, new ones for each inner step.
        inner_steps: K, gradient steps on the task's own loss from what was decoded.
        inner_rate: β, their rate, in coordinates of unit size. One step on decoded held-out experts of the sandbox lowered their
            loss most at about 30, and did harm at 100.
        sets: Training on sets of tasks that share one adapter: ours, beyond the paper. It needs examples.
        top: Nearest experts whose latents are mixed for a description.
        temperature: τ of the softmax over their cosines.
        spread: Factor on the deviation of sampled latents; 0 takes the mean.
    """

    RENAMED: ClassVar[dict[str, str]] = {"sharpness": "temperature"}

    condition: str = "description"
    coordinates: int = 0
    latent: int = 128
    width: int = 384
    kl: float = 1e-4
    steps: int = 1500
    learning_rate: float = 1e-3
    batch: int = 64
    meta_steps: int = 200
    meta_learning_rate: float = 3e-4
    tasks: int = 16
    examples: int = 4
    inner_steps: int = 2
    inner_rate: float = 20.0
    sets: SetSettings = field(default_factory=SetSettings)
    top: int = 4
    temperature: float = 0.05
    spread: float = 0.0


class IcmFusion(Method):
    """ICM-Fusion (arXiv 2508.04153): an F-VAE over codes, in principal coordinates of the bank.

    Fitted, it holds the posterior of every expert: `lorag.training.fuse` mixes several into one adapter. From a description
    alone it mixes those of the nearest experts and decodes the mixture beside the description's own vector.

    Attributes:
        latents: μ of each expert (n, z).
        spreads: σ of each expert (n, z).
        vectors: Task vector of each expert (n, v), as `standardise` gives them.
    """

    name = "icm_fusion"
    settings_type = IcmFusionSettings
    settings: IcmFusionSettings
    network: FusionVae | None = None
    coordinates: PrincipalCodes
    diagnostics: Diagnostics
    latents: Tensor
    spreads: Tensor
    vectors: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        if self.settings.condition not in _CONDITIONS:
            raise ConfigError("settings.condition is unknown", got=repr(self.settings.condition), expected=" or ".join(_CONDITIONS))

    # --- fit -----------------------------------------------------------------------------------------------------

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Reconstruction, meta-training and training on sets through the base model; each stops early on held-out training tasks."""
        data.require_experts(self.name)
        s, experts = self.settings, data.training_experts
        if s.meta_steps or s.sets.steps or s.condition == "examples":
            if runner is None or not data.tasks:
                raise GeneratorError(
                    f"{self.name} learns from the experts' tasks, and there are no examples of them",
                    remedy="Give their suite: tasks=PATH; or settings.meta_steps=0 settings.sets.steps=0 settings.condition=description.",
                )
        self.coordinates = PrincipalCodes.fit(data.codes[experts], s.coordinates)
        means = data.conditioner.centroids
        if runner is not None and s.condition == "examples":
            means = task_vectors(runner, data.tasks[: len(data.codes)]).cpu()
        self.centre = means[experts].mean(0)
        self.scale = (means[experts] - self.centre).square().mean().sqrt().clamp_min(1e-6)
        self.vectors = self.standardise(means)
        with loop.seeded():
            network = FusionVae(self.coordinates.size, means.shape[1], latent=s.latent, width=s.width).to(loop.accelerator.device)
        standardise = self.standardise if s.condition == "description" else None
        stages = FusionTraining(self.name, network, self.coordinates, self.vectors, standardise, data, loop)
        stages.reconstruct(steps=s.steps, learning_rate=s.learning_rate, batch=s.batch, kl=s.kl)
        if runner is not None and s.meta_steps:
            stages.meta_train(
                runner,
                steps=s.meta_steps,
                learning_rate=s.meta_learning_rate,
                tasks=s.tasks,
                kl=s.kl,
                inner_steps=s.inner_steps,
                inner_rate=s.inner_rate,
                examples=s.examples,
            )
        if runner is not None and s.sets.steps:
            stages.train_on_sets(runner, s.sets)
        self.network = network.requires_grad_(False).eval().cpu()
        posterior = self.encode(data.codes, self.vectors)
        self.latents, self.spreads = posterior.mean, (0.5 * posterior.log_variance).exp()
        posteriors = Gaussian(posterior.mean[experts], posterior.log_variance[experts])
        self.diagnostics = self._diagnose(posteriors, self.vectors[experts], data.space.zero.cpu())

    def _diagnose(self, posterior: Gaussian, vectors: Tensor, zero: Tensor) -> Diagnostics:
        """Whether the latents are used; norms count from the code `zero` (c,) of no change."""
        network, rng, spreads = self._fitted(), torch.Generator().manual_seed(0), []
        for vector in vectors[:16]:
            with torch.no_grad():
                codes = self.decode(torch.randn(8, network.latent, generator=rng), vector.expand(8, -1)) - zero
            spreads.append(torch.pdist(codes).mean() / codes.mean(0).norm().clamp_min(1e-12))
        kl = gaussian_kl(posterior, standard_normal(posterior.mean, network.latent)).mean(0)
        return Diagnostics(kl, posterior.mean.var(0, correction=0), torch.stack(spreads).mean().item())

    # --- use -----------------------------------------------------------------------------------------------------

    def standardise(self, vectors: Tensor) -> Tensor:
        """Task vectors (..., v) minus their mean over the training experts, which all of them share, at unit size."""
        return (vectors - self.centre) / self.scale

    def encode(self, codes: Tensor, vectors: Tensor) -> Gaussian:
        """Posteriors (b, z) of codes (b, c) beside their tasks' standardised vectors (b, v)."""
        with torch.no_grad():
            return self._fitted().encode(self.coordinates.to_coordinates(codes), vectors)

    def decode(self, latents: Tensor, vectors: Tensor) -> Tensor:
        """Codes (b, c) of latents (b, z) beside standardised vectors (b, v); gradients reach both."""
        decoded, directions = self._fitted().decode(latents, vectors), self._fitted().directions
        return codes_of(self.coordinates, decoded) if directions is None else directions(decoded)

    def fuse(self, latents: Tensor, vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """One latent (z,) and one vector (v,) for several experts' (n, z) and (n, v)."""
        return self._fitted().fuse(latents, vectors, weights)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Decodes the mixture of the nearest experts' latents beside the condition's own task vector.

        Fitted on examples, it takes the condition's task vector, and the nearest experts' mixed ones where it has none.
        """
        settings, similarities = self.settings, condition.similarities
        mixed = mixture(similarities, self.latents, self.spreads, top=settings.top, temperature=settings.temperature)
        if settings.condition == "description":
            v = self.standardise(condition.embedding.pooled)
        elif condition.task_vector is not None:
            v = self.standardise(condition.task_vector)
        else:
            v = mixture(similarities, self.vectors, None, top=settings.top, temperature=settings.temperature).mean
        if not settings.spread:
            with torch.inference_mode():
                return self.decode(mixed.mean[None], v[None]).expand(count, -1).clone()
        noise = torch.randn(count, len(mixed.mean), generator=rng)
        with torch.inference_mode():
            return self.decode(mixed.mean + settings.spread * mixed.variance.sqrt() * noise, v.expand(count, -1))

    def _fitted(self) -> FusionVae:
        if self.network is None:
            raise self.unfitted()
        return self.network

    # --- files ---------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """Number of parameters of the network and of values stored of the experts; its coordinates are a base, as a weight space is."""
        return sum(tensor.numel() for tensor in (*self._fitted().parameters(), self.latents, self.spreads, self.vectors))

    def state(self) -> State:
        """The network, the coordinates, diagnostics, and what is stored of each expert."""
        network = self._fitted()
        tensors = nested(network=network.state_dict(), coordinates=self.coordinates.tensors(), diagnostics=self.diagnostics.tensors())
        values = {"latents": self.latents, "spreads": self.spreads, "vectors": self.vectors, "centre": self.centre, "scale": self.scale}
        code = 0 if network.directions is None else network.directions.out_features
        return State({**values, **tensors}, {"elements": self.coordinates.size, "vector": self.vectors.shape[1], "code": code})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Builds the network and puts everything back."""
        s, (elements, vector, code) = self.settings, (whole(shape, name) for name in ("elements", "vector", "code"))
        with torch.device("meta"):
            network = FusionVae(elements, vector, latent=s.latent, width=s.width, code=code)
        network.load_state_dict(part(tensors, "network"), assign=True)
        self.coordinates = PrincipalCodes.from_tensors(part(tensors, "coordinates"))
        self.diagnostics = Diagnostics.from_tensors(part(tensors, "diagnostics"))
        self.latents, self.spreads, self.vectors = (tensors[name].float() for name in ("latents", "spreads", "vectors"))
        self.centre, self.scale = tensors["centre"].float(), tensors["scale"].float()
        self.network = network.requires_grad_(False).eval()
