"""SG-LoRA: a conditional VAE with a learned prior, conditioned on a mixture of the nearest experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.conditions.conditioning import Condition
from lorag.errors import ConfigError
from lorag.generators.base import FitData
from lorag.generators.baselines import MixtureSettings
from lorag.generators.expert_mixture import ExpertMixture
from lorag.generators.latent import LatentGenerator, negative_elbo, squared_error
from lorag.models.cvae import LearnedPriorVae
from lorag.optimisation.data_parallel import Batch
from lorag.optimisation.training_loop import LoopSettings, TrainingLoop
from lorag.weights.principal_codes import PrincipalCodes

__all__ = ["SgLora"]


@dataclass
class SgLoraSettings(MixtureSettings):
    """Size and training, after K and τ of the mixture.

    Attributes:
        components: Principal coordinates in which codes are seen; 0 takes all.
        latent: Number of latents.
        width: Of the hidden layers.
        beta: λ, the weight of the KL.
        decode: "sample" draws z from the learned prior, as published; "prior_mean" and "zero" are controls that decode its
            mean, and z = 0.
        steps: Of training.
        learning_rate: Peak rate.
        batch: Experts in a step.
    """

    components: int = 0
    latent: int = 128
    width: int = 512
    beta: float = 1.0
    decode: str = "sample"
    steps: int = 1500
    learning_rate: float = 1e-3
    batch: int = 64


class SgLora(LatentGenerator[LearnedPriorVae]):
    """Semantic-guided LoRA parameters generation (arXiv 2509.10535, CVPR 2026).

    The condition is {μ*, σ*²}, mean and total variance of a mixture of the K nearest experts; z has a learned prior
    p(z|c); loss = squared error, summed over elements, + λ KL(q ‖ p). Published: K, λ and the depths. Not published, and
    chosen here: τ, widths, latents, rates; principal coordinates instead of raw factors, so that the condition stays small;
    the samples of an expert, its final code plus noise with the deviations of its late checkpoints; and early stopping by
    the squared error of the prior's mean on held-out training tasks.

    A task's own expert, and what else is its kin, is never part of its condition in training. Experts held out for
    validation are neighbours of none while it trains, so that their codes enter no gradient; once the best state is
    chosen, all experts are neighbours.
    """

    name = "sg_lora"
    settings_type = SgLoraSettings
    settings: SgLoraSettings
    experts: ExpertMixture

    def __init__(self, settings: SgLoraSettings | None = None) -> None:
        super().__init__(settings)
        if self.settings.decode not in ("sample", "prior_mean", "zero"):
            raise ConfigError("settings.decode is unknown", got=repr(self.settings.decode), expected="sample, prior_mean or zero")

    def build(self, *sizes: int) -> LearnedPriorVae:
        """The untrained network for lengths of condition and coordinates."""
        condition, elements = sizes
        return LearnedPriorVae(condition, elements, latent=self.settings.latent, width=self.settings.width)

    def fit(self, data: FitData, loop: TrainingLoop) -> None:
        """Trains the VAE on the training experts, each conditioned on the others."""
        s, training, held = self.settings, list(data.training), list(data.validation)
        self.coordinates = PrincipalCodes.fit(data.codes[training], s.components)
        known = ExpertMixture.of(data, training, self.coordinates, s.top, s.temperature)
        conditions = known.leave_one_out(data, training)
        self.sizes = (2 * self.coordinates.size, self.coordinates.size)
        network, device = self.start(loop), loop.accelerator.device

        def loss(module: nn.Module, step: int) -> Batch:
            places = torch.randint(len(training), (s.batch,), generator=loop.rng).tolist()
            picks = torch.randint(2**31, (s.batch,), generator=loop.rng).tolist()
            h = torch.stack([conditions[i][pick % len(conditions[i])] for i, pick in zip(places, picks, strict=True)])
            x = known.means[places] + known.deviations[places] * torch.randn(h.shape[0], self.sizes[-1], generator=loop.rng)
            noise = torch.randn(s.batch, s.latent, generator=loop.rng)
            x, noise, h = x.to(device), noise.to(device), h.to(device)
            return Batch(s.batch, lambda part: negative_elbo(module(x[part], noise[part], h[part]), x[part], s.beta, each=False))

        unseen = known.leave_one_out(data, held)
        right = self.coordinates.to_coordinates(data.codes[held])

        def validate(_: nn.Module) -> float:
            h = torch.cat(unseen).to(device)
            wanted = right.repeat_interleave(torch.tensor([len(own) for own in unseen]), 0).to(device)
            with torch.no_grad():
                return squared_error(network.decode(network.prior(h).mean, h), wanted).mean().item()

        steps = LoopSettings(s.steps, s.learning_rate, validate_every=100)
        loop.run(f"{self.name} reconstruction", network, loss, validate if held else None, steps)
        network.eval()
        first = torch.stack([own[0] for own in conditions]).to(device)
        self.diagnostics = self.diagnose(known.means.to(device), first, data.zero)
        self.experts = ExpertMixture.of(data, sorted([*training, *held]), self.coordinates, s.top, s.temperature)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Codes of `count` samples of the learned prior, or of its mean or of z = 0, repeated."""
        network = self.fitted()
        with torch.inference_mode():
            h = self.experts(condition.similarities)[None].to(next(network.parameters()).device)
            if self.settings.decode == "zero":
                code = self.coordinates.to_codes(network.decode(h.new_zeros(1, self.settings.latent), h).cpu())
                return code.expand(count, -1).clone()
            return self.sample(h, rng, count, 1.0 if self.settings.decode == "sample" else 0.0).clone()

    def more_tensors(self) -> dict[str, Tensor]:
        """The experts that may be neighbours."""
        return self.experts.tensors()

    def restore_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the experts back."""
        self.experts = ExpertMixture.from_tensors(tensors, self.settings.top, self.settings.temperature)
