"""Commands that start engines with an adapter: what is pasted runs, and nothing of a stranger's file becomes a command."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorag.adapters.reading import read_facts, read_provenance
from lorag.base.names import locate
from lorag.cli.info import describe_path
from lorag.generator.generate import default_generator
from lorag.serving.commands import start_commands


@pytest.fixture(scope="module")
def adapter():
    return default_generator().generate("summarise legal text")


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory):
    return adapter.save_pretrained(tmp_path_factory.mktemp("commands") / "legal summary")


def _starts(folder):
    return {start.engine: start for start in start_commands(folder, read_facts(folder), read_provenance(folder))}


def _changed(folder, tmp_path, config=None, prompt=None):
    """A copy of an adapter that names another base model or other prompts."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    stated = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps(stated | (config or {})), encoding="utf-8")
    if prompt is not None:
        info = json.loads((copy / "lorag.json").read_text(encoding="utf-8"))
        info["base_model"]["prompt"] = prompt
        (copy / "lorag.json").write_text(json.dumps(info), encoding="utf-8")
    return copy


@pytest.mark.slow
def test_the_command_for_transformers_answers_when_pasted(folder, adapter):
    """In a shell, with a space in the folder's name: as PEFT answers to the template that the adapter was trained with."""
    command = _starts(folder)["PEFT"].command
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(locate("sandbox-lm"))
    model = adapter.apply_to(AutoModelForCausalLM.from_pretrained(locate("sandbox-lm"))).eval()
    prompt = tokenizer("Hello\n", return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    answer = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    assert answer.strip() and done.stdout.strip().startswith(answer.strip())


def test_info_shows_commands_in_lines_that_can_be_pasted(folder):
    """Unbroken, whatever their length; none for llama.cpp where no GGUF file of the base model is at hand."""
    lines = describe_path(folder).splitlines()
    starts = _starts(folder)
    assert set(starts) == {"PEFT", "vLLM"}
    for start in starts.values():
        place = lines.index(f"start in {start.engine}:")
        assert lines[place + 1] == start.command and (not start.ask or lines[place + 2] == start.ask)


@pytest.mark.slow
def test_vllm_is_told_what_it_needs(folder, adapter, tmp_path):
    """The base model's folder, the adapter's name and folder as one word, the rank only where it is above 16; prompts in the template."""
    start = _starts(folder)["vLLM"]
    words = shlex.split(start.command)
    assert words[:2] == ["vllm", "serve"] and "--max-lora-rank" not in words
    name, _, where = words[words.index("--lora-modules") + 1].partition("=")
    assert where == str(folder) and name == json.loads(shlex.split(start.ask)[-1])["model"]
    assert json.loads(shlex.split(start.ask)[-1])["prompt"] == "…\n"
    wider = dataclasses.replace(adapter, factors=adapter.factors.padded(32)).save_pretrained(tmp_path / "wide")
    assert _starts(wider)["vLLM"].command.endswith("--max-lora-rank 32")


def test_chats_are_asked_as_chats(folder, tmp_path):
    """With the system text that the adapter was trained with."""
    copy = _changed(folder, tmp_path, {"base_model_name_or_path": "someone/model"}, {"template": "chat", "system": "Be 'brief'."})
    starts = _starts(copy)
    body = json.loads(shlex.split(starts["vLLM"].ask)[-1])
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"] and body["messages"][0]["content"] == "Be 'brief'."
    assert "chat/completions" in starts["vLLM"].ask and starts["vLLM"].command.startswith("vllm serve someone/model ")
    assert "Be 'brief'." in shlex.split(starts["PEFT"].command)[-1]


def test_llama_cpp_is_started_where_the_base_is_a_gguf_file(folder, tmp_path):
    """The adapter is exported first."""
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF")
    command = _starts(_changed(folder, tmp_path, {"base_model_name_or_path": str(base)}))["llama.cpp"].command
    assert command.startswith("lorag export ") and f"llama-server -m {base} --lora " in command


@pytest.mark.parametrize("base", ["x; touch /tmp/owned", "$(id)", "`id`", "-c", "a\nb", "", None, 3, "a'b", 'a"b'])
def test_a_stranger_s_base_model_never_becomes_a_command(folder, tmp_path, base):
    """Names that cannot be a model's get no command at all."""
    assert _starts(_changed(folder, tmp_path, {"base_model_name_or_path": base})) == {}


@pytest.mark.parametrize("template", ["'; touch owned; '{input}", '"); import os; ("{input}', "$(id) {input}"])
def test_a_stranger_s_template_stays_a_value(folder, tmp_path, template):
    """It reaches the engine as it is, and the shell and Python see one string."""
    starts = _starts(_changed(folder, tmp_path, None, {"template": template}))
    words = shlex.split(starts["PEFT"].command)
    assert words[:2] == ["python", "-c"] and len(words) == 3
    assert f"p({json.dumps(template.replace('{input}', 'Hello'))}, " in words[2]
    compile(words[2], "pasted", "exec")
    assert json.loads(shlex.split(starts["vLLM"].ask)[-1])["prompt"] == template.replace("{input}", "…")
