"""SG-LoRA's conditions (arXiv 2509.10535): mixtures of the experts whose descriptions are nearest, in principal coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorag.errors import GeneratorError
from lorag.methods.training_set import TrainingSet
from lorag.spaces.principal_codes import PrincipalCodes
from lorag.text.conditioning import mixture

__all__ = ["ExpertMixture"]


@dataclass(frozen=True)
class ExpertMixture:
    """Experts that may be neighbours, and how they are mixed.

    Attributes:
        indices: Their places in the bank (l,), int64.
        means: Coordinates of their final codes (l, p).
        deviations: Of their late checkpoints, in coordinates (l, p).
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
        found = mixture(similarities[self.indices], self.means, self.deviations, top=self.top, temperature=self.temperature)
        return torch.cat([found.mean, found.variance])

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
        found = []
        for row, masked in zip(rows, data.masked(rows), strict=True):
            others = self.without(masked)
            cosines = torch.stack([one.pooled for one in data.embeddings[row]]) @ data.conditioner.centroids.T
            found.append(torch.stack([others(each) for each in cosines]))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {"experts.indices": self.indices, "experts.means": self.means, "experts.deviations": self.deviations}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], top: int, temperature: float) -> ExpertMixture:
        """Puts back what `tensors` gave.

        Raises:
            GeneratorError: If they do not fit together.
            KeyError: If one is missing.
        """
        indices, means, deviations = (tensors[f"experts.{name}"] for name in ("indices", "means", "deviations"))
        if means.dim() != 2 or means.shape != deviations.shape or indices.shape != means.shape[:1] or (indices < 0).any():
            raise GeneratorError("stored experts do not fit", got=f"{tuple(indices.shape)}, {tuple(means.shape)}")
        return cls(indices.long(), means.float(), deviations.float(), top, temperature)
