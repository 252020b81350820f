"""What a benchmark runs on, in words that name nobody, and how it takes time there."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["describe", "device", "interleaved_seconds", "load_average", "median_seconds", "memory_bytes", "peak_bytes", "synchronise"]


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_bytes() -> int:
    """Memory in which a network may live: the GPU's, or the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes(where: torch.device | None = None) -> float:
    """Highest memory so far: of this process, or what torch allocated on a GPU."""
    if where is not None and where.type == "cuda":
        return float(torch.cuda.max_memory_allocated(where))
    # Not getrusage: that maximum outlives exec, so that a child would report its parent's memory.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise RuntimeError("peak memory is read from /proc, which this system lacks")
    return float(found.group(1)) * 1024


def describe() -> str:
    """Processor, cores, memory and versions in one line; no name of a host, a user or a folder."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
        processor = f"{found.group(1).strip()} ({processor})"
    wide = next((name for flag, name in (("amx_bf16", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2")) if f" {flag}" in text), None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        processor + (f" with {wide}" if wide else ""),
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"{memory:.0f} GiB of memory",
    ]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        parts.insert(0, f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def load_average() -> float:
    """Processes that ran or waited for a core in the last minute: on a busy machine times are too long, ratios less so."""
    return os.getloadavg()[0]


def synchronise(where: torch.device) -> None:
    """Waits for a GPU to finish; does nothing on a CPU."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def median_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of a call, after one call that is not counted."""
    return interleaved_seconds([run], repeats)[0]


def interleaved_seconds(runs: list[Callable[[], object]], repeats: int = 7) -> list[float]:
    """Median seconds of each call, taken in turn, so that what disturbs the machine disturbs all of them alike.

    One call of each is not counted.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]
