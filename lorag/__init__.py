"""lorag turns the description of a task into a LoRA adapter for a base model, in one pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorag.moved import follow_moves

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.bank.bank import AdapterBank
    from lorag.errors import LoragError
    from lorag.generator.generate import generate_lora, generate_loras
    from lorag.generator.lora_generator import LoraGenerator
    from lorag.tasks.suite import TaskSuite

__version__ = "0.2.0"
__all__ = [
    "AdapterBank",
    "LoraAdapter",
    "LoraGenerator",
    "LoragError",
    "TaskSuite",
    "generate_lora",
    "generate_loras",
]

# Public names are imported on first use: `import lorag` loads neither torch nor transformers.
_HOME = {
    "AdapterBank": "lorag.bank.bank",
    "LoraAdapter": "lorag.adapters.adapter",
    "LoraGenerator": "lorag.generator.lora_generator",
    "LoragError": "lorag.errors",
    "TaskSuite": "lorag.tasks.suite",
    "generate_lora": "lorag.generator.generate",
    "generate_loras": "lorag.generator.generate",
}


follow_moves()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorag' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
