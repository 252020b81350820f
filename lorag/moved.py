"""Import paths of 0.1 whose rooms have other names now: they still work, with a warning that names the new path."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["follow_moves"]

_MOVED = {
    "lorag.banks": "lorag.bank",
    "lorag.base_models": "lorag.base",
    "lorag.batch": "lorag.generator.generate",
    "lorag.cards": "lorag.cli.info",
    "lorag.conditions": "lorag.text",
    "lorag.fusion": "lorag.training.fuse",
    "lorag.gate": "lorag.generator",
    "lorag.generation": "lorag.generator.generate",
    "lorag.generators": "lorag.methods",
    "lorag.models": "lorag.networks",
    "lorag.objectives": "lorag.base.objectives",
    "lorag.publishing": "lorag.adapters",
    "lorag.quickstart": "lorag.cli.quickstart",
    "lorag.report": "lorag.evaluation.report",
    "lorag.row_adapters": "lorag.base.row_adapters",
    "lorag.sandbox": "lorag.worlds.sandbox",
    "lorag.weights": "lorag.spaces",
}


class _Finder:
    """Asked last of all: only for names that nothing else has. A loader by what it does: importlib.abc takes long to import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        room = ".".join(fullname.split(".")[:2])
        if room not in _MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=fullname == room)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        room, name = ".".join(module.__name__.split(".")[:2]), module.__name__
        now = _MOVED[room] + name.removeprefix(room)
        try:
            target = importlib.import_module(now)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is gone; its room is {_MOVED[room]} now", name=name) from error
        warnings.warn(f"{name} is {now} now", DeprecationWarning, stacklevel=2)
        module.__dict__.update({key: value for key, value in vars(target).items() if not key.startswith("__")})


def follow_moves() -> None:
    """Lets imports by the paths of 0.1 find what they mean."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
