"""What a bank's files say: its experts' entries, the base that they share, and the tensors of a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorag.adapter import LoraAdapter
from lorag.artifacts import require_name
from lorag.base_model import BaseModel
from lorag.errors import BankError, BaseModelError
from lorag.layout import LoraLayout

__all__ = ["PRECISIONS", "BankBase", "Expert", "known_details", "quantise", "stack_checkpoints", "texts"]

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Expert:
    """One expert's entry in a bank.

    Attributes:
        name: Its name, unique in the bank.
        descriptions: What its task is, in one or more wordings.
        rank: Rank r of its factors.
        alpha: lora_alpha of each of its checkpoints.
        checkpoints: Number of checkpoints, the final one last.
        file: Shard that holds it.
        index: Its place in the shard.
        suite: The suite that its task came from.
        license: Licence of the data that it was trained on, or "unknown".
        score: Its score on its own task's test examples, if measured.
        examples: Number of examples that it was trained on, if known.
    """

    name: str
    descriptions: tuple[str, ...]
    rank: int
    alpha: float
    checkpoints: int
    file: str
    index: int
    suite: str = ""
    license: str = "unknown"
    score: float | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        require_name(self.name, "an expert's name")
        texts = (self.file, self.suite, self.license, *self.descriptions)
        whole = (self.rank, self.checkpoints, self.index)
        numbers = (self.alpha, 0.0 if self.score is None else self.score, 0 if self.examples is None else self.examples)
        if (
            not self.descriptions
            or not all(isinstance(text, str) for text in texts)
            or not all(type(value) is int and value >= least for value, least in zip(whole, (1, 1, 0), strict=True))
            or not all(type(value) in (int, float) for value in numbers)
        ):
            raise BankError(f"the entry of expert {self.name!r} cannot be used", got=str(asdict(self))[:200])


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
        except (KeyError, TypeError) as error:
            raise BankError("the description of a base model cannot be read", got=repr(error)[:120]) from error

    def check(self) -> None:
        """Raises BaseModelError if the model that the name now leads to is not the one of the bank."""
        now = self.model.identity()
        if now != self.identity:
            raise BaseModelError(
                f"base model {self.model.name!r} has changed", got=now, expected=self.identity, remedy="Restore it, or rebuild the bank."
            )


def known_details(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns optional values of an entry, all of known names."""
    unknown = set(given) - {"suite", "license", "score", "examples"}
    if unknown:
        raise BankError("a detail of an expert is unknown", got=min(unknown), expected="suite, license, score or examples")
    return given


def texts(value: object) -> list[str]:
    """Returns a list of descriptions, each of which must be text."""
    if not isinstance(value, list):
        raise TypeError(f"descriptions {value!r}")
    return value


def quantise(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Int8 values and one scale for each vector along `axis`."""
    scale = values.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
    return (values / scale).round().to(torch.int8), scale


def stack_checkpoints(layout: LoraLayout, experts: Sequence[Sequence[LoraAdapter]], precision: str) -> dict[str, Tensor]:
    """A shard's tensors: A (n, checkpoints, r, i) and B (n, checkpoints, o, r) of each module, by its number.

    Raises:
        BankError: If a value overflows the precision.
    """
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(layout.names):
        for side, factor in enumerate("AB"):
            values = torch.stack([torch.stack([a.factors[module][side].float() for a in late]) for late in experts])
            key = f"{number}.{factor}"
            if precision == "int8":
                tensors[key], tensors[f"{key}.scale"] = quantise(values, axis=-1 if factor == "A" else -2)
            else:
                tensors[key] = values.to(PRECISIONS[precision])
                if not torch.isfinite(tensors[key]).all():
                    raise BankError(f"values of {module} overflow {precision}", remedy="Store them as float32.")
    return tensors
