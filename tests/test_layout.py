"""Layouts: PEFT's own view of a base model, in model order, without allocating it."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from conftest import Allocations
from peft.tuners.lora import LoraLayer

from lorag.base.layout import LoraLayout, ModuleShape
from lorag.errors import LayoutError


def test_layout_is_what_peft_wraps(tiny):
    """Names and sizes are those that PEFT adapts in the real model, which stays as it was."""
    model = tiny.build()
    before = [(name, type(module)) for name, module in model.named_modules()]
    layout = tiny.layout(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=list(tiny.targets), fan_in_fan_out=tiny.name == "gpt2"))
    expected = [
        ModuleShape(name, module.lora_A["default"].weight.shape[1], module.lora_B["default"].weight.shape[0])
        for name, module in wrapped.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]
    assert list(layout.modules) == expected
    assert layout.fan_in_fan_out == (tiny.name == "gpt2")
    assert layout.target_modules == tuple(sorted(tiny.targets))
    assert layout.values(3) == sum(p.numel() for n, p in wrapped.named_parameters() if ".lora_" in n)


def test_order_is_model_order(tiny_models):
    """Layer 2 comes before layer 10, and q before v."""
    layout = LoraLayout.from_model(tiny_models["llama"].build(layers=12), ["v_proj", "q_proj"])
    assert list(layout.names) == [f"model.layers.{n}.self_attn.{p}_proj" for n in range(12) for p in "qv"]


def test_grouped_query_sizes_are_not_confused(tiny_models):
    """With grouped keys and values, v is smaller than q."""
    sizes = {m.name.split(".")[-1]: (m.in_features, m.out_features) for m in tiny_models["qwen2"].layout().modules}
    assert sizes == {"q_proj": (32, 32), "v_proj": (32, 16)}


def test_conv1d_sizes_are_in_and_out(tiny_models):
    """GPT-2 stores (in, out); the layout says in and out all the same."""
    layout = tiny_models["gpt2"].layout()
    assert layout.fan_in_fan_out
    assert {(m.name.split(".")[-1], m.in_features, m.out_features) for m in layout.modules} == {("c_attn", 32, 96), ("c_fc", 32, 128)}


@pytest.mark.slow
def test_all_linear(tiny):
    """ "all-linear" takes every linear layer but the output head, and the names stored select the same again."""
    model = tiny.build()
    layout = LoraLayout.from_model(model, "all-linear")
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    assert list(layout.names) == [n for n, m in model.named_modules() if isinstance(m, linear) and n != "lm_head"]
    assert LoraLayout.from_model(model, layout.target_modules) == layout


def test_regular_expression_targets_select_the_same_again(tiny_models):
    """A layout asked for by expression stores names that PEFT, given them as a list, matches to the same modules."""
    model = tiny_models["llama"].build()
    layout = LoraLayout.from_model(model, r".*layers\.1\..*(q|v)_proj")
    assert list(layout.names) == [f"model.layers.1.self_attn.{p}_proj" for p in "qv"]
    assert LoraLayout.from_model(model, layout.target_modules) == layout


@pytest.mark.parametrize("targets", [["nothing"], ["input_layernorm"], ["embed_tokens"], r"no\.such", []])
def test_targets_that_are_no_linear_layers_are_refused(tiny_models, targets):
    """Nothing matched, a norm, an embedding: LayoutError."""
    with pytest.raises(LayoutError):
        LoraLayout.from_model(tiny_models["llama"].build(), targets)


def test_mixed_weight_orders_are_taken():
    """A model may store some layers as (in, out) and others as (out, in): sizes are those of each layer."""
    config = transformers.GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=4, n_positions=32, num_labels=2, pad_token_id=0)
    layout = LoraLayout.from_model(transformers.GPT2ForSequenceClassification(config), ["c_attn", "score"])
    assert [(m.in_features, m.out_features) for m in layout.modules] == [(32, 96), (32, 2)]


def test_json_round_trip(tiny):
    """A layout survives JSON."""
    layout = tiny.layout()
    assert LoraLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules": []}, "got modules: a list; expected .*at least 1"),
        ({"modules": [["a", 4, 4], ["a", 4, 4]]}, "repeats"),
        ({"modules": [["a", 0, 4]]}, r"got modules\.0\.1: 0"),
        ({"modules": [["a", 4]]}, r"got no modules\.0\.2"),
        ({"modules": [["a", "wide", 4]]}, r"got modules\.0\.1: wide"),
        ({"modules": [["a", float("inf"), 4]]}, r"got modules\.0\.1: inf"),
        ({"modules": None}, "got modules: None"),
        ({"target_modules": 3}, "got target_modules: 3"),
        ({"target_modules": "q_proj"}, "got target_modules: q_proj"),
        ({"fan_in_fan_out": 1}, "got fan_in_fan_out: 1"),
    ],
)
def test_malformed_stored_layouts_are_refused(llama_layout, change, said):
    """What no model can have is a LayoutError that names the value."""
    with pytest.raises(LayoutError, match=said):
        LoraLayout.from_dict({**llama_layout.to_dict(), **change})


def test_stored_layout_without_a_part_is_refused(llama_layout):
    """A missing key is a LayoutError."""
    for key in llama_layout.to_dict():
        with pytest.raises(LayoutError):
            LoraLayout.from_dict({k: v for k, v in llama_layout.to_dict().items() if k != key})


def test_fingerprint_changes_with_every_size_name_and_order(llama_layout):
    """Two layouts with one fingerprint have the same modules."""
    modules, found = llama_layout.modules, {llama_layout.fingerprint}
    for index, module in enumerate(modules):
        for change in ({"in_features": 33}, {"out_features": 31}, {"name": module.name + "x"}):
            changed = dataclasses.replace(module, **change)
            found.add(dataclasses.replace(llama_layout, modules=(*modules[:index], changed, *modules[index + 1 :])).fingerprint)
    found.add(dataclasses.replace(llama_layout, modules=modules[::-1]).fingerprint)
    assert len(found) == 2 + 3 * len(modules)
    assert dataclasses.replace(llama_layout).fingerprint == llama_layout.fingerprint


def test_true_size_layout_allocates_nothing():
    """Llama 3 8B's layout comes from its config alone: 64 GB of fp32 weights would not fit this test."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with Allocations() as seen:
        layout = LoraLayout.from_model(model, ["q_proj", "v_proj"])
    assert [(m.in_features, m.out_features) for m in layout.modules] == [(4096, 4096), (4096, 1024)] * 32
    assert seen.largest < 2**20


def test_factors_that_do_not_fit_name_the_module(llama_layout, random_adapter):
    """check_factors names the first module that is missing, extra or of the wrong shape."""
    factors = random_adapter(llama_layout).factors
    first = llama_layout.names[0]
    rows, columns = factors[first]
    llama_layout.check_factors(factors)
    for wrong in (
        {name: pair for name, pair in factors.items() if name != first},
        {**factors, first + "x": (rows, columns)},
        {**factors, first: (rows.T, columns.T)},
        {**factors, first: (rows[:2], columns)},
        {**factors, first: (rows.flatten(), columns)},
    ):
        with pytest.raises(LayoutError, match=first):
            llama_layout.check_factors(wrong)


def test_a_model_that_its_config_alone_does_not_build(tiny_models):
    """A wrapper around a model, changed after it was built: its modules count, not what its class and config would make."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner, width):
            super().__init__()
            self.inner, self.more = inner, torch.nn.Linear(32, width)

    model = tiny_models["llama"].build()
    del model.model.layers[1]
    layout = LoraLayout.from_model(Wrapper(model, 5), ["q_proj", "more"])
    assert layout.modules == (ModuleShape("inner.model.layers.0.self_attn.q_proj", 32, 32), ModuleShape("more", 32, 5))


def test_layers_are_chosen_as_peft_chooses_them(tiny_models):
    """The upper layers' modules alone, stored by names that select them again; layers that are not there are refused."""
    model = tiny_models["llama"].build(layers=4)
    layout = LoraLayout.from_model(model, ["q_proj", "v_proj"], [2, 3])
    assert list(layout.names) == [f"model.layers.{n}.self_attn.{p}_proj" for n in (2, 3) for p in "qv"]
    assert LoraLayout.from_model(model, layout.target_modules) == layout
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3]))
    assert layout.values(3) == sum(p.numel() for n, p in wrapped.named_parameters() if ".lora_" in n)
    with pytest.raises(LayoutError, match=r"layers \[9\]"):
        LoraLayout.from_model(tiny_models["llama"].build(), ["q_proj"], [9])
