"""Base models: every kind's adapters load in PEFT and leave the model usable as its users use it."""

import json

import pytest
import torch
import transformers
from conftest import output_of
from safetensors.torch import load_file, save_file

from lorag.bank.bank import AdapterBank
from lorag.base import base_model
from lorag.base.base_model import BaseModel, warn_if_slow
from lorag.base.kinds import KINDS
from lorag.base.layout import LoraLayout
from lorag.base.objectives import OBJECTIVES, objectives_of
from lorag.base.precision import stored_types
from lorag.base.runner import BankBase
from lorag.base.weights import weights_identity
from lorag.errors import ArtifactError, BaseModelError
from lorag.files.artifacts import sha256

KIND_OF = {"llama": "causal_lm", "qwen2": "causal_lm", "gpt2": "causal_lm", "t5": "seq2seq_lm", "bert": "encoder", "clip": "two_towers"}


@pytest.mark.slow
def test_an_expert_of_every_kind_runs_through_peft(tiny, random_adapter, tmp_path):
    """From a bank into PEFT's wrapper: the wrapped model takes its usual arguments, and the adapter changes the outcome."""
    model = tiny.build()
    layout = tiny.layout(model)
    base = BankBase(BaseModel("tiny", KIND_OF[tiny.name]), "revision:main", layout, "prototypes", {})
    adapter = AdapterBank.create(tmp_path, base).add([("a", ["a task"], [random_adapter(layout)])]).adapter("a")
    assert adapter.task_type == tiny.task_type
    inputs = tiny.inputs(3, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = output_of(model, inputs)
        wrapped = adapter.apply_to(model)
        after = output_of(wrapped, inputs)
    assert after.shape == before.shape and not torch.allclose(after, before, atol=1e-3)


def test_every_kind_has_an_objective_and_a_loader():
    """A kind without them would break every bank of it; a task type of PEFT's belongs to one kind alone."""
    assert set(KINDS) == {*KIND_OF.values(), "image_seq2seq"}
    stated = [kind.task_type for kind in KINDS.values() if kind.task_type is not None]
    assert len(stated) == len(set(stated))
    for name, kind in KINDS.items():
        assert kind.name == name and objectives_of(name) and hasattr(transformers, kind.loader)
        assert all(OBJECTIVES[one].needs_processor == kind.reads_images for one in objectives_of(name))


# --- what identifies weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tiny_models, tmp_path):
    """A tiny Llama in one file."""
    tiny_models["llama"].build().save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def _divide(folder, target, pieces):
    """The same model in another number of files."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, reverse=True)
    places = {name: f"model-{index % pieces + 1:05}-of-{pieces:05}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, target / file, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def test_another_division_into_files_is_the_same_base(stored, tmp_path):
    """One file, two or five: one identity, and the weights load alike."""
    one = BaseModel(str(stored), "causal_lm")
    for pieces in (2, 5):
        many = BaseModel(str(_divide(stored, tmp_path / str(pieces), pieces)), "causal_lm")
        assert many.identity() == one.identity()
        assert torch.equal(many.load("cpu").lm_head.weight, one.load("cpu").lm_head.weight)


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "missing"])
def test_any_change_of_any_tensor_in_any_file_is_another_base(stored, tmp_path, change):
    """In the last shard too: a bit, a name, a type, a shape, a tensor fewer."""
    folder = _divide(stored, tmp_path / "many", 3)
    before = weights_identity(folder)
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensor = tensors.pop(name)
    if change == "value":
        tensor = tensor.clone()
        tensor.view(-1)[-1] += 1e-3
    tensor = tensor.to(torch.bfloat16) if change == "dtype" else tensor.reshape(1, -1) if change == "shape" else tensor
    if change != "missing":
        tensors[f"{name}_" if change == "name" else name] = tensor
    save_file(tensors, file, {"format": "pt"})
    assert weights_identity(folder) not in (before, None)


def test_a_shard_that_is_missing_or_holds_anothers_tensor_is_named(stored, tmp_path):
    """Neither is passed over: it would identify another model."""
    folder = _divide(stored, tmp_path / "many", 3)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(last), **dict(list(load_file(first).items())[:1])}, last, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{last.name} repeats a tensor"):
        weights_identity(folder)
    last.unlink()
    with pytest.raises(ArtifactError, match=f"{last.name} cannot be read.*complete"):
        weights_identity(folder)


def test_identities_of_lorag_0_1_still_hold(stored, tmp_path):
    """The first file's sha256, as banks and generators stored it: accepted for these weights, refused for others."""
    base = BaseModel(str(stored), "causal_lm")
    old = "sha256:" + sha256(stored / "model.safetensors")[:16]
    assert base.has_identity(old) and base.has_identity(base.identity())
    assert not base.has_identity("sha256:0123456789abcdef") and not base.has_identity("tensors:0123456789abcdef")
    layout = base_layout(base)
    before, now = (BankBase(base, identity, layout, "causal_lm", {}) for identity in (old, base.identity()))
    assert before.same(now) and now.same(before) and not before.same(BankBase(base, old, layout, "causal_lm", {"max_length": 9}))
    before.check()
    AdapterBank.create(tmp_path / "bank", before)
    assert AdapterBank.create(tmp_path / "bank", now).base == before
    with pytest.raises(BaseModelError, match="has changed"):
        BankBase(base, "tensors:0123456789abcdef", layout, "causal_lm", {}).check()


def base_layout(base):
    """Query projections."""
    return LoraLayout.from_model(base.skeleton(), ["q_proj"])


def test_precisions_are_each_tensor_s(stored, tmp_path):
    """As stored, also where a model mixes them, in 8-bit floats too."""
    tensors = load_file(stored / "model.safetensors")
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]].to(torch.bfloat16)
    tensors[names[1]] = tensors[names[1]].to(torch.float8_e4m3fn)
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    found = stored_types(BaseModel(str(stored), "causal_lm"))
    assert set(found) == set(names)
    assert (found[names[0]], found[names[1]], {found[name] for name in names[2:]}) == ("BF16", "F8_E4M3", {"F32"})
    assert weights_identity(stored).startswith("tensors:")


@pytest.mark.parametrize(
    ("has", "seconds", "dtype"),
    [
        ({"avx512_bf16": True}, {"bfloat16": 1.0, "float32": 2.0}, torch.bfloat16),
        ({"avx512_bf16": True}, {"bfloat16": 2.0, "float32": 1.0}, torch.float32),
        ({"avx2": True}, {}, torch.float32),
    ],
)
def test_fast_is_bf16_where_the_cpu_is_faster_in_it(stored, monkeypatch, recwarn, has, seconds, dtype):
    """Elsewhere it is fp32, and who asks for bf16 gets it, with a warning that it is slow there."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(base_model, "_product_seconds", seconds.__getitem__)
    base = BaseModel(str(stored), "causal_lm")
    assert base.load("cpu", "fast").dtype == dtype and base.load("cpu").dtype == torch.float32
    assert not recwarn.list
    assert base.load("cpu", "bfloat16").dtype == torch.bfloat16
    assert not recwarn.list  # to hold weights in it costs nothing: a merge does
    warn_if_slow(base.load("cpu", "bfloat16"))
    assert [warning for warning in recwarn if "slower in bfloat16" in str(warning.message)] or dtype == torch.bfloat16
