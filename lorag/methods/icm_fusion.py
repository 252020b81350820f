"""ICM-Fusion: a VAE whose latents are meta-trained to stand gradient steps, so that experts can be fused in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorag.base.runner import Runner
from lorag.errors import ConfigError, GeneratorError
from lorag.methods.base import Generator, Settings, draw
from lorag.methods.data_parallel import Batch
from lorag.methods.functional import code_losses, mean_loss, require_runner, task_vectors
from lorag.methods.latent import Diagnostics, gaussian_kl, negative_elbo
from lorag.methods.set_training import SetSettings, train_on_sets
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.cvae import Gaussian, standard_normal
from lorag.networks.fvae import FusionVae
from lorag.spaces.principal_codes import PrincipalCodes
from lorag.text.conditioning import Condition, mixture

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
        second_order: Whether gradients flow through the inner gradients too.
        sets: Training on sets of tasks that share one adapter: ours, beyond the paper. It needs examples.
        top: Nearest experts whose latents are mixed for a description.
        sharpness: τ of the softmax over their cosines.
        temperature: Factor on the deviation of sampled latents; 0 takes the mean.
    """

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
    second_order: bool = False
    sets: SetSettings = field(default_factory=SetSettings)
    top: int = 4
    sharpness: float = 0.05
    temperature: float = 0.0


class IcmFusion(Generator):
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
    sizes: tuple[int, ...]

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        if self.settings.condition not in _CONDITIONS:
            raise ConfigError("method.condition is unknown", got=repr(self.settings.condition), expected=" or ".join(_CONDITIONS))

    # --- fit -----------------------------------------------------------------------------------------------------

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Reconstruction, meta-training and training on sets through the base model; each stops early on held-out training tasks."""
        data.require_experts(self.name)
        settings = self.settings
        if (runner is None or not data.tasks) and (settings.meta_steps or settings.sets.steps or settings.condition == "examples"):
            raise GeneratorError(
                f"{self.name} learns from the experts' tasks, and there are no examples of them",
                remedy="Give their suite: tasks=PATH; or settings.meta_steps=0 settings.sets.steps=0 settings.condition=description.",
            )
        device, rows, held = loop.accelerator.device, data.training_experts, data.validation_experts
        self.coordinates = PrincipalCodes.fit(data.codes[rows], settings.coordinates)
        x = self.coordinates.to_coordinates(data.codes).to(device)
        means = data.conditioner.centroids
        if settings.condition == "examples":
            means = task_vectors(require_runner(self.name, data, runner), data.tasks[: len(data.codes)]).cpu()
        self.centre = means[rows].mean(0)
        self.scale = (means[rows] - self.centre).square().mean().sqrt().clamp_min(1e-6)
        self.vectors = self.standardise(means)
        self.sizes = (x.shape[1], means.shape[1])
        with loop.seeded():
            network = FusionVae(*self.sizes, latent=settings.latent, width=settings.width).to(device)
        training = torch.tensor(rows)

        def vectors(picks: Sequence[int], anew: bool = True) -> Tensor:
            """Task vectors of some experts, of one description each, drawn anew, if they are made of descriptions."""
            if anew and settings.condition == "description":
                return self.standardise(torch.stack([one.pooled for one in draw(data, picks, loop)]))
            return self.vectors[list(picks)]

        def batch(picks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            """Coordinates, task vectors and noise of some experts."""
            return x[picks], vectors(picks).to(device), torch.randn(len(picks), settings.latent, generator=loop.rng).to(device)

        def reconstruction(_: nn.Module, step: int) -> Batch:
            picks = training[torch.randint(len(training), (settings.batch,), generator=loop.rng)].tolist()
            target, v, noise = batch(picks)
            return Batch(
                len(picks), lambda part: negative_elbo(network(target[part], v[part], noise[part]), target[part], settings.kl, each=True)
            )

        def meta(_: nn.Module, step: int) -> Batch:
            picks = training[torch.randperm(len(training), generator=loop.rng)[: settings.tasks]].tolist()
            target, v, noise = batch(picks)
            more = torch.randn(noise.shape, generator=loop.rng).to(device)

            def losses(part: slice) -> Tensor:
                made = network(target[part], v[part], noise[part]).x
                adapted = self.adapt(made, picks[part], data, require_runner(self.name, data, runner), f"{self.name}/{step}")
                return negative_elbo(network(adapted, v[part], more[part]), target[part], settings.kl, each=True)

            return Batch(len(picks), losses)

        def decoded() -> Tensor:
            """Held-out experts, through their posterior's mean."""
            v = self.vectors[held].to(device)
            with torch.no_grad():
                return network.decode(network.encode(x[held], v).mean, v)

        def error(_: nn.Module) -> float:
            return F.mse_loss(decoded(), x[held]).item()

        def task_loss(_: nn.Module) -> float:
            return mean_loss(require_runner(self.name, data, runner), data, self.to_codes(decoded()), held, 8, "validation")

        plain = LoopSettings(settings.steps, settings.learning_rate, validate_every=100)
        loop.run(f"{self.name} reconstruction", network, reconstruction, error if held else None, plain)
        steps = LoopSettings(settings.meta_steps, settings.meta_learning_rate, validate_every=50)
        loop.run(f"{self.name} meta", network, meta, task_loss if held else None, steps)
        train_on_sets(self.name, network, self.coordinates, vectors, data, loop, settings.sets, runner)
        self.network = network.requires_grad_(False).eval().cpu()
        posterior = self.encode(data.codes, self.vectors)
        self.latents, self.spreads = posterior.mean, (0.5 * posterior.log_variance).exp()
        self.diagnostics = self._diagnose(
            Gaussian(posterior.mean[rows], posterior.log_variance[rows]), self.vectors[rows], data.space.zero.cpu()
        )

    def _diagnose(self, posterior: Gaussian, vectors: Tensor, zero: Tensor) -> Diagnostics:
        """Whether the latents are used; norms count from the code `zero` (c,) of no change."""
        network, rng, spreads = self._fitted(), torch.Generator().manual_seed(0), []
        for vector in vectors[:16]:
            with torch.no_grad():
                codes = self.decode(torch.randn(8, network.latent, generator=rng), vector.expand(8, -1)) - zero
            spreads.append(torch.pdist(codes).mean() / codes.mean(0).norm().clamp_min(1e-12))
        kl = gaussian_kl(posterior, standard_normal(posterior.mean, network.latent)).mean(0)
        return Diagnostics(kl, posterior.mean.var(0, correction=0), torch.stack(spreads).mean().item())

    def adapt(self, start: Tensor, indices: Sequence[int], data: TrainingSet, runner: Runner, seed: str) -> Tensor:
        """Coordinates (b, p) after K gradient steps of each on its own task's loss.

        First order: the steps' gradients are constants, and what follows is differentiated as if they were a shift.
        Second order: they are functions of the start; only plain attention has the derivatives for that.
        """
        adapted, second = start, self.settings.second_order
        for step in range(self.settings.inner_steps):
            at = adapted if second else adapted.detach().requires_grad_()
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if second else nullcontext():
                losses = code_losses(runner, data, self.to_codes(at), indices, self.settings.examples, f"{seed}/{step}")
                (gradient,) = torch.autograd.grad(losses.sum(), at, create_graph=second)
            adapted = adapted - self.settings.inner_rate * gradient
        return adapted

    # --- use -----------------------------------------------------------------------------------------------------

    def standardise(self, vectors: Tensor) -> Tensor:
        """Task vectors (..., v) minus their mean over the training experts, which all of them share, at unit size."""
        return (vectors - self.centre) / self.scale

    def to_codes(self, coordinates: Tensor) -> Tensor:
        """Codes (..., c) of principal coordinates (..., p), on their device."""
        own, device = self.coordinates, coordinates.device
        return PrincipalCodes(own.mean.to(device), own.basis.to(device), own.scale).to_codes(coordinates)

    def encode(self, codes: Tensor, vectors: Tensor) -> Gaussian:
        """Posteriors (b, z) of codes (b, c) beside their tasks' standardised vectors (b, v)."""
        with torch.no_grad():
            return self._fitted().encode(self.coordinates.to_coordinates(codes), vectors)

    def decode(self, latents: Tensor, vectors: Tensor) -> Tensor:
        """Codes (b, c) of latents (b, z) beside standardised vectors (b, v); gradients reach both."""
        decoded, directions = self._fitted().decode(latents, vectors), self._fitted().directions
        return self.to_codes(decoded) if directions is None else directions(decoded)

    def fuse(self, latents: Tensor, vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """One latent (z,) and one vector (v,) for several experts' (n, z) and (n, v)."""
        return self._fitted().fuse(latents, vectors, weights)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Decodes the mixture of the nearest experts' latents beside the condition's own task vector.

        Fitted on examples, it takes the condition's task vector, and the nearest experts' mixed ones where it has none.
        """
        settings, similarities = self.settings, condition.similarities
        mixed = mixture(similarities, self.latents, self.spreads, top=settings.top, temperature=settings.sharpness)
        if settings.condition == "description":
            v = self.standardise(condition.embedding.pooled)
        elif condition.task_vector is not None:
            v = self.standardise(condition.task_vector)
        else:
            v = mixture(similarities, self.vectors, None, top=settings.top, temperature=settings.sharpness).mean
        if not settings.temperature:
            with torch.inference_mode():
                return self.decode(mixed.mean[None], v[None]).expand(count, -1).clone()
        noise = torch.randn(count, len(mixed.mean), generator=rng)
        with torch.inference_mode():
            return self.decode(mixed.mean + settings.temperature * mixed.variance.sqrt() * noise, v.expand(count, -1))

    def _fitted(self) -> FusionVae:
        if self.network is None:
            raise GeneratorError(f"{self.name} is not fitted")
        return self.network

    # --- files ---------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """Number of parameters of the network and of values known of the experts; its coordinates are a base, as a weight space is."""
        return sum(tensor.numel() for tensor in (*self._fitted().parameters(), self.latents, self.spreads, self.vectors))

    def tensors(self) -> dict[str, Tensor]:
        """The network, the coordinates, diagnostics, and what is known of each expert."""
        known = {"latents": self.latents, "spreads": self.spreads, "vectors": self.vectors, "centre": self.centre, "scale": self.scale}
        parts = {
            "network": self._fitted().state_dict(),
            "coordinates": self.coordinates.tensors(),
            "diagnostics": self.diagnostics.tensors(),
        }
        found = {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.items()}
        return {**known, **found, "sizes": torch.tensor(self.sizes)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Builds the network and puts everything back."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{prefix}."): value.float() for name, value in tensors.items() if name.startswith(f"{prefix}.")}

        try:
            self.sizes = tuple(tensors["sizes"].tolist())
            with torch.device("meta"):
                code = len(tensors.get("network.directions.weight", ()))
                network = FusionVae(*self.sizes, latent=self.settings.latent, width=self.settings.width, code=code)
            network.load_state_dict(part("network"), assign=True)
            self.coordinates = PrincipalCodes.from_tensors(part("coordinates"))
            self.diagnostics = Diagnostics.from_tensors(part("diagnostics"))
            self.latents, self.spreads, self.vectors = (tensors[name].float() for name in ("latents", "spreads", "vectors"))
            self.centre, self.scale = tensors["centre"].float(), tensors["scale"].float()
        except (KeyError, RuntimeError, TypeError) as error:
            raise GeneratorError(f"stored tensors do not fit {self.name}", got=str(error)[:160]) from error
        self.network = network.requires_grad_(False).eval()
