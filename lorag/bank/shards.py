"""Shards of a bank: experts of one rank with their checkpoints, stacked module by module, and the one reader of them.

A shard holds the factors themselves, or, of a compressed bank, factors of the experts' cores in bases that lie in a file of their own:
A (r, i) is then A' U_inᵀ with A' (r, k), and B (o, r) is U_out B' with B' (k, r).

Files are read by position and never mapped: what is read of a map stays in memory until another needs it, so that a bank of any size
takes the memory of a few experts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import torch
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor

from lorag.adapters.factors import Factors, Pair
from lorag.errors import ArtifactError, BankError, DtypeOverflowError
from lorag.files.artifacts import require_name, resolve_inside
from lorag.files.stored import Count, Number, Text, Texts
from lorag.files.tensors import TensorSpec, read_header

if TYPE_CHECKING:
    from lorag.base.layout import LoraLayout

__all__ = ["BASES", "PRECISIONS", "Expert", "ShardReader", "check_shards", "quantise", "shard_name", "stack_checkpoints"]

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
BASES = ("{module}.U_in", "{module}.U_out")  # of the module of a number: (i, k) and (o, k)
_STORED = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}


Sizes = Sequence[tuple[int, int]]  # length of A's rows and B's columns, module by module
Side = tuple[str, tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, config={"extra": "forbid"})
class Expert:
    """One expert's entry in a bank's manifest.

    Attributes:
        name: Its name, unique in the bank.
        descriptions: What its task is, in one or more wordings.
        rank: Rank r of its factors.
        alpha: lora_alpha of its stored factors; the rank in banks that this version writes, whose factors hold the scaling.
        checkpoints: Number of checkpoints, the final one last.
        file: Shard that holds it.
        index: Its place in the shard.
        suite: The suite that its task came from.
        license: Licence of the data that it was trained on, or "unknown".
        score: Its score on its own task's test examples, if measured.
        examples: Number of examples that it was trained on, if known.
        bases: File with the bases that its factors are in, of a compressed expert.
    """

    name: Text
    descriptions: Annotated[Texts, Field(min_length=1)]
    rank: Count
    alpha: Number
    checkpoints: Count
    file: Text
    index: Annotated[int, Strict(), Field(ge=0)]
    suite: Text = ""
    license: Text = "unknown"
    score: Number | None = None
    examples: Annotated[int, Strict()] | None = None
    bases: Text = ""

    def __post_init__(self) -> None:
        require_name(self.name, "an expert's name")


# --- writing ----------------------------------------------------------------------------------------------------------


def quantise(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Int8 values and one scale for each vector along `axis`."""
    scale = values.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
    return (values / scale).round().to(torch.int8), scale


def shard_name(names: Sequence[str]) -> str:
    """File of the experts of these names, in a bank's folder."""
    return f"experts/{names[0]}-{hashlib.sha256('/'.join(names).encode()).hexdigest()[:8]}.safetensors"


def stack_checkpoints(modules: Sequence[str], experts: Sequence[Sequence[Mapping[str, Pair]]], precision: str) -> dict[str, Tensor]:
    """A shard's tensors: A (n, checkpoints, r, i) and B (n, checkpoints, o, r) of each module, by its number.

    Args:
        modules: Their names, in the layout's order.
        experts: Factors of each checkpoint of each expert, with ΔW = B·A, or those of its core in bases.
        precision: One of `PRECISIONS`.

    Raises:
        DtypeOverflowError: If a value overflows the precision.
    """
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        for side, factor in enumerate("AB"):
            values = torch.stack([torch.stack([factors[module][side] for factors in checkpoints]) for checkpoints in experts])
            key = f"{number}.{factor}"
            if precision == "int8":
                tensors[key], tensors[f"{key}.scale"] = quantise(values, axis=-1 if factor == "A" else -2)
                continue
            tensors[key] = values.to(PRECISIONS[precision])
            if not torch.isfinite(tensors[key]).all():
                got = f"{values.abs().max().item():.3g}"
                raise DtypeOverflowError(f"values of {module} overflow {precision}", got=got, remedy="Store them as float32.")
    return tensors


# --- reading ----------------------------------------------------------------------------------------------------------


def _sides(sizes: Sizes, rank: int) -> Iterator[Side]:
    """Key, shape of one factor, and shape of its scales in int8, for A and B of each module."""
    for number, (inner, outer) in enumerate(sizes):
        yield f"{number}.A", (rank, inner), (rank, 1)
        yield f"{number}.B", (outer, rank), (1, rank)


def _sizes(folder: Path, bases: str, layout: LoraLayout) -> Sizes:
    """Length of the factors as a shard holds them: the modules' own, or the number of directions of the bases that they are in.

    Raises:
        BankError: If the bases are not those of the layout.
    """
    whole = [(module.in_features, module.out_features) for module in layout.modules]
    if not bases:
        return whole
    spec, _ = read_header(resolve_inside(folder, bases))
    sizes = []
    for number, sides in enumerate(whole):
        held = [spec.get(key.format(module=number), ("", ())) for key in BASES]
        for key, size, (dtype, shape) in zip(BASES, sides, held, strict=True):
            if dtype not in ("F32", "F16") or len(shape) != 2 or shape[0] != size or not 1 <= shape[1] <= size:
                got = f"{key.format(module=number)} {dtype} {shape}"
                raise BankError(f"{bases} does not hold bases of the layout", got=got[:120], expected=f"F32 or F16 ({size}, 1 to {size})")
        sizes.append((held[0][1][1], held[1][1][1]))
    if len(spec) != len(BASES) * len(whole):
        raise BankError(f"{bases} holds more than bases", got=f"{len(spec)} tensors", expected=len(BASES) * len(whole))
    return sizes


def check_shards(folder: Path, experts: Sequence[Expert], layout: LoraLayout) -> None:
    """Checks from their headers that a bank's shards hold the experts whose entries name them.

    Raises:
        BankError: If one does not.
    """
    by_file: dict[str, list[Expert]] = {}
    for expert in experts:
        by_file.setdefault(expert.file, []).append(expert)
    sizes = {bases: _sizes(folder, bases, layout) for bases in {expert.bases for expert in experts}}
    for file, members in by_file.items():
        _check_shard(folder, file, members, sizes)


def _check_shard(folder: Path, file: str, experts: Sequence[Expert], sizes: Mapping[str, Sizes]) -> None:
    spec, _ = read_header(resolve_inside(folder, file))
    shapes = {(expert.checkpoints, expert.rank, expert.bases) for expert in experts}
    if len(shapes) != 1:
        raise BankError(f"{file} mixes ranks, numbers of checkpoints or bases")
    checkpoints, rank, bases = shapes.pop()
    count = spec.get("0.A", ("", (0,)))[1][:1]
    expected: TensorSpec = {}
    for key, tail, scale in _sides(sizes[bases], rank):
        dtype = spec.get(key, ("", ()))[0]
        expected[key] = (dtype if dtype in _STORED else " or ".join(_STORED), (*count, checkpoints, *tail))
        if dtype == "I8":
            expected[f"{key}.scale"] = ("F32", (*count, checkpoints, *scale))
    odd = sorted(key for key in spec.keys() | expected.keys() if spec.get(key) != expected.get(key))
    if odd:
        key = odd[0]
        raise BankError(f"{file} does not hold what its entries say", got=f"{key[:40]} {spec.get(key)}", expected=expected.get(key))
    if any(expert.index >= count[0] for expert in experts):
        raise BankError(f"{file} holds fewer experts than its entries say", got=count[0])


class ShardReader:
    """Reads experts of a bank whose shards `check_shards` has looked at; no file stays open."""

    def __init__(self, folder: Path, layout: LoraLayout) -> None:
        self._folder, self._layout = folder, layout
        self._places: dict[str, dict[str, tuple[torch.dtype, int]]] = {}  # file -> key -> precision, where it begins
        self._sizes: dict[str, Sizes] = {}  # of the factors in a file of bases; "" is none

    def read(self, expert: Expert, checkpoint: int) -> Factors:
        """One checkpoint's factors, in fp32, their values checked; checkpoints are counted from either end.

        Raises:
            ArtifactError: If the shard ends before its tensors do.
            BankError: If it cannot be read.
        """
        number = range(expert.checkpoints)[checkpoint]
        with self._open(expert.file) as file:
            sides = _sides(self._held(expert.bases), expert.rank)
            values = [self._values(file, expert.file, side, [expert], number)[0] for side in sides]
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if expert.bases:
            with self._open(expert.bases) as file:
                pairs = [self._expanded(file, expert.bases, place, pair) for place, pair in enumerate(pairs)]
        return Factors.with_alpha(dict(zip(self._layout.names, pairs, strict=True)), expert.alpha).check_values()

    def stacks(self, experts: Sequence[Expert], module: str, at_once: int = 2**21) -> Iterator[Pair]:
        """Stacks A (n, r, i) and B (n, o, r) of one module with ΔW = B·A, in fp64, of the final checkpoints, in order, a few at a time.

        Args:
            experts: The experts.
            module: Its name.
            at_once: Most values of one factor at a time.

        Raises:
            ArtifactError: If a shard ends before its tensors do.
            BankError: If one cannot be read.
        """
        place = self._layout.names.index(module)
        longest = max(self._layout.modules[place].in_features, self._layout.modules[place].out_features)
        for (name, rank, bases), group in groupby(experts, key=lambda expert: (expert.file, expert.rank, expert.bases)):
            members, sides = list(group), list(_sides(self._held(bases), rank))[2 * place : 2 * place + 2]
            count = max(1, at_once // (rank * longest))
            with self._open(name) as file:
                for start in range(0, len(members), count):
                    part = members[start : start + count]
                    a, b = (self._values(file, name, side, part, part[0].checkpoints - 1).double() for side in sides)
                    if bases:
                        with self._open(bases) as shared:
                            a, b = self._expanded(shared, bases, place, (a, b))
                    scaling = torch.tensor([expert.alpha / expert.rank for expert in part], dtype=torch.float64)
                    yield a, b * scaling[:, None, None]

    def _held(self, bases: str) -> Sizes:
        if bases not in self._sizes:
            self._sizes[bases] = _sizes(self._folder, bases, self._layout)
        return self._sizes[bases]

    def _expanded(self, opened: BinaryIO, bases: str, place: int, pair: Pair) -> Pair:
        """A (..., r, i) and B (..., o, r) of factors A' (..., r, k) and B' (..., k, r) in the bases of one module."""
        module, shared = self._layout.modules[place], []
        for key, size, count in zip(BASES, (module.in_features, module.out_features), self._held(bases)[place], strict=True):
            dtype, start = self._places[bases][key.format(module=place)]
            opened.seek(start)
            data = bytearray(opened.read(size * count * dtype.itemsize))
            if len(data) != size * count * dtype.itemsize:
                raise ArtifactError(f"{opened.name} is cut short", remedy="Run lorag bank check.")
            shared.append(torch.frombuffer(data, dtype=dtype).view(size, count).to(pair[0].dtype))
        return pair[0] @ shared[0].T, shared[1] @ pair[1]

    @contextmanager
    def _open(self, file: str) -> Iterator[BinaryIO]:
        path = resolve_inside(self._folder, file)
        if file not in self._places:
            self._places[file] = _places(path)
        try:
            with path.open("rb", buffering=0) as opened:
                yield opened
        except OSError as error:
            raise BankError(f"{path} cannot be read", got=error.strerror or error) from error

    def _values(self, opened: BinaryIO, file: str, side: Side, experts: Sequence[Expert], checkpoint: int) -> Tensor:
        """One factor (n, ...) of one checkpoint of each expert, in fp32."""
        key, tail, scale = side

        def read(key: str, shape: tuple[int, int]) -> Tensor:
            dtype, start = self._places[file][key]
            size, data = math.prod(shape) * dtype.itemsize, bytearray()
            for expert in experts:
                opened.seek(start + (expert.index * expert.checkpoints + checkpoint) * size)
                data += opened.read(size)
            if len(data) != size * len(experts):
                raise ArtifactError(f"{opened.name} is cut short", remedy="Run lorag bank check.")
            return torch.frombuffer(data, dtype=dtype).view(len(experts), *shape).float()

        values = read(key, tail)
        return values * read(f"{key}.scale", scale) if f"{key}.scale" in self._places[file] else values


def _places(path: Path) -> dict[str, tuple[torch.dtype, int]]:
    """Precision and beginning of each tensor of a shard; they follow one another in the header's order."""
    spec, _ = read_header(path)
    odd = sorted(dtype for dtype, _ in spec.values() if dtype not in _STORED)
    if odd:
        raise BankError(f"{path} stores values in an unknown way", got=odd[0], expected=", ".join(_STORED))
    sizes = {key: _STORED[dtype].itemsize * math.prod(shape) for key, (dtype, shape) in spec.items()}
    place, places = path.stat().st_size - sum(sizes.values()), {}
    for key, (dtype, _) in spec.items():
        places[key] = (_STORED[dtype], place)
        place += sizes[key]
    return places
