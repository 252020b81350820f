"""How long a bank takes to import many adapters, and whether memory grows with their number.

`python -m benchmarks.imports [--counts 100,1000] [--no-descriptions] [--folder DIR] [--json FILE]`

The base model is a Llama of 5 million parameters (hidden size 256, six layers); an adapter has rank 8 on the query, value
and down projections: 98,304 values. Each count is imported by a process of its own into an empty bank. Memory is what the
process has allocated (RssAnon of /proc, Linux); files that it maps are the page cache's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank, BankBase
from lorag.bank.importing import import_adapters
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.files.artifacts import write_json
from lorag.text.embedding import SentenceEmbedder

WIDTH, LAYERS, INNER, RANK = 256, 6, 768, 8
MODULES = [
    [f"model.layers.{layer}.{part}", inner, outer]
    for layer in range(LAYERS)
    for part, inner, outer in (("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.v_proj", WIDTH, WIDTH), ("mlp.down_proj", INNER, WIDTH))
]
LAYOUT = LoraLayout.from_dict({"target_modules": ["q_proj", "v_proj", "down_proj"], "modules": MODULES, "fan_in_fan_out": False})
BASE = BankBase(BaseModel("llama-5m", "causal_lm"), "sha256:0", LAYOUT, "causal_lm", {})
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "base_model_name_or_path": "llama-5m", "target_modules": ["q_proj", "v_proj"]}


def make_adapters(folder: Path, count: int) -> None:
    """Writes adapters whose rows lie for a half in directions that they share, as those of one base model do."""
    rng = torch.Generator().manual_seed(0)
    shared = {size: torch.randn(16, size, generator=rng) / size**0.5 for size in (WIDTH, INNER)}
    for number in tqdm(range(count), desc="writing adapters"):
        place = folder / f"task-{number:05d}"
        place.mkdir(parents=True)
        tensors = {}
        for module in LAYOUT.modules:
            for factor, size in (("A", module.in_features), ("B", module.out_features)):
                rows = torch.randn(RANK, 16, generator=rng) @ shared[size] * 0.1 + torch.randn(RANK, size, generator=rng) * 0.02
                tensors[f"base_model.model.{module.name}.lora_{factor}.weight"] = (rows if factor == "A" else rows.T).contiguous()
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(CONFIG))
        (place / "description.txt").write_text(f"answer question {number % 37} about topic {number} in the style of writer {number % 101}")


def run(bank: Path, adapters: Path, count: int, described: bool) -> dict[str, Any]:
    """Imports the first `count` adapters into an empty bank, in this process."""
    AdapterBank.create(bank, BASE)
    embedder = SentenceEmbedder.from_pretrained(device="cpu") if described else None
    sources = find_sources([str(adapters)])[:count]
    started, used = time.perf_counter(), time.process_time()
    done = list(import_adapters(bank, sources, embedder=embedder))
    wall, used = time.perf_counter() - started, time.process_time() - used
    assert not any(one.error for one in done) and len(AdapterBank.from_pretrained(bank)) == count  # noqa: S101 - a measurement
    return {"adapters": count, "wall_s": round(wall, 1), "cpu_s": round(used, 1), "threads": torch.get_num_threads()}


def measure(adapters: Path, count: int, described: bool) -> dict[str, Any]:
    """Runs one import in a process of its own and watches what it allocates."""
    with tempfile.TemporaryDirectory(dir=adapters.parent) as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.imports", "--run", f"{folder}/bank", "--counts", str(count)]
        command += ["--folder", str(adapters), *([] if described else ["--no-descriptions"])]
        peak = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own module
            while process.poll() is None:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
                peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
                time.sleep(0.02)
            row: dict[str, Any] = json.loads(process.stdout.read().splitlines()[-1]) if process.stdout else {}
    return {**row, "peak_mib": peak // 1024, "max_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}


def main() -> None:
    """Writes adapters, imports them, prints a line for each count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="100,1000")
    parser.add_argument("--no-descriptions", action="store_true", help="do not compare descriptions")
    parser.add_argument("--folder", type=Path, help="where adapters are written, or already are")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts = [int(count) for count in given.counts.split(",")]
    if given.run is not None:
        print(json.dumps(run(given.run, given.folder, counts[0], not given.no_descriptions)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        adapters = (given.folder or Path(temporary)) / "adapters"
        if not adapters.is_dir():
            make_adapters(adapters, max(counts))
        rows = [measure(adapters, count, not given.no_descriptions) for count in counts]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if given.json is not None:
        write_json(given.json, {"layout_values": LAYOUT.values(RANK), "rows": rows})


if __name__ == "__main__":
    main()
