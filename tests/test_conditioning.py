"""Conditions: cosines, neighbours, exclusion, novelty and the mixture come out as worked out by hand."""

import pytest
import torch

from lorag.text.conditioning import Conditioner, mixture
from lorag.text.embedding import Embedding


def _embedding(*values):
    pooled = torch.tensor(values)
    return Embedding(pooled, pooled[None])


# Three experts in the plane: a along x, b at 45 degrees between its two wordings, c along -y.
AXES = {"a": [(1.0, 0.0)], "b": [(1.0, 0.0), (0.0, 1.0)], "c": [(0.0, -1.0)]}


@pytest.fixture
def conditioner():
    return Conditioner.fit(list(AXES), [[_embedding(*one) for one in own] for own in AXES.values()])


def test_an_expert_stands_at_the_mean_of_its_wordings(conditioner):
    """Averaged, then of unit length: b's two orthogonal wordings give the diagonal."""
    assert torch.allclose(conditioner.centroids, torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0, -1]]))


def test_cosines_and_neighbours_by_hand(conditioner):
    """A description at (0.6, 0.8): cosines .6, 1.4/√2 and -.8; the nearest first, rounded, as many as asked for."""
    found = conditioner(_embedding(0.6, 0.8))
    assert torch.allclose(found.similarities, torch.tensor([0.6, 1.4 * 0.5**0.5, -0.8]))
    assert found.neighbours == (("b", 0.9899), ("a", 0.6), ("c", -0.8))
    assert found.distance == pytest.approx(1 - 1.4 * 0.5**0.5, abs=1e-6)
    assert conditioner(_embedding(0.6, 0.8), keep=1).neighbours == (("b", 0.9899),)
    assert found.task_vector is None


def test_an_excluded_expert_is_as_far_as_can_be(conditioner):
    """Training must not see a task's own expert: it has cosine -1, is not a neighbour, and novelty is that to the others."""
    whole, left = conditioner(_embedding(1.0, 0.0)), conditioner(_embedding(1.0, 0.0), masked=torch.tensor([True, False]))
    assert whole.distance == 0 and whole.neighbours[0] == ("a", 1.0)
    assert left.similarities.tolist() == pytest.approx([-1, 0.5**0.5, 0])
    assert [name for name, _ in left.neighbours] == ["b", "c"]
    assert left.distance == pytest.approx(1 - 0.5**0.5, abs=1e-6)
    again = conditioner(_embedding(1.0, 0.0))
    assert torch.equal(again.similarities, whole.similarities)  # the exclusion is gone with its call


def test_novelty_reaches_two_and_never_falls_below_zero():
    """Opposite to the only expert: 2; and rounding above a cosine of 1 does not make it negative."""
    alone = Conditioner(["a"], torch.tensor([[1.0, 0.0]]))
    assert alone(_embedding(-1.0, 0.0)).distance == 2
    assert alone(_embedding(1.0 + 1e-6, 0.0)).distance == 0


def test_a_mixture_of_one_is_that_expert():
    """K = 1: its code and its own variance, whatever the temperature and the others."""
    codes, deviations = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[0.5, 0.0], [9.0, 9.0]])
    found = mixture(torch.tensor([0.3, 0.2]), codes, deviations, top=1, temperature=3.0)
    assert torch.equal(found.mean, codes[0]) and torch.equal(found.variance, torch.tensor([0.25, 0.0]))


def test_temperature_runs_from_the_nearest_to_the_plain_mean():
    """τ near 0 takes the nearest expert, a large τ weighs the K nearest alike, and top beyond the bank takes all."""
    similarities, codes = torch.tensor([0.5, 0.9, 0.4]), torch.tensor([[0.0], [3.0], [6.0]])
    assert mixture(similarities, codes, None, top=3, temperature=1e-3).mean.item() == pytest.approx(3.0)
    assert mixture(similarities, codes, None, top=2, temperature=1e6).mean.item() == pytest.approx(1.5, abs=1e-4)
    assert mixture(similarities, codes, None, top=99, temperature=1e6).mean.item() == pytest.approx(3.0, abs=1e-4)


def test_law_of_total_variance_by_sampling():
    """200,000 draws (an expert by its weight, then a normal around it): mean and variance within five standard errors."""
    rng = torch.Generator().manual_seed(0)
    similarities, temperature, draws = torch.tensor([0.9, 0.85, 0.8, 0.1]), 0.05, 200_000
    codes, deviations = torch.randn(4, 3, generator=rng) * 2, torch.rand(4, 3, generator=rng) + 0.2
    weights = torch.softmax(similarities[:3] / temperature, 0)
    chosen = torch.multinomial(weights, draws, replacement=True, generator=rng)
    samples = codes[chosen] + deviations[chosen] * torch.randn(draws, 3, generator=rng)
    found = mixture(similarities, codes, deviations, top=3, temperature=temperature)
    error = samples.std(0) / draws**0.5
    assert ((samples.mean(0) - found.mean).abs() < 5 * error).all()
    spread = (samples - samples.mean(0)).square()
    assert ((spread.mean(0) - found.variance).abs() < 5 * spread.std(0) / draws**0.5).all()
