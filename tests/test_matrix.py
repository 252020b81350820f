"""Kinds of LoRA x architectures, against stock PEFT on the same files: read, applied, exported, fused, merged, or refused by name.

Where lorag takes an adapter, logits are PEFT's within 1e-4; where it does not, the error says what the adapter has.
"""

import copy

import pytest
import torch
import transformers
from conftest import _TINY, EOS, PAD, SIZE, Tiny, _text, output_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.export import export_portable
from lorag.adapters.merged import merge_into
from lorag.adapters.merging import aligned, merge
from lorag.errors import LoragError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what PEFT says of Conv1D and of biases

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
_TOWER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
_ENDS = {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}


def _gemma3(layers):
    config = transformers.Gemma3TextConfig(**_ENDS, **_SMALL, num_hidden_layers=layers, head_dim=8, sliding_window=16)
    return transformers.Gemma3ForCausalLM(config)


def _phi(layers):
    settings = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
    return transformers.PhiForCausalLM(transformers.PhiConfig(**_ENDS, **settings, num_hidden_layers=layers))


def _llava(layers):
    text = transformers.LlamaConfig(**{**_ENDS, "vocab_size": SIZE + 1}, **_SMALL, num_hidden_layers=layers)
    vision = transformers.CLIPVisionConfig(**_TOWER, num_hidden_layers=2)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=SIZE)
    return transformers.LlavaForConditionalGeneration(config)


def _seen(rows, rng):
    """Four patches of an image before the text."""
    text = _text(rows, rng)["input_ids"]
    ids = torch.cat([torch.full((rows, 4), SIZE), text], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(rows, 3, 16, 16, generator=rng)}


BASES = {
    **_TINY,
    "gemma3": Tiny("gemma3", _gemma3, ("q_proj", "v_proj"), _text, "CAUSAL_LM"),
    "phi": Tiny("phi", _phi, ("q_proj", "dense", "fc1"), _text, "CAUSAL_LM"),
    "llava": Tiny("llava", _llava, ("q_proj", "v_proj", "linear_1"), _seen, None),
}


def _expression(tiny):
    return rf".*\.(?:{'|'.join(tiny.targets)})"


# Kind -> settings of LoraConfig, given a base; those below the line are more than plain LoRA.
TAKEN = {
    "plain": lambda tiny: {},
    "rank 1": lambda tiny: {"r": 1, "lora_alpha": 0.5},
    "rslora": lambda tiny: {"use_rslora": True},
    "fractional alpha": lambda tiny: {"lora_alpha": 3.7},
    "rank_pattern": lambda tiny: {"rank_pattern": {tiny.targets[0]: 7}},
    "alpha_pattern": lambda tiny: {"alpha_pattern": {tiny.targets[-1]: 1.5}, "rank_pattern": {rf".*1.*{tiny.targets[0]}": 2}},
    "expression": lambda tiny: {"target_modules": _expression(tiny)},
    "one target": lambda tiny: {"target_modules": [tiny.targets[0]]},
    "excluded": lambda tiny: {"exclude_modules": rf".*\.0\..*\.{tiny.targets[0]}"},
    "bf16": lambda tiny: {},
    "fp16": lambda tiny: {"lora_alpha": 32},
    "all rank-stabilised patterns": lambda tiny: {"use_rslora": True, "rank_pattern": {tiny.targets[-1]: 3}, "alpha_pattern": {"0": 9}},
}
REFUSED = {
    "dora": (lambda tiny: {"use_dora": True}, "DoRA|use_dora"),
    "bias": (lambda tiny: {"bias": "lora_only"}, "bias"),
    "lora_bias": (lambda tiny: {"lora_bias": True}, "lora_bias"),
    "pissa": (lambda tiny: {"init_lora_weights": "pissa"}, "init_lora_weights"),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", params=sorted(BASES))
def case(request):
    """One architecture: what makes it, a frozen model, inputs, and what the bare model gives."""
    tiny = BASES[request.param]
    model = tiny.build()
    inputs = tiny.inputs(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return tiny, model, inputs, output_of(model, inputs)


def _trained(tiny, model, folder, settings, dtype=None, seed=0):
    """What a trainer leaves: a PEFT folder with factors other than their start."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(tiny.targets), "task_type": tiny.task_type, **settings}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=rng)
            parameter.data = parameter.data if dtype is None else parameter.data.to(dtype)
    wrapped.save_pretrained(folder)
    return folder


@torch.no_grad()
def _stock(model, inputs, folder, other=None):
    """What PEFT gives with one adapter; with a second one, also what it gives with their sum."""
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    alone = output_of(wrapped, inputs)
    if other is None:
        return alone
    wrapped.load_adapter(other, "other")
    wrapped.base_model.set_adapter(["default", "other"])
    return alone, output_of(wrapped.eval(), inputs)


@pytest.fixture(scope="module")
def other(case, tmp_path_factory):
    """A plain adapter of the architecture, to be fused with others."""
    tiny, model, _, _ = case
    return _trained(tiny, model, tmp_path_factory.mktemp("other") / tiny.name, {}, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TAKEN)
def test_an_adapter_computes_what_peft_computes(case, other, kind, tmp_path):
    """Read and applied; exported and read by PEFT; fused with another; merged into the weights: logits within 1e-4 of stock PEFT's."""
    tiny, model, inputs, bare = case
    folder = _trained(tiny, model, tmp_path / "adapter", TAKEN[kind](tiny), _DTYPES.get(kind))
    expected, summed = _stock(model, inputs, folder, other)
    scale = bare.abs().max().clamp_min(1)
    assert (expected - bare).abs().max() > 1e-3 * scale  # else nothing would be compared
    adapter = LoraAdapter.from_pretrained(folder)

    def same(found, wanted):
        return (found - wanted).abs().max().item() <= 1e-4 * scale

    with torch.no_grad():
        assert same(output_of(adapter.apply_to(copy.deepcopy(model)), inputs), expected)
        export_portable(folder, tmp_path / "portable")
        assert same(_stock(model, inputs, tmp_path / "portable"), expected)
        merged = copy.deepcopy(model)
        merge_into(merged, adapter.fitted(merged))
        assert same(output_of(merged, inputs), expected)
        both = merge(aligned([adapter, LoraAdapter.from_pretrained(other)]), "cat", weights=[1.0, 1.0])
        assert same(output_of(both.apply_to(copy.deepcopy(model)), inputs), summed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_plain_lora_is_refused_by_name(case, kind, tmp_path):
    """The message says what the adapter has, and nothing is returned."""
    tiny, model, _, _ = case
    settings, said = REFUSED[kind]
    folder = _trained(tiny, model, tmp_path / "adapter", settings(tiny))
    with pytest.raises(LoragError, match=said):
        LoraAdapter.from_pretrained(folder)
