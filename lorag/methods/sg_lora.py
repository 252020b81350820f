"""SG-LoRA: a conditional VAE with a learned prior, conditioned on a mixture of the nearest experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.base.runner import Runner
from lorag.errors import ConfigError
from lorag.methods.base import ReaderSettings, collate
from lorag.methods.baselines import MixtureSettings
from lorag.methods.data_parallel import Batch
from lorag.methods.expert_mixture import ExpertMixture
from lorag.methods.latent import LatentGenerator, negative_elbo, squared_error
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.cvae import LearnedPriorVae
from lorag.spaces.principal_codes import PrincipalCodes
from lorag.text.conditioning import Condition
from lorag.text.embedding import Embedding

__all__ = ["SgLora"]

_WORDINGS = 8  # of each held-out task, that validation reads


@dataclass
class SgLoraSettings(ReaderSettings, MixtureSettings):
    """Condition, size and training, beside K and τ of the mixture, and the settings of the reader, which are for "both".

    Attributes:
        condition: "both", the description, read token by token as `icm_lora` does, beside μ* and σ*² of the nearest experts; or
            "merge", as published: these alone.
        components: Principal coordinates in which codes are seen; 0 takes all.
        latent: Number of latents.
        width: Of the hidden layers.
        beta: λ, the weight of the KL.
        decode: "sample" draws z from the learned prior, as published; "prior_mean" and "zero" are controls that decode its
            mean, and z = 0.
        steps: Of training.
        learning_rate: Peak rate.
        batch: Experts in a step.
        reading: Width of the transformer that reads the description, for "both".
        features: Number of features that it makes of a description, for "both".
    """

    condition: str = "both"
    components: int = 0
    latent: int = 128
    width: int = 512
    beta: float = 1.0
    decode: str = "sample"
    steps: int = 1500
    learning_rate: float = 1e-3
    batch: int = 64
    reading: int = 192
    features: int = 384


class SgLora(LatentGenerator[LearnedPriorVae]):
    """Semantic-guided LoRA parameters generation (arXiv 2509.10535, CVPR 2026).

    The condition is {μ*, σ*²}, mean and total variance of a mixture of the K nearest experts; z has a learned prior
    p(z|c); loss = squared error, summed over elements, + λ KL(q ‖ p). Published: K, λ and the depths. Not published, and
    chosen here: τ, widths, latents, rates; principal coordinates instead of raw factors, so that the condition stays small;
    the samples of an expert, its final code plus noise with the deviations of its late checkpoints; and early stopping by
    the squared error of the prior's mean on held-out training tasks.

    Ours is `condition="both"`: a softmax over neighbours' descriptions loses what the description itself says, so its tokens are
    read beside the merge, blurred in training, and the decoder adds a linear map of both.

    An expert of a task's own group is never part of its merge in training. Experts held out for
    validation are neighbours of none while it trains, so that their codes enter no gradient; once the best state is
    chosen, all experts are neighbours.
    """

    name = "sg_lora"
    settings_type = SgLoraSettings
    settings: SgLoraSettings
    experts: ExpertMixture

    def __init__(self, settings: SgLoraSettings | None = None) -> None:
        super().__init__(settings)
        s = self.settings
        known = {"condition": ("merge", "both"), "decode": ("sample", "prior_mean", "zero")}
        for key, values in known.items():
            if getattr(s, key) not in values:
                raise ConfigError(f"settings.{key} is unknown", got=repr(getattr(s, key)), expected=", ".join(values))

    @property
    def reads(self) -> bool:
        """Whether the description itself is part of the condition."""
        return self.settings.condition == "both"

    def build(self, *sizes: int) -> LearnedPriorVae:
        """The untrained network for lengths of merge, of embedding where descriptions are read, and of coordinates."""
        s = self.settings
        merge, *embedding, elements = sizes
        if not embedding:
            return LearnedPriorVae(merge, elements, latent=s.latent, width=s.width)
        reader = s.reader(embedding[0], 0, width=s.reading, features=s.features)
        return LearnedPriorVae(merge, elements, latent=s.latent, width=s.width, reader=reader, features=s.features)

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Trains the VAE on the training experts, each conditioned on the others."""
        data.require_experts(self.name)
        s, training, held = self.settings, data.training_experts, data.validation_experts
        self.coordinates = PrincipalCodes.fit(data.codes[training], s.components)
        known = ExpertMixture.of(data, training, self.coordinates, s.top, s.temperature)
        merges = known.leave_group_out(data, training)
        coordinates = self.coordinates.size
        embedding = (data.embedding_size,) if self.reads else ()
        self.sizes = (2 * coordinates, *embedding, coordinates)
        network, device = self.start(loop), loop.accelerator.device

        def inputs(merge: Tensor, embeddings: Sequence[Embedding]) -> tuple[Tensor, ...]:
            return merge.to(device), *collate(embeddings, device)

        def loss(module: nn.Module, step: int) -> Batch:
            places = torch.randint(len(training), (s.batch,), generator=loop.rng).tolist()
            picks = torch.randint(2**31, (s.batch,), generator=loop.rng).tolist()
            chosen = [(i, pick % len(merges[i])) for i, pick in zip(places, picks, strict=True)]
            merge = torch.stack([merges[i][text] for i, text in chosen])
            texts = [data.embeddings[training[i]][text] for i, text in chosen]
            x = known.means[places] + known.deviations[places] * torch.randn(s.batch, coordinates, generator=loop.rng)
            x, noise = x.to(device), torch.randn(s.batch, s.latent, generator=loop.rng).to(device)

            def losses(part: slice) -> Tensor:
                return negative_elbo(module(x[part], noise[part], *inputs(merge[part], texts[part])), x[part], s.beta, each=False)

            return Batch(s.batch, losses)

        unseen = known.leave_group_out(data, held)
        right = self.coordinates.to_coordinates(data.codes[held])

        def validate(_: nn.Module) -> float:
            own = [merge[:_WORDINGS] for merge in unseen]
            texts = [one for i in held for one in data.embeddings[i][:_WORDINGS]]
            wanted = right.repeat_interleave(torch.tensor([len(each) for each in own]), 0).to(device)
            with torch.no_grad():
                h = network.read(*inputs(torch.cat(own), texts))
                return squared_error(network.decode(network.prior(h).mean, h), wanted).mean().item()

        steps = LoopSettings(s.steps, s.learning_rate, validate_every=100)
        loop.run(f"{self.name} reconstruction", network, loss, validate if held else None, steps)
        network.eval()
        with torch.no_grad():
            h = network.read(*inputs(torch.stack([own[0] for own in merges]), [data.embeddings[i][0] for i in training]))
        self.diagnostics = self.diagnose(known.means.to(device), h, data.space.zero.cpu())
        self.experts = ExpertMixture.of(data, sorted([*training, *held]), self.coordinates, s.top, s.temperature)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """Codes of `count` samples of the learned prior, or of its mean or of z = 0, repeated."""
        network = self.fitted()
        with torch.inference_mode():
            device = next(network.parameters()).device
            h = network.read(self.experts(condition.similarities)[None].to(device), *collate([condition.embedding], device))
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
