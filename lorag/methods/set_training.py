"""Training on sets: an adapter that is decoded from several experts' fused latents learns to serve all of their tasks.

An expert acts on any input, since nothing in its training told it not to; so sums of experts disturb each other. Here sets of
tasks that their inputs tell apart are drawn anew in each step, their latents are fused as they will be at use, and the frozen
base model's loss on all of the set's tasks flows into encoder, decoder and the directions that codes are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorag.base.runner import Runner
from lorag.methods.data_parallel import Batch
from lorag.methods.functional import code_losses, require_runner
from lorag.methods.support_examples import told_apart
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.fvae import FusionVae
from lorag.spaces.principal_codes import PrincipalCodes

__all__ = ["SetSettings", "draw_set", "train_on_sets"]

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


def draw_set(rows: Sequence[int], apart: Tensor, size: int, rng: torch.Generator) -> list[int]:
    """Draws rows of which `apart` (n, n) says of each two that their inputs differ; fewer than `size` if there are no more."""
    order = torch.tensor(list(rows))[torch.randperm(len(rows), generator=rng)]
    chosen: list[int] = []
    while len(order) and len(chosen) < size:
        chosen.append(int(order[0]))
        order = order[apart[chosen[-1], order]]
    return chosen


def train_on_sets(
    name: str,
    network: FusionVae,
    coordinates: PrincipalCodes,
    vectors: Callable[[Sequence[int], bool], Tensor],
    data: TrainingSet,
    loop: TrainingLoop,
    settings: SetSettings,
    runner: Runner | None,
) -> None:
    """Trains an F-VAE on sets of tasks, and leaves it in the state that was best on sets of held-out ones.

    Args:
        name: Names the stage.
        network: The F-VAE, which gets directions of its own, from the bank's principal ones.
        coordinates: What it encodes.
        vectors: Task vectors (n, v) of experts at some rows of the bank; drawn anew where that is asked for and there is a choice.
        data: The bank, with the tasks' examples.
        loop: Runs the stage.
        settings: Its length.
        runner: The base model.

    Raises:
        GeneratorError: If there are no examples of the experts' tasks.
    """
    if not settings.steps:
        return
    runner, device = require_runner(name, data, runner), loop.accelerator.device
    training, held_out = data.training_experts, data.validation_experts
    apart = told_apart(runner, data.tasks[: len(data.codes)])
    x = coordinates.to_coordinates(data.codes).to(device)
    network.directions = directions = _directions(coordinates).to(device)
    sizes = [2**power for power in range(max(1, settings.members).bit_length())]

    def losses(sets: Sequence[Sequence[int]], v: Sequence[Tensor], noise: Sequence[Tensor], count: int, seed: str) -> Tensor:
        """Mean loss of each set's tasks (s,), of the one adapter that it gets, given its task vectors and noise (n, v) and (n, z)."""
        lengths, rows = [len(one) for one in sets], [row for one in sets for row in one]
        latents = network.encode(x[rows], torch.cat(list(v))).sample(torch.cat(list(noise))).split(lengths)
        fused = [network.fuse(z, own, z.new_full((len(z),), 1 / len(z))) for z, own in zip(latents, v, strict=True)]
        codes = directions(network.decode(torch.stack([z for z, _ in fused]), torch.stack([own for _, own in fused])))
        each = code_losses(runner, data, codes.repeat_interleave(torch.tensor(lengths, device=device), 0), rows, count, seed)
        return torch.stack([own.mean() for own in each.split(lengths)])

    def loss(_: nn.Module, step: int) -> Batch:
        size = sizes[int(torch.randint(len(sizes), (), generator=loop.rng))]
        sets = [draw_set(training, apart, size, loop.rng) for _ in range(max(1, settings.tasks // size))]
        v = [vectors(one, True).to(device) for one in sets]
        noise = [torch.randn(len(one), network.latent, generator=loop.rng).to(device) for one in sets]
        return Batch(len(sets), lambda part: losses(sets[part], v[part], noise[part], settings.examples, f"{name} sets/{step}"))

    rng = torch.Generator().manual_seed(0)
    held = [[draw_set(held_out, apart, size, rng) for _ in range(max(1, _CHECKED // size))] for size in sizes]

    def validate(_: nn.Module) -> float:
        found = []
        with torch.no_grad():
            for sets in held:
                v = [vectors(one, False).to(device) for one in sets]
                still = [torch.zeros(len(one), network.latent, device=device) for one in sets]
                found.append(losses(sets, v, still, 8, "validation").mean())
        return torch.stack(found).mean().item()

    length = LoopSettings(settings.steps, settings.learning_rate, validate_every=settings.validate_every)
    loop.run(f"{name} sets", network, loss, validate if held_out else None, length)


def _directions(coordinates: PrincipalCodes) -> nn.Linear:
    """The bank's principal directions as a layer from coordinates to codes."""
    layer = nn.Linear(*coordinates.basis.shape)
    with torch.no_grad():
        layer.weight.copy_(coordinates.basis.T * coordinates.scale)
        layer.bias.copy_(coordinates.mean)
    return layer
