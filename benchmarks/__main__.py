"""Row adapters against a loop over PEFT adapters, expert building against one-by-one training, and generation latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from lorag.adapters.adapter import LoraAdapter
from lorag.base_models.base_model import BaseModel
from lorag.base_models.layout import LoraLayout
from lorag.generator import default_generator
from lorag.objectives import make_objective
from lorag.optimisation.experts import ExpertConfig, train_group
from lorag.row_adapters import RowAdapters, stack_adapters
from lorag.sandbox.base_lm import TEMPLATE
from lorag.sandbox.grid import build_suite, splits

TARGETS = ["q_proj", "v_proj", "down_proj"]
ROWS, RANK = 4, 4


def median(run: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of a call, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_adapter(layout: LoraLayout, seed: int) -> LoraAdapter:
    """An adapter with random factors."""
    rng = torch.Generator().manual_seed(seed)
    factors = {
        m.name: (torch.randn(RANK, m.in_features, generator=rng) * 0.05, torch.randn(m.out_features, RANK, generator=rng) * 0.05)
        for m in layout.modules
    }
    return LoraAdapter(layout, factors, float(RANK))


def forward_backward(counts: tuple[int, ...] = (1, 8, 64)) -> None:
    """One forward and backward pass of n adapters with a few rows each: row adapters, and PEFT adapters one after another."""
    base = BaseModel("sandbox-lm", "causal_lm")
    model, objective = base.load("cpu"), make_objective("causal_lm", base.tokenizer(), {"template": TEMPLATE})
    layout = LoraLayout.from_model(model, TARGETS)
    rows = RowAdapters(model, layout)
    tasks = list(build_suite(splits()["train"][: max(counts)], train=16, test=1, descriptions=1, wording="train"))
    print(f"forward and backward, sandbox base, {ROWS} rows an adapter, rank {RANK}")
    print(f"{'n':>4}{'row adapters':>16}{'PEFT loop':>14}{'ratio':>8}")
    for n in counts:
        adapters = [random_adapter(layout, seed) for seed in range(n)]
        stacked = {name: (a.requires_grad_(), b.requires_grad_()) for name, (a, b) in stack_adapters(adapters).items()}
        batch = objective.sample(tasks[:n], ROWS, "0")
        singles = [objective.sample([task], ROWS, "0") for task in tasks[:n]]
        wrapped = adapters[0].apply_to(copy.deepcopy(model), name="a0")
        for index, adapter in enumerate(adapters[1:], start=1):
            adapter.apply_to(wrapped, name=f"a{index}")

        def together(stacked: dict = stacked, batch: object = batch) -> None:
            with rows.use(stacked) as adapted:
                objective.losses(adapted, batch).sum().backward()

        def one_by_one(wrapped: object = wrapped, singles: list = singles) -> None:
            for index, single in enumerate(singles):
                wrapped.set_adapter(f"a{index}")
                objective.losses(wrapped, single).sum().backward()

        fast, slow = median(together), median(one_by_one)
        print(f"{n:>4}{fast * 1e3:>13.1f} ms{slow * 1e3:>11.1f} ms{slow / fast:>8.2f}")


def experts_a_minute(group: int = 24, steps: int = 10, batch: int = 8) -> None:
    """Optimizer steps of expert training: a group at once, and one by one with stock PEFT and Adam."""
    base = BaseModel("sandbox-lm", "causal_lm")
    model, objective = base.load("cpu"), make_objective("causal_lm", base.tokenizer(), {"template": TEMPLATE})
    rows = RowAdapters(model, LoraLayout.from_model(model, TARGETS))
    tasks = list(build_suite(splits()["train"][:group], train=64, test=1, descriptions=1, wording="train"))
    config = ExpertConfig(target_modules=TARGETS, steps=steps, batch=batch, checkpoints=1)
    together = median(lambda: train_group(rows, objective, tasks, RANK, config), 3) / (group * steps)

    def alone() -> None:
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        for step in range(steps):
            loss = objective.losses(wrapped, objective.sample(tasks[:1], batch, str(step))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    single = median(alone, 3) / steps
    print(f"\nexpert training, {batch} rows a step, milliseconds a step and expert: {together * 1e3:.2f} with {group} at once,")
    print(f"{single * 1e3:.2f} one by one with PEFT, ratio {single / together:.2f}")
    print(f"experts a minute at 80 steps: {60 / (together * 80):.1f} against {60 / (single * 80):.1f}")


def generation_latency() -> None:
    """One description to an adapter in memory, with the embedder and without."""
    generator = default_generator()
    texts = iter(f"summarise legal text number {number}" for number in range(100))
    whole = median(lambda: generator.generate(next(texts)), 15)
    condition = generator.condition("summarise legal text")
    rng = torch.Generator().manual_seed(0)
    rest = median(lambda: generator.space.decode(generator.method.generate(condition, rng), generator.rank), 15)
    print(f"\ngeneration on the sandbox base: {whole * 1e3:.1f} ms a description, of which {rest * 1e3:.1f} ms network and decoding")


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    forward_backward()
    experts_a_minute()
    generation_latency()
