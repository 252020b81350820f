"""Generated adapters in the engines that people run: served by name in vLLM, or one per request in one process."""

from __future__ import annotations

from typing import Any

__all__ = ["LoraRouter"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the class, imported on first use: the plug-in for vLLM needs none of it
    if name != "LoraRouter":
        raise AttributeError(f"module 'lorag.serving' has no attribute {name!r}")
    from lorag.serving.router import LoraRouter

    return LoraRouter
