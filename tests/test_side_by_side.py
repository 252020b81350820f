"""`lorag try`: answers beside the base model's, for any PEFT folder, and whether the adapter changes more than noise of its size."""

import json
import sys

import pytest
import torch
from conftest import stack_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from toy_world import save_base, true_adapter

from lorag.adapters.adapter import LoraAdapter
from lorag.errors import AdapterError, ConfigError
from lorag.evaluation.rivals import random_like
from lorag.evaluation.side_by_side import Effect, open_for, side_by_side

TEXTS = ["the cat sat", "a dog ran on the log"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    """A small base model with its tokenizer, in a folder."""
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """What a user of plain PEFT has."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    out = tmp_path_factory.mktemp("peft") / "paint"
    get_peft_model(base.model.load("cpu"), settings).save_pretrained(out)
    (out / "README.md").write_text("# paint\n\n## Model description\n\nIt paints the cat that you describe in red.\n")
    return out


def _kl(moved, bare, ids, start):
    with torch.no_grad():
        p, q = (torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].double(), -1) for model in (moved, bare))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.slow
def test_answers_and_effect_are_those_of_peft(base, folder):
    """Each column is what stock PEFT writes, and KL is that of its logits over the base model's own answer."""
    runner, adapter = open_for(LoraAdapter.from_pretrained(folder), device="cpu")
    found = side_by_side(runner, adapter, TEXTS, description="paint it", null=True, max_new_tokens=6)
    assert list(found.columns) == ["base", "prompted", "adapter", "random"] and found.texts == tuple(TEXTS)
    bare = base.model.load("cpu")
    stock = PeftModel.from_pretrained(base.model.load("cpu"), folder).eval()
    objective, values = runner.objective, []
    for place, text in enumerate(TEXTS):
        assert found.columns["base"][place] == objective.generate(bare, [text], max_new_tokens=6)[0]
        assert found.columns["prompted"][place] == objective.generate(bare, [f"paint it\n\n{text}"], max_new_tokens=6)[0]
        assert found.columns["adapter"][place] == objective.generate(stock, [text], max_new_tokens=6)[0]
        prompt, answer = objective.prompts.rows([(text, found.columns["base"][place])])[0]
        values.append(_kl(stock, bare, torch.tensor([prompt + answer]), len(prompt)))
    assert found.effect.kl == pytest.approx(torch.cat(values).mean().item(), rel=1e-3)
    assert found.effect.tokens == len(torch.cat(values)) and len(found.effect.nulls) == 4 and min(found.effect.nulls) > 0
    with runner.use(stack_adapters([random_like(adapter, 0)])) as model:
        assert found.columns["random"] == tuple(objective.generate(model, [text], max_new_tokens=6)[0] for text in TEXTS)


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_found_out(base, folder):
    """One of zeros, as it is before training; one drawn at random changes no more than the others; ten times as much stands out."""
    opened = LoraAdapter.from_pretrained(folder)
    runner, adapter = open_for(opened, device="cpu")

    def line(one):
        return side_by_side(runner, one, TEXTS, null=True, max_new_tokens=6).effect.line()

    assert line(adapter.scaled(0.0)).startswith("the adapter changes nothing here: ")
    lines = {line(random_like(adapter, seed)).split(":")[0].split(" changes ")[1] for seed in range(9, 17)}
    assert "no more than noise of its size does" in lines
    assert Effect(2.0, (0.1, 0.3), 5).line().startswith("the adapter changes 10 times what noise of its size does: 2 nats per token")


def test_the_prompt_is_the_one_that_the_adapter_was_trained_with(base, folder):
    """lorag.json's template, a chat template beside the adapter, or the base model's own way."""
    opened = LoraAdapter.from_pretrained(folder)
    stated = LoraAdapter(
        opened.layout, opened.factors, opened.base_model, "CAUSAL_LM", {"base_model": {"prompt": {"template": "say {input} "}}}
    )
    assert open_for(opened, device="cpu")[0].objective.template == "{input}\n"
    assert open_for(stated, device="cpu")[0].objective.template == "say {input} "
    chat = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    assert open_for(opened, chat_template=chat, device="cpu")[0].objective.template == "chat"
    with pytest.raises(ConfigError, match="chat template"):
        open_for(opened, chat_template="{% nonsense %}", device="cpu")


@pytest.mark.parametrize("texts", [[], ["a cat", " "], [3]])
def test_what_cannot_be_asked_is_named(folder, texts):
    """No text, an empty one, and no text at all."""
    runner, adapter = open_for(LoraAdapter.from_pretrained(folder), device="cpu")
    with pytest.raises(ConfigError, match="nothing to answer"):
        side_by_side(runner, adapter, texts)


def test_adapters_of_other_modules_and_bases_that_write_nothing_are_refused(base, folder, tmp_path, tiny_models, random_adapter):
    """With a remedy, before anything runs."""
    runner, _ = open_for(LoraAdapter.from_pretrained(folder), device="cpu")
    with pytest.raises(AdapterError, match="other modules"):
        side_by_side(runner, true_adapter(tiny_models["gpt2"].layout(), "red", "cat"), TEXTS)
    bert = tiny_models["bert"]
    bert.build().save_pretrained(tmp_path / "bert")
    other = random_adapter(bert.layout())
    with pytest.raises(ConfigError, match="kind encoder"):
        open_for(LoraAdapter(other.layout, other.factors, str(tmp_path / "bert"), "FEATURE_EXTRACTION"))


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_piped_answers_are_lines(lorag, folder):
    """A line per answer, under its name, and one that says whether the adapter changes anything."""
    code, out, err = lorag("try", folder, *TEXTS, "--null", "--tokens", 4)
    assert code == 0, err
    names = [line.split(": ")[0] for line in out.splitlines()]
    assert names[:-1] == ["text", "base", "prompted", "adapter", "random"] * 2
    assert out.splitlines()[-1].startswith("the adapter changes ")
    code, out, _ = lorag("try", folder, TEXTS[0], "--no-base", "--no-prompted", "--tokens", 4)
    assert code == 0 and [line.split(": ")[0] for line in out.splitlines()] == ["text", "adapter"]


@pytest.mark.slow
def test_a_description_is_generated_and_tried(lorag):
    """Several words that name no folder."""
    code, out, err = lorag("try", "write the legal text in upper case", "the court ruled for Ann", "--tokens", 4)
    assert code == 0, err
    assert [line.split(": ")[0] for line in out.splitlines()] == ["text", "base", "prompted", "adapter"]


@pytest.mark.slow
def test_bad_input_gets_one_line(lorag, folder, tmp_path):
    """No such folder, no description for --prompted, a description that is too long, a generator for a folder, a foreign kind."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    for arguments, said in (
        (("missing", "a"), "no such folder"),
        ((bare, "a", "--prompted"), "what"),
        ((folder, "a", "--description", "x" * 5000), "too long"),
        ((folder, "a", "--kind", "encoder"), "write texts"),
        ((folder, "a", "--base-model", tmp_path / "none"), "none"),
    ):
        code, out, err = lorag("try", *arguments)
        assert code == 1 and len(err.splitlines()) == 1 and said in err and "Traceback" not in err, (arguments, err)
    code, _, err = lorag("try", folder, "a", "--generator", "sandbox")
    assert code == 2 and "--generator" in err
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((folder / name).read_bytes())
    (broken / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ raise_exception('no') }}"}))
    code, _, err = lorag("try", broken, "a", "--tokens", 2)
    assert code == 1 and "chat template" in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_terminal_gets_columns(lorag, folder, monkeypatch):
    """Side by side, and no control character of a model or a file reaches the terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    code, out, err = lorag("try", folder, "the \x1b[31mcat\x1b[0m", "--tokens", 4)
    assert code == 0, err
    head = next(line for line in out.splitlines() if "base model" in line)
    assert head.index("text") < head.index("base model") < head.index("adapter")
    assert "\\x1b[31mcat" in out and "\x1b[31m" not in out
