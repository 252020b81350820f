"""Fitting the weight space of an 8-billion-parameter base model: time and memory against the number of experts.

Experts are synthetic, of Llama-3.1-8B's shape: rank 8 on q and v of all layers, 3.4 million values each. Their ΔW share 64
directions a side, weighted as j^-½, with singular values that fall by a factor of .7 each, and a tenth of noise in directions of
their own. They lie in fp16 in shards of 20, in a temporary folder: 6.5 MiB an expert. Each fit is a process of its own; its
peak is its resident memory. "energy kept" is the share of ‖ΔW‖² of the first four experts that lies in the bases.

Bounded by arithmetic in fp64: columns are compressed from 8 k to 4 k whenever 4 k new ones have come, one product 8 k x 8 k and
one decomposition of that size each, so time is linear in experts, rank and width. Memory is that of one module and a few
experts, whatever the size of the bank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.generation import llama_8b
from benchmarks.machine import peak_bytes
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, BankBase
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.spaces.shared_subspace import SharedSubspace

__all__ = ["TITLE", "measure"]

TITLE = "Fitting the weight space: Llama-3.1-8B, rank 8 on q and v, k = 32"
TARGETS, RANK, K, SHARED, SHARD = ["q_proj", "v_proj"], 8, 32, 64, 20


def _directions(layout: LoraLayout) -> dict[str, tuple[Tensor, Tensor]]:
    """The weighted directions (64, i) and (o, 64) that all experts share in each module."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.arange(1, SHARED + 1) ** -0.5
    found = {}
    for module in layout.modules:
        inner, outer = (
            torch.randn(size, SHARED, generator=rng) * weights / size**0.5 for size in (module.in_features, module.out_features)
        )
        found[module.name] = inner.T, outer
    return found


def _expert(layout: LoraLayout, directions: Mapping[str, tuple[Tensor, Tensor]], number: int) -> LoraAdapter:
    rng = torch.Generator().manual_seed(number + 1)
    root = 0.7 ** (torch.arange(RANK) / 2)
    factors = {}
    for module in layout.modules:
        inner, outer = directions[module.name]
        rows = (
            torch.randn(RANK, SHARED, generator=rng) @ inner
            + torch.randn(RANK, module.in_features, generator=rng) * 0.1 / module.in_features**0.5
        )
        columns = outer @ torch.randn(SHARED, RANK, generator=rng)
        columns += torch.randn(module.out_features, RANK, generator=rng) * 0.1 / module.out_features**0.5
        factors[module.name] = (rows * root[:, None], columns * root)
    return LoraAdapter(layout, Factors(factors))


def make_bank(folder: Path, count: int) -> AdapterBank:
    """A bank of synthetic experts, or the one that is there, gone on with."""
    layout = llama_8b(TARGETS)
    bank = AdapterBank.create(folder, BankBase(BaseModel("llama-3.1-8b", "causal_lm"), "revision:main", layout, "causal_lm", {}))
    directions = _directions(layout)
    for start in tqdm(range(len(bank), count, SHARD), desc=f"writing {count} experts"):
        numbers = range(start, min(start + SHARD, count))
        experts = [(f"task-{n:05d}", [f"task number {n}"], [_expert(layout, directions, n)]) for n in numbers]
        bank = bank.add(experts, precision="float16")
    return bank


def fit(folder: Path, count: int) -> dict[str, str | float]:
    """Fits the first `count` experts of a bank in this process: one row."""
    whole = AdapterBank._open(folder, contents=False)  # without reading all of it once for its checksums
    bank = AdapterBank(folder, whole.base, whole.experts[:count], whole.files)
    peak_before = peak_bytes()
    wall, used = time.perf_counter(), time.process_time()
    space = SharedSubspace.fit_stream(bank, bank.base.layout, K, quiet=False)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    peak = peak_bytes()
    kept = [space.energy(bank.adapter(expert.name).factors) for expert in bank.experts[:4]]
    return {
        "experts": count,
        "bank MiB": round(count * bank.base.layout.values(RANK) * 2 / 2**20),
        "seconds": round(wall, 1),
        "CPU seconds": round(used, 1),
        "threads": torch.get_num_threads(),
        "peak MiB above start": round((peak - peak_before) / 2**20),
        "peak MiB of the process": round(peak / 2**20),
        "energy kept": round(sum(kept) / len(kept), 3),
    }


def _in_a_process(arguments: list[str]) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.weight_fit", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603 - our own module


def measure(quick: bool, counts: list[int] | None = None, folder: Path | None = None) -> list[dict[str, str | float]]:
    """A row for each number of experts: 10 and 100, and 1,000 if there is time (13 GB of disk while it writes)."""
    counts = counts or ([10, 100] if quick else [10, 100, 1000])
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory(prefix="lorag-") as temporary:
        place = folder or Path(temporary)
        _in_a_process(["--make", str(max(counts)), "--folder", str(place)])
        for count in counts:
            rows.append(json.loads(_in_a_process(["--fit", str(count), "--folder", str(place)]).splitlines()[-1]))
    return rows


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="1,000 experts too")
    parser.add_argument("--counts")
    parser.add_argument("--folder", type=Path, help="where the bank is written, or already is")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fit", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make_bank(given.folder, given.make)
    elif given.fit:
        print(json.dumps(fit(given.folder, given.fit)))
    else:
        counts = [int(count) for count in given.counts.split(",")] if given.counts else None
        for row in measure(not given.full, counts, given.folder):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
