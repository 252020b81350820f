"""Base models: every kind's adapters load in PEFT and leave the model usable as its users use it."""

import torch
from conftest import output_of

from lorag.bank.bank import AdapterBank
from lorag.base.bank_base import BankBase
from lorag.base.base_model import KINDS, TASK_TYPES, BaseModel

KIND_OF = {"llama": "causal_lm", "qwen2": "causal_lm", "gpt2": "causal_lm", "t5": "seq2seq_lm", "bert": "encoder", "clip": "two_towers"}


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


def test_every_kind_has_a_task_type():
    """A kind without an entry would break every bank of it; None, no task type, is an entry."""
    assert set(TASK_TYPES) == set(KINDS) == {*KIND_OF.values(), "image_seq2seq"}
