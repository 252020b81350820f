"""Formats beside PEFT's: recognised by what they hold, read as what they mean, written and read back, refused by name."""

import dataclasses
import json
import logging
import shutil
import struct

import gguf
import peft
import pytest
import torch
import transformers
from conftest import SIZE, output_of
from safetensors.torch import load_file, save_file
from toy_world import save_base, true_adapter

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.export import export_as, export_portable
from lorag.adapters.factors import Factors
from lorag.adapters.formats import FORMATS, adapter_files, format_of, peft_folder
from lorag.adapters.formats.format import Base
from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.cli import main as cli
from lorag.cli.info import describe_path
from lorag.errors import (
    AdapterError,
    AlphaRangeError,
    ArtifactError,
    BaseModelError,
    ConfigError,
    LoragError,
    MissingDependencyError,
    MissingTensorError,
    PeftTypeError,
    StorageError,
    UnsupportedLoraError,
)
from lorag.files.cache import cache_folder

HEADS, KEYS = 4, 2
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("LORAG_CACHE", str(tmp_path_factory.mktemp("cache")))


def _drawn(kind, config):
    """A model of a kind with values that are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).requires_grad_(False).eval()


def _decoder(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _drawn(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM"), config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small Llama, Qwen and Gemma in folders, each with grouped heads."""
    found = {}
    for name in ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Mistral"):
        model = _decoder(name)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = (str(folder), model)
    return found


def _adapter(model, name, random_adapter, targets=LINEAR, **more):
    layout = LoraLayout.from_model(model, targets)
    made = random_adapter(layout, **more)
    return dataclasses.replace(made, base_model=name, task_type="CAUSAL_LM", info={"description": "paint the red cat", "license": "MIT"})


def _saved(adapter, folder):
    return adapter.save_pretrained(folder)


def _same(one, other, atol=0.0):
    assert set(one.layout.names) == set(other.layout.names)
    for name in one.layout.names:
        assert torch.allclose(one.delta(name), other.delta(name), atol=atol, rtol=1e-6), name


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text"])
def test_a_gguf_file_holds_what_the_adapter_is(bases, random_adapter, tmp_path, name):
    """Out and in again: the same ΔW, description and licence, in every family."""
    folder, model = bases[name]
    adapter = _adapter(model, folder, random_adapter)
    export_as(_saved(adapter, tmp_path / "a"), tmp_path / "a.gguf", "gguf")
    again = LoraAdapter.from_pretrained(tmp_path / "a.gguf")
    _same(adapter, again)
    assert again.info["description"] == "paint the red cat" and again.info["license"] == "MIT"
    assert again.alpha == adapter.alpha and again.rank == adapter.rank
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        applied = again.apply_to(transformers.AutoModelForCausalLM.from_pretrained(folder))(ids).logits
        assert torch.allclose(applied, adapter.apply_to(transformers.AutoModelForCausalLM.from_pretrained(folder))(ids).logits, atol=1e-5)


def test_rows_are_permuted_where_llama_cpp_has_them_so(bases, random_adapter, tmp_path):
    """q and k of Llama, by their own number of heads; nothing of Qwen; the names are llama.cpp's."""
    for name, permuted in (("Llama", {"attn_q": HEADS, "attn_k": KEYS}), ("Qwen2", {})):
        folder, model = bases[name]
        adapter = _adapter(model, folder, random_adapter)
        export_as(_saved(adapter, tmp_path / name), tmp_path / f"{name}.gguf", "gguf")
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        for module, (a, b) in adapter.factors.tensors.items():
            target = names.get_name(f"{module}.weight", (".weight",))
            heads = permuted.get(target.split(".")[2])
            if heads:
                b = b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
            assert torch.equal(found.pop(f"{target}.lora_a"), a) and torch.equal(found.pop(f"{target}.lora_b"), b)
        assert not found
        assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
        assert reader.fields["adapter.lora.alpha"].contents() == adapter.alpha
        assert reader.fields["general.architecture"].contents() == name.lower()


def _write_foreign(path, adapter, *, heads=None, architecture="llama", kind="adapter", quantised=None, **fields):
    """A GGUF as llama.cpp's converter writes it: without the number of heads."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", fields.pop("alpha", adapter.alpha))
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for module, (a, b) in adapter.factors.tensors.items():
        target = names.get_name(f"{module}.weight", (".weight",))
        count = (heads or {}).get(target.split(".")[2])
        if count:
            b = b.view(count, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
        for side, value in (("a", a), ("b", b)):
            raw = value.float().numpy() if quantised is None else gguf.quantize(value.float().numpy(), quantised)
            writer.add_tensor(f"{target}.lora_{side}", raw, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_foreign_llama_file_asks_for_its_base(bases, random_adapter, tmp_path, capsys):
    """Without heads and a base model it cannot be said which row is which; with it everything works, from the command line too."""
    folder, model = bases["Llama"]
    adapter = _adapter(model, folder, random_adapter, targets=("q_proj", "k_proj", "down_proj"))
    path = tmp_path / "foreign.gguf"
    _write_foreign(path, adapter, heads={"attn_q": HEADS, "attn_k": KEYS}, general__description="paint the blue cat")
    with pytest.raises(BaseModelError, match=r"does not say how its rows are ordered.*--base-model"):
        LoraAdapter.from_pretrained(path)
    with pytest.raises(BaseModelError, match=r"another architecture.*qwen2"):
        LoraAdapter.from_pretrained(path, base=BaseModel(bases["Qwen2"][0], "causal_lm"))
    base = BaseModel(folder, "causal_lm")
    _same(adapter, LoraAdapter.from_pretrained(path, base=base))
    assert "format of GGUF" in describe_path(path, folder)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(path), "--base-model", folder, "--out", str(tmp_path / "peft")])
    assert stopped.value.code == 0
    again = LoraAdapter.from_pretrained(tmp_path / "peft")
    _same(adapter, again)
    assert again.base_model == folder and again.info["description"] == "paint the blue cat"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(path), "--merge", "--base-model", folder, "--out", str(tmp_path / "merged")])
    assert stopped.value.code == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapter.apply_to(_fresh(folder))(ids).logits, atol=1e-5)


def _fresh(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_quantised_and_unscaled_files_are_read(bases, random_adapter, tmp_path):
    """Q8_0 and F16 factors are dequantised; an alpha of 0 means a scaling of 1, as in llama.cpp; the base's address is read."""
    folder, model = bases["Qwen2"]
    adapter = _adapter(model, folder, random_adapter, targets=("q_proj",), rank=32)
    adapter = dataclasses.replace(adapter, factors=Factors(dict(adapter.factors.tensors)))
    path = tmp_path / "half.gguf"
    _write_foreign(
        path,
        adapter,
        architecture="qwen2",
        quantised=gguf.GGMLQuantizationType.Q8_0,
        alpha=0.0,
        general__base_model__0__repo_url="https://huggingface.co/toys/Tiny-Qwen",
    )
    again = LoraAdapter.from_pretrained(path)
    assert again.base_model == "toys/Tiny-Qwen"
    for name in adapter.layout.names:
        assert (again.delta(name) - adapter.delta(name)).norm() < 0.02 * adapter.delta(name).norm()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.6, 0.95, 0.9999])
def test_a_truncated_file_is_refused(bases, random_adapter, tmp_path, share):
    """Cut anywhere: one error that names the file, and nothing in the cache."""
    folder, model = bases["Qwen2"]
    path = tmp_path / "a.gguf"
    export_as(_saved(_adapter(model, folder, random_adapter), tmp_path / "a"), path, "gguf")
    shutil.rmtree(cache_folder() / "adapters", ignore_errors=True)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match=r"a\.gguf.*(cut short or damaged|cannot be read as an adapter)"):
        LoraAdapter.from_pretrained(path)
    assert not (cache_folder() / "adapters").exists()


@pytest.mark.slow
def test_a_flipped_header_never_escapes(bases, random_adapter, tmp_path):
    """Each byte of the header changed: the adapter, or an error of lorag's."""
    folder, model = bases["Qwen2"]
    path = tmp_path / "a.gguf"
    export_as(_saved(_adapter(model, folder, random_adapter, targets=("q_proj",)), tmp_path / "a"), path, "gguf")
    data = path.read_bytes()
    refused = 0
    for place in [*range(0, 96), *range(96, 900, 13)]:
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                FORMATS["gguf"].read(path, Base())
            except LoragError:
                refused += 1
    assert refused > 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda raw: b"GGML" + raw[4:], ArtifactError, "cannot be read as an adapter"),
        (lambda raw: raw[:4] + b"\x09" + raw[5:], ArtifactError, "version 9"),
        (lambda raw: raw[:8] + b"\xff\xff\xff\xff\xff" + raw[13:], ArtifactError, "larger than an adapter"),
        (lambda raw: raw[:16] + b"\xff\xff\xff\xff\xff" + raw[21:], ArtifactError, "larger than an adapter"),
    ],
)
def test_what_a_header_claims_is_bounded(bases, random_adapter, tmp_path, spoil, error, message):
    """Wrong magic, versions, and counts beyond an adapter's: refused before anything is read."""
    folder, model = bases["Qwen2"]
    path = tmp_path / "a.gguf"
    export_as(_saved(_adapter(model, folder, random_adapter), tmp_path / "a"), path, "gguf")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(error, match=message):
        LoraAdapter.from_pretrained(path)


def test_all_lists_of_a_header_together_are_bounded(tmp_path):
    """A list of numbers costs the library some hundred times its bytes: many short ones are counted as one."""
    fields = b"".join(struct.pack("<Q", 2) + f"k{n}".encode() + struct.pack("<IIQ", 9, 0, 30_000) + bytes(30_000) for n in range(3))
    path = tmp_path / "lists.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + fields)
    with pytest.raises(ArtifactError, match=r"larger than an adapter is.*30000 values of 'k2'"):
        LoraAdapter.from_pretrained(path)


def test_other_gguf_files_are_named(bases, random_adapter, tmp_path):
    """A model, a control vector's type, another architecture, a tensor that is not a factor, half a pair."""
    folder, model = bases["Qwen2"]
    adapter = _adapter(model, folder, random_adapter, targets=("q_proj",))
    path = tmp_path / "x.gguf"
    _write_foreign(path, adapter, kind="model")
    with pytest.raises(AdapterError, match=r"not a LoRA adapter.*got a model of llama.*where a base model"):
        LoraAdapter.from_pretrained(path)
    _write_foreign(path, adapter, architecture="mamba")
    with pytest.raises(BaseModelError, match=r"architecture.*got mamba.*llama"):
        LoraAdapter.from_pretrained(path)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", torch.ones(2, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError, match=r"not whole.*attn_q"):
        LoraAdapter.from_pretrained(path)


@pytest.mark.slow
def test_bases_that_llama_cpp_orders_otherwise_are_refused_by_name(tiny_models, random_adapter, tokenizer, bases, tmp_path):
    """GPT-2 has no way; a tied head and a norm neither; nothing is left where the file would have been."""
    tiny = tiny_models["gpt2"]
    tiny.build().save_pretrained(tmp_path / "base")
    adapter = dataclasses.replace(random_adapter(tiny.layout()), base_model=str(tmp_path / "base"), task_type="CAUSAL_LM")
    _saved(adapter, tmp_path / "a")
    with pytest.raises(BaseModelError, match=r"cannot be written as GGUF.*gpt2.*llama.*--merge"):
        export_as(tmp_path / "a", tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".a*"))
    folder, _ = bases["Gemma2"]
    head = LoraLayout(("lm_head",), LoraLayout.from_model(_fresh(folder), ["lm_head"]).modules)
    tied = LoraAdapter(head, Factors({"lm_head": (torch.ones(2, 32), torch.ones(SIZE, 2))}), folder, "CAUSAL_LM")
    _saved(tied, tmp_path / "tied")
    for name in ("gguf", "mlx"):
        with pytest.raises(AdapterError, match=r"ties to its embeddings.*without lm_head"):
            export_as(tmp_path / "tied", tmp_path / f"tied.{name}", name)
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(StorageError, match="there already"):
        export_as(_saved(_adapter(bases["Llama"][1], bases["Llama"][0], random_adapter), tmp_path / "l"), tmp_path / "there.gguf", "gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_without_the_package_the_remedy_is_named(bases, random_adapter, tmp_path, monkeypatch):
    """Extra `gguf`, on writing and on reading."""
    folder, model = bases["Llama"]
    saved = _saved(_adapter(model, folder, random_adapter), tmp_path / "a")
    export_as(saved, tmp_path / "a.gguf", "gguf")
    shutil.rmtree(cache_folder() / "adapters", ignore_errors=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (lambda: export_as(saved, tmp_path / "b.gguf", "gguf"), lambda: LoraAdapter.from_pretrained(tmp_path / "a.gguf")):
        with pytest.raises(MissingDependencyError, match=r"lorag\[gguf\]"):
            call()


# --- MLX --------------------------------------------------------------------------------------------------------------


def test_mlx_means_the_same(bases, random_adapter, tmp_path):
    """x·A·B·scale, as mlx-lm computes it, equals PEFT's; out and in again, with what is known of the task."""
    folder, model = bases["Llama"]
    adapter = _adapter(model, folder, random_adapter)
    export_as(_saved(adapter, tmp_path / "a"), tmp_path / "m", "mlx")
    tensors, config = load_file(tmp_path / "m" / "adapters.safetensors"), json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    x = torch.randn(3, 32)
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        theirs = config["lora_parameters"]["scale"] * (x @ tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"])
        assert torch.allclose(theirs, x @ adapter.delta(name).T, atol=1e-4)
    assert config["num_layers"] == -1 and set(config["lora_parameters"]["keys"]) == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    again = LoraAdapter.from_pretrained(tmp_path / "m")
    _same(adapter, again)
    assert again.info["description"] == "paint the red cat" and "format of MLX" in describe_path(tmp_path / "m")


def _mlx(folder, config=None, tensors=None):
    folder.mkdir(exist_ok=True)
    values = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    base = {"fine_tune_type": "lora", "lora_parameters": values, "num_layers": 2, "model": "toys/base"}
    if tensors is None:
        tensors = {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(32, 2), "model.layers.0.self_attn.q_proj.lora_b": torch.ones(2, 16)}
    (folder / "adapter_config.json").write_text(json.dumps({**base, **(config or {})}))
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def test_an_mlx_folder_is_read_with_its_scale(tmp_path):
    """scale is alpha / r; the model that it names is the base; earlier states beside it are not adapters of their own."""
    folder = _mlx(tmp_path / "m")
    shutil.copy(folder / "adapters.safetensors", folder / "0000100_adapters.safetensors")
    adapter = LoraAdapter.from_pretrained(folder)
    assert adapter.base_model == "toys/base" and adapter.rank == 2 and adapter.alpha == 40.0
    assert torch.equal(adapter.delta("model.layers.0.self_attn.q_proj"), torch.full((16, 32), 40.0))
    assert [source.name for source in find_sources([str(tmp_path)])] == ["m"]


@pytest.mark.parametrize(
    ("config", "tensors", "error", "message"),
    [
        ({"fine_tune_type": "dora"}, None, UnsupportedLoraError, "dora"),
        ({"fine_tune_type": "full"}, None, UnsupportedLoraError, "full"),
        ({"lora_parameters": {"rank": 2}}, None, AlphaRangeError, "scale"),
        ({"lora_parameters": {"scale": 0}}, None, AlphaRangeError, "scale"),
        ({"lora_parameters": {"scale": True}}, None, AlphaRangeError, "scale"),
        ({"lora_parameters": None}, None, ArtifactError, "no lora_parameters"),
        ({}, {"model.x.lora_a": torch.ones(4, 2)}, MissingTensorError, "alone"),
        ({}, {"model.x.lora_a": torch.ones(4, 2), "model.x.lora_b": torch.ones(3, 4)}, AdapterError, "do not fit"),
        ({}, {"model.x.lora_a": torch.ones(3, 4, 2), "model.x.lora_b": torch.ones(3, 2, 4)}, UnsupportedLoraError, "linear layers"),
        ({}, {"model.x.weight": torch.ones(4, 2)}, UnsupportedLoraError, "model.x.weight"),
    ],
)
def test_what_mlx_has_beside_lora_is_refused(tmp_path, config, tensors, error, message):
    """DoRA, whole layers, no scale, half pairs, experts: each by its name."""
    with pytest.raises(error, match=message):
        LoraAdapter.from_pretrained(_mlx(tmp_path / "m", config, tensors))


def test_an_mlx_vlm_folder_is_read_with_its_scale(tmp_path):
    """Its config holds rank and alpha, and alpha is the whole scale; its factors are called A and B."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 0.5, "dropout": 0.0}))
    name = "language_model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.A": torch.ones(32, 2), f"{name}.B": torch.ones(2, 16)}, tmp_path / "adapters.safetensors")
    adapter = LoraAdapter.from_pretrained(tmp_path)
    assert adapter.base_model is None and torch.equal(adapter.delta(name), torch.full((16, 32), 1.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my_lora.safetensors", "factors", r"my_lora\.safetensors holds PEFT's factors: rename it adapter_model\.safetensors"),
        ("adapter_model.bin", b"\x80\x04.", r"got adapter_model\.bin.*never read: opening it may run code"),
        ("adapters.npz", b"PK", r"adapters\.npz is never read: save it with a newer mlx-lm"),
    ],
)
def test_weights_under_other_names_are_named(tmp_path, name, content, message):
    """What is there, and what to do about it: a file that was renamed, a pickle, an older format; also where the file itself is given."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}))
    if content == "factors":
        save_file({f"base_model.model.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        LoraAdapter.from_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=message.replace("got adapter_model", "adapter_model")):
        LoraAdapter.from_pretrained(tmp_path / name)


def test_a_missing_mlx_config_is_named(tmp_path):
    """Without it nothing says the scale."""
    folder = _mlx(tmp_path / "m")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json beside it"):
        LoraAdapter.from_pretrained(folder)


def test_a_module_that_mlx_lm_calls_otherwise_is_refused(tiny_models, random_adapter, tmp_path):
    """GPT-2's paths are not mlx-lm's."""
    adapter = dataclasses.replace(random_adapter(tiny_models["gpt2"].layout()), base_model="toys/gpt2")
    with pytest.raises(AdapterError, match="mlx-lm has no such module"):
        export_as(_saved(adapter, tmp_path / "a"), tmp_path / "m", "mlx")
    assert not (tmp_path / "m").exists()


# --- diffusers and kohya ----------------------------------------------------------------------------------------------


def _clip(layers=2, width=16):
    config = transformers.CLIPTextConfig(
        vocab_size=SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=16,
    )
    return _drawn(transformers.CLIPTextModel, config)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A text encoder in a folder, and an adapter of it."""
    folder = tmp_path_factory.mktemp("clip")
    model = _clip()
    model.save_pretrained(folder)
    return str(folder), model


def _kohya(adapter, prefix="lora_te_text_model_", alpha=3.0):
    tensors = {}
    for name, (a, b) in adapter.factors.tensors.items():
        flat = prefix + name.removeprefix("text_model.").replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(alpha)}
    return tensors


def _diffusers(adapter, prefix="text_encoder.text_model."):
    names = {name: prefix + name.removeprefix("text_model.") for name in adapter.layout.names}
    return {
        f"{names[name]}.lora_{side}.weight": value
        for name, pair in adapter.factors.tensors.items()
        for side, value in zip("AB", pair, strict=True)
    }


def _of_clip(model, random_adapter, **more):
    return random_adapter(LoraLayout.from_model(model, ["q_proj", "out_proj", "fc1"]), **more)


@pytest.mark.slow
def test_kohya_s_names_are_found_in_the_base_model(clip, random_adapter, tmp_path):
    """Underscores become the base model's own paths, alpha / r the scaling; applied, it computes what PEFT does with the same factors."""
    folder, model = clip
    adapter = _of_clip(model, random_adapter, alpha=3.0)
    path = tmp_path / "style.safetensors"
    save_file(_kohya(adapter), path)
    again = LoraAdapter.from_pretrained(path, base=BaseModel(folder, "encoder"))
    _same(adapter, again, atol=1e-6)
    ids = {"input_ids": torch.tensor([[1, 5, 6, 2]])}
    with torch.no_grad():
        assert torch.allclose(output_of(again.apply_to(_clip()), ids), output_of(adapter.apply_to(_clip()), ids), atol=1e-5)
    assert format_of(path).name == "diffusers"
    (tmp_path / "broken.safetensors").write_bytes(b"not one at all")
    assert [source.name for source in find_sources([str(tmp_path)])] == ["style"]  # one that cannot be read leaves the others alone
    known = LoraAdapter.from_pretrained(path)  # names of CLIP's encoder can be told without it, and transformers renames them
    with torch.no_grad():
        assert torch.allclose(output_of(known.apply_to(_clip()), ids), output_of(adapter.apply_to(_clip()), ids), atol=1e-5)


def test_diffusers_names_and_their_scaling(clip, random_adapter, tmp_path):
    """Without metadata the scaling is 1; with them it is what they say, module by module."""
    folder, model = clip
    adapter = _of_clip(model, random_adapter, alpha=4.0)
    base = BaseModel(folder, "encoder")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(_diffusers(adapter), path)
    _same(adapter, LoraAdapter.from_pretrained(path, base=base), atol=1e-6)
    said = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8, "text_encoder.alpha_pattern": {"fc1": 2}}
    save_file(_diffusers(adapter), path, {"lora_adapter_metadata": json.dumps(said)})
    again = LoraAdapter.from_pretrained(tmp_path, base=base)
    for name in adapter.layout.names:
        assert torch.allclose(again.delta(name), adapter.delta(name) * (0.5 if name.endswith("fc1") else 2), atol=1e-5)
    save_file(_diffusers(adapter), path, {"lora_adapter_metadata": json.dumps({**said, "text_encoder.use_dora": True})})
    with pytest.raises(UnsupportedLoraError, match="use_dora"):
        LoraAdapter.from_pretrained(path, base=base)


def test_the_part_of_the_base_model_is_taken(clip, random_adapter, tmp_path, caplog):
    """Of a file for a U-Net and two encoders the one whose sizes fit; what is left out is said. Without a base the choice is asked for."""
    folder, model = clip
    one, two = _of_clip(model, random_adapter, alpha=3.0), _of_clip(_clip(3, 24), random_adapter, alpha=3.0, seed=1)
    unet = {
        "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": torch.ones(2, 8),
        "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight": torch.ones(8, 2),
    }
    path = tmp_path / "sdxl.safetensors"
    save_file(_kohya(one, "lora_te1_text_model_") | _kohya(two, "lora_te2_text_model_") | unet, path)
    with caplog.at_level(logging.WARNING):
        again = LoraAdapter.from_pretrained(path, base=BaseModel(folder, "encoder"))
    _same(one, again, atol=1e-6)
    assert "left out 1 modules of unet" in caplog.text and "of te2" in caplog.text
    with pytest.raises(AdapterError, match=r"several models.*te1.*te2.*--base"):
        LoraAdapter.from_pretrained(path)
    save_file(unet, path)
    with pytest.raises(BaseModelError, match=r"flattened form.*U-Nets"):
        LoraAdapter.from_pretrained(path)
    with pytest.raises(BaseModelError, match=r"nothing for the base model"):
        LoraAdapter.from_pretrained(path, base=BaseModel(folder, "encoder"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale", "plain LoRA.*dora_scale"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "plain LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1", "plain LoRA"),
        ("something.else", "not known"),
    ],
)
def test_other_methods_of_such_files_are_refused(clip, random_adapter, tmp_path, key, message):
    """LoHa, LoKr and DoRA by their names."""
    folder, model = clip
    path = tmp_path / "x.safetensors"
    save_file(_kohya(_of_clip(model, random_adapter)) | {key: torch.ones(2, 2)}, path)
    with pytest.raises(UnsupportedLoraError, match=message):
        LoraAdapter.from_pretrained(path, base=BaseModel(folder, "encoder"))


# --- every door -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_models, tokenizer):
    """The toy world's base model."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.mark.slow
def test_one_bank_takes_all_formats(world, tmp_path, capsys):
    """PEFT, GGUF and MLX, a folder each or loose files, in one command; the bank holds the same ΔW of each."""
    root, expected = tmp_path / "in", {}
    for colour, name in (("red", "peft"), ("green", "gguf"), ("blue", "mlx")):
        adapter = true_adapter(world.layout, colour, "cat")
        adapter = dataclasses.replace(
            adapter, base_model=world.model.name, task_type="CAUSAL_LM", info={"description": f"paint the {colour} cat", "license": "MIT"}
        )
        folder = _saved(adapter, tmp_path / f"of-{name}")
        expected[name] = adapter
        if name == "peft":
            shutil.copytree(folder, root / "peft")
        else:
            export_as(folder, root / ("gguf.gguf" if name == "gguf" else name), name)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bank", "add", str(root), "--bank", str(tmp_path / "bank"), "--base", world.model.name, "--embedder", "none", "--quiet"])
    assert stopped.value.code == 0, capsys.readouterr()
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert sorted(bank.names) == ["gguf", "mlx", "peft"]
    for name, adapter in expected.items():
        _same(adapter, bank.adapter(name), atol=1e-6)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fuse", str(root / "gguf.gguf"), str(root / "mlx"), str(root / "peft"), "--out", str(tmp_path / "fused"), "--rank", "12"])
    assert stopped.value.code == 0, capsys.readouterr()
    fused = LoraAdapter.from_pretrained(tmp_path / "fused")
    for module in world.layout.names:
        mean = sum(one.delta(module) for one in expected.values()) / 3
        assert torch.allclose(fused.delta(module), mean, atol=1e-5)


@pytest.mark.slow
def test_a_bank_of_a_text_encoder_from_kohya_files(clip, random_adapter, tmp_path, capsys):
    """Files without a word on their base model start a bank, given the base, and train a generator of weights alone."""
    folder, model = clip
    (tmp_path / "in").mkdir()
    for seed in range(3):
        save_file(_kohya(_of_clip(model, random_adapter, seed=seed)), tmp_path / "in" / f"style{seed}.safetensors")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{tmp_path / 'in' / f'style{n}.safetensors'}\tstyle{n}\tpaint in style number {n}\n" for n in range(3)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["bank", "add", "--from", str(listed), "--bank", str(tmp_path / "bank"), "--base", folder, "--embedder", "none", "--quiet"]
        )
    assert stopped.value.code == 0, capsys.readouterr()
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert bank.names == ["style0", "style1", "style2"] or sorted(bank.names) == ["style0", "style1", "style2"]
    _same(_of_clip(model, random_adapter, seed=1, alpha=3.0), bank.adapter("style1"), atol=1e-6)


def test_a_file_is_converted_once(bases, random_adapter, tmp_path, monkeypatch):
    """The second reader takes the folder that is there; another base model is another conversion."""
    folder, model = bases["Qwen2"]
    path = tmp_path / "a.gguf"
    export_as(_saved(_adapter(model, folder, random_adapter), tmp_path / "a"), path, "gguf")
    first = peft_folder(path)
    monkeypatch.setattr(type(FORMATS["gguf"]), "read", None)
    assert peft_folder(path) == first and first.parent == cache_folder() / "adapters"


def test_what_is_no_adapter_is_said_to_be_none(tmp_path, bases, random_adapter):
    """A text, a base model's weights, a folder of several adapters."""
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ArtifactError, match=r"x\.txt cannot be read as an adapter.*GGUF, MLX, diffusers"):
        LoraAdapter.from_pretrained(tmp_path / "x.txt")
    folder, model = bases["Qwen2"]
    assert adapter_files(tmp_path) == []
    saved = _saved(_adapter(model, folder, random_adapter), tmp_path / "a")
    for name in ("one", "two"):
        export_as(saved, tmp_path / "both" / f"{name}.gguf", "gguf")
    with pytest.raises(AdapterError, match=r"holds 2 adapters.*one\.gguf, two\.gguf"):
        LoraAdapter.from_pretrained(tmp_path / "both")
    assert [source.name for source in find_sources([str(tmp_path / "both")])] == ["one", "two"]
    assert find_sources([str(tmp_path / "both" / "one.gguf")])[0].name == "one"


@pytest.mark.slow
def test_files_are_tried_and_fused_as_folders_are(world, tmp_path, capsys):
    """A GGUF of lorag's names its base model; one of llama.cpp's that does not is asked for it in one line, and works with it."""
    adapter = dataclasses.replace(
        true_adapter(world.layout, "red", "cat"),
        base_model=world.model.name,
        task_type="CAUSAL_LM",
        info={"description": "paint the red cat", "base_model": {"name": world.model.name}},
    )
    own, foreign = tmp_path / "own.gguf", tmp_path / "foreign.gguf"
    export_as(_saved(adapter, tmp_path / "peft"), own, "gguf")
    config = transformers.AutoConfig.from_pretrained(world.model.name)
    _write_foreign(foreign, adapter, heads={"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads})

    def lorag(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    of_folder, of_file = (lorag("try", place, "paint", "--tokens", 4) for place in (tmp_path / "peft", own))
    assert of_folder[0] == 0 and of_file[:2] == of_folder[:2]
    code, _, err = lorag("try", foreign, "paint", "--tokens", 4)
    assert code == 1 and "--base-model" in err and len(err.splitlines()) == 1
    assert lorag("try", foreign, "paint", "--tokens", 4, "--base-model", world.model.name, "--no-prompted")[0] == 0
    both = (f"{own}=.7", f"{foreign}=.3", "--method", "cat", "--out", tmp_path / "fused")
    code, _, err = lorag("fuse", *both)
    assert code == 1 and "--base-model" in err and len(err.splitlines()) == 1
    assert lorag("fuse", *both, "--base-model", world.model.name)[0] == 0
    fused = LoraAdapter.from_pretrained(tmp_path / "fused")
    assert fused.base_model == world.model.name
    _same(adapter, fused, atol=1e-6)
    code, _, err = lorag("fuse", "a", "b", "--bank", "sandbox", "--base-model", world.model.name, "--out", tmp_path / "x")
    assert code == 1 and "no bank" in err


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_smaller_rank_is_the_nearest_one(bases, random_adapter, tmp_path, capsys):
    """--rank: torch's own truncated SVD of ΔW, with the relative error said; --keep: the smallest rank that keeps the share."""
    folder, model = bases["Llama"]
    adapter = _adapter(model, folder, random_adapter, rank=8)
    saved = _saved(adapter, tmp_path / "a")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(saved), "--rank", "3", "--out", str(tmp_path / "r3")])
    assert stopped.value.code == 0
    small, lost, whole = LoraAdapter.from_pretrained(tmp_path / "r3"), 0.0, 0.0
    for name in adapter.layout.names:
        delta = adapter.delta(name).double()
        left, values, right = torch.linalg.svd(delta)
        best = left[:, :3] * values[:3] @ right[:3]
        assert torch.allclose(small.delta(name).double(), best, atol=1e-4)
        lost, whole = lost + float((delta - best).square().sum()), whole + float(delta.square().sum())
    assert f"relative error of ΔW: {(lost / whole) ** 0.5:.3g}" in capsys.readouterr().out
    done = export_portable(saved, tmp_path / "k", keep=0.9)
    ranks = [1 - adapter.factors.truncated(rank)[1] for rank in range(1, 9)]
    assert done.adapter.rank == next(rank for rank, missing in enumerate(ranks, 1) if 1 - missing >= 0.9)
    assert done.error**2 <= 0.1
    assert export_portable(saved, tmp_path / "all", keep=1.0).adapter.rank == 8
    export_as(saved, tmp_path / "r2.gguf", "gguf", rank=2, strength=0.5)
    again = LoraAdapter.from_pretrained(tmp_path / "r2.gguf")
    assert again.rank == 2
    half = adapter.factors.truncated(2)[0]
    for name in adapter.layout.names:
        assert torch.allclose(again.delta(name), half.delta(name) * 0.5, atol=1e-5)


def test_impossible_ranks_are_refused(bases, random_adapter, tmp_path):
    """Both at once, shares outside of 0 to 1, a format that is only read."""
    folder, model = bases["Llama"]
    saved = _saved(_adapter(model, folder, random_adapter), tmp_path / "a")
    for more, message in (({"rank": 2, "keep": 0.5}, "exclude"), ({"keep": 0.0}, "keep"), ({"keep": 1.5}, "keep"), ({"rank": 0}, "rank")):
        with pytest.raises(ConfigError, match=message):
            export_portable(saved, tmp_path / "x", **more)
    with pytest.raises(ConfigError, match=r"cannot be written.*gguf, mlx"):
        export_as(saved, tmp_path / "x", "diffusers")
    assert not (tmp_path / "x").exists()


# --- PEFT's other methods ---------------------------------------------------------------------------------------------


def _random_peft(config, model, folder, seed=0):
    """An adapter of a method with random values, as PEFT saves it, and the outputs that it gives."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
        for value in wrapped.parameters():
            if value.requires_grad:
                value.data.add_(torch.randn_like(value) * 0.3)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = wrapped.eval()(input_ids=ids).logits
    wrapped.save_pretrained(folder)
    return logits


METHODS = {
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=3, alpha=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(r=3, alpha=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "miss": peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_become_lora_exactly_where_all_is_kept(bases, tmp_path, name):
    """DoRA with its magnitudes, LoHa, LoKr, OFT, MiSS and IA³: logits as PEFT's own; refused without being asked for."""
    folder, _ = bases["Llama"]
    expected = _random_peft(METHODS[name], _fresh(folder), tmp_path / "a")
    for config in (tmp_path / "a").glob("adapter_config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": folder}))
    with pytest.raises(AdapterError, match=r"(use_dora is set|peft_type cannot be used)"):
        LoraAdapter.from_pretrained(tmp_path / "a")
    done = export_portable(tmp_path / "a", tmp_path / "lora", keep=1.0, convert=True)
    with torch.no_grad():
        logits = LoraAdapter.from_pretrained(tmp_path / "lora").apply_to(_fresh(folder))(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
        assert torch.allclose(logits, expected, atol=1e-4)
        assert not torch.allclose(logits, _fresh(folder)(torch.tensor([[5, 6, 7, 8]])).logits, atol=1e-2)
    assert done.error < 1e-4


@pytest.mark.slow
def test_peft_s_own_conversion_agrees_but_for_dora(bases, tmp_path):
    """convert_to_lora and lorag give one ΔW for LoHa; of DoRA it leaves out what the magnitudes do, which lorag keeps."""
    folder, _ = bases["Llama"]
    found = {}
    for name in ("loha", "dora"):
        _random_peft(METHODS[name], _fresh(folder), tmp_path / name)
        wrapped = peft.PeftModel.from_pretrained(_fresh(folder), tmp_path / name)
        _, theirs = peft.convert_to_lora(wrapped, 1.0)
        ours = export_portable(tmp_path / name, tmp_path / f"{name}-lora", keep=1.0, convert=True, base_model=folder).adapter
        key, module = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight", "model.layers.1.self_attn.q_proj"
        delta = theirs[key.format("B")] @ theirs[key.format("A")]
        found[name] = ((delta - ours.delta(module)).norm() / ours.delta(module).norm()).item()
    assert found["loha"] < 1e-4 and found["dora"] > 0.1


@pytest.mark.slow
def test_a_bank_takes_them_on_request(bases, tmp_path, capsys):
    """`bank add --convert`: with the share that is kept and its error said; without it the name of what cannot be taken."""
    folder, _ = bases["Llama"]
    for name in ("dora", "loha"):
        _random_peft(METHODS[name], _fresh(folder), tmp_path / "in" / name)
        config = tmp_path / "in" / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": folder, "task_type": "CAUSAL_LM"}))
        (tmp_path / "in" / name / "description.txt").write_text(f"answer in the manner of {name}\n")
    command = ["bank", "add", str(tmp_path / "in"), "--bank", str(tmp_path / "bank"), "--embedder", "none", "--quiet"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 1 and "use_dora" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--convert", "--keep", "0.9"])
    assert stopped.value.code == 0, capsys.readouterr()
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert sorted(bank.names) == ["dora", "loha"]
    whole = export_portable(tmp_path / "in" / "dora", tmp_path / "whole", keep=1.0, convert=True).adapter
    for module in bank.base.layout.names:
        lost = (whole.delta(module) - bank.adapter("dora").delta(module)).norm() / whole.delta(module).norm()
        assert 0.01 < lost <= 0.1**0.5 + 1e-4


@pytest.mark.slow
def test_a_dora_is_merged_exactly(bases, tmp_path):
    """`export --merge --convert`: the model computes what PEFT computes with the DoRA."""
    folder, _ = bases["Llama"]
    expected = _random_peft(METHODS["dora"], _fresh(folder), tmp_path / "a")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path / "a"), "--merge", "--convert", "--base-model", folder, "--out", str(tmp_path / "m")])
    assert stopped.value.code == 0
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")(torch.tensor([[5, 6, 7, 8]])).logits
    assert torch.allclose(merged, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "base", "error", "message"),
    [
        ({"base_model_name_or_path": None}, None, BaseModelError, "base model's weights"),
        ({"r": 10**7}, True, AdapterError, "r is too large"),
        ({"peft_type": "PROMPT_TUNING"}, True, PeftTypeError, "cannot become a LoRA"),
        ({"peft_type": "XLORA", "adapters": {"a": "somebody/elses"}}, True, PeftTypeError, "cannot become a LoRA"),
        ({"peft_type": "MARTIAN"}, True, PeftTypeError, "cannot become a LoRA"),
        (
            {"peft_type": "LORA", "use_dora": True, "lora_alpha": 4, "modules_to_save": ["lm_head"]},
            True,
            UnsupportedLoraError,
            "modules_to_save",
        ),
        ({"target_modules": ["no_such"]}, True, AdapterError, "PEFT cannot merge"),
        ({"target_modules": "(" * 2000}, True, AdapterError, "too large"),
    ],
)
def test_what_cannot_become_a_lora_is_said_so(bases, tmp_path, config, base, error, message):
    """No base model, sizes that nobody trains, other kinds of methods, modules that are not there."""
    folder, _ = bases["Llama"]
    _random_peft(METHODS["loha"], _fresh(folder), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(error, match=message):
        export_portable(tmp_path / "a", tmp_path / "out", convert=True, base_model=folder if base else None)
    assert not (tmp_path / "out").exists()


# --- on the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosted(standin, world, tmp_path):
    """A GGUF adapter of the toy world on the hub: alone, in two quantisations, below a folder, beside models; and a model."""
    adapter = dataclasses.replace(
        true_adapter(world.layout, "red", "cat"),
        base_model=world.model.name,
        task_type="CAUSAL_LM",
        info={"description": "paint the red cat", "license": "MIT", "base_model": {"name": world.model.name}},
    )
    file = tmp_path / "adapter.gguf"
    export_as(_saved(adapter, tmp_path / "peft"), file, "gguf")
    model = tmp_path / "model.gguf"
    _write_foreign(model, adapter, kind="model")
    data, large = file.read_bytes(), model.read_bytes() + bytes(2**20)
    card = b"---\nlicense: mit\n---\n# Red cats\n\nPaints cats in red, whatever is asked.\n"
    standin.put("me/one", {"red-cat-f32.gguf": data, "README.md": card})
    standin.put("me/several", {"a.gguf": data, "b.gguf": data, "README.md": card})
    standin.put("me/mixed", {"model-q4.gguf": large, "adapter.gguf": data, "deep/adapter.gguf": data})
    standin.put("me/models", {"model-q4.gguf": large, "model-q8.gguf": large})
    export_as(tmp_path / "peft", tmp_path / "mlx", "mlx")
    standin.put("me/mlx", {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()})
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        *("me/one", "me/one/red-cat-f32.gguf", "me/several/b.gguf", "me/mixed", "me/mixed/deep/adapter.gguf"),
        *("https://huggingface.co/me/one", "https://huggingface.co/me/one/blob/main/red-cat-f32.gguf?download=true"),
        *("https://hf.co/me/mixed/tree/main/deep", "https://huggingface.co/me/mixed/resolve/main/deep/adapter.gguf", "me/mlx"),
    ],
)
def test_adapters_in_other_formats_come_from_the_hub(standin, hosted, place):
    """A repository, one of its files, an address out of a browser: the same ΔW; of a model nothing but its start is fetched."""
    _same(hosted, LoraAdapter.from_pretrained(place))
    assert all(size <= 2**16 for *_, size in standin.parts)
    assert "model-q4.gguf" not in [path.rsplit("/", 1)[1] for how, path in standin.log if how == "HEAD"]
    sources = find_sources([place])
    assert len(sources) == 1 and sources[0].name.startswith("me-") and "." not in sources[0].name and ":" not in sources[0].name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("me/several", r"me/several does not say which file is the adapter.*a\.gguf, b\.gguf.*Name the file: me/several/a\.gguf"),
        ("me/models", r"me/models holds no adapter.*model-q4\.gguf, model-q8\.gguf"),
        ("me/models/model-q8.gguf", r"me/models/model-q8\.gguf is not a LoRA adapter.*of a model"),
        ("me/one/missing.gguf", r"no missing\.gguf in me/one, but red-cat-f32\.gguf"),
        ("me/nothing/a.gguf", r"no such repository"),
        ("https://huggingface.co/me/one/tree/main/deep", r"no deep in me/one"),
    ],
)
def test_what_is_no_adapter_on_the_hub_is_named(standin, hosted, place, message):
    """Before anything large is fetched."""
    with pytest.raises((AdapterError, ArtifactError), match=message):
        LoraAdapter.from_pretrained(place)
    assert all(size <= 2**16 for *_, size in standin.parts) and not standin.fetched("me/models")


@pytest.mark.slow
def test_commands_take_a_gguf_from_the_hub(standin, hosted, world, lorag, tmp_path, monkeypatch):
    """bank add, export, fuse, try and info, as they take a folder; what the repository's card says comes along, also offline later."""
    one, other = "me/one", "me/several/b.gguf"
    add = ("bank", "add", one, other, "--bank", tmp_path / "bank", "--embedder", "none", "--quiet")
    code, out, err = lorag(*add)
    assert code == 0, err
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert bank.names == ("me-one", "me-several-b") and bank["me-one"].descriptions == ("paint the red cat",)
    _same(hosted, bank.adapter("me-several-b"), atol=1e-6)
    assert lorag("export", other, "--out", tmp_path / "peft2")[0] == 0
    _same(hosted, LoraAdapter.from_pretrained(tmp_path / "peft2"))
    assert lorag("fuse", f"{one}=.5", f"{other}=.5", "--method", "cat", "--out", tmp_path / "fused")[0] == 0
    _same(hosted, LoraAdapter.from_pretrained(tmp_path / "fused"), atol=1e-6)
    code, out, err = lorag("try", one, "paint", "--tokens", 4)
    assert code == 0 and out == lorag("try", tmp_path / "peft", "paint", "--tokens", 4)[1], err
    code, out, err = lorag("info", "https://huggingface.co/me/one/blob/main/red-cat-f32.gguf")
    assert code == 0 and "paint the red cat" in out and "start in" in out, err
    listed = tmp_path / "list.txt"
    listed.write_text(f"{one}\tfirst\tpaint cats\n{other}\tsecond\n")
    assert lorag("bank", "add", "--from", listed, "--bank", tmp_path / "two", "--embedder", "none", "--quiet")[0] == 0
    assert AdapterBank.from_pretrained(tmp_path / "two")["first"].descriptions == ("paint cats",)
    standin.shutdown()
    standin.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in (one, other):
        _same(hosted, LoraAdapter.from_pretrained(place))
    code, _, err = lorag("info", "me/several/a.gguf")
    assert code == 1 and len(err.splitlines()) == 1 and "nothing is in the cache" in err
