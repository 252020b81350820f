"""One training step of the CVAE over codes, and of the published convolutional network over raw factors, for the same adapters.

The convolutional network (arXiv 2501.17635) keeps about 185 activations for each value of an adapter, so bytes and time grow
with the adapter: memory bandwidth bounds it. The CVAE sees principal coordinates of codes, as many as there are experts less
one; its step is bounded by one product of a code with their basis (c x p values, read once for a batch) and by the overhead of
some hundred small kernels, and its memory by that basis. Both train on 2 adapters per step with AdamW. Each network has a process
of its own: peak is the highest resident set (on a GPU: what torch allocated there), net is peak less what a process holds that
has imported the same modules and does nothing. The bank itself is not held by either. "Generate" makes one adapter's factors
from a description that is embedded already; for codes it includes the singular value decompositions and the products with the
bases, whose bytes (`bases`) are not part of the training process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.machine import device, median_seconds, memory_bytes, peak_bytes, synchronise
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.methods.icm_lora import IcmLora, IcmLoraSettings
from lorag.methods.vae import negative_elbo
from lorag.networks.conv_vae import ConvVae
from lorag.networks.vae import ConditionalVae
from lorag.spaces import SharedSubspace
from lorag.spaces.principal_codes import PrincipalCodes

__all__ = ["TITLE", "measure"]

TITLE = "Training step of a CVAE: over codes, and the published convolutional network"

BATCH, EXPERTS, K, EMBEDDING, TOKENS = 2, 256, 32, 384, 16


@dataclass(frozen=True)
class Adapter:
    """An adapter's form: sizes (i, o) of one layer's modules, number of layers, rank."""

    name: str
    layer: tuple[tuple[int, int], ...]
    layers: int
    rank: int

    @property
    def layout(self) -> LoraLayout:
        """A layout of these sizes."""
        sizes = [(f"layers.{n}.part{p}", i, o) for n in range(self.layers) for p, (i, o) in enumerate(self.layer)]
        return LoraLayout(("all",), tuple(ModuleShape(*size) for size in sizes))


_Q, _KV, _UP, _DOWN = (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)
ADAPTERS = (
    # Published for Florence-2: 1,929,928 values; here 157 modules of its text width, 1,929,216 values.
    Adapter("Florence-2, r = 8", ((768, 768),), 157, 8),
    Adapter("8 B, q and v, r = 8", (_Q, _KV), 32, 8),
    Adapter("8 B, all linear, r = 8", (_Q, _KV, _KV, _Q, _UP, _UP, _DOWN), 32, 8),
)
TINY = Adapter("two modules of 64", ((64, 64),), 2, 4)


def measure(quick: bool, child: Callable[[str, Adapter], dict[str, float]] | None = None) -> list[dict[str, str | float]]:
    """One row an adapter and network; `quick` takes one tiny adapter, in this process, so that its peaks say nothing.

    `child` measures in a process of its own.
    """
    child = child or _child
    run = _here if quick else child
    rows: list[dict[str, str | float]] = []
    known: list[tuple[int, float]] = []  # values of an adapter, net bytes of the convolutional network
    bare = child("bare", TINY)["peak"]
    for adapter in (TINY,) if quick else ADAPTERS:
        values = adapter.layout.values(adapter.rank)
        codes = run("codes", adapter)
        ours = codes | run("generate", adapter)
        rows.append(_row(adapter, "CVAE over codes", ours, bare))
        estimate = _extrapolate(known, values)
        available = memory_bytes()
        if estimate is not None and estimate + bare > 0.95 * available:
            text = f"does not fit: about {estimate / 1e9:.0f} GB of {available / 1e9:.0f}"
            rows.append({"adapter": adapter.name, "values": values, "network": "convolutions", "step ms": text})
            continue
        conv = run("conv", adapter)
        known.append((values, conv["peak"] - bare))
        row = _row(adapter, "convolutions", conv, bare)
        net = max(1.0, codes["peak"] - bare)
        row |= {"time ratio": round(conv["step"] / codes["step"]), "net memory ratio": round((conv["peak"] - bare) / net, 1)}
        rows.append(row)
    return rows


def _row(adapter: Adapter, network: str, found: dict[str, float], bare: float) -> dict[str, str | float]:
    row: dict[str, str | float] = {"adapter": adapter.name, "values": adapter.layout.values(adapter.rank), "network": network}
    row |= {"parameters": round(found["parameters"]), "step ms": round(found["step"] * 1e3, 2)}
    row |= {"peak MB": round(found["peak"] / 1e6), "net MB": round((found["peak"] - bare) / 1e6)}
    return row | {"generate ms": round(found["generate"] * 1e3, 1), "bases MB": round(found.get("bases", 0.0) / 1e6)}


def _extrapolate(known: list[tuple[int, float]], values: int) -> float | None:
    """Net bytes at a number of values, in a straight line through the last two measurements."""
    if len(known) < 2:
        return None
    (x0, y0), (x1, y1) = known[-2:]
    return y1 + (values - x1) * (y1 - y0) / (x1 - x0)


def _child(what: str, adapter: Adapter) -> dict[str, float]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vae_step", what, adapter.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode:
        raise RuntimeError(f"{what} for {adapter.name}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _build(what: str, adapter: Adapter, size: int, code: int) -> tuple[ConditionalVae | ConvVae, PrincipalCodes | None]:
    torch.manual_seed(0)
    if what == "conv":
        return ConvVae(size, EMBEDDING), None
    coordinates = min(EXPERTS - 1, code)
    network = IcmLora(IcmLoraSettings()).build({"embedding": EMBEDDING, "vector": 0, "elements": coordinates})
    # Rows of nearly unit length; that they are orthogonal changes no time.
    basis = torch.randn(coordinates, code).div_(code**0.5)
    return network, PrincipalCodes(torch.zeros(code), basis, 1.0)


def _train(what: str, adapter: Adapter, where: torch.device) -> dict[str, float]:
    """Median seconds of a training step, and of making one adapter by the convolutional network."""
    layout = adapter.layout
    k = min(K, *(min(m.in_features, m.out_features) for m in layout.modules))
    values, code = layout.values(adapter.rank), len(layout) * k * k
    network, basis = _build(what, adapter, values, code)
    network.to(where).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(0)
    condition = _condition(BATCH, rng, where)
    targets = torch.randn(BATCH, values if basis is None else code, generator=rng)

    def step() -> None:
        x = targets if basis is None else basis.to_coordinates(targets)
        noise = torch.randn(BATCH, network.latent, generator=rng)
        made = network(x.to(where), noise.to(where), *condition, None)
        optimizer.zero_grad(set_to_none=True)
        negative_elbo(made, x.to(where), 0.005, each=True).backward()
        optimizer.step()
        synchronise(where)

    seconds = median_seconds(step, 2 if what == "conv" and values > 1e6 else 50)
    found = {"step": seconds, "peak": peak_bytes(where), "parameters": float(sum(p.numel() for p in network.parameters()))}
    if what == "conv":
        found["generate"] = _generating(network, where, lambda x: x)
    return found


def _generating(network: nn.Module, where: torch.device, rest) -> float:  # noqa: ANN001 - a function of coordinates
    """Median seconds from a condition to what `rest` makes of the network's output."""
    network.eval()
    rng = torch.Generator().manual_seed(1)
    condition = _condition(1, rng, where)

    def make() -> None:
        with torch.inference_mode():
            h = network.read(*condition, None)  # type: ignore[operator]
            rest(network.decode(torch.randn(1, network.latent, generator=rng).to(where), h))  # type: ignore[operator]
        synchronise(where)

    return median_seconds(make, 5)


def _condition(batch: int, rng: torch.Generator, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    pooled, tokens = torch.randn(batch, EMBEDDING, generator=rng), torch.randn(batch, TOKENS, EMBEDDING, generator=rng)
    return pooled.to(where), tokens.to(where), torch.ones(batch, TOKENS, dtype=torch.bool, device=where)


def _generate(adapter: Adapter, where: torch.device) -> dict[str, float]:
    """Median seconds from a condition to factors through codes, and the bytes of the bases."""
    layout = adapter.layout
    k = min(K, *(min(m.in_features, m.out_features) for m in layout.modules))
    network, basis = _build("codes", adapter, 0, len(layout) * k * k)
    if basis is None:
        raise RuntimeError("codes have coordinates")
    ins = tuple((torch.randn(m.in_features, k) / m.in_features**0.5).bfloat16() for m in layout.modules)
    outs = tuple((torch.randn(m.out_features, k) / m.out_features**0.5).bfloat16() for m in layout.modules)
    space = SharedSubspace(layout, ins, outs, torch.zeros(len(layout), k, k), torch.ones(len(layout))).to(where)
    mean, rows = basis.mean.to(where), basis.basis.to(where)
    placed = PrincipalCodes(mean, rows, basis.scale)
    seconds = _generating(network.to(where), where, lambda x: space.decode(placed.to_codes(x), adapter.rank))
    return {"generate": seconds, "bases": float(sum(u.numel() * u.element_size() for u in (*ins, *outs)))}


def _here(what: str, adapter: Adapter) -> dict[str, float]:
    """One measurement in this process."""
    where = device()
    if what == "bare":
        # Kernels, autograd and optimiser are loaded on first use, which is not a cost of a network.
        network = nn.Linear(1, 1).to(where)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.zeros(1, 1, device=where)).sum().backward()
        optimizer.step()
        return {"peak": peak_bytes(where)}
    return _generate(adapter, where) if what == "generate" else _train(what, adapter, where)


def main() -> None:
    """Prints one measurement, for `_child`."""
    what, name = sys.argv[1:]
    print(json.dumps(_here(what, next(one for one in (*ADAPTERS, TINY) if one.name == name))))


if __name__ == "__main__":
    main()
