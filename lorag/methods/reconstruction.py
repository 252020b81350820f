"""Reconstruction: fit a network's codes to the experts' codes, the exact ‖ΔW‖² loss up to one weight a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorag.methods.base import NetworkGenerator, draw
from lorag.methods.data_parallel import Batch
from lorag.methods.training_loop import LoopSettings, TrainingLoop
from lorag.methods.training_set import TrainingSet

__all__ = ["reconstruct", "start_network"]


def start_network(generator: NetworkGenerator, data: TrainingSet, loop: TrainingLoop) -> nn.Module:
    """Builds the network of a generator from the loop's seed, if it has none yet."""
    if generator.network is None:
        generator.sizes = (data.embedding_size, data.space.size)
        with loop.seeded():
            generator.network = generator.build(*generator.sizes)
        generator.network.to(loop.accelerator.device)
    return generator.network


def reconstruct(generator: NetworkGenerator, data: TrainingSet, loop: TrainingLoop, steps: int, learning_rate: float, batch: int) -> None:
    """Trains a generator's network on random (expert, description) pairs; without experts nothing happens.

    In a shared subspace, codes are cores divided by one number a module, so their squared distance is ‖ΔW − ΔW'‖²
    summed over modules with one weight each. Validation is the same distance on held-out training tasks.
    """
    network = start_network(generator, data, loop)
    training, held = torch.tensor(data.training_experts), data.validation_experts
    if not len(training):
        return
    device = loop.accelerator.device

    def loss(_: nn.Module, step: int) -> Batch:
        rows = training[torch.randint(len(training), (batch,), generator=loop.rng)].tolist()
        drawn = draw(data, rows, loop)
        return Batch(batch, lambda part: _distance(generator.predict(drawn[part]), data.codes[rows[part]].to(device)))

    def validate(_: nn.Module) -> float:
        with torch.no_grad():
            distances = [
                _distance(generator.predict(data.embeddings[i][:8]), data.codes[i].to(device).expand(len(data.embeddings[i][:8]), -1))
                for i in held
            ]
        return torch.stack(distances).mean().item()

    settings = LoopSettings(steps, learning_rate, validate_every=100)
    loop.run(f"{generator.name} reconstruction", network, loss, validate if held else None, settings)


def _distance(guessed: Tensor, right: Tensor) -> Tensor:
    if guessed.shape != right.shape:  # a silent broadcast here once pulled a published method to the batch mean
        raise AssertionError(f"codes {tuple(guessed.shape)} against {tuple(right.shape)}")
    return F.mse_loss(guessed, right)
