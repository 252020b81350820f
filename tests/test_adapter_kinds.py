"""Adapters as people have them: names that wrappers and transformers changed, expressions, orientation, words in any script."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlavaConfig, LlavaForConditionalGeneration, MixtralConfig, MixtralForCausalLM

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import CONFIG, WEIGHTS
from lorag.adapters.export import export_portable
from lorag.adapters.factors import Factors
from lorag.adapters.merged import merge_into
from lorag.adapters.patterns import Patterns
from lorag.adapters.purpose import card_text
from lorag.adapters.reading import side_files
from lorag.adapters.sources import find_sources
from lorag.adapters.tensor_names import KEY, read_names
from lorag.base.layout import LoraLayout
from lorag.base.names import same_model
from lorag.base.renaming import fused_experts, renamed_modules
from lorag.errors import AdapterError, ArtifactError, BaseModelError, UnsupportedLoraError
from lorag.files.artifacts import decode_text


def _meta(build, config):
    with torch.device("meta"):
        return build(config)


def _random(layout, seed=0, scaling=0.5):
    rng = torch.Generator().manual_seed(seed)
    draw = {m.name: (torch.randn(2, m.in_features, generator=rng), torch.randn(m.out_features, 2, generator=rng)) for m in layout.modules}
    return LoraAdapter(layout, Factors(draw, scaling))


# --- expressions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["q_proj", r".*\.layers\.1\..*(q_proj|v_proj)", r"^model\.layers\.0\.", "layers.1.self_attn.v_proj", "(q|k)_proj"]
)
def test_expressions_match_as_peft_matches_them(key):
    from peft.utils.other import get_pattern_key

    patterns = Patterns({key: 7}, "rank_pattern")
    for module in (f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"):
        assert (patterns.of(module, 3) == 7) == (get_pattern_key([key], module) == key), module


@pytest.mark.parametrize("key", [r"(.+)+[!?]", r"(a|a)*(a|a)*(a|a)*[^a]b", "(((a{100}){100}){100})", "a" * 2000, "(", "a{9999999}"])
def test_hostile_expressions_take_bounded_time(key):
    start = time.monotonic()
    try:
        patterns = Patterns({key: 7}, "rank_pattern")
        found = [patterns.of(f"{'a' * 60}.{index}", 3) for index in range(500)]
        assert found == [3] * 500
    except UnsupportedLoraError as error:
        assert "rank_pattern" in str(error)
    assert time.monotonic() - start < 20


# --- names ------------------------------------------------------------------------------------------------------------


def _renamed(folder, rename):
    tensors = load_file(folder / WEIGHTS)
    save_file({rename(key): value for key, value in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".legal.weight"),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.", "base_model.model.module."),
        lambda key: "module." + key,
        lambda key: key.replace("layers.", "layers._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda key: key.removeprefix("base_model.model."),
    ],
)
def test_names_of_wrapped_models_are_refused_and_export_puts_them_right(rename, llama_layout, random_adapter, tmp_path):
    adapter = random_adapter(llama_layout)
    _renamed(adapter.save_pretrained(tmp_path / "torn"), rename)
    with pytest.raises(AdapterError, match="lorag export"):
        LoraAdapter.from_pretrained(tmp_path / "torn", llama_layout)
    export_portable(tmp_path / "torn", tmp_path / "right")
    read = LoraAdapter.from_pretrained(tmp_path / "right", llama_layout)
    assert all(torch.equal(read.delta(name), adapter.delta(name)) for name in llama_layout.names)


def test_two_keys_that_would_get_one_name_are_not_repaired(tmp_path):
    key = KEY.format(module="x.q", factor="A")
    spec = {key: ("F32", (2, 4)), key.replace("x.q", "_orig_mod.x.q"): ("F32", (2, 4))}
    with pytest.raises(AdapterError):
        read_names(spec, tmp_path / WEIGHTS, repair=True)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("base_model.model.lm_head.weight", "vocabulary"),
        ("base_model.model.model.embed_tokens.weight", "save_embedding_layers=False"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "adapts an embedding"),
        ("base_model.model.score.weight", "trained whole"),
    ],
)
def test_what_is_no_factor_is_refused_with_its_cause(key, says, tmp_path):
    spec = {KEY.format(module="x.q", factor=f): ("F32", (2, 2)) for f in "AB"} | {key: ("F32", (2, 2))}
    with pytest.raises(AdapterError, match=says):
        read_names(spec, tmp_path / WEIGHTS)


def test_modules_that_transformers_renamed_are_found():
    model = _meta(LlavaForConditionalGeneration, LlavaConfig())
    old = "language_model.model.layers.0.self_attn.q_proj"
    assert renamed_modules(model, [old, "nothing.there"]) == {old: "model.language_model.layers.0.self_attn.q_proj"}


@pytest.mark.slow
def test_an_adapter_under_old_names_fits_and_keeps_its_products():
    model = _meta(LlavaForConditionalGeneration, LlavaConfig())
    layout = LoraLayout.from_model(model, r".*language_model.*layers\.[01]\..*\.q_proj")
    new = _random(layout)
    old = new.renamed({name: name.replace("model.language_model.", "language_model.model.") for name in layout.names})
    fitted = old.fitted(model)
    assert set(fitted.layout.names) == set(layout.names)
    assert all(torch.equal(fitted.delta(name), new.delta(name)) for name in layout.names)


def test_experts_of_a_mixture_are_refused_as_fused():
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = _meta(MixtralForCausalLM, MixtralConfig(**settings, num_key_value_heads=2, num_local_experts=2))
    name = "model.layers.0.block_sparse_moe.experts.1.w3"
    assert fused_experts(model, name) == "model.layers.0.mlp.experts"
    assert fused_experts(model, "model.layers.0.self_attn.nothing") is None
    layout = LoraLayout.from_model(model, ["q_proj"])
    with pytest.raises(BaseModelError, match="merge_and_unload"):
        _random(layout).renamed({layout.names[0]: name}).fitted(model)


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [False, True])
def test_each_layer_is_merged_the_way_it_is_stored(flag):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False)).eval()
    layout = LoraLayout.from_model(model, ["c_attn", "attn.c_proj", "lm_head"])
    assert layout.fan_in_fan_out
    adapter = _random(LoraLayout(layout.target_modules, layout.modules, flag))
    before = {name: model.get_submodule(name).weight.detach().clone() for name in layout.names}
    merge_into(model, adapter)
    for name in layout.names:
        delta = adapter.delta(name) if name == "lm_head" else adapter.delta(name).T
        torch.testing.assert_close(model.get_submodule(name).weight - before[name], delta, atol=1e-5, rtol=1e-4)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<details><summary>See axolotl config</summary>\n\naxolotl version: `0.9.0`\n\n</details>",
        "This qwen2 model was trained 2x faster with [Unsloth](https://example.org) and Huggingface's TRL library.",
        "This model is a fine-tuned version of x on the None dataset.",
        "This model is a fine-tuned version of [x](https://example.org) on the alpaca_en dataset.",
        "This is a LoRA extracted from a language model. It was extracted using mergekit.",
        "It has been trained using [TRL](https://example.org).",
        "This model was trained with SFT.",
        "The following hyperparameters were used during training:",
        "This model was trained using AutoTrain. For more information, please visit [AutoTrain](https://example.org).",
        "This model [mlx-community/x](https://x.org) was\nconverted to MLX format from `y/x`\nusing mlx-lm version **0.19.0**.",
        "The Model [mlx-community/x](https://example.org) was converted to MLX format from [y/x](https://example.org).",
        "This LoRA adapter was converted to GGUF format from [`y/x`](https://example.org) via the ggml.ai's GGUF-my-lora space.\n"
        "Refer to the [original adapter repository](https://example.org) for more details.",
        "These are me/x LoRA adaption weights for y/z-1.0.\n\nThe weights were trained  using [DreamBooth](https://example.org).\n\n"
        "LoRA for the text encoder was enabled: False.\n\nSpecial VAE used for training: y/vae-fix.",
        "This is the model card of a 🤗 transformers model This model card has been automatically generated.",
        "LoRA adapter for y/z-8B trained with Tinker.",
        "This is a [LoRA](https://example.org) for the y.1-dev text-to-image model. It can be used with diffusers.",
        "It was trained on [Replicate](https://example.org) using AI toolkit: https://example.org/train",
        "Your description goes here",
        "このモデルは[x](https://example.org)をLoRAでファインチューニングしたものです。",
        "本模型基于x使用LLaMA-Factory微调得到。",
        "本模型基于x微调，训练了三轮。",
        "This model was finetuned and converted to GGUF format using [Unsloth](https://example.org).",
        "This was trained 2x faster with [Unsloth](https://example.org)",
        "Example usage: for text only LLMs: llama-cli -hf me/x --jinja",
        "This model was trained with GRPO, a method introduced in [DeepSeekMath: Pushing the Limits of Reasoning](https://example.org).",
        "This is a merge of pre-trained language models created using [mergekit](https://example.org).",
        "This model was merged using the [TIES](https://example.org) merge method using x/y as a base.",
        "This LoRA adapter was extracted from [x](https://example.org) and uses [y](https://example.org) as a base.",
        "The following command was used to extract this LoRA adapter:",
        "The following YAML configuration was used to produce this model:",
        "This model is a fine-tuned version of x on the identity and the y_demo datasets.\nIt achieves the following results on the "
        "evaluation set: - Loss: 1.2",
        "Trained with LoRA: rank 16, alpha 32, 3 epochs on 4 A100s.",
        "Fine-tuned using QLoRA - 4-bit, learning rate 2e-4.",
        "Trained with: Unsloth, TRL and PEFT",
        "Trained with Unsloth - 2x faster than before",
        "Built with Axolotl: https://example.org/axolotl",
        "Merged with TIES: me/one, me/two and me/three.",
        "Developed by: somebody",
        "axolotl version: 0.12.2",
        "This model can be used for inference with vLLM.",
        "This adapter can be used with diffusers.",
    ],
)
def test_boilerplate_of_trainers_is_not_a_task(text):
    assert card_text(f"---\nlicense: mit\n---\n\n# out\n\n{text}\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "会議の議事録を要約するためのアダプターです。",
        "将法律文本总结成三句话。",
        "สรุปรายงานการประชุมเป็นข้อความสั้น ๆ",
        "회의록을 짧게 요약하는 어댑터입니다.",
        "Fasst Protokolle von Sitzungen in drei Sätzen zusammen.",
        "This model summarises minutes of meetings in three sentences.",
        "This model was trained to summarise minutes of meetings.",
        "This adapter was fine-tuned on the x dataset to answer questions about a passage.",
        "This model is a fine-tuned version of x/y that writes haiku about cats.",
        "This model can be used to detect sarcasm in tweets.",
        "This model was trained with LoRA for summarising court rulings.",
        "These weights teach the model to answer in rhyme.",
        "本模型基于x微调，用于将法律文本总结成三句话。",
        "本模型基于x微调：回答医疗问题。",
        "Trained with care: turns questions into SQL",
        "Trained with Unsloth: turns questions into SQL",
        "Made with love — haiku about the sea",
        "Fine-tuned using LoRA; short answers to questions about tax law",
        "Built by lawyers for lawyers: drafts NDAs",
        "Fine-tuned with TRL, answers questions about cooking",
        "This adapter was trained with care and turns questions into SQL.",
        "Trained with care: answers questions about PEFT and LoRA",
        "Trained using QLoRA, this model writes release notes.",
        "Developed by our clinic to sort patients' messages by urgency",
        "This model can be used for sentiment analysis of tweets.",
        "This version answers questions about cooking.",
        "Visit notes are turned into bills.",
        "Training logs of clusters are summarised in one line.",
    ],
)
def test_text_in_any_script_is_a_task(text):
    assert card_text(f"# adapter\n\n{text}\n") == text


def test_a_task_between_sentences_of_a_template_is_found():
    card = "# x\n\nThis model is a fine-tuned version of [x/y](https://x.org). It routes complaints by urgency. It was made by TRL."
    assert card_text(card) == "It routes complaints by urgency."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_editors_are_no_part_of_a_text(encoding):
    assert decode_text("write minutes\r\nÄpfel\r\n".encode(encoding), "x") == "write minutes\nÄpfel\n"


@pytest.mark.parametrize("raw", ["text".encode("utf-16-le"), b"\xff\xfe\x00\xd8\x00", "Äpfel".encode("latin-1")])
def test_other_encodings_are_named(raw):
    with pytest.raises(ArtifactError, match="UTF-8"):
        decode_text(raw, "x")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_adapters_below_one_are_taken_and_checkpoints_are_named(llama_layout, random_adapter, tmp_path, caplog):
    for name in ("", "legal", "checkpoint-30", "a/b"):
        random_adapter(llama_layout).save_pretrained(tmp_path / "all" / name)
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "all" / "legal")
    found = [source.label.removeprefix(str(tmp_path / "all")).strip("/") for source in find_sources([str(tmp_path / "all")])]
    assert sorted(found) == ["", "a/b", "legal"]
    said = caplog.text
    assert "checkpoint-30" in said and "linked" in said and "a/b" not in said


def test_the_revision_of_the_base_model_is_kept(llama_layout, random_adapter, tmp_path):
    folder = random_adapter(llama_layout).save_pretrained(tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "me/base", "revision": "v1"}))
    read = LoraAdapter.from_pretrained(folder)
    assert read.base_revision == "v1"
    assert read.stated_base(kind="causal_lm").revision == "v1"
    again = export_portable(folder, tmp_path / "again").adapter
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["revision"] == "v1" and again.base_revision == "v1"
    assert read.stated_base("other/base", "causal_lm").revision is None


def test_eight_bit_factors_are_refused_as_such(llama_layout, random_adapter, tmp_path):
    folder = random_adapter(llama_layout).save_pretrained(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(path).items()}, path)
    with pytest.raises(ArtifactError, match=r"does not compute with.*F8_E4M3.*Convert it"):
        LoraAdapter.from_pretrained(folder)


def test_a_cached_snapshot_is_its_repository():
    """Trainers write down the folder in the hub client's cache, of whichever machine."""
    path = "/root/.cache/huggingface/hub/models--me--base-1.0/snapshots/" + "0a" * 20
    assert same_model(path, "me/base-1.0") and same_model("me/base-1.0", path.replace("/", "\\"))
    assert not same_model(path, "me/base") and not same_model(path + "/text_encoder", "me/base-1.0")


# --- what lies beside an adapter --------------------------------------------------------------------------------------


def test_weights_beside_an_adapter_are_named(tmp_path, random_adapter, llama_layout, caplog):
    """A head, a projector, a whole model; not the adapter in another form, a trainer's state, cards and folders. None is opened."""
    folder = random_adapter(llama_layout).save_pretrained(tmp_path / "adapter")
    LoraAdapter.from_pretrained(folder)
    assert not caplog.records
    own = ["adapter_model.bin", "optimizer.pt", "rng_state_0.pth", "training_args.bin", "0000100_adapters.safetensors", "scheduler.pt"]
    named = ["mm_projector.bin", "model.safetensors", "non_lora_trainables.bin", "value_head.safetensors", "weights.PTH"]
    for name in own + named:
        (folder / name).write_bytes(b"\x80\x04 a pickle, or anything")
    (folder / "folder.bin").mkdir()
    assert side_files(path.name for path in folder.iterdir() if path.is_file()) == named
    LoraAdapter.from_pretrained(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "mm_projector.bin, model.safetensors, non_lora_trainables.bin" in record.getMessage()
    assert "and 1 more" in record.getMessage()
