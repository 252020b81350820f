"""From an embedded description to an adapter of an 8-billion-parameter base model, without text embedding and without disk.

The layout is Llama-3.1-8B's; bases are random, since time does not depend on their values. "ms each" is one description's
share of a batch, network and decode. The floor is a copy of the adapter's bytes in memory; "load" opens its fp32 file from a
warm disk cache and touches every value; "generate" is the whole of `LoraGenerator.generate` for one description, with its
checks and norms, on a CPU. The peak is that of a process that makes one adapter of a stored generator, above what it held
before, the pages of the mapped bases among it.

Bounded by memory: bases are read in bf16 and written in fp32 a piece at a time, which a batch shares, and the adapter is
written once, into fresh pages, which take longer than warm ones. One decomposition k x k a module is the rest; a batch does
not share it, since an adapter's bytes may not depend on its neighbours. `generate` reads the adapter several times more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.machine import device, median_seconds, synchronise
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.runner import BankBase
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods.house import House, HouseSettings, number_places
from lorag.spaces.shared_subspace import SharedSubspace
from lorag.text.conditioning import Conditioner
from lorag.text.embedding import Embedding

__all__ = ["TITLE", "llama_8b", "measure"]

TITLE = "Generating adapters of Llama-3.1-8B"
CASES: dict[str, tuple[str | list[str], int]] = {"all-linear, r = 16": ("all-linear", 16), "q and v, r = 8": (["q_proj", "v_proj"], 8)}
K, EMBEDDING, TOKENS, TOGETHER = 32, 384, 16, 8
EXPERTS = 479


def llama_8b(targets: str | list[str]) -> LoraLayout:
    """Llama-3.1-8B's layout, from its published dimensions on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return LoraLayout.from_model(LlamaForCausalLM(config), targets)


class _AnyEmbedder:
    """Random vectors for any text, at once."""

    name, size = "random", EMBEDDING

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> list[Embedding]:
        rng = torch.Generator().manual_seed(0)
        return [Embedding(torch.randn(EMBEDDING, generator=rng), torch.randn(TOKENS, EMBEDDING, generator=rng)) for _ in texts]


def make_generator(layout: LoraLayout, rank: int) -> LoraGenerator:
    """A house generator of that layout, untrained, with random bases in bf16."""
    rng = torch.Generator().manual_seed(0)

    def basis(size: int) -> torch.Tensor:
        return (torch.randn(size, K, generator=rng) / size**0.5).bfloat16()

    mean = torch.randn(len(layout), K, K, generator=rng) * 0.01
    space = SharedSubspace(
        layout,
        tuple(basis(module.in_features) for module in layout.modules),
        tuple(basis(module.out_features) for module in layout.modules),
        mean,
        torch.full((len(layout),), 0.01),
    )
    method = House(HouseSettings(decoder="shared"))
    kinds, depths = (places.tolist() for places in number_places(layout.places))
    members = 1 + method.settings.ensemble.count
    method.shape = {"embedding": EMBEDDING, "code": space.size, "members": members, "kinds": kinds, "depths": depths}
    torch.manual_seed(0)
    method.network = method.build(method.shape).requires_grad_(False).eval()
    names = [f"task-{number}" for number in range(EXPERTS)]
    conditioner = Conditioner(names, torch.nn.functional.normalize(torch.randn(EXPERTS, EMBEDDING, generator=rng), dim=1))
    base = BankBase(BaseModel("llama-3.1-8b", "causal_lm"), "revision:main", layout, "causal_lm", {})
    return LoraGenerator(base, space, conditioner, method, _AnyEmbedder(), rank)


def _copy(values: int, where: torch.device) -> float:
    """Seconds to copy that many fp32 values in memory."""
    source, target = torch.zeros(values, device=where), torch.empty(values, device=where)

    def copy() -> None:
        target.copy_(source)
        synchronise(where)

    return median_seconds(copy, 5)


def _peak(folder: Path) -> float:
    """MiB that a process of its own needs at most, above what it had, to make one adapter of a stored generator."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.generation", "--peak", str(folder)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)  # noqa: S603 - our own module


def _peak_here(folder: Path) -> float:
    generator = LoraGenerator.from_pretrained(folder, embedder=_AnyEmbedder(), device="cpu")
    status = Path("/proc/self/status")

    def held(name: str) -> int:
        return int(next(line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name)))

    before = held("RssAnon") + held("RssShmem")  # without what is mapped: the trial on opening has touched the bases
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    generator.generate("summarise legal text", on_unknown="ignore")
    return (held("VmHWM") - before) / 1024


def _case(name: str, where: torch.device, batches: Sequence[int], repeats: int) -> list[dict[str, str | float]]:
    targets, rank = CASES[name]
    generator = make_generator(llama_8b(targets), rank)
    with tempfile.TemporaryDirectory(prefix="lorag-") as temporary:
        folder = Path(temporary)
        generator.save_pretrained(folder / "g")
        stored = sum(path.stat().st_size for path in (folder / "g").iterdir())
        peak = _peak(folder / "g")
        adapter = generator.generate("summarise legal text", on_unknown="ignore")
        whole = median_seconds(lambda: generator.generate("summarise legal text", on_unknown="ignore"), repeats)
        save_file(adapter.state_dict(), folder / "a.safetensors")
        load = median_seconds(lambda: [t.sum() for t in load_file(folder / "a.safetensors").values()], repeats)
    values = generator.base.layout.values(rank)
    condition = generator.condition("summarise legal text")
    space, rng = generator.space.to(where), torch.Generator()
    if isinstance(generator.method, House) and generator.method.network is not None:
        generator.method.network.to(where)
    floor = _copy(values, where)
    rows: list[dict[str, str | float]] = []
    for batch in batches:

        def make(batch: int = batch) -> None:
            for start in range(0, batch, TOGETHER):  # what is made is dropped: 64 of them are 10 GB
                count = min(TOGETHER, batch - start)
                codes = torch.cat([generator.method.generate(condition, rng) for _ in range(count)]).to(where)
                space.decode(codes, rank)
            synchronise(where)

        used, began = time.process_time(), time.perf_counter()
        seconds = median_seconds(make, repeats if batch == 1 else 1) / batch
        share = (time.process_time() - used) / (time.perf_counter() - began)
        rows.append(
            {
                "adapter": name,
                "values": values,
                "device": where.type,
                "batch": batch,
                "ms each": round(seconds * 1e3, 1),
                "CPU ms each": round(seconds * share * 1e3, 1),
                "floor ms": round(floor * 1e3, 1),
                "times the floor": round(seconds / floor, 1),
                "load ms": round(load * 1e3, 1),
                "generate ms": round(whole * 1e3, 1),
                "peak MiB": round(peak),
                "generator MiB": round(stored / 2**20, 1),
                f"% of {EXPERTS} adapters in bf16": round(100 * stored / (EXPERTS * values * 2), 2),
            }
        )
    return rows


def measure(quick: bool) -> list[dict[str, str | float]]:
    """A row for each adapter and batch: 1 and 8, and 64 if there is time."""
    return [row for name in CASES for row in _case(name, device(), (1, 8) if quick else (1, 8, 64), 3 if quick else 7)]


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="batches of 64, and more repeats")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(_peak_here(given.peak))
        return
    for row in measure(not given.full):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
