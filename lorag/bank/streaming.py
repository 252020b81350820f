"""A bank's experts module by module, for fitting: read by position, so that a bank of any size takes the memory of a few."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorag.bank.bank import AdapterBank
from lorag.bank.entries import Expert
from lorag.errors import ArtifactError, BankError
from lorag.files.artifacts import resolve_inside
from lorag.files.tensors import read_header

__all__ = ["ExpertStream"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}
_MOST = 2**21  # values of one factor at a time


@dataclass(frozen=True)
class _Shard:
    """Where the tensors of a shard begin: start of A, of B, and of their scales for each module (m, 4), in bytes; -1 if none."""

    path: Path
    dtypes: tuple[torch.dtype, torch.dtype]
    starts: Tensor


class ExpertStream:
    """The final checkpoints of all experts of a bank, one module at a time.

    Shards are not mapped: what is read of a map stays in memory until another needs it, and so would count as used.

    Args:
        bank: The bank.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._layout, self._experts = bank.base.layout, bank.experts
        self._places = {name: number for number, name in enumerate(self._layout.names)}
        files = dict.fromkeys(expert.file for expert in bank.experts)
        self._shards = {file: _open(resolve_inside(bank.folder, file), len(self._layout)) for file in files}

    def factors(self, module: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Stacks A (n, r, i) and B (n, o, r) of one module, scaling in B, in fp64, in the bank's order.

        Raises:
            BankError: If a shard ends before its tensors do.
        """
        number = self._places[module]
        shape = self._layout.modules[number]
        for (file, rank), group in groupby(self._experts, key=lambda expert: (expert.file, expert.rank)):
            members = list(group)
            count = max(1, _MOST // (rank * max(shape.in_features, shape.out_features)))
            shard = self._shards[file]
            try:
                with shard.path.open("rb", buffering=0) as opened:
                    for start in range(0, len(members), count):
                        part = members[start : start + count]
                        rows = _read(opened, shard, number, 0, part, (rank, shape.in_features))
                        columns = _read(opened, shard, number, 1, part, (shape.out_features, rank))
                        scaling = torch.tensor([expert.alpha / expert.rank for expert in part], dtype=torch.float64)
                        yield rows, columns * scaling[:, None, None]
            except OSError as error:
                raise BankError(f"{shard.path} cannot be read", got=error.strerror or error) from error


def _open(path: Path, modules: int) -> _Shard:
    """Finds the tensors of a shard from its header, which says that they follow one another in its order."""
    spec, _ = read_header(path)
    sizes = {"F32": 4, "F16": 2, "I8": 1}
    unknown = sorted(dtype for dtype, _ in spec.values() if dtype not in sizes)
    if unknown:
        raise BankError(f"{path} stores values in an unknown way", got=unknown[0], expected=", ".join(sizes))
    place = path.stat().st_size - sum(sizes[dtype] * math.prod(shape) for dtype, shape in spec.values())
    found: dict[str, int] = {}
    for key, (dtype, shape) in spec.items():
        found[key] = place
        place += sizes[dtype] * math.prod(shape)
    keys = [(f"{number}.A", f"{number}.B", f"{number}.A.scale", f"{number}.B.scale") for number in range(modules)]
    starts = torch.tensor([[found.get(key, -1) for key in row] for row in keys])
    if (starts[:, :2] < 0).any():
        raise BankError(f"{path} does not hold what its entries say", expected=f"factors of {modules} modules")
    return _Shard(path, (_DTYPES[spec["0.A"][0]], _DTYPES[spec["0.B"][0]]), starts)


def _read(opened: BinaryIO, shard: _Shard, number: int, side: int, experts: list[Expert], shape: tuple[int, int]) -> Tensor:
    """The final checkpoint's factor (n, *shape) of each expert, in fp64."""
    stored, scales = (int(start) for start in shard.starts[number, [side, side + 2]])
    values = _values(opened, stored, shard.dtypes[side], experts, shape).double()
    if scales < 0:
        return values
    tail = (shape[0], 1) if side == 0 else (1, shape[1])
    return values * _values(opened, scales, torch.float32, experts, tail).double()


def _values(opened: BinaryIO, start: int, dtype: torch.dtype, experts: list[Expert], shape: tuple[int, int]) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    data = bytearray()
    for expert in experts:
        opened.seek(start + (expert.index * expert.checkpoints + expert.checkpoints - 1) * size)
        data += opened.read(size)
    if len(data) != size * len(experts):
        raise ArtifactError(f"{opened.name} is cut short", remedy="Run lorag bank check.")
    return torch.frombuffer(data, dtype=dtype).view(len(experts), *shape)
