"""What stored JSON must hold, as pydantic's models: types and bounds are declared, and the first fault of a file is an error of lorag's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, FailFast, Field, Strict, ValidationError

if TYPE_CHECKING:
    from lorag.errors import LoragError

__all__ = ["Count", "Number", "Numbers", "PositiveNumbers", "Stored", "Text", "Texts", "first_fault"]

Text = Annotated[str, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
# Lists end at their first fault: pydantic would collect millions from a hostile file.
Numbers = Annotated[tuple[Number, ...], FailFast()]
PositiveNumbers = Annotated[tuple[Annotated[Number, Field(gt=0)], ...], FailFast()]
Texts = Annotated[tuple[Text, ...], FailFast()]


class Stored(BaseModel):
    """An object of a JSON file. Keys that are not declared are left to other readers."""

    @classmethod
    def read(cls, value: object, what: str, error: type[LoragError]) -> Self:
        """Checks what a file holds.

        Args:
            value: Parsed JSON.
            what: The error's first part: what cannot be read.
            error: Its class.

        Raises:
            LoragError: Of that class, naming the first field that is missing or wrong.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as fault:
            got, expected = first_fault(fault)
            raise error(what, got=got, expected=expected) from fault


def first_fault(error: ValidationError) -> tuple[str, str]:
    """What pydantic found wrong first: where with what was given, and what it expected."""
    first = error.errors(include_url=False, include_context=False)[0]
    where, given = ".".join(map(str, first["loc"]))[:80], first["input"]
    if first["type"] == "missing":
        return f"no {where}", "a value for it"
    shown = f"a {type(given).__name__}" if isinstance(given, dict | list) else str(given)[:80]
    return f"{where}: {shown}" if where else shown, first["msg"]
