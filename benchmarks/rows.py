"""One forward and backward pass of n adapters on 4 rows each: row adapters, and PEFT adapters of one model one after another.

Bounded by matrix products with the frozen weights, which are the same on both sides; row adapters save the overhead of starting
each kernel n times, which counts for much where n is large and the base model small, and for most of the time on a GPU.
"""

from __future__ import annotations

import copy

import torch

from benchmarks.machine import device, interleaved_seconds, synchronise
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.objectives import make_objective
from lorag.base.row_adapters import RowAdapters
from lorag.worlds.sandbox.base_lm import TEMPLATE
from lorag.worlds.sandbox.grid import build_suite, splits

__all__ = ["TITLE", "measure"]

TITLE = "Row adapters: one pass for n adapters against a loop over PEFT adapters"

TARGETS = ["q_proj", "v_proj", "down_proj"]
ROWS, RANK = 4, 4


def measure(quick: bool) -> list[dict[str, str | float]]:
    """One row for each n, on the sandbox's base model."""
    where = device()
    base = BaseModel("sandbox-lm", "causal_lm")
    model, objective = base.load(where.type, "float32"), make_objective("causal_lm", base.tokenizer(), {"template": TEMPLATE})
    layout = LoraLayout.from_model(model, TARGETS)
    rows = RowAdapters(model, layout)
    counts = (1, 2) if quick else (1, 8, 64)
    tasks = list(build_suite(splits()["train"][: max(counts)], train=16, test=1, descriptions=1, wording="train"))
    found: list[dict[str, str | float]] = []
    for n in counts:
        adapters = [_random_adapter(layout, seed) for seed in range(n)]
        stacked = Factors.stack([adapter.factors for adapter in adapters], where)
        stacked = {name: (a.requires_grad_(), b.requires_grad_()) for name, (a, b) in stacked.items()}
        batch = objective.sample(tasks[:n], ROWS, "0")
        singles = [objective.sample([task], ROWS, "0") for task in tasks[:n]]
        wrapped = adapters[0].apply_to(copy.deepcopy(model), name="a0")
        for index, adapter in enumerate(adapters[1:], start=1):
            adapter.apply_to(wrapped, name=f"a{index}")

        def together(stacked: dict = stacked, batch: object = batch) -> None:
            with rows.use(stacked) as adapted:
                objective.losses(adapted, batch).sum().backward()
            synchronise(where)

        def one_by_one(wrapped=wrapped, singles: list = singles) -> None:  # noqa: ANN001 - a PEFT model
            for index, single in enumerate(singles):
                wrapped.set_adapter(f"a{index}")
                objective.losses(wrapped, single).sum().backward()
            synchronise(where)

        fast, slow = interleaved_seconds([together, one_by_one], 1 if quick else 7)
        found.append(
            {"n": n, "row adapters ms": round(fast * 1e3, 1), "PEFT loop ms": round(slow * 1e3, 1), "ratio": round(slow / fast, 2)}
        )
    return found


def _random_adapter(layout: LoraLayout, seed: int) -> LoraAdapter:
    rng = torch.Generator().manual_seed(seed)
    factors = {
        m.name: (torch.randn(RANK, m.in_features, generator=rng) * 0.05, torch.randn(m.out_features, RANK, generator=rng) * 0.05)
        for m in layout.modules
    }
    return LoraAdapter(layout, Factors(factors))
