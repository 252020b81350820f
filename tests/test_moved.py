"""Import paths of 0.1: they lead to the same objects, with a warning, and what is gone says where to look."""

import importlib
import sys
import warnings

import pytest

from lorag import moved
from lorag.bank.bank import AdapterBank
from lorag.base.base_model import BaseModel

# What docs/api.md of 0.1 named, and where it is now.
DOCUMENTED = {
    "lorag.generation.generate_lora": "lorag.generator.generate",
    "lorag.generator.LoraGenerator": "lorag.generator.lora_generator",
    "lorag.banks.bank.AdapterBank": "lorag.bank.bank",
    "lorag.banks.entries.BankBase": "lorag.base.runner",
    "lorag.banks.entries.Expert": "lorag.bank.shards",
    "lorag.training.run.TrainConfig": "lorag.training.train",
    "lorag.training.run.train": "lorag.training.train",
    "lorag.fusion.fuse": "lorag.training.fuse",
    "lorag.fusion.fuse_experts": "lorag.training.fuse",
    "lorag.weights.merging.merge": "lorag.adapters.merging",
    "lorag.conditions.conditioning.Condition": "lorag.text.conditioning",
    "lorag.conditions.embedding.TextEmbedder": "lorag.text.embedding",
    "lorag.weights.weight_space.WeightSpace": "lorag.spaces.weight_space",
    "lorag.weights.shared_subspace.SharedSubspace": "lorag.spaces.shared_subspace",
    "lorag.objectives.base.Objective": "lorag.base.objectives.base",
    "lorag.gate.gate.Verdict": "lorag.generator.gate",
}


@pytest.mark.parametrize(
    ("old", "name", "now"), [("lorag.banks.bank", "AdapterBank", AdapterBank), ("lorag.base_models.base_model", "BaseModel", BaseModel)]
)
def test_an_old_path_gives_the_same_object(old, name, now):
    """And names the new one."""
    with pytest.warns(DeprecationWarning, match="now"):
        module = importlib.reload(importlib.import_module(old)) if old in sys.modules else importlib.import_module(old)
    assert getattr(module, name) is now


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old", sorted(DOCUMENTED))
def test_every_name_that_was_documented_is_still_found(old):
    """It is the very object that the new module has."""
    module, name = old.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is getattr(importlib.import_module(DOCUMENTED[old]), name)


def test_the_tables_lead_somewhere():
    """Every module and every name that they promise can be imported."""
    for now in {*moved._ROOMS.values(), *moved._MODULES.values()}:
        importlib.import_module(now)
    for now in moved._NAMES.values():
        owner, name = now.rsplit(".", 1)
        try:
            holder = importlib.import_module(owner)
        except ModuleNotFoundError:  # a class's own
            module, owner = owner.rsplit(".", 1)
            holder = getattr(importlib.import_module(module), owner)
        assert hasattr(holder, name), now


def test_what_is_gone_says_where_to_look():
    """A module that no room has any more, a name that another took over, and what never was."""
    with pytest.raises(ModuleNotFoundError, match="its room is lorag.methods now"):
        importlib.import_module("lorag.generators.colleagues")
    with pytest.raises(ModuleNotFoundError, match="lorag.nowhere"):
        importlib.import_module("lorag.nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ImportError, match=r"FitData is gone; lorag\.methods\.TrainingSet takes its place"):
            from lorag.generators.base import FitData  # noqa: F401
        with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
            from lorag.generators.base import Nonsense  # noqa: F401
