"""The stages in which an F-VAE is trained: reconstruction, meta-training, and sets of tasks that share one adapter.

An expert acts on any input, since nothing in its training told it not to; so sums of experts disturb each other. Training on sets is
against that: sets of tasks that their inputs tell apart are drawn anew in each step, their latents are fused as they will be at use, and
the frozen base model's loss on all of the set's tasks flows into encoder, decoder and the directions that codes are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.functional import code_losses, mean_loss
from lorag.methods.method import draw
from lorag.methods.support_examples import told_apart
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.methods.vae import negative_elbo
from lorag.spaces.principal_codes import PrincipalCodes

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_set import TrainingSet
    from lorag.networks.vae import FusionVae

__all__ = ["FusionTraining", "SetSettings", "adapt", "codes_of", "draw_set"]

_CHECKED = 16  # tasks that sets of each size have in validation


@dataclass
class SetSettings:
    """Length of training on sets.

    Attributes:
        steps: 0 leaves it out.
        tasks: Tasks of a step, over all of its sets.
        members: Most tasks of a set; each step's sets have 1, 2, 4 … of them.
        examples: Training examples of each task.
        learning_rate: Peak rate.
        validate_every: Steps between two validations on sets of held-out training tasks.
    """

    steps: int = 1000
    tasks: int = 64
    members: int = 8
    examples: int = 2
    learning_rate: float = 1e-3
    validate_every: int = 50


def codes_of(coordinates: PrincipalCodes, x: Tensor) -> Tensor:
    """Codes (..., c) of principal coordinates (..., p), on their device."""
    return PrincipalCodes(coordinates.mean.to(x.device), coordinates.basis.to(x.device), coordinates.scale).to_codes(x)


def adapt(
    coordinates: PrincipalCodes,
    start: Tensor,
    tasks: Sequence[int],
    data: TrainingSet,
    runner: Runner,
    seed: str,
    *,
    steps: int,
    rate: float,
    examples: int,
) -> Tensor:
    """Coordinates (b, p) after gradient steps of each on its own task's loss, of first order.

    The steps' gradients are constants, and what follows is differentiated as if they were a shift.
    """
    adapted = start
    for step in range(steps):
        at = adapted.detach().requires_grad_()
        with torch.enable_grad():
            losses = code_losses(runner, data, codes_of(coordinates, at), tasks, examples, f"{seed}/{step}")
            (gradient,) = torch.autograd.grad(losses.sum(), at)
        adapted = adapted - rate * gradient
    return adapted


def draw_set(tasks: Sequence[int], apart: Tensor, size: int, rng: torch.Generator) -> list[int]:
    """Draws tasks of which `apart` (n, n) says of each two that their inputs differ; fewer than `size` if there are no more."""
    order = torch.tensor(list(tasks))[torch.randperm(len(tasks), generator=rng)]
    chosen: list[int] = []
    while len(order) and len(chosen) < size:
        chosen.append(int(order[0]))
        order = order[apart[chosen[-1], order]]
    return chosen


@dataclass(frozen=True)
class FusionTraining:
    """An F-VAE and what its stages share; each stage stops early on held-out experts.

    Attributes:
        name: Names the stages.
        network: What is trained.
        coordinates: What it sees of codes.
        vectors: Standardised task vectors of the experts (n, v).
        standardise: Makes such vectors of pooled descriptions; None if task vectors are not made of descriptions.
        data: The experts and their tasks.
        loop: Runs the stages.
    """

    name: str
    network: FusionVae
    coordinates: PrincipalCodes
    vectors: Tensor
    standardise: Callable[[Tensor], Tensor] | None
    data: TrainingSet
    loop: TrainingLoop

    @functools.cached_property
    def x(self) -> Tensor:
        """Coordinates of the experts (n, p)."""
        return self.coordinates.to_coordinates(self.data.codes).to(self.loop.accelerator.device)

    def reconstruct(self, *, steps: int, learning_rate: float, batch: int, kl: float) -> None:
        """Plain training of the VAE on the experts' codes."""
        training = torch.tensor(self.data.training_experts)

        def loss(_: nn.Module, step: int) -> Batch:
            picks = training[torch.randint(len(training), (batch,), generator=self.loop.rng)].tolist()
            target, v, noise = self._batch(picks)

            def losses(share: slice) -> Tensor:
                return negative_elbo(self.network(target[share], v[share], noise[share]), target[share], kl, each=True)

            return Batch(len(picks), losses)

        def validate(_: nn.Module) -> float:
            return F.mse_loss(self._decoded(), self.x[self.data.validation_experts]).item()

        length = LoopSettings(steps, learning_rate, validate_every=100)
        self.loop.run(f"{self.name} reconstruction", self.network, loss, validate if self.data.validation_experts else None, length)

    def meta_train(
        self, runner: Runner, *, steps: int, learning_rate: float, tasks: int, kl: float, inner_steps: int, inner_rate: float, examples: int
    ) -> None:
        """Reconstruction of experts from what was decoded and then took a few steps on its own task's loss."""
        training = torch.tensor(self.data.training_experts)

        def loss(_: nn.Module, step: int) -> Batch:
            picks = training[torch.randperm(len(training), generator=self.loop.rng)[:tasks]].tolist()
            target, v, noise = self._batch(picks)
            more = torch.randn(noise.shape, generator=self.loop.rng).to(noise.device)

            def losses(share: slice) -> Tensor:
                rebuilt, seed = self.network(target[share], v[share], noise[share]).x, f"{self.name}/{step}"
                inner = {"steps": inner_steps, "rate": inner_rate, "examples": examples}
                adapted = adapt(self.coordinates, rebuilt, picks[share], self.data, runner, seed, **inner)  # type: ignore[arg-type]
                return negative_elbo(self.network(adapted, v[share], more[share]), target[share], kl, each=True)

            return Batch(len(picks), losses)

        def validate(_: nn.Module) -> float:
            held = self.data.validation_experts
            return mean_loss(runner, self.data, codes_of(self.coordinates, self._decoded()), held, 8, "validation")

        length = LoopSettings(steps, learning_rate, validate_every=50)
        self.loop.run(f"{self.name} meta", self.network, loss, validate if self.data.validation_experts else None, length)

    def train_on_sets(self, runner: Runner, settings: SetSettings) -> None:
        """Gives the F-VAE directions of its own, from the bank's principal ones, and trains it on sets of tasks."""
        rng, device = self.loop.rng, self.loop.accelerator.device
        training, held_out = self.data.training_experts, self.data.validation_experts
        apart = told_apart(runner, self.data.tasks[: len(self.data.codes)])
        self.network.directions = _directions(self.coordinates).to(device)
        sizes = [2**power for power in range(max(1, settings.members).bit_length())]

        def loss(_: nn.Module, step: int) -> Batch:
            size = sizes[int(torch.randint(len(sizes), (), generator=rng))]
            sets = [draw_set(training, apart, size, rng) for _ in range(max(1, settings.tasks // size))]
            v = [self._vectors(one).to(device) for one in sets]
            noise = [torch.randn(len(one), self.network.latent, generator=rng).to(device) for one in sets]

            def losses(share: slice) -> Tensor:
                return self._set_losses(runner, sets[share], v[share], noise[share], settings.examples, f"{self.name} sets/{step}")

            return Batch(len(sets), losses)

        fixed = torch.Generator().manual_seed(0)
        held = [[draw_set(held_out, apart, size, fixed) for _ in range(max(1, _CHECKED // size))] for size in sizes]

        def validate(_: nn.Module) -> float:
            per_size = []
            with torch.no_grad():
                for sets in held:
                    v = [self.vectors[one].to(device) for one in sets]
                    still = [torch.zeros(len(one), self.network.latent, device=device) for one in sets]
                    per_size.append(self._set_losses(runner, sets, v, still, 8, "validation").mean())
            return torch.stack(per_size).mean().item()

        length = LoopSettings(settings.steps, settings.learning_rate, validate_every=settings.validate_every)
        self.loop.run(f"{self.name} sets", self.network, loss, validate if held_out else None, length)

    def _vectors(self, tasks: Sequence[int]) -> Tensor:
        """Task vectors of some experts; of one description each, drawn anew, if they are made of descriptions."""
        if self.standardise is not None:
            return self.standardise(torch.stack([one.pooled for one in draw(self.data, tasks, self.loop)]))
        return self.vectors[list(tasks)]

    def _batch(self, tasks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates, task vectors and noise of some experts."""
        device, v = self.loop.accelerator.device, self._vectors(tasks)
        return self.x[tasks], v.to(device), torch.randn(len(tasks), self.network.latent, generator=self.loop.rng).to(device)

    def _decoded(self) -> Tensor:
        """Coordinates of held-out experts, through their posterior's mean."""
        held = self.data.validation_experts
        v = self.vectors[held].to(self.x.device)
        with torch.no_grad():
            return self.network.decode(self.network.encode(self.x[held], v).mean, v)

    def _set_losses(
        self, runner: Runner, sets: Sequence[Sequence[int]], v: Sequence[Tensor], noise: Sequence[Tensor], count: int, seed: str
    ) -> Tensor:
        """Mean loss of each set's tasks (s,), of the one adapter that it gets, given its task vectors and noise (n, v) and (n, z)."""
        network, lengths, tasks = self.network, [len(one) for one in sets], [task for one in sets for task in one]
        latents = network.encode(self.x[tasks], torch.cat(list(v))).sample(torch.cat(list(noise))).split(lengths)
        fused = [network.fuse(z, vector, z.new_full((len(z),), 1 / len(z))) for z, vector in zip(latents, v, strict=True)]
        decoded = network.decode(torch.stack([z for z, _ in fused]), torch.stack([vector for _, vector in fused]))
        if network.directions is None:
            raise AssertionError("sets are trained with directions")
        codes = network.directions(decoded).repeat_interleave(torch.tensor(lengths, device=decoded.device), 0)
        each = code_losses(runner, self.data, codes, tasks, count, seed)
        return torch.stack([of_set.mean() for of_set in each.split(lengths)])


def _directions(coordinates: PrincipalCodes) -> nn.Linear:
    """The bank's principal directions as a layer from coordinates to codes."""
    layer = nn.Linear(*coordinates.basis.shape)
    with torch.no_grad():
        layer.weight.copy_(coordinates.basis.T * coordinates.scale)
        layer.bias.copy_(coordinates.mean)
    return layer
