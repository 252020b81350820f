"""Import paths of 0.1: they lead to the same objects, with a warning, and what is gone says where to look."""

import importlib

import pytest

from lorag.bank.bank import AdapterBank
from lorag.base.base_model import BaseModel


@pytest.mark.parametrize(
    ("old", "name", "now"), [("lorag.banks.bank", "AdapterBank", AdapterBank), ("lorag.base_models.base_model", "BaseModel", BaseModel)]
)
def test_an_old_path_gives_the_same_object(old, name, now):
    """And names the new one."""
    with pytest.warns(DeprecationWarning, match="now"):
        module = importlib.reload(importlib.import_module(old)) if old in importlib.sys.modules else importlib.import_module(old)
    assert getattr(module, name) is now


def test_what_is_gone_says_where_to_look():
    """A module that no room has any more, and one that never was."""
    with pytest.raises(ModuleNotFoundError, match="its room is lorag.methods now"):
        importlib.import_module("lorag.generators.colleagues")
    with pytest.raises(ModuleNotFoundError, match="lorag.nowhere"):
        importlib.import_module("lorag.nowhere")
