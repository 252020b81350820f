"""vLLM measured beside `python -m benchmarks.routing speed`: tokens per second, each request with an adapter of its own.

Runs in vLLM's environment (tests/engines/run.sh makes one): `python -m benchmarks.vllm_speed FOLDER`, where FOLDER is the base model's.
Adapters have rank 8 on all linear layers and random values. Time is that of all of vLLM's processes, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import psutil
import torch

from benchmarks.routing import random_adapter
from lorag.adapters.adapter import LoraAdapter
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout


def measure(base: str, rows: tuple[int, ...], tokens: int, folder: Path) -> None:
    """Prints tokens per second for each number of rows, the best of three runs."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    layout = LoraLayout.from_model(BaseModel(base, "causal_lm").load("cpu", "float32"), "all-linear")
    most = max(rows)
    for number in range(most):
        adapter = LoraAdapter(layout, random_adapter(layout, number).factors, base, "CAUSAL_LM")
        adapter.save_pretrained(folder / str(number))
    limits = {"max_num_seqs": most, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": 8, "max_model_len": 256}
    engine = LLM(base, dtype="float32", enforce_eager=True, enable_lora=True, enable_prefix_caching=False, **limits)
    requests = [LoRARequest(str(number), number + 1, str(folder / str(number))) for number in range(most)]
    texts = [f"Write a sentence about the number {number}." for number in range(most)]
    settings = SamplingParams(temperature=0, min_tokens=tokens, max_tokens=tokens, ignore_eos=True)
    engine.generate(texts, SamplingParams(max_tokens=1), lora_request=requests, use_tqdm=False)  # loads all adapters
    for count in rows:
        runs = []
        for _ in range(3):
            began = _work()
            written = engine.generate(texts[:count], settings, lora_request=requests[:count], use_tqdm=False)
            runs.append(_work() - began)
            if any(len(one.outputs[0].token_ids) != tokens for one in written):
                raise RuntimeError("fewer tokens were written than are counted")
        print(f"vLLM, {count} rows, {count} adapters: {count * tokens / min(runs):.1f} tokens per second", flush=True)


def _work() -> float:
    """Seconds that this process and those that it started have computed."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(given.base, tuple(given.rows), given.tokens, Path(folder))
