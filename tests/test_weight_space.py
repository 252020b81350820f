"""Weight spaces: codes depend on ΔW alone, and what a code says is what its adapter does."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import gauge
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.errors import GeneratorError
from lorag.spaces import FlatFactors, SharedSubspace, open_space

# Layers 2 and 10 side by side: sorted by name they would trade places.
MODULES = [[f"layers.{n}.{p}", 24, o] for n in (1, 2, 10) for p, o in (("q", 24), ("v", 20))]
LAYOUT = LoraLayout.from_dict({"target_modules": ["q", "v"], "modules": MODULES, "fan_in_fan_out": False})
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=8)


@pytest.fixture(scope="module")
def experts(random_adapter):
    """Eight experts of three ranks and alphas."""
    return [random_adapter(LAYOUT, rank=(2, 3, 5)[i % 3], alpha=(4.0, 16.0)[i % 2], seed=i) for i in range(8)]


@pytest.fixture(scope="module")
def space(experts):
    """Subspace of k = 8, smaller than what the experts span together."""
    return SharedSubspace.fit(lambda: iter(experts), LAYOUT, 8)


def _near(a, b, relative=1e-5):
    return torch.linalg.norm(a.double() - b.double()) <= relative * torch.linalg.norm(b.double())


def _adapter_of(factors):
    return LoraAdapter(LAYOUT, factors)


# --- gauge, rank, alpha ------------------------------------------------------------------------------------------------


@few
@given(seeds)
def test_codes_are_free_of_gauge(space, random_adapter, seed):
    """B·G and G⁻¹·A have the code of B and A, for any invertible G: in the shared subspace, but not as flat factors."""
    adapter = random_adapter(LAYOUT, rank=4, seed=seed)
    turned = gauge(adapter, seed)
    assert all(_near(turned.delta(n), adapter.delta(n)) for n in LAYOUT.names)
    assert _near(space.encode(turned.factors), space.encode(adapter.factors))
    flat = FlatFactors.fit(lambda: [adapter], LAYOUT)
    assert not _near(flat.encode(turned.factors), flat.encode(adapter.factors), 0.1)


@settings(max_examples=3)
@given(seeds)
def test_fitting_is_free_of_gauge(space, experts, random_adapter, seed):
    """A bank whose experts all change gauge gives the same codes."""
    turned = [gauge(expert, seed + i) for i, expert in enumerate(experts)]
    other = SharedSubspace.fit(lambda: iter(turned), LAYOUT, 8)
    for adapter in (experts[0], random_adapter(LAYOUT, seed=seed)):
        assert _near(other.encode(adapter.factors), space.encode(adapter.factors), 1e-5)
    codes = torch.stack([space.encode(expert.factors) for expert in experts])
    assert _near(torch.stack([other.encode(t.factors) for t in turned]), codes, 1e-5)


@settings(max_examples=5)
@given(seeds, st.integers(2, 8))
def test_the_order_of_experts_does_not_matter(random_adapter, seed, count):
    """A bank read in another order gives the same codes: singular vectors' signs are fixed, not left to chance."""
    bank = [random_adapter(LAYOUT, rank=2, seed=seed + i) for i in range(count)]
    codes = [SharedSubspace.fit(lambda o=order: iter(o), LAYOUT, 6).encode(bank[0].factors) for order in (bank, bank[::-1])]
    assert _near(*codes, 1e-4)


@few
@given(seeds, st.integers(1, 4), st.floats(0.25, 64))
def test_codes_are_free_of_rank_and_alpha(space, random_adapter, seed, more, alpha):
    """Zero rows and columns, or another alpha that the factors make up for, leave the code unchanged."""
    adapter = random_adapter(LAYOUT, rank=3, alpha=6.0, seed=seed)
    pad = torch.nn.functional.pad
    factors = {n: (pad(a, (0, 0, 0, more)), pad(b * ((3 + more) / alpha), (0, more))) for n, (a, b) in adapter.factors.items()}
    assert _near(space.encode(Factors.with_alpha(factors, alpha)), space.encode(adapter.factors))


@pytest.mark.parametrize(("one", "other"), [("layers.2.q", "layers.10.q"), ("layers.2.v", "layers.10.v"), ("layers.1.v", "layers.2.v")])
def test_swapped_layers_change_the_code(space, random_adapter, one, other):
    """An adapter whose layers 2 and 10 trade places is another adapter, and only their parts of the code change."""
    adapter = random_adapter(LAYOUT)
    factors = {**adapter.factors, one: adapter.factors[other], other: adapter.factors[one]}
    changed = (space.cores(Factors(factors)) - space.cores(adapter.factors)).flatten(1).norm(dim=1)
    assert {LAYOUT.names[i] for i in changed.nonzero().flatten()} == {one, other}
    assert changed[changed > 0].min() > 0.1


def test_swapped_projections_change_the_code(random_adapter):
    """q and v of one size, traded, give another code: sizes alone would not show it."""
    square = dataclasses.replace(LAYOUT, modules=tuple(ModuleShape(m.name, 24, 24) for m in LAYOUT.modules))
    adapter = random_adapter(square)
    space = SharedSubspace.fit(lambda: [random_adapter(square, seed=i) for i in range(4)], square, 8)
    factors = {**adapter.factors, "layers.1.q": adapter.factors["layers.1.v"], "layers.1.v": adapter.factors["layers.1.q"]}
    assert not _near(space.encode(Factors(factors)), space.encode(adapter.factors), 0.05)


# --- round trips and energy -------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 3))
def test_adapters_inside_the_span_come_back(random_adapter, seed, rank):
    """With k as large as the experts' joint rank, encode then decode gives ΔW back, and nothing is lost."""
    inside = [random_adapter(LAYOUT, rank=rank, alpha=2.0 * rank, seed=seed + i) for i in range(4)]
    space = SharedSubspace.fit(lambda: iter(inside), LAYOUT, 4 * rank)
    for adapter in inside:
        back = _adapter_of(space.decode(space.encode(adapter.factors)[None], rank)[0])
        assert back.rank == rank
        assert all(_near(back.delta(n), adapter.delta(n), 1e-4) for n in LAYOUT.names)
        assert space.energy(adapter.factors) == pytest.approx(1.0, abs=1e-5)
        assert space.energy(adapter.factors) <= 1.0


@few
@given(seeds)
def test_energy_accounts_for_everything(space, random_adapter, seed):
    """‖core‖² and what lies outside the bases add up to ‖ΔW‖²; the share is between 0 and 1."""
    adapter = random_adapter(LAYOUT, seed=seed)
    whole = kept = lost = 0.0
    for index, name in enumerate(LAYOUT.names):
        u_in, u_out, delta = space.bases_in[index].double(), space.bases_out[index].double(), adapter.delta(name).double()
        projected = u_out @ (u_out.T @ delta @ u_in) @ u_in.T
        whole += delta.square().sum().item()
        kept += space.cores(adapter.factors)[index].double().square().sum().item()
        lost += (delta - projected).square().sum().item()
    assert kept + lost == pytest.approx(whole, rel=1e-5)
    assert space.energy(adapter.factors) == pytest.approx(kept / whole, rel=1e-5)
    assert 0.0 <= space.energy(adapter.factors) <= 1.0
    assert 0.05 < space.energy(adapter.factors) < 0.95  # of a stranger: neither all nor nothing
    nothing = dataclasses.replace(adapter, factors=adapter.factors.scaled(0.0))
    assert space.energy(nothing.factors) == 1.0


def test_bases_are_orthonormal_and_span_the_experts(experts):
    """U_inᵀU_in is the identity; k dimensions keep at least what any k of the experts' own directions keep."""
    space = SharedSubspace.fit(lambda: iter(experts), LAYOUT, 8)
    for u in (*space.bases_in, *space.bases_out):
        assert torch.allclose(u.T @ u, torch.eye(8), atol=1e-6)
    stacked = torch.cat([expert.delta("layers.2.q").double() for expert in experts], 1)
    best = torch.linalg.svdvals(stacked)[:8].square().sum()
    u = space.bases_out[LAYOUT.names.index("layers.2.q")].double()
    assert (u.T @ stacked).square().sum() == pytest.approx(best.item(), rel=1e-6)


@few
@given(seeds, st.integers(1, 8))
def test_decoding_is_the_best_truncation(space, seed, rank):
    """Rank-r factors are the dense SVD truncation of U_out M U_inᵀ, their singular values shared evenly by A and B."""
    code = torch.randn(1, space.size, generator=torch.Generator().manual_seed(seed))
    (factors,) = space.decode(code, rank)
    cores = space.restore(code)[0]
    for index, name in enumerate(LAYOUT.names):
        dense = (space.bases_out[index] @ cores[index] @ space.bases_in[index].T).double()
        left, values, right = torch.linalg.svd(dense)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        rows, columns = factors[name]
        assert rows.shape == (rank, 24)
        assert torch.allclose((columns @ rows).double(), best, atol=1e-4 * values[0].item())
        assert torch.allclose(rows.norm(dim=1), columns.norm(dim=0), rtol=1e-4)
        assert torch.allclose(rows.norm(dim=1).square().double(), values[:rank], rtol=1e-3, atol=1e-4)


def test_training_and_decoding_agree(space):
    """The cores that functional training runs are the ΔW that decode writes."""
    codes = torch.randn(3, space.size, generator=torch.Generator().manual_seed(0))
    cores = space.differentiable(codes)
    for number, factors in enumerate(space.decode(codes, space.k)):
        for name, (rows, columns) in factors.items():
            assert _near(columns @ rows, cores.bases_out[name] @ cores.values[name][number] @ cores.bases_in[name].T)


@pytest.mark.parametrize("kind", ["shared", "flat"])
def test_neighbours_in_a_batch_do_not_change_a_decoded_adapter(space, experts, kind):
    """A code decoded alone and as one of five gives the same bytes."""
    space = space if kind == "shared" else FlatFactors.fit(lambda: iter(experts), LAYOUT)
    codes = torch.randn(5, space.size, generator=torch.Generator().manual_seed(0))
    together = space.decode(codes, 5)
    for index in range(5):
        (alone,) = space.decode(codes[index : index + 1].clone(), 5)
        for name in LAYOUT.names:
            assert all(torch.equal(a, b) for a, b in zip(alone[name], together[index][name], strict=True))


# --- odd banks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_modules_on_which_all_experts_agree(random_adapter, size):
    """Equal ΔW (each in its own gauge) or none at all: finite codes near zero there, and decoding gives ΔW back."""
    common = random_adapter(LAYOUT, seed=99)
    zero, equal = "layers.1.q", "layers.2.q"

    def expert(i):
        own = random_adapter(LAYOUT, seed=i)
        rows, columns = gauge(common, i).factors[equal]
        factors = {**own.factors, equal: (rows, columns * size), zero: (own.factors[zero][0], own.factors[zero][1] * 0)}
        return dataclasses.replace(own, factors=Factors(factors))

    space = SharedSubspace.fit(lambda: (expert(i) for i in range(5)), LAYOUT, 8)
    codes = torch.stack([space.encode(expert(i).factors) for i in range(5)]).view(5, len(LAYOUT), -1)
    assert codes.isfinite().all()
    for name in (zero, equal):
        assert codes[:, LAYOUT.names.index(name)].abs().max() < 1e-3
    back = _adapter_of(space.decode(codes[:1].flatten(1), 4)[0])
    assert _near(back.delta(equal), expert(0).delta(equal), 1e-4)
    assert back.delta(zero).abs().max() < 1e-6


def test_a_bank_of_one_and_of_none(random_adapter):
    """One expert has the mean as its code; no expert is an error."""
    one = random_adapter(LAYOUT)
    space = SharedSubspace.fit(lambda: [one], LAYOUT, 16)
    assert space.encode(one.factors).abs().max() < 1e-4
    assert _near(_adapter_of(space.decode(torch.zeros(1, space.size), 4)[0]).delta("layers.10.q"), one.delta("layers.10.q"), 1e-4)
    for fit in (SharedSubspace.fit, FlatFactors.fit):
        with pytest.raises(GeneratorError, match="at least one expert"):
            fit(lambda: [], LAYOUT)


def test_long_banks_are_compressed_without_loss(random_adapter):
    """When the buffer is full, what it held keeps its weight: 105 experts in one span outvote 5 later ones in another."""
    small = LoraLayout.from_dict({"target_modules": ["q"], "modules": [["q", 40, 40]], "fan_in_fan_out": False})
    turn = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))[0]

    def experts():
        for seed in range(110):  # of 40 columns each; the buffer holds 16·4 + 4096
            basis = turn[:, :4] if seed < 105 else turn[:, 4:8]
            rows, columns = random_adapter(small, rank=40, seed=seed).factors["q"]
            yield LoraAdapter(small, Factors({"q": (rows @ basis @ basis.T, basis @ (basis.T @ columns))}))

    space = SharedSubspace.fit(experts, small, 4)
    energies = [space.energy(expert.factors) for expert in experts()]
    assert min(energies[:105]) > 1 - 1e-4
    assert max(energies[105:]) < 1e-4


# --- flat factors -----------------------------------------------------------------------------------------------------


def test_flat_factors_round_trip(experts, random_adapter):
    """Flat codes hold the factors themselves, scaling in B, padded to the largest rank."""
    space = FlatFactors.fit(lambda: iter(experts), LAYOUT)
    assert (space.rank, space.size) == (5, LAYOUT.values(5))
    codes = torch.stack([space.encode(expert.factors) for expert in experts])
    assert codes.mean(0).abs().max() < 1e-4
    for expert, factors in zip(experts, space.decode(codes, 5), strict=True):
        back = _adapter_of(factors)
        assert all(_near(back.delta(n), expert.delta(n)) for n in LAYOUT.names)
        assert torch.allclose(factors["layers.10.v"][0][: expert.rank], expert.factors["layers.10.v"][0], atol=1e-5)
    with pytest.raises(GeneratorError, match="fixed rank"):
        space.decode(codes, 4)
    with pytest.raises(GeneratorError, match="rank exceeds"):
        space.encode(random_adapter(LAYOUT, rank=6).factors)


# --- stored spaces ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["shared", "flat"])
def stored(request, space, experts):
    """Each kind of space with its stored form."""
    one = space if request.param == "shared" else FlatFactors.fit(lambda: iter(experts), LAYOUT)
    return one, *one.tensors()


def test_stored_spaces_come_back(stored, experts):
    """Through safetensors and JSON, a space keeps every bit."""
    space, tensors, values = stored
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in tensors.items()}, Path(folder, "t.safetensors"))
        back = open_space(load_file(Path(folder, "t.safetensors")), json.dumps(values))
    assert type(back) is type(space)
    assert back.layout == LAYOUT
    assert torch.equal(back.encode(experts[0].factors), space.encode(experts[0].factors))
    code = space.encode(experts[1].factors)[None]
    assert all(torch.equal(x, y) for n, p in back.decode(code, 5)[0].items() for x, y in zip(p, space.decode(code, 5)[0][n], strict=True))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, v: (t, {**v, "kind": "pickle"}),
        lambda t, v: (t, {k: x for k, x in v.items() if k != "kind"}),
        lambda t, v: (t, {k: x for k, x in v.items() if k != "layout"}),
        lambda t, v: (t, {**v, "layout": {**v["layout"], "modules": v["layout"]["modules"][:-1]}}),
        lambda t, v: (t, {**v, "layout": {**v["layout"], "modules": [[n, i, o + 1] for n, i, o in v["layout"]["modules"]]}}),
        lambda t, v: (t, []),
        lambda t, v: (t, "{"),
        lambda t, v: ({k: x for k, x in t.items() if k != "mean"}, v),
        lambda t, v: ({k: x for k, x in t.items() if k != "scale"}, v),
        lambda t, v: ({**t, "mean": t["mean"][:-1]}, v),
        lambda t, v: ({**t, "mean": torch.tensor(0.0)}, v),
        lambda t, v: ({**t, "scale": t["scale"][:-1]}, v),
        lambda t, v: ({**t, "mean": t["mean"] * math.nan}, v),
        lambda t, v: ({**t, "scale": t["scale"] * 0}, v),
        lambda t, v: ({k: x[:-1] if k == "bases_in.1" else x for k, x in t.items()} if "bases_in.1" in t else {}, v),
        lambda t, v: ({}, {**v, "rank": 10**30}),
    ],
)
def test_corrupted_spaces_are_refused(stored, spoil):
    """A missing or misshapen tensor, a number that is none, an unknown kind: GeneratorError, never a crash or a wrong space."""
    _, tensors, values = stored
    with pytest.raises(GeneratorError):
        open_space(*spoil(tensors, values))


def test_codes_of_another_space_are_refused(space):
    """A code of the wrong length is not a code."""
    for codes in (torch.zeros(1, space.size + 1), torch.zeros(space.size)):
        with pytest.raises(GeneratorError, match="do not fit"):
            space.decode(codes, 4)


@pytest.mark.parametrize("rank", [-1, 0, 9])
def test_ranks_that_the_space_cannot_give_are_refused(space, rank):
    """No silent fallback: k dimensions hold ranks 1 to k."""
    with pytest.raises(GeneratorError, match="rank"):
        space.decode(torch.zeros(1, space.size), rank)
