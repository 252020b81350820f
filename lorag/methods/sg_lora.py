"""SG-LoRA: a conditional VAE with a learned prior, conditioned on a mixture of the nearest experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.errors import ConfigError, GeneratorError
from lorag.methods.baselines import MixtureSettings
from lorag.methods.method import ReaderSettings, collate, whole
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.methods.vae import Diagnostics, VaeMethod, VaeStage, negative_elbo, squared_error
from lorag.networks.vae import LearnedPriorVae
from lorag.spaces.principal_codes import PrincipalCodes
from lorag.text.conditioning import Condition, mixture

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_set import TrainingSet
    from lorag.text.embedding import Embedding

__all__ = ["ExpertMixture", "SgLora"]

_WORDINGS = 8  # of each held-out task, that validation reads


@dataclass(frozen=True)
class ExpertMixture:
    """Experts that may be neighbours, and how they are mixed.

    Attributes:
        indices: Their places in the bank (l,), int64.
        means: Coordinates of their final codes (l, p).
        deviations: Of their checkpoints, in coordinates (l, p).
        top: K, neighbours that count.
        temperature: τ of the softmax over cosines.
    """

    indices: Tensor
    means: Tensor
    deviations: Tensor
    top: int
    temperature: float

    @classmethod
    def of(cls, data: TrainingSet, rows: Sequence[int], coordinates: PrincipalCodes, top: int, temperature: float) -> ExpertMixture:
        """Mixtures of the experts at some rows of a bank."""
        rows = list(rows)
        means = coordinates.to_coordinates(data.codes[rows])
        return cls(torch.tensor(rows), means, coordinates.project_deviations(data.deviations[rows]), top, temperature)

    def __call__(self, similarities: Tensor) -> Tensor:
        """Condition (2 p,) of a description: μ* and σ*², given its cosine to every expert of the bank (n,)."""
        prior = mixture(similarities[self.indices], self.means, self.deviations, top=self.top, temperature=self.temperature)
        return torch.cat([prior.mean, prior.variance])

    def without(self, masked: Tensor) -> ExpertMixture:
        """The same without the experts that are masked (n,), which are then no neighbours at any similarity.

        Raises:
            GeneratorError: If no other is left.
        """
        keep = ~masked[self.indices]
        if not keep.any():
            raise GeneratorError("an expert has no neighbours to learn from", expected="experts that are not of its own source")
        return ExpertMixture(self.indices[keep], self.means[keep], self.deviations[keep], self.top, self.temperature)

    def leave_group_out(self, data: TrainingSet, rows: Sequence[int]) -> list[Tensor]:
        """Conditions (d, 2 p) of each of the d descriptions of some experts, none of which sees an expert of its group.

        Without this, training would always see a similarity of about 1, and use never does.
        """
        conditions = []
        for row, masked in zip(rows, data.masked(rows), strict=True):
            others = self.without(masked)
            cosines = torch.stack([one.pooled for one in data.embeddings[row]]) @ data.conditioner.centroids.T
            conditions.append(torch.stack([others(each) for each in cosines]))
        return conditions

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {"experts.indices": self.indices, "experts.means": self.means, "experts.deviations": self.deviations}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], top: int, temperature: float) -> ExpertMixture:
        """Puts back what `tensors` gave.

        Raises:
            KeyError: If one is missing.
            ValueError: If they do not fit together.
        """
        indices, means, deviations = (tensors[f"experts.{name}"] for name in ("indices", "means", "deviations"))
        if means.dim() != 2 or means.shape != deviations.shape or indices.shape != means.shape[:1] or (indices < 0).any():
            raise ValueError(f"experts {tuple(indices.shape)}, {tuple(means.shape)}")
        return cls(indices.long(), means.float(), deviations.float(), top, temperature)


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


class SgLora(VaeMethod[LearnedPriorVae]):
    """Semantic-guided LoRA parameters generation (arXiv 2509.10535, CVPR 2026).

    The condition is {μ*, σ*²}, mean and total variance of a mixture of the K nearest experts; z has a learned prior
    p(z|c); loss = squared error, summed over elements, + λ KL(q ‖ p). Published: K, λ and the depths. Not published, and
    chosen here: τ, widths, latents, rates; principal coordinates instead of raw factors, so that the condition stays small;
    the samples of an expert, its final code plus noise with the deviations of its checkpoints; and early stopping by
    the squared error of the prior's mean on held-out training tasks.

    Ours is `condition="both"`: a softmax over neighbours' descriptions loses what the description itself says, so its tokens are
    read beside the merge, with augmentation in training, and the decoder adds a linear map of both.

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
        choices = {"condition": ("merge", "both"), "decode": ("sample", "prior_mean", "zero")}
        for key, values in choices.items():
            if getattr(s, key) not in values:
                raise ConfigError(f"settings.{key} is unknown", got=repr(getattr(s, key)), expected=", ".join(values))

    @property
    def reads(self) -> bool:
        """Whether the description itself is part of the condition."""
        return self.settings.condition == "both"

    def build(self, shape: Mapping[str, Any]) -> LearnedPriorVae:
        """The untrained network for lengths of `merge`, of `embedding`, 0 where none is read, and of `elements`."""
        s = self.settings
        merge, embedding, elements = (whole(shape, name) for name in ("merge", "embedding", "elements"))
        if not embedding:
            return LearnedPriorVae(merge, elements, latent=s.latent, width=s.width)
        reader = s.reader(embedding, 0, width=s.reading, features=s.features)
        return LearnedPriorVae(merge, elements, latent=s.latent, width=s.width, reader=reader, features=s.features)

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Trains the VAE on the training experts, each conditioned on the others."""
        data.require_experts(self.name)
        s, training, held = self.settings, data.training_experts, data.validation_experts
        self.coordinates = PrincipalCodes.fit(data.codes[training], s.components)
        neighbours = ExpertMixture.of(data, training, self.coordinates, s.top, s.temperature)
        merges, unseen = (neighbours.leave_group_out(data, rows) for rows in (training, held))
        coordinates = self.coordinates.size
        self.shape = {"merge": 2 * coordinates, "embedding": data.embedding_size if self.reads else 0, "elements": coordinates}
        stage = _Stage(data, loop, self.start(loop), self, neighbours, merges, unseen)
        steps = LoopSettings(s.steps, s.learning_rate, validate_every=100)
        loop.run(f"{self.name} reconstruction", stage.network, stage.batch, stage.validate if held else None, steps)
        self.diagnostics = stage.diagnostics()
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

    def load_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the experts back."""
        self.experts = ExpertMixture.from_tensors(tensors, self.settings.top, self.settings.temperature)


@dataclass(frozen=True)
class _Stage(VaeStage[LearnedPriorVae]):
    """The training of the VAE on experts, each conditioned on the others.

    Attributes:
        method: Whose network it is.
        neighbours: The training experts.
        merges: Conditions (d, 2 p) of the d descriptions of each training expert.
        unseen: The same of each held-out one.
    """

    method: SgLora
    neighbours: ExpertMixture
    merges: Sequence[Tensor]
    unseen: Sequence[Tensor]

    def batch(self, module: nn.Module, step: int) -> Batch:
        """Codes of some experts with the noise of their checkpoints, each with one of its descriptions."""
        s, data, experts, rng = self.method.settings, self.data, self.neighbours, self.loop.rng
        training = data.training_experts
        places = torch.randint(len(training), (s.batch,), generator=rng).tolist()
        picks = torch.randint(2**31, (s.batch,), generator=rng).tolist()
        chosen = [(i, pick % len(self.merges[i])) for i, pick in zip(places, picks, strict=True)]
        merge = torch.stack([self.merges[i][text] for i, text in chosen])
        texts = [data.embeddings[training[i]][text] for i, text in chosen]
        x = experts.means[places] + experts.deviations[places] * torch.randn(s.batch, self.method.coordinates.size, generator=rng)
        x, noise = x.to(self.device), torch.randn(s.batch, s.latent, generator=rng).to(self.device)

        def losses(share: slice) -> Tensor:
            read = self._inputs(merge[share], texts[share])
            return negative_elbo(module(x[share], noise[share], *read), x[share], s.beta, each=False)

        return Batch(s.batch, losses)

    def validate(self, _: nn.Module) -> float:
        """Squared error of the prior's mean on held-out experts."""
        held = self.data.validation_experts
        first = [merge[:_WORDINGS] for merge in self.unseen]
        texts = [one for i in held for one in self.data.embeddings[i][:_WORDINGS]]
        right = self.method.coordinates.to_coordinates(self.data.codes[held])
        wanted = right.repeat_interleave(torch.tensor([len(each) for each in first]), 0).to(self.device)
        with torch.no_grad():
            h = self.network.read(*self._inputs(torch.cat(first), texts))
            return squared_error(self.network.decode(self.network.prior(h).mean, h), wanted).mean().item()

    def diagnostics(self) -> Diagnostics:
        """Of the trained network, on the training experts."""
        self.network.eval()
        with torch.no_grad():
            texts = [self.data.embeddings[i][0] for i in self.data.training_experts]
            h = self.network.read(*self._inputs(torch.stack([of_task[0] for of_task in self.merges]), texts))
        return self.method.diagnose(self.neighbours.means.to(self.device), h, self.data.space.zero.cpu())

    def _inputs(self, merge: Tensor, embeddings: Sequence[Embedding]) -> tuple[Tensor, ...]:
        """What the network reads: merges (b, 2 p), pooled, tokens and mask."""
        return merge.to(self.device), *collate(embeddings, self.device)
