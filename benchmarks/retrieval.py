"""Nearest neighbours among many descriptions: time to make the index, time of one query, recall@4 against exact search, memory.

`python -m benchmarks.retrieval [--quick]`

Vectors are synthetic and clustered as descriptions are: what all share, topics, families of tasks within a topic, tasks, and
wordings. An expert is the mean of four wordings of its task, a query is another wording. The shares are set so that a query
has a median cosine of about .67 to the nearest expert and .6 to the fourth, as descriptions of the embedded world have under
MiniLM (.59 and .51). Times are of one thread and count this thread's own work, which other programs on the machine do not change.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorag.text.search import NeighbourSearch

__all__ = ["TITLE", "measure"]

TITLE = "Nearest experts by description (384 dimensions, one thread)"
WIDTH, QUERIES, KEPT = 384, 200, 4
SHARED, TOPIC, FAMILY, TASK, WORDING = 0.18, 0.12, 0.12, 0.10, 0.48  # shares of a wording's squared length
TASKS_A_TOPIC, TASKS_A_FAMILY, WORDINGS = 1000, 33, 4
CHUNK = 50_000


def make_vectors(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors of experts (n, e), and of queries (q, e) that are other wordings of some of their tasks."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = 1 / (1 + torch.arange(WIDTH) / 60)
    spectrum = spectrum / spectrum.square().sum().sqrt()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng))[0]

    def draw(rows: int, share: float) -> Tensor:
        return torch.randn(rows, WIDTH, generator=rng) * spectrum * share**0.5

    shared, topics, families = draw(1, SHARED), draw(count // TASKS_A_TOPIC + 1, TOPIC), draw(count // TASKS_A_FAMILY + 1, FAMILY)
    asked = torch.randperm(count, generator=rng)[:QUERIES]
    experts, queries = torch.empty(count, WIDTH), torch.empty(QUERIES, WIDTH)
    for start in range(0, count, CHUNK):
        places = torch.arange(start, min(start + CHUNK, count))
        tasks = shared + topics[places // TASKS_A_TOPIC] + families[places // TASKS_A_FAMILY] + draw(len(places), TASK)
        experts[places] = torch.nn.functional.normalize((tasks + draw(len(places), WORDING / WORDINGS)) @ turn, dim=1)
        here = ((asked >= start) & (asked < start + CHUNK)).nonzero()[:, 0]
        queries[here] = (tasks[asked[here] - start] + draw(len(here), WORDING)) @ turn
    return experts, torch.nn.functional.normalize(queries, dim=1)


def _allocated() -> float:
    """Megabytes that this process has allocated (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _row(
    name: str, build_s: float, memory: float, find: Callable[[Tensor], Tensor], queries: Tensor, right: Tensor
) -> dict[str, str | float]:
    find(queries[0])
    times, hits = [], 0
    for query, wanted in zip(queries, right.tolist(), strict=True):
        began = time.thread_time()
        found = find(query)
        times.append(time.thread_time() - began)
        hits += len(set(found.tolist()) & set(wanted))
    return {
        "search": name,
        "build, s": round(build_s, 1),
        "query, ms (median)": round(statistics.median(times) * 1e3, 2),
        f"recall@{KEPT}": round(hits / right.numel(), 4),
        "memory beyond the vectors, MB": round(memory),
    }


def measure(quick: bool) -> list[dict[str, str | float]]:
    """One row for exact search and one for the index, with 10^5 vectors (quick) or 10^6."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        import faiss

        faiss.omp_set_num_threads(1)
    except ImportError:
        return [{"search": 'faiss is not installed: pip install "lorag[faiss]"'}]
    try:
        vectors, queries = make_vectors(10**5 if quick else 10**6)
        exact = NeighbourSearch(vectors, many=len(vectors))
        right = torch.stack([exact.nearest(query, KEPT)[1] for query in queries])
        size = f"{len(vectors):,} experts, "
        rows = [_row(f"{size}exact", 0.0, 0.0, lambda query: exact.nearest(query, KEPT)[1], queries[:20], right[:20])]
        before, began = _allocated(), time.process_time()
        index = NeighbourSearch(vectors, many=0)
        built, memory = time.process_time() - began, _allocated() - before
        rows.append(_row(f"{size}index", built, memory, lambda query: index.nearest(query, KEPT)[1], queries, right))
        return rows
    finally:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^5 vectors instead of 10^6")
    print(TITLE)
    for row in measure(parser.parse_args().quick):
        print(", ".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
