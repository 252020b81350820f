"""The nearest of many unit vectors: exact, or above 100,000 of them through an index in a fraction of the time.

The index (extra `faiss`) sorts vectors into cells by k-means and keeps four bits for each four values of a vector, by product
quantisation (Jégou et al., TPAMI 2011) in the layout of André et al. (VLDB 2015), which are compared in registers. It reads
an eighth of the cells, and the best found there are compared exactly, so that every cosine that is given is exact and only a
neighbour may be missed. `benchmarks/retrieval.py` measures it.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["MANY", "NeighbourSearch"]

logger = logging.getLogger(__name__)

MANY = 100_000  # vectors above which an index pays
_PER_CODE = 4  # values of a vector that share one code of four bits
_SAMPLE = 48  # vectors a cell that k-means sees
_ROUNDS = 8
_READ = 8  # one in so many cells is read
_COMPARED = 512  # candidates compared exactly, at least
_CHUNK = 65_536


class NeighbourSearch:
    """Finds vectors with the largest inner products with a query.

    Args:
        vectors: Unit vectors (n, e), fp32, on the CPU; they are kept, not copied.
        many: Number of vectors above which the index is used where it is installed.
    """

    def __init__(self, vectors: Tensor, many: int = MANY) -> None:
        self.vectors, self._index = vectors, None
        if len(vectors) > many:
            faiss = _faiss()
            if faiss is None:
                logger.info(
                    '%d experts are compared one by one with each description; pip install "lorag[faiss]" finds neighbours faster',
                    len(vectors),
                )
            else:
                began = time.monotonic()
                self._index = _build(faiss, vectors)
                logger.info("%d experts: an index of their descriptions was made in %.0f s", len(vectors), time.monotonic() - began)

    @property
    def approximate(self) -> bool:
        """Whether an index is used."""
        return self._index is not None

    def nearest(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The nearest vectors, best first.

        Args:
            query: Unit vector (e,).
            count: How many, f; all if there are fewer.

        Returns:
            Their cosines (f,), which are exact, and their places (f,).
        """
        count = min(count, len(self.vectors))
        if self._index is None:
            best = (self.vectors @ query).topk(count)
            return best.values, best.indices
        _, indices = self._index.search(_padded(query[None]).numpy(), max(_COMPARED, 2 * count))
        places = torch.from_numpy(indices[0])
        places = places[places >= 0]
        best = (self.vectors[places] @ query).topk(min(count, len(places)))
        return best.values, places[best.indices]


def _faiss() -> Any:  # noqa: ANN401 - the module, or None
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _padded(vectors: Tensor) -> Tensor:
    """Vectors with zeros behind them, up to a length that codes divide."""
    return torch.nn.functional.pad(vectors.float(), (0, -vectors.shape[1] % _PER_CODE)).contiguous()


def _build(faiss: Any, vectors: Tensor) -> Any:  # noqa: ANN401 - the module and its index
    length = vectors.shape[1] + -vectors.shape[1] % _PER_CODE
    cells = 2 ** (1 + round(math.log2(len(vectors)) / 2))
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(length), length, cells, length // _PER_CODE, 4, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid, index.pq.cp.niter = _ROUNDS, _SAMPLE, _ROUNDS
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: _SAMPLE * cells]
    index.train(_padded(vectors[chosen]).numpy())
    for start in range(0, len(vectors), _CHUNK):
        index.add(_padded(vectors[start : start + _CHUNK]).numpy())
    index.nprobe = max(1, cells // _READ)
    return index
