"""Merging rules: each against a dense reference, and what holds for all of them whatever form the experts come in."""

import dataclasses
import math

import pytest
import torch
from conftest import gauge
from peft.utils.merge_utils import ties
from toy_world import other_form, true_adapter

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.adapters.merging import MERGES, merge
from lorag.cli.main import main
from lorag.errors import AdapterError, ConfigError
from lorag.training.fuse import fuse, read_weights

EXACT_ALONE = {"mean": {}, "cat": {}, "ties": {"density": 1.0}, "lego": {}, "tsv": {"coefficient": 1.0}}
CELLS = (("red", "dog"), ("blue", "fish"), ("pink", "cat"))


@pytest.fixture(scope="module")
def experts(llama_layout, random_adapter):
    """Three adapters of ranks 4, 2 and 3, with different alphas."""
    return [random_adapter(llama_layout, rank, alpha, seed) for seed, (rank, alpha) in enumerate([(4, 8.0), (2, 1.0), (3, 7.5)])]


def _rng():
    return torch.Generator().manual_seed(7)


def _merge(experts, method, **more):
    return merge(experts, method, **more, **({"rng": _rng()} if method == "dare_ties" else {}))


def _distance(one, other):
    """Largest relative distance of ΔW over modules."""
    names = one.layout.names
    return max(((one.delta(n) - other.delta(n)).norm() / other.delta(n).norm().clamp_min(1e-9)).item() for n in names)


def _from_dense(delta, adapter, rank):
    """The best rank-r approximation of dense matrices, as the rules compress theirs."""
    found = {}
    for name, matrix in delta.items():
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        found[name] = ((u[:, :rank] * s[:rank]) @ v[:rank]).float()
    return max(((found[n] - adapter.delta(n)).norm() / found[n].norm()).item() for n in found)


# --- each rule against a dense reference ------------------------------------------------------------------------------


def test_mean_is_the_mean_of_delta_weights(experts):
    """Uniform and weighted, of mixed ranks and alphas, exactly; and the factors' rank is the sum of the ranks."""
    for weights in (None, [1.0, 2.0, 5.0]):
        merged = merge(experts, "mean", weights=weights)
        w = torch.tensor(weights or [1.0, 1.0, 1.0])
        for name in merged.layout.names:
            wanted = sum(share * e.delta(name) for share, e in zip(w / w.sum(), experts, strict=True))
            assert torch.allclose(merged.delta(name), wanted, atol=1e-5)
        assert merged.rank == 9


def test_truncation_is_the_best_of_its_rank(experts):
    """Cut to rank 3 through small QRs, the mean is what a dense SVD would keep; `energy` is the share of ‖ΔW‖² kept."""
    merged = merge(experts, "mean", rank=3)
    dense = {name: sum(e.delta(name) for e in experts) / 3 for name in merged.layout.names}
    assert merged.rank == 3 and _from_dense(dense, merged, 3) < 1e-4
    kept = sum(merged.delta(n).square().sum() for n in dense) / sum(d.square().sum() for d in dense.values())
    assert merged.info["energy"] == pytest.approx(kept.item(), abs=1e-4) and kept < 0.95


def test_task_arithmetic_is_a_scaled_sum(experts):
    """coefficient · Σ ΔW."""
    merged = merge(experts, "task_arithmetic", coefficient=0.7)
    for name in merged.layout.names:
        assert torch.allclose(merged.delta(name), 0.7 * sum(e.delta(name) for e in experts), atol=1e-5)


def test_cat_weighs_each_module_of_each_expert(experts):
    """Σ w[i, module] ΔW_i, negative weights too."""
    weights = torch.randn(3, len(experts[0].layout), generator=_rng())
    merged = merge(experts, "cat", weights=weights)
    for index, name in enumerate(merged.layout.names):
        assert torch.allclose(
            merged.delta(name), sum(w * e.delta(name) for w, e in zip(weights[:, index], experts, strict=True)), atol=1e-5
        )


def _ties(deltas, density):
    """TIES on dense matrices, value by value."""
    trimmed = []
    for delta in deltas:
        order = delta.abs().flatten().argsort(descending=True)[: round(density * delta.numel())]
        kept = torch.zeros(delta.numel())
        kept[order] = delta.flatten()[order]
        trimmed.append(kept.tolist())
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = math.copysign(1, sum(values))
        agreeing = [value for value in values if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged).reshape(deltas[0].shape)


def test_ties_trims_elects_and_averages(experts):
    """Against a loop over single values; at full rank nothing is lost by compressing."""
    merged = merge(experts, "ties", density=0.3, rank=64)
    for name in merged.layout.names:
        wanted = _ties([e.delta(name) for e in experts], 0.3)
        assert (merged.delta(name) - wanted).norm() < 1e-3 * wanted.norm()
    dense = {name: _ties([e.delta(name) for e in experts], 0.3) for name in merged.layout.names}
    assert _from_dense(dense, merge(experts, "ties", density=0.3, rank=5), 5) < 1e-3


def test_ties_is_peft_s_where_peft_s_is_defined(experts):
    """Equal weights and a whole number of values to keep; PEFT divides by how many experts agree, ours by what they weigh."""
    for density in (0.25, 0.5):
        merged = merge(experts, "ties", density=density, rank=64)
        for name in merged.layout.names:
            wanted = ties([expert.delta(name) for expert in experts], torch.ones(len(experts)), density)
            assert (merged.delta(name) - wanted).norm() < 1e-3 * wanted.norm()
    name = experts[0].layout.names[0]
    doubled = merge(experts, "ties", weights=[2.0] * len(experts), density=0.5, rank=64)
    assert torch.allclose(doubled.delta(name), merged.delta(name), atol=1e-5)
    negative = dataclasses.replace(experts[0], factors=experts[0].factors.scaled(-1.0))
    opposite = merge([experts[0], negative], "ties", density=0.5)
    assert not any(opposite.norms().values())


def test_dare_drops_at_random_and_rescales(experts):
    """One expert: each value is dropped or divided by what is kept, in the share asked for; the seed decides which."""
    one = merge(experts[:1], "dare_ties", rng=_rng(), rank=64, drop=0.4)
    dropped = []
    for name in one.layout.names:
        ratio = (one.delta(name) / experts[0].delta(name)).flatten()
        large = experts[0].delta(name).flatten().abs() > 0.05  # where a quotient means something
        kept = ratio[large] > 0.8
        assert torch.allclose(ratio[large][kept], torch.tensor(1 / 0.6), rtol=1e-2) and ratio[large][~kept].abs().max() < 1e-2
        dropped.append(1 - kept.float().mean())
    assert torch.stack(dropped).mean().item() == pytest.approx(0.4, abs=0.03)
    again, other = merge(experts, "dare_ties", rng=_rng()), merge(experts, "dare_ties", rng=torch.Generator().manual_seed(8))
    assert _distance(merge(experts, "dare_ties", rng=_rng()), again) == 0 and _distance(other, again) > 0.1
    with pytest.raises(AdapterError, match="rng"):
        merge(experts, "dare_ties")


def test_lego_averages_the_units_of_a_cluster(llama_layout):
    """Two experts of two units each, pairs of which differ by a known angle: by hand, the sum of two rescaled means."""

    def units(turn):
        factors = {}
        for m in llama_layout.modules:
            rows, columns = torch.zeros(2, m.in_features), torch.zeros(m.out_features, 2)
            for unit, size in enumerate((3.0, 1.0)):
                rows[unit, 2 * unit], rows[unit, 2 * unit + 1] = math.cos(turn), math.sin(turn)
                columns[2 * unit, unit], columns[2 * unit + 1, unit] = size * math.cos(turn), size * math.sin(turn)
            factors[m.name] = (rows, columns)
        return LoraAdapter(llama_layout, Factors(factors))

    angle = 0.4
    merged = merge([units(0.0), units(angle)], "lego", rank=2)
    half = units(angle / 2)  # the mean of two units of one length points halfway, and its norm is restored
    assert _distance(merged, half) < 1e-4
    # Four clusters: every unit stays as it is, and √(2 / 4) keeps the output's variance.
    apart = merge([units(0.0), units(angle)], "lego", rank=4)
    for name in apart.layout.names:
        wanted = (units(0.0).delta(name) + units(angle).delta(name)) / math.sqrt(2)
        assert torch.allclose(apart.delta(name), wanted, atol=1e-4)


def test_tsv_turns_shared_directions_apart(experts):
    """Against dense decompositions."""
    merged = merge(experts, "tsv", coefficient=0.7)
    for name in merged.layout.names:
        parts = [torch.linalg.svd(e.delta(name).double(), full_matrices=False) for e in experts]
        kept = [(u[:, : e.rank], s[: e.rank], v[: e.rank]) for e, (u, s, v) in zip(experts, parts, strict=True)]
        turned = []
        for stack in (torch.cat([u for u, _, _ in kept], 1), torch.cat([v for _, _, v in kept]).T):
            gram = torch.linalg.eigh(stack.T @ stack)  # columns times the inverse root of their products: orthonormal, and nearest
            turned.append(stack @ (gram.eigenvectors / gram.eigenvalues.sqrt()) @ gram.eigenvectors.T)
        wanted = 0.7 * turned[0] @ torch.cat([s for _, s, _ in kept]).diag() @ turned[1].T
        assert (merged.delta(name) - wanted).norm() < 1e-4 * wanted.norm()
    assert merged.rank == 9


# --- what holds for every rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EXACT_ALONE)
def test_one_adapter_merged_is_itself(experts, method):
    """ΔW comes back, from whatever rank and alpha, with the expert's own rank."""
    for expert in experts:
        merged = merge([expert], method, **EXACT_ALONE[method])
        assert _distance(merged, expert) < 1e-4 and merged.rank == expert.rank


@pytest.mark.parametrize("method", MERGES)
def test_order_does_not_matter(experts, method):
    """Whatever the order, the same ΔW; weights go with their experts."""
    turned = [experts[2], experts[0], experts[1]]
    assert _distance(_merge(turned, method), _merge(experts, method)) < 1e-4
    weighted = [_merge(one, method, weights=w) for one, w in ((experts, [1.0, 2.0, 0.5]), (turned, [0.5, 1.0, 2.0]))]
    assert _distance(*weighted) < 1e-4 and _distance(weighted[0], _merge(experts, method)) > 1e-3


@pytest.mark.parametrize("method", MERGES)
def test_gauge_rank_and_alpha_do_not_matter(llama_layout, method):
    """Experts in another gauge, padded to rank 6, with another alpha: the same ΔW."""
    plain = [true_adapter(llama_layout, *cell) for cell in CELLS]
    for other in ([gauge(e, 3 + n) for n, e in enumerate(plain)], [other_form(e, n) for n, e in enumerate(plain)]):
        assert _distance(_merge(other, method, rank=8), _merge(plain, method, rank=8)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", MERGES)
def test_a_merged_adapter_is_portable_and_knows_its_origin(experts, method, tmp_path):
    """Scaling 1, finite, of the asked rank at most, saved and read again; `info` names rule, settings and base."""
    merged = _merge(experts, method, rank=5)
    assert merged.factors.scaling == 1 and merged.rank == 5 and merged.base_model == "tiny-base"
    read = LoraAdapter.from_pretrained(merged.save_pretrained(tmp_path), merged.layout)
    assert _distance(read, merged) < 1e-6
    assert read.info["method"] == method and set(read.info["settings"]) == set(MERGES[method].defaults)
    assert 0 < read.info["energy"] <= 1


def test_experts_that_change_nothing_are_merged(llama_layout, experts):
    """An adapter with B = 0 is a valid expert, alone and beside others, for every rule."""
    nothing = experts[0].scaled(0.0)
    for method in MERGES:
        assert not any(_merge([nothing, nothing], method).norms().values())
        assert any(_merge([nothing, experts[0]], method).norms().values())


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("soup", {}, "mean, task_arithmetic, ties, dare_ties, cat, lego"),
        ("mean", {"density": 0.5}, "density is not a setting of mean"),
        ("ties", {"density": 1.5}, "density"),
        ("mean", {"weights": [1.0]}, r"\(3,\)"),
        ("mean", {"weights": [1.0, -1.0, 1.0]}, "not negative"),
        ("cat", {"weights": [1.0, math.nan, 1.0]}, "finite"),
        ("mean", {"rank": 0}, "rank"),
    ],
)
def test_what_cannot_be_merged_so_is_refused(experts, method, more, said):
    """Unknown rules and settings with what there is, weights and ranks that make no sense."""
    with pytest.raises(AdapterError, match=said):
        merge(experts, method, **more)


def test_adapters_that_do_not_belong_together_are_refused(experts, random_adapter, tiny_models):
    """No adapter, another layout, another base model."""
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge([])
    with pytest.raises(AdapterError, match="different layouts"):
        merge([experts[0], random_adapter(tiny_models["qwen2"].layout())])
    strange = LoraAdapter(experts[0].layout, experts[0].factors, "another-base")
    with pytest.raises(AdapterError, match="another-base"):
        merge([experts[0], strange])


# --- adapters that are in no bank -------------------------------------------------------------------------------------


@pytest.fixture
def loose(llama_layout, random_adapter, tmp_path):
    """Two folders of other ranks and scalings; the second changes two modules only."""
    few = dataclasses.replace(llama_layout, target_modules=tuple(sorted(llama_layout.names[:2])), modules=llama_layout.modules[:2])
    one, other = random_adapter(llama_layout, 3, 6.0, seed=1), random_adapter(few, 5, 2.5, seed=2)
    return {str(adapter.save_pretrained(tmp_path / name)): adapter for name, adapter in (("one", one), ("other", other))}


@pytest.mark.slow
@pytest.mark.parametrize("method", MERGES)
def test_loose_adapters_are_fused_by_every_rule(loose, llama_layout, method):
    """Any ranks, scalings and modules, from folders: as if all changed all modules, the missing ones by nothing."""
    fused = fuse(list(loose), bank=None, method=method)
    assert set(fused.layout.names) == set(llama_layout.names)
    assert fused.factors.norm() > 0 and fused.factors.check_values()
    assert sorted(parent["name"] for parent in fused.info["parents"]) == ["one", "other"]


def test_weights_count(loose, capsys, tmp_path):
    """a=.7,b=.3 is 7/10 of one ΔW and 3/10 of the other, from Python and from the command line."""
    (one, first), (other, second) = loose.items()
    fused = fuse({one: 0.7, other: 0.3}, bank=None)
    for name in first.layout.names:
        wanted = 0.7 * first.delta(name) + (0.3 * second.delta(name) if name in second.layout.names else 0)
        assert torch.allclose(fused.delta(name), wanted, atol=1e-5)
    with pytest.raises(SystemExit) as stopped:
        main(["fuse", f"{one}=.7", f"{other}=.3", "--out", str(tmp_path / "fused")])
    assert not stopped.value.code and "2 adapters by mean" in capsys.readouterr().out
    back = LoraAdapter.from_pretrained(tmp_path / "fused", fused.layout)
    assert all(torch.allclose(back.delta(name), fused.delta(name), atol=1e-6) for name in fused.layout.names)


def test_what_does_not_belong_together_is_not_fused(loose, llama_layout, random_adapter, tmp_path):
    """Modules of other sizes, weights for some only, a weight that is not a number, tasks without a bank: refused by name."""
    first = next(iter(loose))
    wide = dataclasses.replace(
        llama_layout, modules=tuple(dataclasses.replace(m, in_features=m.in_features + 1) for m in llama_layout.modules)
    )
    strange = str(random_adapter(wide).save_pretrained(tmp_path / "wide"))
    with pytest.raises(AdapterError, match="different base models"):
        fuse([first, strange], bank=None)
    with pytest.raises(ConfigError, match="some adapters only"):
        read_weights(["a=.5", "b"])
    with pytest.raises(ConfigError, match="not a number"):
        read_weights(["a=.5", "b=x"])
    with pytest.raises(ConfigError, match="bank"):
        fuse([first], bank=None, tasks="sandbox")
    assert read_weights(["a", "b"]) == ["a", "b"] and read_weights(["a=.5", "b=2"]) == {"a": 0.5, "b": 2.0}
