"""Factors: all algebra on ΔW = B·A agrees with the dense matrices that it never forms."""

import math

import pytest
import torch
from conftest import gauge
from hypothesis import given
from hypothesis import strategies as st

from lorag.adapters.factors import Factors, check_values
from lorag.base.layout import LoraLayout
from lorag.errors import AdapterError, DtypeOverflowError, NonFiniteError, NormRangeError

LAYOUT = LoraLayout.from_dict(
    {"target_modules": ["q"], "modules": [["a.q", 9, 14], ["b.q", 14, 9], ["c.q", 3, 40]], "fan_in_fan_out": False}
)
seeds, ranks = st.integers(0, 10**6), st.integers(1, 5)


@pytest.fixture(scope="module")
def factors(random_adapter):
    """Factors of the layout by seed and rank; the third module is narrower than rank 5."""
    return lambda seed=0, rank=4, alpha=6.0: random_adapter(LAYOUT, rank, alpha, seed).factors


def dense(factors):
    """ΔW of each module, by its definition: scaling times B times A, in fp64."""
    return {name: factors.scaling * b.double() @ a.double() for name, (a, b) in factors.tensors.items()}


def near(one, other, error=1e-6):
    """Whether two sets of dense matrices agree, relative to the second."""
    return all((one[name] - other[name]).norm() <= error * other[name].norm().clamp_min(1e-12) for name in other)


@pytest.mark.slow
@given(seeds, seeds, ranks, ranks)
def test_sizes_and_products_are_those_of_the_dense_matrices(factors, seed, another, rank, other_rank):
    """norms, norm, dot and cosine, for two adapters of any ranks and scalings."""
    one, other = factors(seed, rank, -3.0), factors(another, other_rank)
    left, right = dense(one), dense(other)
    product = sum((left[name] * right[name]).sum().item() for name in left)
    size, other_size = (math.sqrt(sum(d.square().sum().item() for d in found.values())) for found in (left, right))
    assert one.norms() == pytest.approx({name: delta.norm().item() for name, delta in left.items()}, rel=1e-6)
    assert one.norm() == pytest.approx(size, rel=1e-6)
    assert one.dot(other) == pytest.approx(product, rel=1e-5, abs=1e-6 * size * other_size)
    assert one.cosine(other) == pytest.approx(product / (size * other_size), abs=1e-6)
    assert one.cosine(one) == pytest.approx(1.0) and one.cosine(other.scaled(0.0)) == 0.0


@pytest.mark.slow
@given(seeds, ranks)
def test_thin_svd_is_one_of_the_product(factors, seed, rank):
    """Orthonormal sides, sorted values, and ΔW back; of no more directions than a side of the module has."""
    one = factors(seed, rank)
    for name, delta in dense(one).items():
        left, values, right = one.svd(name)
        assert values.shape == (min(rank, *delta.shape),) and torch.equal(values, values.sort(descending=True).values)
        for side in (left, right):
            assert torch.allclose(side.T @ side, torch.eye(len(values), dtype=side.dtype), atol=1e-9)
        assert torch.allclose((left * values) @ right.T, delta, atol=1e-6)


@pytest.mark.slow
@given(seeds, ranks, ranks)
def test_truncation_is_the_best_of_its_rank_and_says_what_it_keeps(factors, seed, rank, wanted):
    """No rank-r matrix is nearer (Eckart and Young), the kept energy is the singular values', and all ranks pad to the asked one."""
    one = factors(seed, rank)
    found, kept = one.truncated(wanted)
    best, whole = 0.0, 0.0
    for name, delta in dense(one).items():
        values = torch.linalg.svdvals(delta)
        best, whole = best + values[:wanted].square().sum().item(), whole + values.square().sum().item()
        lost = (found.delta(name) - delta).norm().item()
        assert lost == pytest.approx(values[wanted:].square().sum().sqrt().item(), abs=1e-5 * values[0].item())
    assert found.rank == wanted and kept == pytest.approx(best / whole, rel=1e-6)
    assert found.scaling == 1 and all(tensor.dtype == torch.float32 for pair in found.values() for tensor in pair)


def test_other_forms_of_one_delta(factors, random_adapter):
    """Padding, another gauge and fp64 copies change no ΔW; what is scaled is scaled, and half precision is left before it is."""
    one = factors()
    for form in (one.padded(7), gauge(random_adapter(LAYOUT, 4, 6.0), 3).factors, Factors.concatenated([one])):
        assert near(dense(form), dense(one), 1e-5)
    assert one.padded(7).rank == 7 and one.padded(7).scaling == one.scaling
    half = Factors({name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in one.tensors.items()}, one.scaling)
    assert near(dense(half.scaled(0.3)), {name: 0.3 * delta for name, delta in dense(half).items()})
    assert half.scaled(1.0) is half
    with pytest.raises(AdapterError, match="smaller rank"):
        one.padded(3)


def test_sums_and_stacks_take_any_ranks(factors):
    """concatenated is the weighted sum of ΔW; a stack holds each ΔW in its place, with zeros up to the largest rank."""
    parts, weights = [factors(1, 2), factors(2, 5, 1.0), factors(3, 3, -2.0)], [0.5, -1.0, 2.0]
    summed = Factors.concatenated(parts, weights)
    assert summed.rank == 10
    wanted = [dense(part) for part in parts]
    assert near(dense(summed), {name: sum(w * d[name] for w, d in zip(weights, wanted, strict=True)) for name in LAYOUT.names})
    stacked = Factors.stack(parts)
    for name, (a, b) in stacked.items():
        assert a.shape[:2] == (3, 5) and a.dtype == b.dtype == torch.float32
        assert all(torch.allclose((b[i] @ a[i]).double(), wanted[i][name], atol=1e-5) for i in range(3))


@pytest.mark.parametrize("alpha", [5.0, 4.5, -3.0, 1e-6, 999999.0])
def test_alpha_is_what_the_config_said(factors, alpha):
    """A lora_alpha that was divided by a rank comes back as it was; factors hold it, tensors do not."""
    tensors = factors(rank=3).tensors
    found = Factors.with_alpha(tensors, alpha)
    assert found.alpha == alpha and found.tensors is tensors
    a, b = found["a.q"]
    assert torch.equal(a, tensors["a.q"][0]) and torch.equal(b, tensors["a.q"][1] * (alpha / 3))


def test_values_are_judged_by_name(factors):
    """NaN, infinity, what fp32 cannot hold and what no adapter has are four errors, which name the factor; fine values pass."""
    one = factors()
    assert one.check_values() is one
    for value, error in ((math.nan, NonFiniteError), (-math.inf, NonFiniteError), (1e39, DtypeOverflowError), (-1e12, NormRangeError)):
        with pytest.raises(error, match="factor B of it"):
            check_values(torch.tensor([[1.0, value]], dtype=torch.float64), "factor B of it")
    a, b = one.tensors["b.q"]
    with pytest.raises(NonFiniteError, match="factor A of b.q"):
        Factors({**one.tensors, "b.q": (a * math.nan, b)}).check_values()
