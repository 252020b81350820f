"""Pickles under any name: never opened, whatever they are called, and the message says what they are."""

import json
import os
import pickle
import shutil

import pytest
import torch

from lorag.bank.bank import AdapterBank
from lorag.base.base_model import BaseModel
from lorag.errors import AdapterError, ArtifactError, BaseModelError, LoragError
from lorag.files.artifacts import looks_like, read_json
from lorag.files.training_state import load_training_state
from lorag.tasks.suite import TaskSuite
from lorag.text.embedding import SentenceEmbedder


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["pickle", "torch", "legacy torch"])
def bomb(request, tmp_path):
    """Bytes of a pickle; that its code did not run is checked afterwards."""
    place = tmp_path / "bombed"
    if request.param == "pickle":
        raw = pickle.dumps(Bomb(place))
    else:
        torch.save({"x": Bomb(place)}, tmp_path / "made", _use_new_zipfile_serialization=request.param == "torch")
        raw = (tmp_path / "made").read_bytes()
    yield raw
    assert not place.exists(), "a pickle was opened"


def test_weights_that_are_pickles_are_refused(folder, bomb, refused):
    """Renamed to safetensors: the first bytes decide, and the message names the danger."""
    folder.weights.write_bytes(bomb)
    assert "pickle" in refused(folder.read, ArtifactError, "not a safetensors file")


def test_pickles_beside_and_instead_of_weights_are_never_read(folder, bomb, refused):
    """adapter_model.bin is what PEFT would load; here it is not looked at."""
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "lorag.pkl"):
        (folder.path / name).write_bytes(bomb)
    folder.read()
    folder.weights.unlink()
    refused(folder.read, AdapterError, "never read")


@pytest.mark.parametrize("name", ["adapter_config.json", "lorag.json"])
def test_settings_that_are_pickles_are_refused(folder, bomb, refused, name):
    """JSON by name only."""
    (folder.path / name).write_bytes(bomb)
    assert "pickle" in refused(folder.read, ArtifactError)


def test_banks_suites_and_states_of_pickles_are_refused(bank, bomb, refused, tmp_path):
    """Every file that lorag opens."""
    shard = next(bank.folder.glob("experts/*.safetensors"))
    shard.write_bytes(bomb)
    refused(lambda: AdapterBank.from_pretrained(bank.folder), LoragError)
    (bank.folder / "bank.json").write_bytes(bomb)
    assert "pickle" in refused(lambda: AdapterBank.from_pretrained(bank.folder), ArtifactError)
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "tasks.jsonl").write_bytes(bomb)
    refused(lambda: TaskSuite.from_folder(suite))
    (suite / "tasks.jsonl").write_text('{"name": "a", "descriptions": ["d"]}\n')
    (suite / "examples.jsonl.gz").write_bytes(bomb)
    refused(lambda: TaskSuite.from_folder(suite))
    (tmp_path / "s").write_bytes(bomb)
    refused(lambda: load_training_state(tmp_path / "s", {"x": torch.zeros(1)}, [], torch.Generator()))


@pytest.mark.slow
def test_base_models_and_embedders_of_pickles_are_refused(bomb, refused, tmp_path, tiny_models):
    """Folders that have no other weights than pickles."""
    model = tiny_models["llama"].build()
    model.save_pretrained(tmp_path / "base")
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(BaseModelError):
        BaseModel(str(tmp_path / "base"), "causal_lm").load("cpu")
    with pytest.raises(BaseModelError, match="safetensors"):
        SentenceEmbedder.from_pretrained(str(tmp_path / "base"), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"\x80\x04\x95", "pickle"),
        (b"PK\x03\x04", "torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\n<html>", "web page"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"GGUF\x03", "GGUF"),
        (b"\x7fELF", "program"),
        (b"", "empty"),
        (b"whatever", "whatever"),
    ],
)
def test_what_a_file_is_instead_is_said(folder, refused, start, named):
    """Half-finished uploads and wrong downloads are met more often than attacks: the message says what lies there."""
    assert named in looks_like(start)
    folder.weights.write_bytes(start)
    assert named in refused(folder.read, ArtifactError)
    shutil.copy(folder.weights, folder.config)
    assert named in refused(lambda: read_json(folder.config), ArtifactError)


@pytest.mark.slow
def test_an_embedder_cannot_name_code(tmp_path, refused):
    """modules.json holds import paths; only the library's own are followed."""
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "antigravity.Anything"}]))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError):
        SentenceEmbedder.from_pretrained(str(tmp_path), "cpu")
    import sys

    assert "antigravity" not in sys.modules
