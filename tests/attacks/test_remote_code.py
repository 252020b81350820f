"""Python code in a model's repository: it runs only when a person said so in this process, and then that is on record."""

import json
import sys

import pytest

from lorag.bank.bank import AdapterBank
from lorag.base import base_model
from lorag.base.base_model import BaseModel, is_trusted, stored_config, trust_remote_code
from lorag.base.runner import BankBase
from lorag.cli import main as cli
from lorag.errors import BaseModelError, ConfigError

from .conftest import LAYOUT

CODE = """
import pathlib
pathlib.Path(__file__).resolve()
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def trap(tmp_path, tiny_models, tokenizer, monkeypatch):
    """A model whose config names code beside it, which leaves a mark where it runs."""
    monkeypatch.setattr(base_model, "_trusted", set())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own-llama"
    tiny_models["llama"].build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return folder


def test_code_of_a_repository_does_not_run(trap, tmp_path, monkeypatch):
    """Nobody is asked either: a question on the terminal is answered too fast."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for call in (BaseModel(str(trap), "causal_lm").load, lambda: stored_config(str(trap))):
        with pytest.raises(BaseModelError):
            call()
    assert not (tmp_path / "ran").exists()


def test_a_file_s_word_is_no_permission(trap, tmp_path):
    """A bank that says `remote_code` records what its builder did; whoever opens it decides anew."""
    base = BankBase(BaseModel(str(trap), "causal_lm", None, True), "sha256:0", LAYOUT, "causal_lm", {})
    opened = AdapterBank.create(tmp_path / "bank", base).base.model
    assert opened.remote_code and json.loads((tmp_path / "bank" / "bank.json").read_text())["base"]["model"]["remote_code"]
    for call in (opened.load, opened.tokenizer):
        with pytest.raises(BaseModelError, match="--trust-remote-code"):
            call()
    assert not (tmp_path / "ran").exists()


def test_a_person_s_word_is_and_it_is_recorded(trap, tmp_path):
    """The model loads with its own class, and its identity says that code was part of it, and which."""
    trust_remote_code(str(trap))
    model = BaseModel(str(trap), "causal_lm", None, is_trusted(str(trap)))
    loaded = model.load("cpu")
    assert type(loaded).__name__ == "OwnModel" and (tmp_path / "ran").exists()
    before = model.identity()
    assert "+code:" in before and "+code:" not in BaseModel(str(trap), "causal_lm").identity()
    (trap / "own.py").write_text((trap / "own.py").read_text() + "\n# changed\n")
    assert model.identity() != before, "changed code is another base model"


def test_code_from_the_hub_must_be_pinned():
    """A branch can move to other code after it was read."""
    trust_remote_code("user/own")
    try:
        for revision in (None, "main", "v1"):
            with pytest.raises(BaseModelError, match="commit"):
                BaseModel("user/own", "causal_lm", revision, True).load("cpu")
    finally:
        base_model._trusted.discard("user/own")


def test_the_flag_is_the_command_line_s(monkeypatch):
    """`lorag --trust-remote-code NAME …` allows just that model."""
    monkeypatch.setattr(base_model, "_trusted", set())
    with pytest.raises(SystemExit):
        cli.main(["--trust-remote-code", "user/own", "info", "/nowhere"])
    assert is_trusted("user/own") and not is_trusted("user/other")


@pytest.mark.parametrize("name", ["\\\\host\\share", "//host/share", "", "a\x1b[2J", None, 3, ["a"]])
def test_names_that_reach_elsewhere_are_refused(name):
    """A network share would be sent the user's credentials when it is opened."""
    with pytest.raises(ConfigError):
        BaseModel(name, "causal_lm")


def test_other_fields_are_checked_too():
    """A bank's file can hold anything in them."""
    for fields in ({"kind": "code"}, {"kind": ["causal_lm"]}, {"revision": 3}, {"remote_code": "yes"}, {"remote_code": 1}):
        with pytest.raises(ConfigError):
            BaseModel(**{"name": "a", "kind": "causal_lm", **fields})


def test_no_module_of_the_trap_stays():
    """The traps above left nothing that later tests could import."""
    assert "own" not in sys.modules
