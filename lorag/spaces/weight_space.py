"""What a weight space is: adapters of one layout as codes, flat vectors that can be compared, averaged and regressed, and back.

ΔW = B·A does not change when B becomes B·G and A becomes G⁻¹·A, so raw factors of independently trained adapters cannot be compared.
`SharedSubspace` describes an adapter by its cores U_outᵀ ΔW U_in in bases shared by the bank, which are free of that gauge and of rank and
alpha. `FlatFactors` keeps the raw factors, as published methods do. A new kind is one file and a line in `lorag.spaces`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from lorag.adapters.factors import Factors, Pair
from lorag.errors import GeneratorError

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.base.layout import LoraLayout
    from lorag.base.row_adapters import Cores
    from lorag.base.runner import Runner
    from lorag.tasks.suite import Task
    from lorag.text.embedding import TextEmbedder

__all__ = ["AdapterStream", "FactorStream", "SpaceInputs", "WeightSpace", "no_experts"]


class FactorStream(Protocol):
    """Experts module by module, a few at a time, as often as asked: a bank larger than memory."""

    def factors(self, module: str) -> Iterator[Pair]:
        """Stacks A (n, r, i) and B (n, o, r) with ΔW = B·A, in fp64, of all experts in order."""
        ...


@dataclass(frozen=True)
class AdapterStream:
    """Adapters at hand as such a stream; `adapters` is called anew for each pass."""

    adapters: Callable[[], Iterable[LoraAdapter]]

    def factors(self, module: str) -> Iterator[Pair]:
        """Each adapter's factors, one by one."""
        for adapter in self.adapters():
            a, b = adapter.factors.pair(module, torch.float64)
            yield a[None], b[None]


@dataclass(frozen=True)
class SpaceInputs:
    """All that a weight space may be found from; each kind takes what it needs, and says what it lacks.

    Attributes:
        layout: The adapters' layout.
        experts: The training experts; there may be none.
        k: Dimensions kept on each side of a module, for spaces with bases.
        rank: Rank of the adapters that are wanted, for spaces that fix one.
        runner: The base model, for spaces that look at what passes through it.
        tasks: Training tasks with examples, for the same.
        seed: Seed of whatever is drawn.
        quiet: No progress bar.
    """

    layout: LoraLayout
    experts: FactorStream
    k: int = 32
    rank: int = 16
    runner: Runner | None = None
    tasks: Sequence[Task] = ()
    seed: int = 0
    quiet: bool = True


def no_experts(kind: str) -> GeneratorError:
    """The error of a space that is found from experts where there are none."""
    return GeneratorError(
        f"a weight space of kind {kind} needs at least one expert", got="an empty bank", remedy="Add experts to the bank."
    )


class WeightSpace(ABC):
    """Maps adapters of one layout to codes (c,) in fp32 and back.

    A space that standardises its codes stores the normaliser as `mean` and `scale`, in a shape of its own choice.
    """

    kind: ClassVar[str]  # its name in settings and files
    degree: ClassVar[float] = 1.0  # ΔW grows with the distance of a code from `zero` to the power of 1 / degree

    layout: LoraLayout

    # --- what a kind of space says -------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_inputs(cls, inputs: SpaceInputs) -> Self:
        """Finds the space.

        Raises:
            GeneratorError: If the inputs lack what it needs.
        """

    @property
    @abstractmethod
    def parts(self) -> list[int]:
        """Length of each module's part of a code, in the layout's order."""

    @abstractmethod
    def best_rank(self, wanted: int) -> int:
        """The rank of adapters that the space decodes which is nearest to a wanted one."""

    @abstractmethod
    def encode(self, factors: Factors) -> Tensor:
        """Code (c,) of an adapter's factors."""

    @abstractmethod
    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Factors of a rank for each code (b, c); the bytes of each do not depend on the others."""

    @abstractmethod
    def differentiable(self, codes: Tensor) -> Cores | dict[str, Pair]:
        """What `RowAdapters` runs for codes (b, c); gradients reach the codes."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The same space on a device; with a dtype, its bases in it, so that `differentiable` need not convert them each time."""

    @abstractmethod
    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what JSON must say beside kind and layout, from which `restored` builds the space again."""

    @classmethod
    @abstractmethod
    def restored(cls, layout: LoraLayout, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Self:
        """Puts back what `stored` gave; what it raises of KeyError, TypeError and ValueError becomes one GeneratorError."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the tensors of `stored` must have, given the layout and the JSON values."""

    @classmethod
    def describe(cls, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """One line on a stored space of this kind for a person, by the shapes of the tensors that `stored` gave."""
        return cls.kind

    # --- what all have in common ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Length c of a code."""
        return sum(self.parts)

    @property
    def zero(self) -> Tensor:
        """Code (c,) of the adapter that changes nothing."""
        return self.encode(Factors.zeros(self.layout))

    def scaled(self, codes: Tensor, strength: float) -> Tensor:
        """Codes (..., c) whose ΔW is `strength` times as large."""
        zero = self.zero.to(codes.device)
        return zero + (codes - zero) * strength**self.degree

    def text_alignment(self, embedder: TextEmbedder, *, quiet: bool = True) -> Tensor | None:
        """The map (g, e, k) from embedded texts to directions of the base model's inputs; None of a space that was not found from texts."""
        return None

    def check_codes(self, codes: Tensor) -> None:
        """Raises a GeneratorError unless codes are (b, c)."""
        if codes.dim() != 2 or codes.shape[1] != self.size:
            raise GeneratorError("codes do not fit the weight space", got=tuple(codes.shape), expected=f"(b, {self.size})")

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `lorag.spaces.open_space` builds the space again."""
        tensors, values = self.stored()
        return tensors, {"kind": self.kind, "layout": self.layout.to_dict(), **values}

    def check(self) -> None:
        """Checks what was read from a file against the space's own shapes.

        Raises:
            GeneratorError: If a tensor does not fit, or the normaliser cannot be used.
        """
        tensors, _ = self.stored()
        shapes, expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, self.shapes()
        odd = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        if odd:
            got, wanted = shapes.get(odd[0]), expected.get(odd[0])
            raise GeneratorError(f"a stored weight space does not fit its layout: tensor {odd[0]}", got=got, expected=wanted)
        mean, scale = tensors.get("mean", torch.zeros(())), tensors.get("scale", torch.ones(()))
        if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise GeneratorError("a stored weight space has a mean or scale that is not a number, or a scale of 0")
