"""What the VAEs among the methods share: their loss, what shows a collapsed posterior, sampling, and how they are stored."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lorag.methods.method import Method, State, nested, part
from lorag.networks.conv_vae import ConvVae
from lorag.networks.vae import ConditionalVae, Gaussian, LearnedPriorVae, Reconstruction
from lorag.spaces.principal_codes import PrincipalCodes, StandardCodes

if TYPE_CHECKING:
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet

__all__ = ["Diagnostics", "VaeMethod", "VaeStage", "gaussian_kl", "negative_elbo", "squared_error"]

Vae = TypeVar("Vae", bound=ConditionalVae | ConvVae | LearnedPriorVae)

_ACTIVE = 0.01  # variance of a posterior mean above which a latent counts as used
_SAMPLES, _CONDITIONS = 8, 16


def squared_error(guessed: Tensor, right: Tensor) -> Tensor:
    """Squared distance (b,) of rows (b, p), summed over elements.

    Raises:
        AssertionError: If shapes differ: (b, c) against (b, 1, c) broadcasts to (b, b, c), which pulls every output to the
            batch's mean, as in the released code of a published method.
    """
    if guessed.shape != right.shape or guessed.dim() != 2:
        raise AssertionError(f"reconstructions {tuple(guessed.shape)} against {tuple(right.shape)}")
    return (guessed - right).square().sum(1)


def gaussian_kl(posterior: Gaussian, prior: Gaussian) -> Tensor:
    """KL(q ‖ p) of each latent (b, z), in nats: ½ [log(σ_p²/σ_q²) + (σ_q² + (μ_q - μ_p)²)/σ_p² - 1]."""
    ratio = posterior.log_variance - prior.log_variance
    apart = (posterior.mean - prior.mean).square() * (-prior.log_variance).exp()
    return 0.5 * (ratio.exp() + apart - 1.0 - ratio)


def negative_elbo(reconstruction: Reconstruction, right: Tensor, beta: float, *, each: bool) -> Tensor:
    """Squared error + beta · KL(q ‖ p), the KL summed over latents, both averaged over the batch.

    Args:
        reconstruction: What the VAE made of them.
        right: Targets (b, p).
        beta: Weight of the KL.
        each: Whether the error is the mean over the p elements (ICM-LoRA) or their sum (SG-LoRA).
    """
    error = squared_error(reconstruction.x, right).mean() / (right.shape[1] if each else 1)
    return error + beta * gaussian_kl(reconstruction.posterior, reconstruction.prior).sum(1).mean()


@dataclass(frozen=True)
class Diagnostics:
    """Whether a VAE uses its latents, measured on the training experts.

    Attributes:
        kl: KL(q ‖ p) of each latent (z,), in nats, mean over the experts.
        variance: Of the posterior means, relative to the prior's (z,): a prior that is learned may move on its own.
        diversity: Mean distance between samples of the prior for one description, relative to the norm of their mean. In a
            shared subspace both are ‖ΔW‖ with one weight per module.
    """

    kl: Tensor
    variance: Tensor
    diversity: float

    @property
    def active(self) -> int:
        """Active units: latents whose posterior mean varies by more than 0.01 (Burda et al., arXiv 1509.00519)."""
        return int((self.variance > _ACTIVE).sum())

    def lines(self) -> dict[str, str]:
        """For people to read."""
        return {
            "active units": f"{self.active} of {len(self.kl)}",
            "KL": f"{self.kl.sum():.3f} nats, {self.kl.min():.3f} to {self.kl.max():.3f} per latent",
            "diversity": f"{self.diversity:.3f} of the samples' mean norm",
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {"kl": self.kl, "variance": self.variance, "diversity": torch.tensor(self.diversity)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Diagnostics:
        """Puts back what `tensors` gave.

        Raises:
            KeyError: If something is missing.
            ValueError: If shapes do not fit.
        """
        kl, variance, diversity = tensors["kl"], tensors["variance"], tensors["diversity"]
        if kl.dim() != 1 or kl.shape != variance.shape or not len(kl) or diversity.dim():
            raise ValueError(f"diagnostics {tuple(kl.shape)}, {tuple(variance.shape)}")
        return cls(kl, variance, diversity.item())


@dataclass(frozen=True)
class VaeStage(Generic[Vae]):
    """The training of a VAE on experts.

    Attributes:
        data: The experts.
        loop: Runs the stage.
        network: What is trained.
    """

    data: TrainingSet
    loop: TrainingLoop
    network: Vae

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.loop.accelerator.device


class VaeMethod(Method, Generic[Vae]):
    """A method that decodes a latent: sampled from a prior, or its mean.

    Attributes:
        network: The VAE.
        coordinates: In which the VAE sees codes.
        diagnostics: Of the fitted VAE.
        shape: What `build` needs beside the settings; `elements` is the number of coordinates.
    """

    network: Vae | None = None
    coordinates: PrincipalCodes | StandardCodes
    coordinates_type: type[PrincipalCodes] | type[StandardCodes] = PrincipalCodes
    diagnostics: Diagnostics
    shape: dict[str, Any]

    @abc.abstractmethod
    def build(self, shape: Mapping[str, Any]) -> Vae:
        """Makes the untrained network."""

    def more_tensors(self) -> dict[str, Tensor]:
        """What a method stores besides network, coordinates and diagnostics."""
        return {}

    def load_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `more_tensors` gave."""

    def start(self, loop: TrainingLoop) -> Vae:
        """Builds the network from the loop's seed, on its device."""
        with loop.seeded():
            self.network = self.build(self.shape)
        self.network.to(loop.accelerator.device)
        return self.network

    def fitted(self) -> Vae:
        """The network.

        Raises:
            GeneratorError: If there is none yet.
        """
        if self.network is None:
            raise self.unfitted()
        return self.network

    def sample(self, h: Tensor, rng: torch.Generator, count: int, spread: float, start: Tensor | None = None) -> Tensor:
        """Codes (count, c) for one condition (1, h): z = prior mean + spread · prior deviation · noise.

        Without spread one code is repeated, so that it does not depend on the count. `start` (1, p) are coordinates to which what
        is decoded is added.
        """
        network = self.fitted()
        prior = network.prior(h)
        if spread == 0.0:
            decoded = network.decode(prior.mean, h)
        else:
            noise = torch.randn(count, network.latent, generator=rng).to(h.device)
            z = prior.mean + spread * (0.5 * prior.log_variance).exp() * noise
            decoded = network.decode(z, h.expand(count, -1))
        return self.coordinates.to_codes((decoded if start is None else decoded + start).cpu()).expand(count, -1).clone()

    def diagnose(self, x: Tensor, h: Tensor, zero: Tensor, start: Tensor | None = None) -> Diagnostics:
        """Measures the fitted VAE on the training experts' coordinates (n, p) and conditions (n, h).

        `zero` (c,) is the code from which norms count, and `start` (n, p) are coordinates to which what is decoded is added.
        """
        network, rng = self.fitted(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            posterior, prior = network.encode(x, h), network.prior(h)
            moved = posterior.mean - prior.mean
            spreads = []
            for place, row in enumerate(h[:_CONDITIONS]):
                started = None if start is None else start[place : place + 1]
                codes = self.sample(row[None], rng, _SAMPLES, 1.0, started) - zero
                norm = codes.mean(0).norm()
                spreads.append(torch.pdist(codes).mean() / norm if norm > 0 else norm)
        kl = gaussian_kl(posterior, prior).mean(0).cpu()
        return Diagnostics(kl, moved.var(0, correction=0).cpu(), torch.stack(spreads).mean().item())

    def size(self) -> int:
        """Number of parameters of the network; its coordinates are a base, as a weight space is."""
        return sum(parameter.numel() for parameter in self.fitted().parameters())

    def state(self) -> State:
        """Network, coordinates, diagnostics, and the shape from which the network is built."""
        tensors = nested(network=self.fitted().state_dict(), coordinates=self.coordinates.tensors(), diagnostics=self.diagnostics.tensors())
        return State({**tensors, **self.more_tensors()}, dict(self.shape))

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Builds the network and loads its parameters."""
        self.shape = dict(shape)
        self.coordinates = self.coordinates_type.from_tensors(part(tensors, "coordinates"))
        self.diagnostics = Diagnostics.from_tensors(part(tensors, "diagnostics"))
        self.load_more(tensors)
        with torch.device("meta"):
            network = self.build(shape)
        network.load_state_dict(part(tensors, "network"), assign=True)
        if shape["elements"] != self.coordinates.size:
            raise ValueError(f"{self.coordinates.size} coordinates for {shape['elements']!r:.20} elements")
        network.requires_grad_(False).eval()
        self.network = network
