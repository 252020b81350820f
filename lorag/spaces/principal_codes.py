"""Coordinates in which a VAE sees codes: few, near unit size, and found from the training experts alone.

Both classes are bases, not learned parameters: they hold what the bank spans, as a weight space does, and every method on the
same bank would share them. Sizes of generators are therefore stated without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorag.errors import GeneratorError

__all__ = ["PrincipalCodes", "StandardCodes"]

_FLOOR = 1e-8  # share of the largest variance below which a direction is rounding


@dataclass(frozen=True)
class PrincipalCodes:
    """Codes (..., c) as coordinates (..., p) along the principal directions of the training experts' codes.

    One scale serves all directions, so that squared distance in coordinates is squared distance of codes up to that factor,
    for codes in the span of the training experts.

    Attributes:
        mean: Mean code of the training experts (c,). Validation experts are part of a weight space's mean, so it need not be 0.
        basis: Orthonormal rows (p, c).
        scale: Length of a unit coordinate; the training experts' coordinates have a mean square of 1.
    """

    mean: Tensor
    basis: Tensor
    scale: float

    @classmethod
    def fit(cls, codes: Tensor, size: int = 0) -> PrincipalCodes:
        """Finds the directions, in fp64, without a decomposition larger than n x n.

        Args:
            codes: Codes of the training experts (n, c).
            size: Most directions kept; 0 keeps all, at most n - 1.

        Raises:
            GeneratorError: If the codes do not differ.
        """
        mean = codes.double().mean(0)
        centred = codes.double() - mean
        values, left = torch.linalg.eigh(centred @ centred.T)
        values, left = values.flip(0), left.flip(1)
        if len(codes) < 2 or values[0] <= 1e-12 * codes.double().square().sum():
            raise GeneratorError("principal directions need experts that differ", got=f"{len(codes)} training experts")
        count = int((values > _FLOOR * values[0]).sum())
        count = min(count, size) if size else count
        basis = (left[:, :count].T @ centred) / values[:count, None].sqrt()
        probe = torch.randn(basis.shape[1], generator=torch.Generator().manual_seed(1), dtype=basis.dtype)
        signs = torch.where(basis @ probe < 0, -1.0, 1.0)
        scale = (values[:count].sum() / (len(codes) * count)).sqrt()
        return cls(mean.float(), (basis * signs[:, None]).float().contiguous(), scale.float().item())

    @property
    def size(self) -> int:
        """Number p of coordinates."""
        return len(self.basis)

    def to_coordinates(self, codes: Tensor) -> Tensor:
        """Coordinates (..., p) of codes (..., c)."""
        return (codes - self.mean) @ self.basis.T / self.scale

    def to_codes(self, coordinates: Tensor) -> Tensor:
        """Codes (..., c) of coordinates (..., p)."""
        return coordinates * self.scale @ self.basis + self.mean

    def project_deviations(self, deviations: Tensor) -> Tensor:
        """Standard deviations (..., p) of coordinates, given those of codes (..., c) whose elements vary independently."""
        return (deviations.square() @ self.basis.square().T).sqrt() / self.scale

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {"mean": self.mean, "basis": self.basis, "scale": torch.tensor(self.scale)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PrincipalCodes:
        """Puts back what `tensors` gave.

        Raises:
            GeneratorError: If they do not fit together.
            KeyError: If one is missing.
        """
        mean, basis, scale = tensors["mean"].float(), tensors["basis"].float(), tensors["scale"].float()
        if basis.dim() != 2 or mean.shape != basis.shape[1:] or scale.dim() or not scale > 0:
            raise GeneratorError("stored principal directions do not fit", got=f"{tuple(basis.shape)}, {tuple(mean.shape)}, {scale}")
        return cls(mean, basis, scale.item())


@dataclass(frozen=True)
class StandardCodes:
    """Codes (..., c) minus their mean, divided by one standard deviation a module: ICM-LoRA's z-scores (arXiv 2501.17635).

    The paper's released code takes mean and deviation from a checkpoint of the very task that is generated; here they
    come from the training experts.

    Attributes:
        mean: Mean code of the training experts (c,).
        deviations: Of each module's part (m,); 1 where the training experts do not differ.
        modules: Length of each part (m,), int64.
    """

    mean: Tensor
    deviations: Tensor
    modules: Tensor

    @classmethod
    def fit(cls, codes: Tensor, modules: Sequence[int]) -> StandardCodes:
        """Finds mean and deviations of the training experts' codes (n, c), whose parts have these lengths."""
        mean = codes.mean(0)
        parts = (codes - mean).square().mean(0).split(list(modules))
        whole = codes.square().mean(0).split(list(modules))
        spread = torch.stack([part.mean() for part in parts])
        varied = spread > 1e-10 * torch.stack([part.mean() for part in whole])
        return cls(mean, torch.where(varied, spread.sqrt(), torch.ones_like(spread)), torch.tensor(list(modules)))

    @property
    def size(self) -> int:
        """Number c of coordinates."""
        return len(self.mean)

    @property
    def _each(self) -> Tensor:
        return self.deviations.repeat_interleave(self.modules)

    def to_coordinates(self, codes: Tensor) -> Tensor:
        """Standardised codes (..., c)."""
        return (codes - self.mean) / self._each

    def to_codes(self, coordinates: Tensor) -> Tensor:
        """Codes (..., c) of standardised ones."""
        return coordinates * self._each + self.mean

    def tensors(self) -> dict[str, Tensor]:
        """All that `from_tensors` needs."""
        return {"mean": self.mean, "deviations": self.deviations, "modules": self.modules}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StandardCodes:
        """Puts back what `tensors` gave.

        Raises:
            GeneratorError: If they do not fit together.
            KeyError: If one is missing.
        """
        mean, deviations, modules = tensors["mean"].float(), tensors["deviations"].float(), tensors["modules"].long()
        if deviations.shape != modules.shape or (modules < 0).any() or modules.sum() != len(mean) or not (deviations > 0).all():
            raise GeneratorError("a stored normaliser does not fit", got=f"{tuple(mean.shape)}, {tuple(deviations.shape)}")
        return cls(mean, deviations, modules)
