"""What a bank's manifest says of its experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorag.errors import BankError
from lorag.files.artifacts import require_name

__all__ = ["Expert", "known_details", "texts"]


@dataclass(frozen=True)
class Expert:
    """One expert's entry in a bank.

    Attributes:
        name: Its name, unique in the bank.
        descriptions: What its task is, in one or more wordings.
        rank: Rank r of its factors.
        alpha: lora_alpha of its stored factors; the rank in banks that this version writes, whose factors hold the scaling.
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
