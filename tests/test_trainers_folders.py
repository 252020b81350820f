"""Folders as trainers leave them: what is beside an adapter, above and below it, and the way from five of them to one bank and on."""

import json
import shutil

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.export import export_as
from lorag.adapters.sources import find_sources
from lorag.bank.bank import AdapterBank
from lorag.cli import main as cli
from lorag.files.artifacts import embedded

BASE = str(embedded("checkpoints/sandbox-lm"))
CARDS = {
    "peft": "# Model Card for Model ID\n\n<!-- Provide a quick summary of what the model is/does. -->\n\n### Direct Use\n\n"
    "[More Information Needed]\n\n### Framework versions\n\n- PEFT 0.18.0\n",
    "unsloth": "# Uploaded finetuned  model\n\n- **Developed by:** me\n- **License:** apache-2.0\n\n"
    "This llama model was trained 2x faster with [Unsloth](https://example.org) and Huggingface's TRL library.\n",
    "axolotl": "[<img/>](https://x.org)\n<details><summary>See axolotl config</summary>\n\naxolotl version: `0.12.0`\n```yaml\n"
    "adapter: lora\n```\n\n</details><br>\n\n# lora-out\n\nThis model is a fine-tuned version of [x](y) on the a.jsonl dataset.\n",
    "llamafactory": "# sft\n\nThis model is a fine-tuned version of [x](https://x.org) on the identity and the b datasets.\n\n"
    "## Model description\n\nMore information needed\n",
    "trl": "# Model Card for out\n\nThis model is a fine-tuned version of [x](https://example.org).\nIt has been trained using [TRL]"
    "(https://example.org).\n\n## Quick start\n\n```python\nx\n```\n\n## Training procedure\n\nThis model was trained with SFT.\n",
}
TASKS = {
    "peft": "write it in capitals",
    "unsloth": "count the words",
    "axolotl": "give the first word",
    "llamafactory": "repeat the last word",
    "trl": "answer with the name of the city",
}


def _peft(folder, seed, card="peft", **config):
    """What PEFT writes for a trainer, with factors other than their start."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(**settings))
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=rng)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\nlicense: apache-2.0\n---\n\n{CARDS[card]}")
    return folder


def _state(folder, step):
    """A trainer's checkpoint: its adapter, and what it needs to go on."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"PK\x03\x04" + bytes(64))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def unsloth(root):
    """model.save_pretrained("lora_model"), with the trainer's own folder beside it; dropout 0, a name of its own in auto_mapping."""
    folder = _peft(root / "lora_model", 1, "unsloth", r=8, lora_alpha=16, use_rslora=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama", "unsloth_fixed": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    for step in (30, 60):
        _state(_peft(root / f"outputs/checkpoint-{step}", 1, "unsloth", r=8, lora_alpha=16, use_rslora=True), step)
    return root / "lora_model"


def axolotl(root):
    """outputs/lora-out: the base model's config.json beside the adapter, checkpoints and the merged model below it."""
    folder = _peft(root / "outputs/lora-out", 2, "axolotl", target_modules=["q_proj", "v_proj", "down_proj"])
    shutil.copy(f"{BASE}/config.json", folder / "config.json")
    (folder / "debug.log").write_text("…")
    _state(_peft(folder / "checkpoint-12", 7, "axolotl", target_modules=["q_proj", "v_proj", "down_proj"]), 12)
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(folder / "merged")
    return folder


def llamafactory(root):
    """saves/MODEL/lora/RUN: curves, logs and arguments beside the adapter."""
    folder = _peft(root / "saves/Llama/lora/train_2026-01-02-03-04-05", 3, "llamafactory", r=2, lora_alpha=4)
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    (folder / "trainer_log.jsonl").write_text('{"loss": 1.0}\n')
    (folder / "training_args.yaml").write_text("stage: sft\n")
    (folder / "training_loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    _state(_peft(folder / "checkpoint-500", 8, "llamafactory", r=2, lora_alpha=4), 500)
    _state(folder, 500)
    return folder


def trl(root):
    """Checkpoints alone, as after a run that nobody saved: the last one is what was trained."""
    for step in (9, 10, 200):
        _state(_peft(root / f"out/checkpoint-{step}", step, "trl"), step)
    (root / "out/runs/Jan01").mkdir(parents=True)
    (root / "out/runs/Jan01/events.out.tfevents").write_bytes(b"x")
    return root / "out/checkpoint-200"


def mlx(root):
    """adapters/: the last state beside numbered ones."""
    adapter = LoraAdapter.from_pretrained(_peft(root / "kept/adapter", 5))
    folder = root / "adapters"
    export_as(root / "kept/adapter", folder, "mlx")
    shutil.rmtree(root / "kept")
    for step in (100, 200):
        save_file(
            {name: value * 0.5 for name, value in load_file(folder / "adapters.safetensors").items()},
            folder / f"{step:07}_adapters.safetensors",
        )
    assert adapter.rank == 4
    return folder


def plain(root):
    """PEFT's save_pretrained."""
    return _peft(root / "adapter", 6)


LAYOUTS = {one.__name__: one for one in (unsloth, axolotl, llamafactory, trl, mlx, plain)}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", LAYOUTS)
def test_a_trainer_s_folder_holds_one_adapter(trainer, tmp_path, caplog):
    """The one that was trained last, with PEFT's numbers; earlier states are passed over, and said."""
    root = tmp_path / trainer
    folder = LAYOUTS[trainer](root)
    found = [source.place for source in find_sources([str(root)])]
    if trainer == "unsloth":  # two folders of the user's: the adapter, and the run that it came from, of which the last state counts
        assert found == [folder, root / "outputs/checkpoint-60"] and "checkpoint-30" in caplog.text
    else:
        assert found == [folder]
        assert trainer in ("mlx", "plain") or "checkpoint-" in caplog.text
    caplog.clear()
    adapter = LoraAdapter.from_pretrained(folder)
    assert not caplog.records, caplog.text  # nothing beside it is weights of something else
    if trainer != "mlx":
        own, ids = AutoModelForCausalLM.from_pretrained(BASE), torch.arange(5, 21)[None]
        with torch.no_grad():
            wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder).eval()(input_ids=ids).logits
            assert torch.allclose(adapter.apply_to(own)(input_ids=ids).logits, wanted, atol=1e-4)


def test_named_checkpoints_are_taken(tmp_path):
    """A state that somebody names is what they want."""
    trl(tmp_path)
    early = tmp_path / "out/checkpoint-9"
    assert [source.place for source in find_sources([str(early)])] == [early]


@pytest.mark.slow
def test_from_five_trainers_to_what_people_run(tmp_path, monkeypatch, capsys):
    """One `bank add` of five trainers' folders, one adapter generated, one fused with weights, one exported to GGUF."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for name, text in TASKS.items():
        folder = LAYOUTS["plain" if name == "peft" else name](tmp_path / name)
        lines.append(f"{folder.relative_to(tmp_path)}\t{name}\t{text}\n")
    (tmp_path / "adapters.txt").write_text("".join(lines), encoding="utf-16")  # as a Windows editor saves it

    def lorag(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    code, out, err = lorag("bank", "add", *TASKS, "--bank", "bank")
    assert code == 1 and out.count("UndescribedError") >= 5 and "description.txt" in out, (out, err)
    code, out, err = lorag("bank", "add", "--from", "adapters.txt", "--bank", "bank")
    assert code == 0, (out, err)
    assert sorted(AdapterBank.from_pretrained("bank").names) == sorted(TASKS)
    code, out, err = lorag("train", "bank=bank", "method=ridge", "tasks=null", "out=generator", "--quiet")
    assert code == 0, err
    code, out, err = lorag(
        "generate", "give the first word in capitals", "--generator", "generator", "--out", "mine", "--on-unknown", "ignore"
    )
    assert code == 0, err
    code, out, err = lorag("fuse", "peft=.7", "axolotl=.3", "--bank", "bank", "--method", "cat", "--out", "fused")
    assert code == 0, err
    bank, fused = AdapterBank.from_pretrained("bank"), LoraAdapter.from_pretrained("fused")
    for module in fused.layout.names:
        wanted = 0.7 * bank.adapter("peft").delta(module) + 0.3 * bank.adapter("axolotl").delta(module)
        assert torch.allclose(fused.delta(module), wanted, atol=1e-5)
    loose = ("fuse", "peft/adapter=.7", "axolotl/outputs/lora-out=.3", "--method", "cat", "--out", "loose")
    assert lorag(*loose)[0] == 0
    assert all(torch.allclose(LoraAdapter.from_pretrained("loose").delta(m), fused.delta(m), atol=1e-5) for m in fused.layout.names)
    code, out, err = lorag("export", "mine", "--gguf", "--out", "mine.gguf")
    assert code == 0, err
    code, out, err = lorag("try", "mine.gguf", "the cat sat", "--tokens", "2")
    assert code == 0, err
    for folder in ("bank", "generator", "mine", "fused", "mine.gguf"):
        assert lorag("info", folder)[0] == 0, folder
