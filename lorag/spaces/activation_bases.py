"""A weight space that needs no bank: low-rank factors in bases that come from the base model itself.

An adapter reads a module's input along the directions in which texts differ there, and writes along those to which losses on tasks
are sensitive. A new task's direction lies among them even if it lies outside of what a few experts span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from lorag.adapters.factors import Factors, Pair
from lorag.base.activations import input_statistics, output_gradients
from lorag.errors import GeneratorError
from lorag.progress import progress_bar
from lorag.spaces.weight_space import SpaceInputs, WeightSpace

if TYPE_CHECKING:
    from lorag.base.layout import LoraLayout
    from lorag.text.embedding import TextEmbedder

__all__ = ["ActivationBases", "ReadTexts", "alignment"]

_OUTPUT_SCALE = 0.1  # of the output bases: codes of size 1 then make updates that training can start from
_OUTPUTS = 64  # output directions of a module, at most
_TEXTS, _TEXTS_AT_ONCE = 10_000, 32  # that are read, at most
_GRADIENT_BATCHES, _GRADIENT_TASKS, _GRADIENT_EXAMPLES = 24, 16, 2


@dataclass(frozen=True)
class ReadTexts:
    """Texts from which bases were found, and where they lie in them.

    Attributes:
        texts: n texts.
        coordinates: For each input basis, the averaged inputs of the texts along its k directions (n, k).
    """

    texts: list[str]
    coordinates: tuple[Tensor, ...]


def alignment(coordinates: Sequence[Tensor], embeddings: Tensor, penalty: float = 300.0) -> Tensor:
    """Along which input directions texts lie that mean what an embedding says, as linear maps (g, e, k).

    A ridge regression from coordinates to embeddings, transposed: the inner product of a text's coordinates with what the map makes
    of a description is that of the text's predicted embedding with the description's.

    Args:
        coordinates: For each of g bases, the texts' coordinates (n, k).
        embeddings: The texts' embeddings (n, e).
        penalty: Of the regression, in the unit of one text.
    """
    x = (embeddings - embeddings.mean(0)).double()
    maps = []
    for coordinate in coordinates:
        q = (coordinate - coordinate.mean(0)).double()
        maps.append(torch.linalg.solve(q.T @ q + penalty * torch.eye(q.shape[1], dtype=q.dtype), q.T @ x).T)
    return torch.stack(maps).float()


@dataclass(frozen=True)
class ActivationBases(WeightSpace):
    """Codes are factors A = R U_inᵀ and B = U_out Cᵀ of one rank: rows R (r, k + 1) and columns C (r, l) of each module.

    U_in holds k whitened principal directions of a module's inputs, averaged over texts, and one direction along which every input
    is near 1, which serves as a bias; the k are free of the mean. U_out holds l principal directions of the losses' gradients at the
    module's output.

    Attributes:
        layout: The adapters' layout.
        rank: Rank r of all adapters.
        entry: For each module the number of its input basis; modules that read the same input share one.
        bases_in: U_in (i, k + 1), one per entry.
        bases_out: U_out (o, l), one per module. All bases are in half precision, as they are stored.
        read: The texts that the bases were found from; None in a space that was read from a file.
    """

    kind = "activation_bases"

    layout: LoraLayout
    rank: int
    entry: tuple[int, ...]
    bases_in: tuple[Tensor, ...]
    bases_out: tuple[Tensor, ...]
    read: ReadTexts | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_inputs(cls, inputs: SpaceInputs) -> ActivationBases:
        """Finds bases from the training examples of tasks: `k` input directions, factors of `rank`.

        Raises:
            GeneratorError: If there is no base model, or if there are no more texts than directions.
        """
        layout, runner, tasks = inputs.layout, inputs.runner, inputs.tasks
        if runner is None or not tasks:
            raise GeneratorError(f"a weight space of kind {cls.kind} needs tasks with examples", remedy="Give their suite with tasks=PATH.")
        rng, seed, quiet = torch.Generator().manual_seed(inputs.seed), inputs.seed, inputs.quiet
        different = sorted({example.input for task in tasks for example in task.split("train")})
        chosen = [different[i] for i in torch.randperm(len(different), generator=rng)[:_TEXTS].tolist()]
        k = min(inputs.k, *(module.in_features for module in layout.modules))
        outputs = min(_OUTPUTS, *(module.out_features for module in layout.modules))
        if len(chosen) <= k:
            raise GeneratorError("activation bases need more texts than directions", got=f"{len(chosen)} texts", expected=f"more than {k}")
        entry: tuple[int, ...] = ()
        means: list[list[Tensor]] = []
        moments: list[Tensor] = []
        for part in progress_bar(
            input_statistics(runner, chosen, _TEXTS_AT_ONCE),
            total=-(-len(chosen) // _TEXTS_AT_ONCE),
            desc="reading texts",
            disable=quiet,
            leave=False,
        ):
            entry = part.entry
            if not moments:
                means, moments = [[] for _ in part.means], [torch.zeros_like(moment) for moment in part.moments]
            for place, (mean, moment) in enumerate(zip(part.means, part.moments, strict=True)):
                means[place].append(mean)
                moments[place] += moment * len(mean) / len(chosen)
        bases_in = tuple(_input_basis(torch.cat(mean), moment, k).half() for mean, moment in zip(means, moments, strict=True))
        sums: dict[str, Tensor] = {}
        for number in progress_bar(range(_GRADIENT_BATCHES), desc="gradients of tasks", disable=quiet, leave=False):
            picks = torch.randperm(len(tasks), generator=rng)[:_GRADIENT_TASKS].tolist()
            for name, value in output_gradients(runner, [tasks[i] for i in picks], _GRADIENT_EXAMPLES, f"bases/{seed}/{number}").items():
                sums[name] = sums[name] + value if name in sums else value
        bases_out = tuple((_OUTPUT_SCALE * _leading(sums[name], outputs)).half() for name in layout.names)
        coordinates = tuple(torch.cat(mean) @ u[:, :-1].float() for mean, u in zip(means, bases_in, strict=True))
        return cls(layout, inputs.rank, entry, bases_in, bases_out, ReadTexts(sorted(chosen, key=len), coordinates))

    @property
    def shape(self) -> tuple[int, int]:
        """Input directions k + 1, the bias among them, and output directions l."""
        return self.bases_in[0].shape[1], self.bases_out[0].shape[1]

    @property
    def parts(self) -> list[int]:
        """Length of each module's part of a code."""
        return [self.rank * sum(self.shape)] * len(self.layout)

    @property
    def zero(self) -> Tensor:
        """Code (c,) of the adapter that changes nothing."""
        return torch.zeros(self.size)

    def best_rank(self, wanted: int) -> int:
        """The wanted rank, at most the space's."""
        return max(1, min(wanted, self.rank))

    def encode(self, factors: Factors) -> Tensor:
        """Code (c,) whose factors are nearest to these; of those of a higher rank, to their best approximation."""
        factors = factors.truncated(self.rank)[0] if factors.rank > self.rank else factors.padded(self.rank)
        parts = []
        for name, entry, u_out in zip(self.layout.names, self.entry, self.bases_out, strict=True):
            a, b = factors.pair(name, torch.float64)
            parts.append((a @ torch.linalg.pinv(self.bases_in[entry].double().T)).flatten())
            parts.append((torch.linalg.pinv(u_out.double()) @ b).T.flatten())
        return torch.cat(parts).float()

    def energy(self, factors: Factors) -> float:
        """Share of ‖ΔW‖² over all modules that the code keeps, at most 1."""
        return factors.energy_in(self.decode(self.encode(factors)[None], self.rank)[0])

    def differentiable(self, codes: Tensor) -> dict[str, Pair]:
        """Factors A (b, r, i) and B (b, o, r) of codes (b, c); gradients reach the codes."""
        k, outputs = self.shape
        parts = rearrange(codes, "b (m x) -> m b x", m=len(self.layout))
        pairs = {}
        for name, entry, u_out, part in zip(self.layout.names, self.entry, self.bases_out, parts, strict=True):
            rows = rearrange(part[:, : self.rank * k], "b (r k) -> b r k", r=self.rank)
            columns = rearrange(part[:, self.rank * k :], "b (r l) -> b l r", l=outputs)
            pairs[name] = (rows @ self.bases_in[entry].to(codes).T, u_out.to(codes) @ columns)
        return pairs

    def decode(self, codes: Tensor, rank: int) -> list[Factors]:
        """Factors of each code (b, c), of at most the space's rank."""
        self.check_codes(codes)
        if not 1 <= rank <= self.rank:
            raise GeneratorError("the weight space has no adapters of this rank", got=rank, expected=f"1 to {self.rank}")
        decoded = []
        for code in codes.detach():  # one by one: products of a batch may round differently, and each adapter's bytes must not
            pairs = {name: (a[0], b[0]) for name, (a, b) in self.differentiable(code[None]).items()}
            factors = Factors(pairs)
            decoded.append(factors if rank == self.rank else factors.truncated(rank)[0])
        return decoded

    def scaled(self, codes: Tensor, strength: float) -> Tensor:
        """Codes (..., c) whose ΔW is `strength` times as large: it goes to the columns."""
        k, outputs = self.shape
        scale = torch.cat([torch.ones(self.rank * k), torch.full((self.rank * outputs,), strength)]).repeat(len(self.layout))
        return codes * scale.to(codes)

    def text_alignment(self, embedder: TextEmbedder, *, quiet: bool = True) -> Tensor | None:
        """From the embeddings of the texts that the bases were found from."""
        if self.read is None:
            return None
        embeddings = torch.stack([one.pooled for one in embedder.embed(self.read.texts, quiet=quiet)])
        return alignment(self.read.coordinates, embeddings)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ActivationBases:
        """The same space on a device, and in a precision."""
        bases_in, bases_out = (tuple(u.to(device, dtype) for u in bases) for bases in (self.bases_in, self.bases_out))
        return ActivationBases(self.layout, self.rank, self.entry, bases_in, bases_out, self.read)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The bases, which modules share one, and the rank."""
        tensors = {f"bases_in.{i}": u for i, u in enumerate(self.bases_in)} | {f"bases_out.{i}": u for i, u in enumerate(self.bases_out)}
        return tensors, {"rank": self.rank, "entry": list(self.entry)}

    @classmethod
    def restored(cls, layout: LoraLayout, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> ActivationBases:
        """Puts back what `stored` gave."""
        entry = tuple(int(number) for number in values["entry"])
        if len(entry) != len(layout) or set(entry) != set(range(len(set(entry)))):
            raise ValueError("entries that do not number the bases")
        bases_in = tuple(tensors[f"bases_in.{i}"] for i in range(len(set(entry))))
        return cls(layout, int(values["rank"]), entry, bases_in, tuple(tensors[f"bases_out.{i}"] for i in range(len(layout))))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Bases as wide as the first ones, and as long as their modules' inputs and outputs."""
        inputs, outputs = self.shape
        wide: dict[str, tuple[int, ...]] = {
            f"bases_in.{entry}": (module.in_features, inputs) for entry, module in zip(self.entry, self.layout.modules, strict=True)
        }
        return wide | {f"bases_out.{i}": (module.out_features, outputs) for i, module in enumerate(self.layout.modules)}


def _leading(moment: Tensor, count: int) -> Tensor:
    """The leading eigenvectors (d, count) of a symmetric matrix (d, d), each with its largest component positive."""
    vectors = torch.linalg.eigh(moment.double())[1].flip(1)[:, :count]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return (vectors * signs).float().contiguous()  # as files hold it: products round by how a matrix lies in memory


def _input_basis(means: Tensor, moment: Tensor, k: int) -> Tensor:
    """U_in (i, k + 1) from the averages of texts (n, i) and the second moment of tokens (i, i).

    The bias is the direction with b·μ = 1 along which tokens vary least, b = Σ⁻¹μ / μᵀΣ⁻¹μ.
    """
    mean = means.double().mean(0)
    covariance = torch.cov(means.double().T)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:k].clamp_min(1e-12), vectors.flip(1)[:, :k]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    whitened = vectors * signs / values.sqrt()
    spread = moment.double() - torch.outer(mean, mean)
    spread = spread + 1e-3 * spread.diagonal().mean() * torch.eye(len(mean), dtype=spread.dtype)
    bias = torch.linalg.solve(spread, mean)
    bias = bias / (mean @ bias)
    return torch.cat([whitened - torch.outer(bias, mean @ whitened), bias[:, None]], 1).float()
