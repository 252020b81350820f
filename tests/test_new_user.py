"""The way of a new user: adapters of a plain transformers and PEFT script become a bank, a generator, an adapter, a merged model."""

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag.bank.bank import AdapterBank
from lorag.cli import main as cli
from lorag.files.artifacts import embedded

pytestmark = pytest.mark.slow

TASKS = {
    "upper": ("write it in capitals", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "count": ("count the words", {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "first": ("give the first word", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "last": ("repeat the last word", {"r": 2, "target_modules": ["q_proj"]}),
}


def train_as_anybody_would(base, folder, settings, text):
    """A plain script: two steps of AdamW, save_pretrained."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids = tokenizer([f"the judge wrote a letter\n{text}"], return_tensors="pt")["input_ids"]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def test_from_a_plain_script_s_adapters_to_a_new_one(tmp_path, monkeypatch, capsys):
    """No line of Python between a folder of PEFT adapters and a generated, a merged adapter; one without a description is asked for it."""
    monkeypatch.chdir(tmp_path)
    base = str(embedded("checkpoints/sandbox-lm"))
    for name, (text, settings) in TASKS.items():
        train_as_anybody_would(base, f"adapters/{name}", settings, text)
        if name != "last":
            (tmp_path / "adapters" / name / "description.txt").write_text(text)

    def lorag(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    code, out, err = lorag("bank", "add", "adapters", "--bank", "bank")
    assert code == 1 and "started bank: base model sandbox-lm" in out and "UndescribedError" in out and "1 of 4" in err
    code, out, _ = lorag("bank", "add", "adapters/last", "--bank", "bank", "--description", "repeat the last word")
    assert code == 0 and "nearest by weight" in out
    assert set(AdapterBank.from_pretrained("bank").base.layout.target_modules) == {"q_proj", "v_proj", "down_proj"}
    code, out, err = lorag("train", "bank=bank", "method=ridge", "tasks=null", "out=generator", "--quiet")
    assert code == 0 and 'next: lorag generate "DESCRIPTION" --generator generator' in out, err
    code, out, err = lorag("generate", "write the first word in capitals", "--generator", "generator", "--out", "mine")
    assert code == 0, err
    for folder in ("bank", "generator", "mine"):
        assert lorag("info", folder)[0] == 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "mine")
    assert lorag("export", "mine", "--merge", "--out", "merged")[0] == 0
    AutoModelForCausalLM.from_pretrained("merged")


def test_generated_adapters_become_a_bank(tmp_path, lorag):
    """Of a shipped generator, which states its base model's identity in an older form than a new bank does."""
    for number, text in enumerate(("summarise legal text", "name the person in a recipe")):
        assert lorag("generate", text, "--out", tmp_path / f"a{number}")[0] == 0
    code, _, err = lorag("bank", "add", tmp_path / "a0", tmp_path / "a1", "--bank", tmp_path / "bank", "--embedder", "none", "--quiet")
    assert code == 0, err
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert [expert.descriptions for expert in bank.experts] == [("summarise legal text",), ("name the person in a recipe",)]
