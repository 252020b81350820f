"""lm-evaluation-harness: the command that `lorag info` prints, and, where the harness is installed, what comes of pasting it."""

import json
import shlex
import subprocess
import sys
from importlib import util

import pytest
import yaml
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment

from lorag import generate_lora
from lorag.adapters.factors import Factors
from lorag.cli.info import describe_path
from lorag.evaluation.harness import lm_eval_command
from lorag.generator.generate import open_generator
from lorag.tasks.finding import find_tasks

pytestmark = pytest.mark.slow

BASE = {"base_model_name_or_path": "user/model", "task_type": "CAUSAL_LM"}


def _arguments(command):
    """Options by name, as a shell and the harness take them."""
    words = shlex.split(command)
    assert words[:3] == ["lm_eval", "--model", "hf"] and words[-2:] == ["--tasks", "TASK"]
    given = words[words.index("--model_args") + 1]
    return words, json.loads(given) if given.startswith("{") else dict(pair.split("=") for pair in given.split(","))


def _info(**base):
    return {"base_model": base}


def test_the_command_names_base_adapter_and_revision(tmp_path):
    """A hub id as it is, with its revision; an adapter's own tokenizer; paths that the harness would cut up, as JSON."""
    words, arguments = _arguments(lm_eval_command(tmp_path, {**BASE, "revision": "a" * 40}, {}))
    assert arguments == {"pretrained": "user/model", "peft": str(tmp_path), "revision": "a" * 40}
    assert "--apply_chat_template" not in words
    odd = tmp_path / "a, b=c {d} 'e'"
    odd.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (odd / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    words, arguments = _arguments(lm_eval_command(odd, BASE, {}))
    assert arguments == {"pretrained": "user/model", "peft": str(odd), "tokenizer": str(odd)}
    assert "--apply_chat_template" in words


def test_the_chat_template_is_applied_where_it_was_in_training(tmp_path):
    """As lorag.json says; where it says nothing, as the base model's files say."""
    chat = tmp_path / "base"
    chat.mkdir()
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    config = {**BASE, "base_model_name_or_path": str(chat)}
    for info, applied in (
        ({}, True),
        (_info(prompt={"template": "{input}\n"}), False),
        (_info(prompt={"template": "chat", "system": "Be brief; it's late."}), True),
    ):
        words, _ = _arguments(lm_eval_command(tmp_path / "adapter", config, info))
        assert ("--apply_chat_template" in words) == applied
    assert words[words.index("--system_instruction") + 1] == "Be brief; it's late."
    (chat / "chat_template.jinja").unlink()
    (chat / "tokenizer_config.json").write_text("[]")
    assert "--apply_chat_template" not in lm_eval_command(tmp_path, config, {})


@pytest.mark.parametrize(
    "config", [{}, {"base_model_name_or_path": "a/b"}, {**BASE, "task_type": "FEATURE_EXTRACTION"}, {**BASE, "task_type": 3}]
)
def test_adapters_that_write_no_texts_get_no_command(tmp_path, config):
    """And none that nothing says the base model of, whatever stands in lorag.json."""
    assert lm_eval_command(tmp_path, config, {"base_model": ["odd"]}) is None
    assert lm_eval_command(tmp_path, {**BASE, "task_type": None}, _info(kind="encoder")) is None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A generated adapter of the sandbox, its folder and the task that it is for."""
    task = next(iter(find_tasks("sandbox", "test")))
    made = generate_lora(task.descriptions[0])
    return made, made.save_pretrained(tmp_path_factory.mktemp("adapter") / "made"), task


def test_info_prints_it_on_one_line(adapter):
    """So that it can be copied."""
    _, folder, _ = adapter
    (line,) = [line for line in describe_path(folder).splitlines() if line.startswith("lm_eval ")]
    words, arguments = _arguments(line)
    assert arguments["peft"] == str(folder) and arguments["pretrained"].endswith("checkpoints/sandbox-lm")
    assert "--apply_chat_template" not in words


@pytest.mark.skipif(util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_gives_the_score_that_lorag_gives(adapter, tmp_path):
    """Pasted with a small task of one's own, offline: exact match is the one of `lorag evaluate`."""
    made, folder, task = adapter
    examples = task.split("test")[:12]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"input": e.input, "output": e.output}) + "\n" for e in examples))
    settings = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{input}}\n",
        "doc_to_target": "{{output}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    (line,) = [line for line in describe_path(folder).splitlines() if line.startswith("lm_eval ")]
    words = shlex.split(line.replace("TASK", "own"))
    command = [sys.executable, "-m", *words, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    runner = open_generator().runner()
    (expected,) = runner.scores(Factors.stack([made.factors], runner.device), [task], limit=12)
    assert 0 < expected["exact_match"] and found["results"]["own"]["exact_match,none"] == pytest.approx(expected["exact_match"])
