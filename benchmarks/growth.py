"""How fitting and decoding grow: CPU seconds while one size at a time is doubled three times, and the exponent of that growth.

The middle is 4 modules of 4,096 by 4,096, 32 synthetic experts of rank 4, k = 16. An exponent of 1 is proportional growth, 0 none;
it is the slope of a straight line through the logarithms, and small sizes flatten it, because starting kernels costs the same
for each. CPU seconds of this process, on one thread, so that other work on the machine counts little.
Sides of at most 32 k are taken into the fit as Gram matrices, 2 n r (i² + o²) operations a module, and decomposed once; longer
ones are compressed again and again, 48 k n r (i + o) operations. Decoding is bounded by one singular value decomposition of k by k
for each module, and by products with the bases, 2 k r (i + o). scaling.md works out what follows for large models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.spaces import SharedSubspace

__all__ = ["TITLE", "measure"]

TITLE = "Growth of the weight space with experts, modules, width, rank and k"

MIDDLE = {"experts": 32, "modules": 4, "width": 4096, "rank": 4, "k": 16}  # long sides: of more than 32 k
SMALL = {"experts": 4, "modules": 2, "width": 64, "rank": 2, "k": 8}
CODES = 4


def measure(quick: bool) -> list[dict[str, str | float]]:
    """A row for fitting and one for decoding, for each size that grows."""
    middle, doublings = (SMALL, 1) if quick else (MIDDLE, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows: list[dict[str, str | float]] = []
        for grows, start in middle.items():
            sizes = [start * 2**step // 4 for step in range(doublings + 1)] if not quick else [start, start * 2]
            times = [_times(middle | {grows: size}, 1 if quick else 3) for size in sizes]
            for what, index in (("fit", 0), ("decode", 1)):
                if (what, grows) == ("decode", "experts"):
                    continue  # no expert is read
                found = [each[index] for each in times]
                row: dict[str, str | float] = {"what": what, "grows": grows, "from": sizes[0], "to": sizes[-1]}
                row |= {"first CPU ms": round(found[0] * 1e3, 2), "last CPU ms": round(found[-1] * 1e3, 2)}
                rows.append(row | {"exponent": round(_slope(sizes, found), 2)})
        return rows
    finally:
        torch.set_num_threads(threads)


def _times(sizes: dict[str, int], repeats: int) -> tuple[float, float]:
    """CPU seconds of a fit, and of decoding one code, at these sizes."""
    width, rank = sizes["width"], sizes["rank"]
    layout = LoraLayout(("all",), tuple(ModuleShape(f"m{number}", width, width) for number in range(sizes["modules"])))
    rng = torch.Generator().manual_seed(0)
    experts = [
        LoraAdapter(
            layout,
            Factors({name: (torch.randn(rank, width, generator=rng), torch.randn(width, rank, generator=rng)) for name in layout.names}),
        )
        for _ in range(sizes["experts"])
    ]
    space = SharedSubspace.fit(lambda: iter(experts), layout, sizes["k"])
    codes = torch.randn(CODES, space.size, generator=rng)
    fit = _least(lambda: SharedSubspace.fit(lambda: iter(experts), layout, sizes["k"]), repeats)
    return fit, _least(lambda: space.decode(codes, rank), repeats) / CODES


def _least(run: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of a call: what disturbs it only adds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


def _slope(sizes: list[int], times: list[float]) -> float:
    """Slope of a least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(seconds) for seconds in times]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)
