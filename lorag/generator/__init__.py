"""The trained thing that a user holds: descriptions to adapters, with a gate."""

import importlib


def __getattr__(name: str) -> object:
    """LoraGenerator, as 0.1 had it here: imported when it is asked for, because it takes long."""
    if name == "LoraGenerator":
        return importlib.import_module("lorag.generator.lora_generator").LoraGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
