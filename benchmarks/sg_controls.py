"""Controls for SG-LoRA: its condition holds the merged weights already, so a line through them, or their norm, may be enough.

`python -m benchmarks.sg_controls [SPLIT]` fits both on the sandbox and prints their scores beside those of the merge.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.runner import Runner
from lorag.evaluation.ladder import evaluate
from lorag.evaluation.tables import format_table
from lorag.files.artifacts import embedded
from lorag.methods.baselines import MixtureSettings, TopK
from lorag.methods.method import Method, State, nested, part
from lorag.methods.sg_lora import ExpertMixture
from lorag.methods.training_loop import TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.spaces.principal_codes import PrincipalCodes
from lorag.tasks.finding import find_tasks
from lorag.text.conditioning import Condition
from lorag.text.embedding import CachedEmbedder, SentenceEmbedder
from lorag.training.preparation import prepare
from lorag.training.split import RunTasks
from lorag.training.train import TrainConfig, fit_generator

# Shares of the inputs' mean square; the middle one is taken where there is nothing to choose by.
_PENALTIES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


class SgRidge(Method):
    """Linear map from SG-LoRA's μ* to the code, both in principal coordinates.

    Rows are single descriptions, each without its own expert; the penalty is chosen on held-out training tasks, whose
    experts are neighbours of none meanwhile, as for `sg_lora`.
    """

    name = "sg_ridge"
    settings_type = MixtureSettings
    settings: MixtureSettings
    coordinates: PrincipalCodes
    experts: ExpertMixture
    weight: Tensor
    bias: Tensor

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Solves the regression, in fp64."""
        data.require_experts(self.name)
        s, training, held = self.settings, data.training_experts, data.validation_experts
        self.coordinates = PrincipalCodes.fit(data.codes[training])
        known = ExpertMixture.of(data, training, self.coordinates, s.top, s.temperature)
        x, y = self._rows(known, data, training)
        centre, mean = x.mean(0), y.mean(0)
        gram, moment = (x - centre).T @ (x - centre), (x - centre).T @ (y - mean)
        unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        held_x, held_y = self._rows(known, data, held) if held else (x[:0], y[:0])
        found: dict[float, tuple[float, Tensor]] = {}
        for penalty in _PENALTIES:
            weight = torch.linalg.solve(gram + penalty * unit, moment)
            error = ((held_x - centre) @ weight + mean - held_y).square().sum().item()
            found[penalty] = error, weight
        chosen = min(found, key=lambda penalty: found[penalty][0]) if held else _PENALTIES[len(_PENALTIES) // 2]
        weight = found[chosen][1]
        self.weight, self.bias = weight.float(), (mean - centre @ weight).float()
        self.experts = ExpertMixture.of(data, sorted([*training, *held]), self.coordinates, s.top, s.temperature)

    def _rows(self, known: ExpertMixture, data: TrainingSet, rows: list[int]) -> tuple[Tensor, Tensor]:
        """μ* of every description of some experts, and the coordinates to which it should lead, in fp64."""
        conditions = known.leave_group_out(data, rows)
        counts = torch.tensor([len(own) for own in conditions])
        targets = self.coordinates.to_coordinates(data.codes[rows]).repeat_interleave(counts, 0)
        return torch.cat(conditions)[:, : self.coordinates.size].double(), targets.double()

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The predicted code, repeated."""
        merged = self.experts(condition.similarities)[: self.coordinates.size]
        return self.coordinates.to_codes(merged @ self.weight + self.bias).expand(count, -1).clone()

    def size(self) -> int:
        """Number of values of the linear map; coordinates and experts are a base."""
        return self.weight.numel() + self.bias.numel()

    def state(self) -> State:
        """The linear map, the coordinates and the experts."""
        own = {**self.experts.tensors(), "weight": self.weight, "bias": self.bias}
        return State({**nested(coordinates=self.coordinates.tensors()), **own}, {})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts them back."""
        self.coordinates = PrincipalCodes.from_tensors(part(tensors, "coordinates"))
        self.experts = ExpertMixture.from_tensors(tensors, self.settings.top, self.settings.temperature)
        self.weight, self.bias = tensors["weight"].float(), tensors["bias"].float()


class SgRescaled(TopK):
    """The merge of the nearest experts, made as long as experts are: a mean of experts is shorter than each of them.

    Length is the distance from the code of the adapter that changes nothing: ‖ΔW‖, with one weight a module, in a shared
    subspace, and the norm of the factors among flat ones.
    """

    name = "sg_rescaled"
    zero: Tensor

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Keeps the experts, and where lengths count from."""
        super().fit(data, loop)
        self.zero = data.space.zero.cpu()

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """The rescaled merge, repeated."""
        merged = super().generate(condition, rng, 1) - self.zero
        norm = merged.norm()
        wanted = (self.codes - self.zero).norm(dim=1).mean()
        return (self.zero + (merged * (wanted / norm) if norm > 0 else merged)).expand(count, -1).clone()

    def state(self) -> State:
        """The experts, and where lengths count from."""
        return State({**super().state().tensors, "zero": self.zero}, {})

    def load(self, tensors: Mapping[str, Tensor], shape: Mapping[str, Any]) -> None:
        """Puts them back."""
        super().load(tensors, shape)
        self.zero = tensors["zero"].float()


def main(split: str) -> None:
    """Fits both on the sandbox's bank and scores them beside the merge itself."""
    bank, embedder = find_bank("sandbox"), CachedEmbedder(SentenceEmbedder.from_pretrained(TrainConfig.embedder))
    prepared = prepare(bank, embedder, RunTasks(find_tasks("sandbox", "train")), runner=Runner.open(bank.base))
    generators = {}
    for method in (TopK, SgRescaled, SgRidge):
        loop = TrainingLoop(None, torch.Generator().manual_seed(0), quiet=True)
        generators[method.name] = [fit_generator(prepared, method(), loop, rank=TrainConfig.rank, strength=None, origin={})]
    report = evaluate(find_tasks("sandbox", split), generators, oracles=AdapterBank.from_pretrained(embedded("data/sandbox/oracles")))
    print(format_table(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", nargs="?", default="test", help="of the sandbox's tasks")
    main(parser.parse_args().split)
