"""Neighbours among many: the index finds what exact search finds, gives exact cosines, and conditions live on what was found."""

import sys

import pytest
import torch

from benchmarks.retrieval import make_vectors
from lorag.text import conditioning
from lorag.text.conditioning import Conditioner, mixture
from lorag.text.embedding import Embedding
from lorag.text.search import NeighbourSearch


@pytest.fixture(scope="module")
def world():
    """20,000 clustered vectors, and queries."""
    pytest.importorskip("faiss", reason='faiss is not installed: pip install "lorag[faiss]"')
    return make_vectors(20_000)


@pytest.fixture(scope="module")
def index(world):
    """An index of them."""
    found = NeighbourSearch(world[0], many=1000)
    assert found.approximate
    return found


@pytest.mark.slow
def test_the_index_finds_the_nearest_four(world, index):
    """recall@4 of at least .98 over 200 queries; and every cosine that it gives is that of the expert, best first."""
    vectors, queries = world
    exact, hits = NeighbourSearch(vectors, many=len(vectors)), 0
    assert not exact.approximate
    for query in queries:
        cosines, places = index.nearest(query, 4)
        assert torch.allclose(cosines, vectors[places] @ query, atol=1e-6)
        assert (cosines.diff() <= 0).all()
        hits += len(set(places.tolist()) & set(exact.nearest(query, 4)[1].tolist()))
    assert hits / (4 * len(queries)) >= 0.98


@pytest.mark.slow
def test_an_index_is_made_the_same_twice(world, index):
    """No draw but by a seed: the same neighbours from a second index of the same vectors."""
    again = NeighbourSearch(world[0], many=1000)
    for query in world[1][:50]:
        assert torch.equal(index.nearest(query, 16)[1], again.nearest(query, 16)[1])


def test_lengths_that_codes_do_not_divide_and_counts_beyond_the_bank(world):
    """Vectors of 30 values, and more neighbours asked for than there are."""
    vectors = torch.nn.functional.normalize(world[0][:2000, :30], dim=1)
    search = NeighbourSearch(vectors, many=100)
    assert search.approximate and search.nearest(vectors[7], 1)[1].tolist() == [7]
    few = NeighbourSearch(vectors[:3], many=100)
    assert not few.approximate and len(few.nearest(vectors[0], 9)[0]) == 3


def test_without_faiss_search_stays_exact_and_says_so(world, monkeypatch, caplog):
    """One line with the remedy, and the right neighbours."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    with caplog.at_level("INFO", logger="lorag"):
        search = NeighbourSearch(world[0], many=1000)
    assert not search.approximate and "lorag[faiss]" in caplog.text and "20000 experts" in caplog.text
    assert torch.equal(search.nearest(world[1][0], 4)[1], (world[0] @ world[1][0]).topk(4).indices)


def _conditioners(world, monkeypatch):
    """One that compares with every expert, and one that searches."""
    names = [f"t{n}" for n in range(len(world[0]))]
    exact, many = Conditioner(names, world[0]), Conditioner(names, world[0])
    embedding = Embedding(world[1][3], world[1][3][None])
    right = exact(embedding), exact(embedding, masked=torch.arange(len(world[0])) == int((world[0] @ world[1][3]).argmax()))
    outside = exact.outside(embedding)
    monkeypatch.setattr(conditioning, "MANY", 1000)
    many._search = NeighbourSearch(world[0], many=1000)
    return many, embedding, right, outside


@pytest.mark.slow
def test_a_condition_among_many_experts_holds_the_nearest(world, monkeypatch):
    """Same neighbours and novelty, and the same mixture of the nearest; the others, and excluded ones, have -1."""
    many, embedding, (right, without), outside = _conditioners(world, monkeypatch)
    found = many(embedding)
    assert found.neighbours[:4] == right.neighbours[:4] and found.distance == pytest.approx(right.distance, abs=1e-6)
    assert 8 <= int((found.similarities > -1).sum()) <= 64 and found.similarities.shape == right.similarities.shape
    codes = torch.randn(len(many.names), 5, generator=torch.Generator().manual_seed(0))
    means = [mixture(one.similarities, codes, None, top=4, temperature=0.05).mean for one in (found, right)]
    assert torch.allclose(*means, atol=1e-5)
    place = int(right.similarities.argmax())
    left = many(embedding, masked=torch.arange(len(many.names)) == place)
    assert left.similarities[place] == -1 and left.neighbours[:3] == without.neighbours[:3]
    assert many.outside(embedding) == pytest.approx(outside, abs=1e-4)
