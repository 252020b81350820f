"""Import paths of 0.1: they lead to the same objects, with a warning, and what is gone says where to look."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest

from lorag import moved
from lorag.bank.bank import AdapterBank
from lorag.base.base_model import BaseModel

HERE = Path(__file__).parent
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_public_name_is_there_or_says_where_it_went():
    """All names of every module's `__all__` in 0.1. An error that says less than what takes a name's place is not enough."""
    for line in (HERE / "public_names_of_0.1.txt").read_text().splitlines():
        old, names = line.split(": ")
        module = importlib.import_module(old)
        for name in names.split():
            try:
                getattr(module, name)
            except ImportError as error:
                assert re.fullmatch(rf"{name} is gone; .+ takes its place", str(error)), f"{old}.{name}"
            except AttributeError:
                pytest.fail(f"{old}.{name} is gone without a word")


def test_a_name_that_another_module_has_now_is_found_where_it_was():
    """Its old module stayed, or leads to one without it; what it never had, it still lacks."""
    from lorag.adapters.merged import export_merged
    from lorag.base.objectives.causal_lm import CausalLM

    with pytest.warns(DeprecationWarning, match=r"lorag\.adapters\.export\.export_merged is lorag\.adapters\.merged\.export_merged now"):
        from lorag.adapters.export import export_merged as kept
    with pytest.warns(DeprecationWarning, match=r"language_model\.CausalLM is lorag\.base\.objectives\.causal_lm\.CausalLM now"):
        from lorag.objectives.language_model import CausalLM as moved_on
    assert kept is export_merged and moved_on is CausalLM
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        from lorag.adapters.export import Nonsense  # noqa: F401
    with pytest.raises(ImportError, match=r"Doorkeeper is gone; lorag\.web\.serving\.RequestFilter takes its place"):
        from lorag.web.serving import Doorkeeper  # noqa: F401


def test_the_tables_lead_somewhere():
    """Every module and every name that they promise can be imported, or stands in a file of the checkout."""
    for now in {*moved._ROOMS.values(), *moved._MODULES.values()}:
        importlib.import_module(now)
    for key, home in moved._HOMES.items():
        assert hasattr(importlib.import_module(home), key.rpartition(".")[2]), key
    for now in moved._NAMES.values():
        if " of " in now:
            name, file = now.split(" of ")
            assert f"class {name}(" in (HERE.parent / file).read_text(encoding="utf-8"), now
            continue
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
        importlib.import_module("lorag.generators.elsewhere")
    with pytest.raises(ModuleNotFoundError, match="lorag.nowhere"):
        importlib.import_module("lorag.nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ImportError, match=r"FitData is gone; lorag\.methods\.TrainingSet takes its place"):
            from lorag.generators.base import FitData  # noqa: F401
        with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
            from lorag.generators.base import Nonsense  # noqa: F401
