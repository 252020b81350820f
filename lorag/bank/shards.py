"""Shards of a bank: experts of one rank with their late checkpoints, stacked module by module, checked and read one by one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.entries import Expert
from lorag.base.layout import LoraLayout
from lorag.errors import BankError, DtypeOverflowError
from lorag.files.artifacts import resolve_inside
from lorag.files.tensors import TensorSpec, read_header

__all__ = ["PRECISIONS", "ShardReader", "check_shard", "quantise", "stack_checkpoints"]

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_STORED = ("F32", "F16", "I8")
_MOST_OPEN = 8


def quantise(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Int8 values and one scale for each vector along `axis`."""
    scale = values.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
    return (values / scale).round().to(torch.int8), scale


def stack_checkpoints(layout: LoraLayout, experts: Sequence[Sequence[LoraAdapter]], precision: str) -> dict[str, Tensor]:
    """A shard's tensors: A (n, checkpoints, r, i) and B (n, checkpoints, o, r) of each module, by its number, with ΔW = B·A.

    Raises:
        DtypeOverflowError: If a value overflows the precision.
    """
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(layout.names):
        for side, factor in enumerate("AB"):
            values = torch.stack([torch.stack([a.factors[module][side] for a in late]) for late in experts])
            key = f"{number}.{factor}"
            stored = values if precision == "int8" else values.to(PRECISIONS[precision])
            if not torch.isfinite(stored).all():
                most = max(a.factors[module][side].abs().max().item() for late in experts for a in late)
                raise DtypeOverflowError(f"values of {module} overflow {precision}", got=f"{most:.3g}", remedy="Store them as float32.")
            if precision == "int8":
                tensors[key], tensors[f"{key}.scale"] = quantise(values, axis=-1 if factor == "A" else -2)
            else:
                tensors[key] = stored
    return tensors


def check_shard(folder: Path, file: str, experts: Sequence[Expert], layout: LoraLayout) -> None:
    """Checks from its header that a shard holds the experts whose entries name it.

    Raises:
        BankError: If it does not.
    """
    spec, _ = read_header(resolve_inside(folder, file))
    shapes = {(expert.checkpoints, expert.rank) for expert in experts}
    if len(shapes) != 1:
        raise BankError(f"{file} mixes ranks or numbers of checkpoints")
    late, rank = shapes.pop()
    count = spec.get("0.A", ("", (0,)))[1][:1]
    expected: TensorSpec = {}
    for number, module in enumerate(layout.modules):
        sides = (("A", (rank, module.in_features), (rank, 1)), ("B", (module.out_features, rank), (1, rank)))
        for factor, tail, scale in sides:
            key = f"{number}.{factor}"
            dtype = spec.get(key, ("", ()))[0]
            expected[key] = (dtype if dtype in _STORED else " or ".join(_STORED), (*count, late, *tail))
            if dtype == "I8":
                expected[f"{key}.scale"] = ("F32", (*count, late, *scale))
    strange = sorted(key for key in spec.keys() | expected.keys() if spec.get(key) != expected.get(key))
    if strange:
        key = strange[0]
        raise BankError(f"{file} does not hold what its entries say", got=f"{key[:40]} {spec.get(key)}", expected=expected.get(key))
    if any(expert.index >= count[0] for expert in experts):
        raise BankError(f"{file} holds fewer experts than its entries say", got=count[0])


class ShardReader:
    """Reads single experts; keeps a few shards open, so that a bank of any number of shards takes no more memory."""

    def __init__(self, folder: Path, layout: LoraLayout) -> None:
        self._folder, self._layout = folder, layout
        self._open: OrderedDict[str, tuple[Any, frozenset[str]]] = OrderedDict()

    def read(self, expert: Expert, checkpoint: int) -> Factors:
        """One checkpoint's factors, in fp32 or fp16, their values checked; checkpoints are counted from either end."""
        if expert.file not in self._open:
            shard = safe_open(resolve_inside(self._folder, expert.file), framework="pt")
            self._open[expert.file] = shard, frozenset(shard.keys())
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(expert.file)
        shard, keys = self._open[expert.file]
        late = range(expert.checkpoints)[checkpoint]

        def read(key: str) -> Tensor:
            value: Tensor = shard.get_slice(key)[expert.index, late]
            return value.float() * shard.get_slice(f"{key}.scale")[expert.index, late].float() if f"{key}.scale" in keys else value

        tensors = {module: (read(f"{i}.A"), read(f"{i}.B")) for i, module in enumerate(self._layout.names)}
        return Factors.with_alpha(tensors, expert.alpha).check_values()
