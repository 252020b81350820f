"""Factors: the ΔW = B·A of one adapter, module by module, and all algebra on it; nothing here ever forms an o x i matrix but `delta`.

Values are judged where they come in or go out (`check_values` on reading, writing and applying), not at every construction.

An adapter type that has more than A and B would keep the rest here, in a mapping of its own beside `tensors`, because `padded`,
`stack` and the files must carry it. DoRA's magnitude m (o,), for one, rescales the rows of W + ΔW: it is not part of ΔW, so the
algebra of ΔW (`dot`, `svd`, `concatenated`, weight spaces) would have to refuse factors that have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.errors import AdapterError, AlphaRangeError, DtypeOverflowError, NonFiniteError, NormRangeError, RankRangeError

if TYPE_CHECKING:
    from lorag.base.layout import LoraLayout

__all__ = ["MAX_RANK", "Factors", "Pair", "Svd", "balanced", "check_alpha", "check_values", "pad_pair", "thin_svd"]

MAX_RANK = 4096
_FLOAT32_MAX = torch.finfo(torch.float32).max
_MAX_VALUE = 1e9  # of any value: with it products, and their squares, stay far from the largest fp32 and fp64
_MAX_ALPHA = 1e6

Pair = tuple[Tensor, Tensor]  # A (r, i), B (o, r)
Svd = tuple[Tensor, Tensor, Tensor]  # left (o, q), singular values (q,), right (i, q)


def check_alpha(alpha: object, where: str) -> float:
    """Returns a lora_alpha that is a finite number other than 0, of sane size.

    Raises:
        NonFiniteError: If it is NaN or infinite.
        AlphaRangeError: If it is not such a number.
    """
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise NonFiniteError(f"{where} is NaN or infinite", got=alpha, expected="a number")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) <= _MAX_ALPHA:
        raise AlphaRangeError(f"{where} cannot be used", got=repr(alpha)[:40], expected=f"a number other than 0, at most {_MAX_ALPHA:g}")
    return float(alpha)


def check_values(values: Tensor, what: str) -> None:
    """Looks at every value of a factor, or of a piece of it.

    Raises:
        NonFiniteError: If one is NaN or infinite.
        DtypeOverflowError: If fp32 does not hold one.
        NormRangeError: If one is absurdly large.
    """
    largest = values.abs().amax()  # NaN if one value is
    if not torch.isfinite(largest):
        remedy = "Train or export the adapter again; it would poison the base model."
        raise NonFiniteError(f"{what} holds NaN or infinite values", remedy=remedy)
    if largest > _FLOAT32_MAX:
        raise DtypeOverflowError(f"{what} overflows float32", got=f"{largest.item():.3g}", expected=f"at most {_FLOAT32_MAX:.3g}")
    if largest > _MAX_VALUE:
        raise NormRangeError(f"{what} holds absurdly large values", got=f"{largest.item():.3g}", expected=f"at most {_MAX_VALUE:g}")


def thin_svd(a: Tensor, b: Tensor) -> Svd:
    """SVD of B·A: left (o, q), singular values (q,), right (i, q), where q is the least of o, i and r.

    QR first, so that the only dense decomposition is of a matrix of at most r x r.

    Args:
        a: A (r, i).
        b: B (o, r).
    """
    q_out, r_out = torch.linalg.qr(b)
    q_in, r_in = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return q_out @ left, values, q_in @ right.T


def balanced(svd: Svd, rank: int) -> Pair:
    """A (r, i) and B (o, r) in fp32 of the best rank-r approximation, singular values shared evenly, padded with zeros to the rank."""
    left, values, right = (part[..., :rank].double() for part in svd)
    root = values.sqrt()
    a, b = pad_pair(((right * root).T, left * root), rank)
    return a.float().contiguous(), b.float().contiguous()


def pad_pair(pair: Pair, rank: int) -> Pair:
    """A (..., r, i) and B (..., o, r) with zero rows and columns up to a rank."""
    a, b = pair
    more = rank - a.shape[-2]
    return torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))


@dataclass(frozen=True, eq=False)
class Factors(Mapping[str, Pair]):
    """Module -> A (r, i) and B (o, r) in fp32 with ΔW = B·A: the scaling is folded into B.

    Attributes:
        tensors: A (r, i) and B (o, r) of each module as files hold them, in any floating point; one rank for all.
        scaling: The factor alpha / r that goes with them.
    """

    tensors: Mapping[str, Pair]
    scaling: float = 1.0

    @classmethod
    def with_alpha(cls, tensors: Mapping[str, Pair], alpha: float) -> Factors:
        """Tensors for which a config states lora_alpha: ΔW = alpha / r · B·A."""
        factors = cls(tensors)
        return cls(tensors, check_alpha(alpha, "lora_alpha") / factors.check_rank())

    @classmethod
    def zeros(cls, layout: LoraLayout, rank: int = 1) -> Factors:
        """Factors that change nothing."""
        return cls({m.name: (torch.zeros(rank, m.in_features), torch.zeros(m.out_features, rank)) for m in layout.modules})

    def __getitem__(self, module: str) -> Pair:
        return self.pair(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def rank(self) -> int:
        """Rank r, the same for every module."""
        return next(iter(self.tensors.values()))[0].shape[0]

    @property
    def alpha(self) -> float:
        """The lora_alpha of the tensors as files state it."""
        return float(f"{self.scaling * self.rank:.12g}")  # a number that was divided by r comes back as it was

    def pair(self, module: str, dtype: torch.dtype = torch.float32) -> Pair:
        """A (r, i) and B (o, r) of one module in a precision, with ΔW = B·A."""
        a, b = self.tensors[module]
        return a.to(dtype), b.to(dtype) if self.scaling == 1 else b.to(dtype) * self.scaling

    def delta(self, module: str) -> Tensor:
        """ΔW (o, i) of one module, in fp32."""
        a, b = self[module]
        return b @ a

    # --- checks --------------------------------------------------------------------------------------------------

    def check_rank(self) -> int:
        """Returns the one rank of all modules.

        Raises:
            RankRangeError: If there is none, or several.
        """
        ranks = {a.shape[0] for a, _ in self.tensors.values()}
        if len(ranks) != 1 or not 1 <= min(ranks) <= MAX_RANK:
            raise RankRangeError("an adapter must have one rank", got=sorted(ranks), expected=f"one rank from 1 to {MAX_RANK}")
        return ranks.pop()

    def check_values(self) -> Factors:
        """Looks at every value, and returns the same factors.

        Raises:
            NonFiniteError, DtypeOverflowError, NormRangeError: As `check_values` does.
        """
        for name, pair in self.tensors.items():
            for factor, tensor in zip("AB", pair, strict=True):
                check_values(tensor, f"factor {factor} of {name}")
        return self

    # --- sizes ---------------------------------------------------------------------------------------------------

    def norms(self) -> dict[str, float]:
        """‖ΔW‖_F of each module, from the Gram matrices: ‖B·A‖² = tr(BᵀB AAᵀ)."""
        return {name: math.sqrt(max(0.0, self._product(name, self))) for name in self}

    def norm(self) -> float:
        """‖ΔW‖_F over all modules."""
        return math.hypot(*self.norms().values())

    def dot(self, other: Factors) -> float:
        """⟨ΔW, ΔW'⟩ over all modules, for two adapters of any ranks."""
        return sum(self._product(name, other) for name in self)

    def cosine(self, other: Factors) -> float:
        """Cosine of two ΔW, all modules together; 0 where one changes nothing."""
        size = math.sqrt(self.dot(self) * other.dot(other))
        return self.dot(other) / size if size else 0.0

    def energy_in(self, other: Factors) -> float:
        """Share of ‖ΔW‖² that is kept where ΔW' stands for it, 1 - ‖ΔW - ΔW'‖² / ‖ΔW‖² and at least 0; 1 of what changes nothing."""
        whole = self.dot(self)
        lost = whole + other.dot(other) - 2 * self.dot(other)
        return max(0.0, 1 - lost / whole) if whole else 1.0

    def _product(self, module: str, other: Factors) -> float:
        (a, b), (c, d) = self.pair(module, torch.float64), other.pair(module, torch.float64)
        return ((b.T @ d) * (a @ c.T)).sum().item()

    def svd(self, module: str) -> Svd:
        """Thin SVD of one ΔW, in fp64: left (o, q), singular values (q,), right (i, q); q is the least of o, i and r."""
        return thin_svd(*self.pair(module, torch.float64))

    # --- other factors -------------------------------------------------------------------------------------------

    def scaled(self, factor: float) -> Factors:
        """ΔW times a factor, which goes into B, in fp32."""
        if factor == 1:
            return self
        return Factors({name: (a, b.float() * factor) for name, (a, b) in self.tensors.items()}, self.scaling)

    def padded(self, rank: int) -> Factors:
        """The same ΔW in a rank that is no smaller: zero rows of A and zero columns of B.

        Raises:
            AdapterError: If the rank is smaller.
        """
        if rank < self.rank:
            raise AdapterError("factors cannot be padded to a smaller rank", got=rank, expected=f"at least {self.rank}")
        return Factors({name: pad_pair(pair, rank) for name, pair in self.tensors.items()}, self.scaling)

    def truncated(self, rank: int) -> tuple[Factors, float]:
        """The nearest ΔW of a rank, in fp32 with singular values shared evenly, and the share of ‖ΔW‖² that it keeps."""
        kept = whole = 0.0
        tensors = {}
        for name in self:
            left, values, right = self.svd(name)
            kept, whole = kept + values[:rank].square().sum().item(), whole + values.square().sum().item()
            tensors[name] = balanced((left, values, right), rank)
        return Factors(tensors), kept / whole if whole else 1.0

    def rank_for(self, share: float) -> int:
        """The smallest rank whose nearest ΔW keeps a share of ‖ΔW‖², from above 0 to 1; one rank for all modules."""
        values = torch.stack([torch.nn.functional.pad(v, (0, self.rank - len(v))) for v in (self.svd(name)[1] for name in self)])
        kept = values.square().sum(0).cumsum(0)
        enough = kept >= share * kept[-1] * (1 - 1e-12)
        return int(enough.int().argmax().item()) + 1

    @staticmethod
    def concatenated(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
        """Σ w ΔW of several adapters, exactly: their factors side by side. Its rank is the sum of theirs, its precision fp64.

        Args:
            parts: Factors of the same modules, of any ranks.
            weights: One for each; 1 without.
        """
        shares = [1.0] * len(parts) if weights is None else weights
        tensors = {}
        for name in parts[0]:
            pairs = [part.pair(name, torch.float64) for part in parts]
            tensors[name] = (torch.cat([a for a, _ in pairs]), torch.cat([b * w for (_, b), w in zip(pairs, shares, strict=True)], 1))
        return Factors(tensors)

    @staticmethod
    def stack(parts: Sequence[Factors], device: torch.device | str = "cpu") -> dict[str, Pair]:
        """Stacks adapters of the same modules, of any ranks: A (n, r, i) and B (n, o, r) in fp32 with ΔW = B·A, padded with zeros."""
        rank = max(part.rank for part in parts)
        stacked = {}
        for name in parts[0]:
            pairs = [pad_pair(part[name], rank) for part in parts]
            stacked[name] = (torch.stack([a for a, _ in pairs]).to(device), torch.stack([b for _, b in pairs]).to(device))
        return stacked
