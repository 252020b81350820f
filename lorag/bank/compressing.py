"""A bank in less room: bases that all experts share, and each expert's core in them."""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorag.adapters.factors import balanced, thin_svd
from lorag.adapters.spans import Span, weighted_columns
from lorag.bank.bank import AdapterBank
from lorag.bank.shards import BASES, PRECISIONS, Expert, shard_name, stack_checkpoints
from lorag.errors import BankError, ConfigError
from lorag.files.atomic import require_empty
from lorag.files.tensors import save_tensors
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from lorag.adapters.factors import Pair
    from lorag.base.layout import ModuleShape

__all__ = ["Compressed", "compress_bank"]

_SHARD = 2**26  # values of one shard's cores
_LEAST = 1e-12  # of a module's energy: rounding


@dataclass(frozen=True)
class Compressed:
    """A bank that was compressed.

    Attributes:
        bank: The new bank.
        before: Bytes of the shards that it was made from.
        plain: Bytes that they would take in the new bank's precision.
        after: Bytes of its own, bases included.
        directions: The fewest and the most directions that a module's side keeps.
        energies: Of each expert the share of ‖ΔW‖² that is kept: 1 - ‖ΔW - ΔW'‖² / ‖ΔW‖² as it is read back.
    """

    bank: AdapterBank
    before: int
    plain: int
    after: int
    directions: tuple[int, int]
    energies: dict[str, float]

    @property
    def energy(self) -> float:
        """Mean share over the experts."""
        return statistics.fmean(self.energies.values())

    @property
    def worst(self) -> str:
        """The expert of which least is kept."""
        return min(self.energies, key=lambda name: self.energies[name])


@dataclass(frozen=True)
class _Bases:
    """U_in (i, k) and U_out (o, k') of one module, in fp64."""

    inward: Tensor
    outward: Tensor


def compress_bank(bank: AdapterBank, out: str | Path, *, keep: float = 0.99, precision: str = "float16", quiet: bool = True) -> Compressed:
    """Writes a bank anew with bases that its experts share and, for each expert, factors of its core in them.

    Each side of a module gets as few directions as keep their half of the energy; an expert's rank stays, or shrinks to the number of
    directions where that is smaller. Names, descriptions, licences, scores and checkpoints stay. Experts are read one at a time.

    Args:
        bank: Experts of any ranks.
        out: A new folder.
        keep: Share of ‖ΔW‖², over all experts, that is kept at each module.
        precision: How bases and cores are stored: "float32", "float16" or "int8" (the bases then in float16).
        quiet: No progress bar.

    Raises:
        BankError: If there is no expert, or it would take no fewer bytes.
        ConfigError: If `keep` or `precision` cannot be used.
        StorageError: If `out` is not empty, or writing fails.
    """
    out = Path(out)
    if not 0 < keep <= 1:
        raise ConfigError("keep cannot be used", got=keep, expected="a share above 0, at most 1")
    if precision not in PRECISIONS:
        raise ConfigError("precision cannot be used", got=repr(precision)[:40], expected=" or ".join(PRECISIONS))
    if not len(bank):
        raise BankError(f"{bank.folder} has no expert to compress")
    require_empty(out)
    bases = []
    for module in progress_bar(bank.base.layout.modules, desc="fitting shared bases", disable=quiet, leave=False):
        bases.append(_fit(bank, module, keep))
    before = sum(int(entry["bytes"]) for entry in bank.files.values())
    plain, after = _sizes(bank, bases, precision)
    if after >= min(before, plain):
        raise BankError(
            f"compressing {bank.folder} does not pay",
            got=f"{after / 1e6:.3g} MB of bases and cores to keep {keep:.1%}",
            expected=f"less than {min(before, plain) / 1e6:.3g} MB",
            remedy=f"Its {len(bank)} experts share too little, or are too few: keep less, or store them in a smaller precision.",
        )
    new = _write(bank, out, bases, precision, quiet)
    energies = {}
    for expert in progress_bar(bank.experts, desc="comparing experts", disable=quiet, leave=False):
        energies[expert.name] = bank.adapter(expert.name).factors.energy_in(new.adapter(expert.name).factors)
    counts = [basis.shape[1] for one in bases for basis in (one.inward, one.outward)]
    written = sum(int(entry["bytes"]) for entry in new.files.values())
    return Compressed(new, before, plain, written, (min(counts), max(counts)), energies)


def _fit(bank: AdapterBank, module: ModuleShape, keep: float) -> _Bases:
    """The fewest leading directions on both sides of a module that together keep a share of its energy."""
    ranks = sum(expert.rank for expert in bank.experts)
    spans = [Span(size, min(size, ranks)) for size in (module.in_features, module.out_features)]
    for rows, columns in bank.factors(module.name):
        left, right = weighted_columns(rows, columns)
        spans[0].add(right)
        spans[1].add(left)
    bases = [span.basis().double() for span in spans]
    energies, whole = [torch.zeros(basis.shape[1], dtype=torch.float64) for basis in bases], 0.0
    for rows, columns in bank.factors(module.name):
        left, right = weighted_columns(rows, columns)
        whole += left.square().sum().item()
        for energy, basis, columns_of in zip(energies, bases, (right, left), strict=True):
            energy += (basis.T @ columns_of).square().sum(1)
    allowed = max((1 - keep) / 2, _LEAST) * whole
    inward, outward = (basis[:, : _count(energy, whole, allowed)] for energy, basis in zip(energies, bases, strict=True))
    return _Bases(inward, outward)


def _count(energy: Tensor, whole: float, allowed: float) -> int:
    """How many leading directions lose no more than is allowed of the whole."""
    lost = whole - energy.cumsum(0)
    enough = (lost <= allowed).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(energy)


def _rank(expert: Expert, bases: list[_Bases]) -> int:
    """An expert's rank in the bases: no more than the largest core has."""
    return min(expert.rank, max(min(one.inward.shape[1], one.outward.shape[1]) for one in bases))


def _sizes(bank: AdapterBank, bases: list[_Bases], precision: str) -> tuple[int, int]:
    """Bytes of a bank's values in a precision as they are, and as bases and cores."""
    width, scales = PRECISIONS[precision].itemsize, 4 if precision == "int8" else 0
    plain = after = 0
    for expert in bank.experts:
        rank = _rank(expert, bases)
        for module, one in zip(bank.base.layout.modules, bases, strict=True):
            plain += expert.checkpoints * expert.rank * (width * (module.in_features + module.out_features) + 2 * scales)
            after += expert.checkpoints * rank * (width * (one.inward.shape[1] + one.outward.shape[1]) + 2 * scales)
    wide = PRECISIONS[_of_bases(precision)].itemsize
    return plain, after + wide * sum(one.inward.numel() + one.outward.numel() for one in bases)


def _of_bases(precision: str) -> str:
    return "float16" if precision == "int8" else precision


def _write(bank: AdapterBank, out: Path, bases: list[_Bases], precision: str, quiet: bool) -> AdapterBank:
    """Writes bases, shards and, last, the manifest."""
    new = AdapterBank.create(out, bank.base)
    dtype = PRECISIONS[_of_bases(precision)]
    tensors = {
        key.format(module=number): basis.to(dtype)
        for number, one in enumerate(bases)
        for key, basis in zip(BASES, (one.inward, one.outward), strict=True)
    }
    digest = hashlib.sha256(b"".join(tensor.float().numpy().tobytes() for tensor in tensors.values())).hexdigest()[:8]
    file = f"experts/bases-{digest}.safetensors"
    save_tensors(out / file, tensors)
    groups: dict[tuple[int, int], list[Expert]] = {}
    for expert in bank.experts:
        groups.setdefault((_rank(expert, bases), expert.checkpoints), []).append(expert)
    entries: dict[str, Expert] = {}
    with progress_bar(total=len(bank), desc="writing cores", disable=quiet, leave=False) as bar:
        for (rank, checkpoints), members in groups.items():
            size = checkpoints * rank * sum(one.inward.shape[1] + one.outward.shape[1] for one in bases)
            together = max(1, _SHARD // size)
            for start in range(0, len(members), together):
                part = members[start : start + together]
                shard = shard_name([expert.name for expert in part])
                cores = [[_cores(bank, expert, place, bases, rank) for place in range(checkpoints)] for expert in part]
                save_tensors(out / shard, stack_checkpoints(bank.base.layout.names, cores, precision))
                for index, expert in enumerate(part):
                    entries[expert.name] = replace(expert, rank=rank, alpha=float(rank), file=shard, index=index, bases=file)
                bar.update(len(part))
    with new.locked() as now:
        return AdapterBank(out, bank.base, [entries[name] for name in bank.names], now.files).write_manifest()


def _cores(bank: AdapterBank, expert: Expert, checkpoint: int, bases: list[_Bases], rank: int) -> dict[str, Pair]:
    """A' (r, k) and B' (k', r) of each module, with ΔW ≈ U_out B' A' U_inᵀ, singular values shared evenly."""
    factors, cores = bank.adapter(expert.name, checkpoint).factors, {}
    for module, one in zip(bank.base.layout.names, bases, strict=True):
        a, b = factors.pair(module, torch.float64)
        cores[module] = balanced(thin_svd(a @ one.inward, one.outward.T @ b), rank)
    return cores
