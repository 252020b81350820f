"""Row adapters: one pass over a shared base model equals n separate adapted models, forwards and backwards."""

import dataclasses

import peft
import pytest
import torch
from conftest import output_of, stack_adapters
from torch.func import functional_call

from lorag.base.base_model import BaseModel
from lorag.base.row_adapters import Cores, RowAdapters
from lorag.errors import BaseModelError, LayoutError
from lorag.spaces import SharedSubspace

RANKS = ((2, 4.0), (5, 20.0), (3, -3.0))


@pytest.fixture
def setting(tiny, random_adapter):
    """Model, row adapters, three adapters of mixed ranks and alphas, and two rows for each."""
    model = tiny.build()
    layout = tiny.layout(model)
    adapters = [random_adapter(layout, rank, alpha, seed) for seed, (rank, alpha) in enumerate(RANKS)]
    return tiny, RowAdapters(model, layout), adapters, tiny.inputs(6, torch.Generator().manual_seed(5))


def _part(inputs, index, each=2):
    return {key: value[index * each : (index + 1) * each] for key, value in inputs.items()}


def _close(a, b):
    return torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


@pytest.mark.slow
def test_rows_equal_separate_peft_models(setting, tmp_path):
    """Six architectures, three adapters of ranks 2, 5 and 3 at once: each run of rows is what stock PEFT computes."""
    tiny, rows, adapters, inputs = setting
    with torch.no_grad():
        with rows.use(stack_adapters(adapters)) as model:
            together = output_of(model, inputs)
        bare = output_of(rows.model, inputs)
        for index, adapter in enumerate(adapters):
            folder = dataclasses.replace(adapter, task_type=tiny.task_type).save_pretrained(tmp_path / str(index))
            alone = output_of(peft.PeftModel.from_pretrained(tiny.build(), folder), _part(inputs, index))
            assert _close(together[2 * index : 2 * index + 2], alone)
            assert (bare[2 * index : 2 * index + 2] - alone).abs().max() > 0.01


@pytest.mark.slow
def test_cores_equal_factors(setting):
    """Cores in shared bases compute what the factors of the same ΔW compute."""
    _, rows, adapters, inputs = setting
    space = SharedSubspace.fit(lambda: iter(adapters), rows.layout, 10)
    assert min(space.energy(adapter.factors) for adapter in adapters) > 1 - 1e-5
    cores = space.differentiable(torch.stack([space.encode(adapter.factors) for adapter in adapters]))
    with torch.no_grad():
        with rows.use(cores) as model:
            ours = output_of(model, inputs)
        with rows.use(stack_adapters(adapters)) as model:
            expected = output_of(model, inputs)
    assert torch.allclose(ours, expected, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def llama(tiny_models, random_adapter):
    """The tiny Llama with three adapters and six rows."""
    tiny = tiny_models["llama"]
    model = tiny.build()
    layout = tiny.layout(model)
    adapters = [random_adapter(layout, rank, alpha, seed) for seed, (rank, alpha) in enumerate(RANKS)]
    return RowAdapters(model, layout), adapters, tiny.inputs(6, torch.Generator().manual_seed(5))


def _loss(logits, ids, each=2):
    """Next-token loss summed over rows, one value a run of rows; the runs weigh differently."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    return losses.view(-1, each).sum(1) @ torch.arange(1.0, 1 + len(losses) // each)


def _leaves(pairs):
    return {name: tuple(x.detach().clone().requires_grad_() for x in pair) for name, pair in pairs.items()}


def test_gradients_equal_dense_autograd(llama):
    """Gradients of all factors equal those through merged dense weights W + B·A, one adapter at a time."""
    rows, adapters, inputs = llama
    stacked = _leaves(stack_adapters(adapters))
    with rows.use(stacked) as model:
        _loss(model(**inputs).logits, inputs["input_ids"]).backward()
    base = dict(rows.model.named_parameters())
    for index in range(len(adapters)):
        own = _leaves({name: (a[index], b[index]) for name, (a, b) in stacked.items()})
        merged = {f"{name}.weight": base[f"{name}.weight"] + b @ a for name, (a, b) in own.items()}
        part = _part(inputs, index)
        logits = functional_call(rows.model, merged, kwargs=part).logits
        ((index + 1) * _loss(logits, part["input_ids"])).backward()
        for name, pair in own.items():
            for leaf, whole in zip(pair, stacked[name], strict=True):
                assert _close(whole.grad[index], leaf.grad), name


def test_gradients_of_cores_equal_dense_autograd(llama):
    """The same for cores M in W + U_out M U_inᵀ."""
    rows, adapters, inputs = llama
    space = SharedSubspace.fit(lambda: iter(adapters), rows.layout, 10)
    cores = space.differentiable(torch.stack([space.encode(adapter.factors) for adapter in adapters]))
    values = {name: m.detach().clone().requires_grad_() for name, m in cores.values.items()}
    with rows.use(Cores(cores.bases_in, values, cores.bases_out)) as model:
        _loss(model(**inputs).logits, inputs["input_ids"]).backward()
    base = dict(rows.model.named_parameters())
    for index in range(len(adapters)):
        own = {name: m[index].detach().clone().requires_grad_() for name, m in values.items()}
        merged = {f"{n}.weight": base[f"{n}.weight"] + cores.bases_out[n] @ m @ cores.bases_in[n].T for n, m in own.items()}
        part = _part(inputs, index)
        ((index + 1) * _loss(functional_call(rows.model, merged, kwargs=part).logits, part["input_ids"])).backward()
        for name, m in own.items():
            assert torch.allclose(values[name].grad[index], m.grad, atol=1e-4 * m.grad.abs().max().item()), name


def test_base_model_as_loaded_gets_no_gradient(llama, tmp_path):
    """A base model that lorag loads is frozen: backward fills the factors' gradients and no other."""
    rows, adapters, inputs = llama
    rows.model.requires_grad_(True).save_pretrained(tmp_path)
    loaded = RowAdapters(BaseModel(str(tmp_path), "causal_lm").load("cpu"), rows.layout)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    stacked = _leaves(stack_adapters(adapters))
    with loaded.use(stacked) as model:
        _loss(model(**inputs).logits, inputs["input_ids"]).backward()
    assert all(leaf.grad.abs().sum() > 0 for pair in stacked.values() for leaf in pair)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())


def test_rows_that_adapters_do_not_divide_are_refused(llama):
    """Five rows for three adapters: LayoutError, not a guess."""
    rows, adapters, inputs = llama
    space = SharedSubspace.fit(lambda: iter(adapters), rows.layout, 4)
    for stack in (stack_adapters(adapters), space.differentiable(torch.zeros(3, space.size))):
        with pytest.raises(LayoutError, match="5 rows"), rows.use(stack) as model:
            model(**_part(inputs, 0, 5))


def test_model_is_bare_after_the_block_and_after_an_exception(llama):
    """Hooks go with the block, however it ends."""
    rows, adapters, inputs = llama

    def hooks():
        return sum(len(module._forward_hooks) for module in rows.model.modules())

    with torch.no_grad():
        bare = rows.model(**inputs).logits
        with rows.use(stack_adapters(adapters)) as model:
            assert hooks() == len(rows.layout)
            assert not torch.equal(model(**inputs).logits, bare)
        assert hooks() == 0
        with pytest.raises(KeyboardInterrupt), rows.use(stack_adapters(adapters)):
            raise KeyboardInterrupt
        assert hooks() == 0
        assert torch.equal(rows.model(**inputs).logits, bare)


def test_adapters_for_other_modules_are_refused(llama, tiny_models, random_adapter):
    """Neither a layout that the model lacks, nor factors for modules that the layout lacks, are passed over in silence."""
    rows, adapters, _ = llama
    with pytest.raises(BaseModelError, match="no module"):
        RowAdapters(rows.model, tiny_models["gpt2"].layout())
    stacked = stack_adapters(adapters)
    name = rows.layout.names[0]
    with pytest.raises(LayoutError, match="renamed"), rows.use({("renamed" if n == name else n): pair for n, pair in stacked.items()}):
        pass


def test_stacking_folds_rank_and_scaling(llama):
    """Stacked B·A is each adapter's own ΔW, whatever its rank and alpha."""
    rows, adapters, _ = llama
    for name, (a, b) in stack_adapters(adapters).items():
        assert a.shape[:2] == (3, 5)
        for index, adapter in enumerate(adapters):
            assert torch.allclose(b[index] @ a[index], adapter.delta(name), atol=1e-5)


@pytest.mark.parametrize("kind", ["factors", "cores"])
def test_half_precision_base_models(tiny_models, random_adapter, kind):
    """fp32 adapters on a bf16 base: every adapted module keeps the base's precision, and the result is close to that in fp32."""
    tiny = tiny_models["llama"]
    layout = tiny.layout()
    adapters = [random_adapter(layout, seed=i) for i in range(3)]
    stacked = stack_adapters(adapters)
    if kind == "cores":
        space = SharedSubspace.fit(lambda: iter(adapters), layout, 12)
        stacked = space.differentiable(torch.stack([space.encode(adapter.factors) for adapter in adapters]))
    inputs = tiny.inputs(6, torch.Generator().manual_seed(5))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, seen = RowAdapters(tiny.build().to(dtype), layout), []
        with torch.no_grad(), rows.use(stacked) as model:
            for name in layout.names:
                model.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[2].dtype))
            found.append(model(**inputs).logits.float())
        assert seen == [dtype] * len(layout)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()
