"""Export: merged weights compute what the adapter computes, nothing is written that is not finite, and the portable form means the same."""

import dataclasses
import json
import stat

import pytest
import torch
import transformers
from conftest import output_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from toy_world import save_base, true_adapter

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.export import export_portable
from lorag.adapters.factors import Factors
from lorag.adapters.merged import export_merged, merge_into
from lorag.base.base_model import BaseModel, kind_of
from lorag.base.layout import LoraLayout
from lorag.cli import main as cli
from lorag.cli.info import describe_path
from lorag.errors import AdapterError, BaseModelError, StorageError


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    """A small base model with its tokenizer, in a folder."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.fixture
def folder(base, tmp_path):
    """An adapter of it."""
    adapter = true_adapter(base.layout, "red", "cat")
    return dataclasses.replace(
        adapter, base_model=base.model.name, task_type="CAUSAL_LM", info={"description": "paint the red cat"}
    ).save_pretrained(tmp_path / "adapter")


def _logits(model, ids=((5, 6, 7, 8),)):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.float()


@pytest.mark.slow
def test_merging_equals_applying(tiny, random_adapter):
    """In six architectures, Conv1D among them, merged weights give what PEFT gives with the adapter."""
    adapter = random_adapter(tiny.layout())
    inputs = tiny.inputs(3, torch.Generator().manual_seed(0))
    merged = tiny.build()
    merge_into(merged, adapter)
    with torch.no_grad():
        assert torch.allclose(output_of(merged, inputs), output_of(adapter.apply_to(tiny.build()), inputs), atol=1e-3, rtol=1e-3)
        assert not torch.allclose(output_of(merged, inputs), output_of(tiny.build(), inputs), atol=1e-2)


@pytest.mark.slow
def test_export_writes_a_model_that_transformers_loads(base, folder, tmp_path):
    """`--merge`: weights, tokenizer, provenance and card; loaded by transformers alone it computes what the adapter does."""
    out = tmp_path / "merged"
    export_merged(folder, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = _logits(PeftModel.from_pretrained(base.model.load("cpu"), folder))
    assert torch.allclose(_logits(model), expected, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out)("red cat")["input_ids"]
    info = json.loads((out / "lorag.json").read_text())
    assert info["kind"] == "merged" and info["base_model"]["identity"] == base.model.identity()
    assert "library_name: transformers" in (out / "README.md").read_text()
    for file in out.iterdir():
        assert str(tmp_path.parent).encode() not in file.read_bytes(), file.name
    assert not list(tmp_path.glob(".*"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o644}
    assert "merged" in describe_path(out) and "paint the red cat" in describe_path(out)


def test_strength_scales_what_is_merged(base, folder, tmp_path):
    """--strength 0 is the base model."""
    export_merged(folder, tmp_path / "none", strength=0.0)
    bare, merged = (load_file(f"{path}/model.safetensors") for path in (base.model.name, tmp_path / "none"))
    assert all(torch.equal(bare[key], merged[key]) for key in bare)


@pytest.mark.slow
def test_the_base_model_s_precision_is_kept(tiny_models, tokenizer, base, folder, tmp_path):
    """A base stored in bf16 is merged in fp32 and rounded once; --dtype overrides."""
    model = base.model.load("cpu").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    export_merged(folder, tmp_path / "out", base_model=str(tmp_path / "half"))
    adapter, name = LoraAdapter.from_pretrained(folder), "model.layers.0.self_attn.q_proj"
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (model.get_submodule(name).weight.float() + adapter.delta(name)).bfloat16())
    export_merged(folder, tmp_path / "wide", base_model=str(tmp_path / "half"), dtype="float32")
    assert load_file(tmp_path / "wide" / "model.safetensors")[f"{name}.weight"].dtype == torch.float32


def test_nothing_is_merged_that_is_not_finite(tiny_models, random_adapter):
    """A sum that overflows the weights' precision: refused by the module's name, and no weight is changed."""
    tiny = tiny_models["llama"]
    adapter = random_adapter(tiny.layout())
    names = adapter.layout.names
    huge = {name: (a, b * (1e6 if name == names[-1] else 1)) for name, (a, b) in adapter.factors.items()}
    model = tiny.build().half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=names[-1]):
        merge_into(model, dataclasses.replace(adapter, factors=Factors(huge)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_weight_in_two_places_is_not_merged(tmp_path):
    """A head that is tied to the embeddings would change both."""
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config)
    layout = LoraLayout(("lm_head",), LoraLayout.from_model(model, ["lm_head"]).modules)
    adapter = LoraAdapter(layout, Factors({"lm_head": (torch.ones(2, 16), torch.ones(30, 2))}))
    with pytest.raises(BaseModelError, match="embed_tokens"):
        merge_into(model, adapter)


def test_another_base_model_is_refused(base, folder, tiny_models, tmp_path, tokenizer):
    """Other shapes, or other weights than those that the adapter's provenance names."""
    other = tiny_models["llama"].build(layers=3, seed=1)
    other.save_pretrained(tmp_path / "deep")
    with pytest.raises(BaseModelError):
        export_merged(folder, tmp_path / "x", base_model=str(tmp_path / "deep"))
    twin = tiny_models["llama"].build(seed=2)
    twin.save_pretrained(tmp_path / "twin")
    info = {"base_model": {"name": "base", "kind": "causal_lm", "identity": base.identity}}
    stated = dataclasses.replace(LoraAdapter.from_pretrained(folder), info=info).save_pretrained(tmp_path / "stated")
    with pytest.raises(BaseModelError, match="made for"):
        export_merged(stated, tmp_path / "x", base_model=str(tmp_path / "twin"))
    assert not (tmp_path / "x").exists()


def test_a_failed_export_leaves_nothing(folder, tmp_path, monkeypatch):
    """What is there is not overwritten, and a disk that fills up leaves no half folder."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for export in (export_merged, export_portable):
        with pytest.raises(StorageError, match="not an empty folder"):
            export(folder, tmp_path / "full")
    monkeypatch.setattr("lorag.adapters.merged.write_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        export_merged(folder, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "full"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}])
def test_the_portable_form_means_the_same(tiny_models, tmp_path, settings):
    """rsLoRA and patterns are folded: one r, one lora_alpha, and PEFT computes the same with it."""
    tiny = tiny_models["llama"]
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    wrapped = get_peft_model(tiny.build(), config).eval()
    wrapped.save_pretrained(tmp_path / "wild")
    export_portable(tmp_path / "wild", tmp_path / "tame")
    written = json.loads((tmp_path / "tame" / "adapter_config.json").read_text())
    assert not written["use_rslora"] and not written["rank_pattern"] and not written["alpha_pattern"]
    assert torch.allclose(_logits(PeftModel.from_pretrained(tiny.build(), tmp_path / "tame")), _logits(wrapped), atol=1e-4)


@pytest.mark.slow
def test_hot_swap_by_name(base, folder):
    """A served model takes further adapters, replaces one by name, and gives each its own answers, as often as asked."""
    first = LoraAdapter.from_pretrained(folder)
    second = dataclasses.replace(true_adapter(base.layout, "blue", "dog"), task_type="CAUSAL_LM")
    alone = {name: _logits(one.apply_to(base.model.load("cpu"))) for name, one in (("first", first), ("second", second))}
    model = first.apply_to(base.model.load("cpu"), name="a")
    assert model is second.apply_to(model, name="b") and set(model.peft_config) == {"a", "b"}
    assert torch.equal(_logits(model), alone["second"])
    model.set_adapter("a", inference_mode=True)
    assert torch.equal(_logits(model), alone["first"])
    for one, wanted in ((second, "second"), (first, "first"), (second, "second")):
        one.apply_to(model, name="a")  # other rank or not, in place of the one before
        assert torch.equal(_logits(model), alone[wanted]) and set(model.peft_config) == {"a", "b"}
    with model.disable_adapter():
        assert torch.equal(_logits(model), _logits(base.model.load("cpu")))


def test_a_base_model_s_kind_is_found(base, tiny_models, tmp_path):
    """From PEFT's task type, else from the model's own config; so that adapters without a task type can be applied and merged."""
    assert kind_of(base.model.name, task_type="SEQ_2_SEQ_LM") == "seq2seq_lm"
    assert kind_of(base.model.name) == "causal_lm"
    for name, kind in (("t5", "seq2seq_lm"), ("bert", "encoder"), ("gpt2", "causal_lm")):
        tiny_models[name].build().config.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["architectures"] = [type(tiny_models[name].build()).__name__]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert kind_of(str(tmp_path / name)) == kind
    adapter = dataclasses.replace(true_adapter(base.layout, "red", "cat"), base_model=base.model.name)
    assert adapter.task_type is None and _logits(adapter.apply_to()).shape[-1] == len(BaseModel(base.model.name, "causal_lm").tokenizer())


@pytest.mark.slow
def test_export_from_the_command_line(folder, tmp_path, capsys):
    """With and without --merge; options that need it say so."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    code, out, err = run("export", folder, "--merge", "--out", tmp_path / "m")
    assert code == 0 and "merged" in out, err
    assert run("export", folder, "--out", tmp_path / "p")[0] == 0
    assert run("info", tmp_path / "p")[0] == 0
    assert run("export", folder, "--out", tmp_path / "q", "--dtype", "float32")[0] == 2
    assert run("export", folder, "--out", tmp_path / "q", "--gguf", "--mlx")[0] == 2
    assert run("export", folder, "--out", tmp_path / "q", "--merge", "--rank", "2")[0] == 2
    assert run("export", folder, "--out", tmp_path / "twice", "--strength", "2")[0] == 0
    module = LoraAdapter.from_pretrained(folder).layout.names[0]
    once, twice = (LoraAdapter.from_pretrained(path).delta(module) for path in (folder, tmp_path / "twice"))
    assert torch.allclose(twice, 2 * once)
    assert run("export", tmp_path / "nothing", "--out", tmp_path / "q")[0] == 1
