"""Base models of true size: layouts from published dimensions, codes from a shared decoder, bases in bf16, banks streamed."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import Allocations
from toy_world import TRAINING, WordEmbedder, make_bank, prepare_toy, quiet_loop, save_base

from lorag.adapters.spans import Span
from lorag.base.layout import LoraLayout, ModulePlace, ModuleShape
from lorag.errors import ConfigError, GeneratorError, LoragError
from lorag.files.tensors import load_tensors, save_tensors
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.networks.modules import ModuleDecoder
from lorag.spaces import FlatFactors, SharedSubspace, open_space
from lorag.training.train import fit_generator

CONFIGS = Path(__file__).parent / "base_configs"
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _attention(d, kv, layers):
    """Values a rank of q, k, v and o, each way."""
    return layers * (2 * d + 2 * (d + kv) + 2 * d)


# name -> attention targets; modules and values a rank of all linear layers, and of attention, from the published dimensions
EXPECTED = {
    "llama-3.1-8b": (QKVO, 32 * 7, 32 * (4 * 4096 + 2 * 5120 + 3 * (4096 + 14336)), 32 * 4, _attention(4096, 1024, 32)),
    "mistral-7b": (QKVO, 32 * 7, 32 * (4 * 4096 + 2 * 5120 + 3 * (4096 + 14336)), 32 * 4, _attention(4096, 1024, 32)),
    "qwen2.5-7b": (QKVO, 28 * 7, 28 * (4 * 3584 + 2 * 4096 + 3 * (3584 + 18944)), 28 * 4, _attention(3584, 512, 28)),
    "gemma-2-2b": (QKVO, 26 * 7, 26 * (2 * 4352 + 2 * 3328 + 3 * (2304 + 9216)), 26 * 4, 26 * (2 * 4352 + 2 * 3328)),
    "phi-4-mini": (["qkv_proj", "o_proj"], 32 * 4, 32 * (8192 + 6144 + 19456 + 11264), 32 * 2, 32 * (8192 + 6144)),
    "gpt2": (["c_attn"], 12 * 4, 12 * (3072 + 1536 + 3840 + 3840), 12, 12 * 3072),
    "flan-t5-large": (["q", "v"], 24 * 18, 24 * (12 * 2048 + 6 * 3840), 24 * 3 * 2, 24 * 3 * 2 * 2048),
    "clip-vit-b-16": (
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        24 * 6 + 2,
        12 * (4 * 1536 + 2 * 3840 + 4 * 1024 + 2 * 2560) + 1280 + 1024,
        24 * 4,
        12 * (4 * 1536 + 4 * 1024),
    ),
    # 12 blocks a kind in the vision tower, of widths 128, 256, 512 (nine times) and 1024: qkv, proj, fc1 and fc2 for windows
    # and for channels; then 6 + 12 attentions and 12 perceptrons of text, and the projection between them.
    "florence-2-base": (
        ["q_proj", "k_proj", "v_proj"],
        12 * 8 + 18 * 4 + 12 * 2 + 1,
        2 * (128 + 256 + 9 * 512 + 1024) * (4 + 2 + 5 + 5) + 72 * 1536 + 24 * 3840 + 1024 + 768,
        18 * 3,
        54 * 1536,
    ),
}


def _skeleton(name):
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        return getattr(transformers, values["architectures"][0])(config)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_layouts_of_real_base_models(name):
    """PEFT finds the published model's modules, all linear ones and those of attention, and no weight is allocated."""
    targets, modules, values, attention, attention_values = EXPECTED[name]
    with Allocations() as seen:
        model = _skeleton(name)
        whole, part = LoraLayout.from_model(model, "all-linear"), LoraLayout.from_model(model, targets)
    assert (len(whole), whole.values(1)) == (modules, values)
    assert (len(part), part.values(1)) == (attention, attention_values)
    assert seen.largest < 2**20
    places = whole.places
    assert len(set(places)) == len(places)  # kind and depth tell every module apart
    kinds = {place.kind for place in places}
    assert not any(character.isdecimal() for kind in kinds for character in kind.split("."))
    assert len(kinds) <= 28 < len(places)


@pytest.mark.slow
def test_counts_that_others_published():
    """Parameters that PEFT's users report: Llama-3.1-8B and Qwen2.5-7B at r = 16, Florence-2 at r = 8 as ICM-LoRA has it."""
    assert LoraLayout.from_model(_skeleton("llama-3.1-8b"), "all-linear").values(16) == 41_943_040
    assert LoraLayout.from_model(_skeleton("qwen2.5-7b"), "all-linear").values(16) == 40_370_176
    targets = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]
    assert LoraLayout.from_model(_skeleton("florence-2-base"), targets).values(8) == 1_929_928


@pytest.mark.slow
def test_places_of_an_encoder_decoder():
    """Encoder and decoder keep kinds of their own, and the layer is the first number."""
    places = dict(zip((t5 := LoraLayout.from_model(_skeleton("flan-t5-large"), ["q"])).names, t5.places, strict=True))
    assert places["encoder.block.3.layer.0.SelfAttention.q"] == ModulePlace("encoder.block.layer.SelfAttention.q", (3, 0))
    assert places["decoder.block.11.layer.1.EncDecAttention.q"] == ModulePlace("decoder.block.layer.EncDecAttention.q", (11, 1))


# --- the shared decoder -------------------------------------------------------------------------------------------------


def _decoder(layers, kinds=3, part=16):
    torch.manual_seed(0)
    numbers = torch.arange(kinds).repeat(layers)
    return ModuleDecoder(8, numbers, torch.arange(layers).repeat_interleave(kinds)[:, None], part, width=24, blocks=1)


def test_its_size_does_not_grow_with_depth():
    """Two layers or eighty: as many parameters. Another kind adds its embedding and its head."""
    sizes = [sum(p.numel() for p in _decoder(layers).parameters()) for layers in (2, 80)]
    assert sizes[0] == sizes[1]
    assert sum(p.numel() for p in _decoder(2, kinds=4).parameters()) - sizes[0] == 2 * 24 + 24 * 16 + 16


def test_parts_are_in_the_layout_s_order_and_start_at_the_mean():
    """Zero before training; then each module's part is what its own place gives, alone or among others."""
    decoder, z = _decoder(5), torch.randn(4, 8)
    assert not decoder(z).any()
    torch.nn.init.normal_(decoder.heads)
    codes = decoder(z).view(4, 15, 16)
    one = _decoder(5)
    one.load_state_dict(decoder.state_dict())
    one.kinds, one.depths = decoder.kinds[7:8], decoder.depths[7:8]
    assert torch.allclose(one(z), codes[:, 7], atol=1e-5)
    distances = torch.cdist(codes[0], codes[0]) + 1e9 * torch.eye(15)
    assert distances.min() > 1e-2  # no two places alike


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_models, tokenizer):
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)
    return prepare_toy(bank)


def _fit(prepared, **settings):
    small = {"functional": {"steps": 0}, "steps": 40, "width": 32, "queries": 2, "hidden": 32, "decoder_width": 32, "decoder_blocks": 1}
    small |= {"ensemble": {"count": 1, "steps": 4}, "kernel_steps": 4}
    method = method_type("house").with_settings({**small, "noise": 0.0, "word_dropout": 0.0, "dropout": 0.0, **settings})
    return fit_generator(prepared, method, quiet_loop(), rank=4, strength=1.0, origin={})


def _adapters_equal(one, other):
    return all(torch.equal(a, b) for n in one.layout.names for a, b in zip(one.factors[n], other.factors[n], strict=True))


@pytest.mark.slow
def test_house_with_a_shared_decoder_learns_and_comes_back(prepared, tmp_path):
    """It comes nearer to its experts than the mean does, and opened again it writes the same bytes."""
    generator = _fit(prepared, decoder="shared", steps=150, learning_rate=3e-3)
    training = list(prepared.data.training)
    guessed = generator.method.predict([prepared.data.embeddings[i][0] for i in training])
    error = (guessed - prepared.data.codes[training]).square().mean() / prepared.data.codes[training].square().mean()
    assert error < 0.6
    generator.save_pretrained(tmp_path)
    opened = LoraGenerator.from_pretrained(tmp_path, embedder=WordEmbedder())
    assert _adapters_equal(*(g.generate("paint the red dog", on_unknown="ignore") for g in (generator, opened)))


def test_small_codes_keep_the_flat_decoder(prepared):
    """`auto` changes nothing for a small base model, and what a file holds decides, whatever the setting says."""
    auto = _fit(prepared, steps=1)
    assert "kinds" not in auto.method.shape and "network.head.experts" in auto.method.state().tensors
    other = method_type("house").with_settings({**auto.method.values(), "decoder": "shared"})
    other.restore(*auto.method.state())
    embeddings = WordEmbedder().embed(["red dog"])
    with torch.inference_mode():
        assert torch.equal(other.predict(embeddings), auto.method.predict(embeddings))


@pytest.mark.slow
def test_decoder_settings_that_cannot_be_used(prepared):
    """Unknown names, sizes, and a space whose modules' parts differ in length are named errors; so are impossible places."""
    for wrong in ({"decoder": "round"}, {"decoder_blocks": 1000}, {"decoder_width": 0}):
        with pytest.raises(ConfigError):
            method_type("house").with_settings(wrong)
    method = method_type("house").with_settings({"decoder": "shared", "functional": {"steps": 0}})
    with pytest.raises(GeneratorError, match="share a decoder"):
        flat = FlatFactors.fit(prepared.bank.adapters, prepared.space.layout)
        method.shares_decoder(dataclasses.replace(prepared.data, space=flat))
    tensors, shape = _fit(prepared, decoder="shared", steps=1).method.state()
    far, floats = [kind + 1000 for kind in shape["kinds"]], [float(kind) for kind in shape["kinds"]]
    for change in ({"kinds": far}, {"depths": shape["depths"][1:]}, {"kinds": floats}, {"kinds": [True]}, {"depths": 3}):
        with pytest.raises(LoragError):
            method_type("house").with_settings({"decoder": "shared"}).restore(tensors, {**shape, **change})


# --- bases in bf16, and a bank that streams -----------------------------------------------------------------------------


def test_bases_in_bf16_are_mapped_and_decode_the_same_bytes_in_any_batch(prepared, tmp_path):
    """Half the bytes, ΔW within half a percent, no copy on opening, and an adapter does not depend on its batch."""
    layout = prepared.bank.base.layout
    full = SharedSubspace.fit_stream(prepared.bank, layout, 8)
    half = SharedSubspace.fit_stream(prepared.bank, layout, 8, dtype=torch.bfloat16)
    adapter = prepared.bank.adapter("red-cat")
    near, wide = (space.decode(space.encode(adapter.factors)[None], 4)[0] for space in (half, full))
    for name, (rows, columns) in near.items():
        right = wide[name][1] @ wide[name][0]
        assert rows.dtype == torch.float32
        assert torch.linalg.norm(columns @ rows - right) < 5e-3 * torch.linalg.norm(right)
    tensors, values = half.tensors()
    save_tensors(tmp_path / "s.safetensors", tensors)
    stored = load_tensors(tmp_path / "s.safetensors")
    opened = open_space(stored, values)
    assert all(u.dtype == torch.bfloat16 for u in (*opened.bases_in, *opened.bases_out))
    assert opened.bases_in[0].data_ptr() == stored["bases_in.0"].data_ptr()
    codes = torch.randn(5, half.size, generator=torch.Generator().manual_seed(0))
    together = opened.decode(codes, 4)
    for place in (0, 4):
        (alone,) = half.decode(codes[place : place + 1].clone(), 4)
        assert list(alone) == list(layout.names)
        assert all(torch.equal(a, b) for n in layout.names for a, b in zip(alone[n], together[place][n], strict=True))
    cores = opened.differentiable(codes.requires_grad_())  # functional training runs them in the codes' precision
    assert cores.bases_in[layout.names[0]].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("side, dtype", [(2**12, torch.float32), (2**17, torch.bfloat16)])
def test_large_spaces_take_bf16_by_themselves(side, dtype):
    """Of more than eight million values, and not below: what ships stays as it is."""
    layout = LoraLayout(("q",), (ModuleShape("q", side, side),))
    pair = (torch.randn(2, 20, side, dtype=torch.float64), torch.randn(2, side, 20, dtype=torch.float64))
    stream = SimpleNamespace(factors=lambda module: iter([pair]))
    assert SharedSubspace.fit_stream(stream, layout, 40).bases_in[0].dtype == dtype


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_streamed_experts_are_those_of_the_bank(prepared, tmp_path, precision):
    """Module by module, over shards of other ranks and precisions, in the bank's order: the final checkpoint of each."""
    bank, base = prepared.bank, prepared.bank.base
    copy = bank.copy_to(tmp_path / "copy", bank.names[:4], precision)
    other = bank.adapter(bank.names[5]).scaled(2.75)
    copy = copy.add([("other", ["other"], [other])])
    stream = copy
    for module in base.layout.names:
        deltas = [column @ row for rows, columns in stream.factors(module) for row, column in zip(rows, columns, strict=True)]
        assert len(deltas) == 5
        for delta, adapter in zip(deltas, copy.adapters(), strict=True):
            assert torch.allclose(delta.float(), adapter.delta(module), atol=1e-5 * adapter.delta(module).abs().max().item())


def test_a_stream_holds_a_few_experts_at_a_time(prepared):
    """However many experts a shard has, stacks stay below the limit, and nobody is left out."""
    module = prepared.bank.base.layout.names[2]  # 64 -> 32
    counts = [len(rows) for rows, _ in prepared.bank.factors(module, at_once=3 * 4 * 64)]
    assert max(counts) == 3 and sum(counts) == len(prepared.bank)


def test_fitting_from_the_stream_is_fitting_from_adapters(prepared):
    """The same bases and normaliser, whichever way experts come."""
    layout = prepared.bank.base.layout
    streamed = SharedSubspace.fit_stream(prepared.bank, layout, 8)
    whole = SharedSubspace.fit(prepared.bank.adapters, layout, 8)
    adapter = prepared.bank.adapter("red-cat")
    assert torch.allclose(streamed.encode(adapter.factors), whole.encode(adapter.factors), atol=1e-4)


def test_experts_that_are_no_numbers_are_refused(llama_layout, random_adapter):
    """A NaN would spoil every base: the fit stops."""

    class _Stream:
        def factors(self, module):
            rows, columns = random_adapter(llama_layout).factors[module]
            yield rows[None] * math.nan, columns[None]

    with pytest.raises(GeneratorError, match="NaN"):
        SharedSubspace.fit_stream(_Stream(), llama_layout, 4)


def test_long_columns_are_compressed_almost_without_loss():
    """Columns longer than 32 k, with a spectrum that falls slowly: at least .995 of the energy that any k directions keep."""
    rng = torch.Generator().manual_seed(0)
    k, size = 4, 200
    weights = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    turn = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0]
    columns = turn @ (weights[:, None] * torch.randn(size, 600, generator=rng, dtype=torch.float64))
    span = Span(size, k)
    for part in columns.split(23, 1):
        span.add(part)
        assert span._columns.shape[1] < 8 * k
    best = torch.linalg.svdvals(columns)[:k].square().sum()
    assert (span.basis().double().T @ columns).square().sum() > 0.995 * best
