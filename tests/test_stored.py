"""Stored JSON: what is missing or wrong is named with its place, as an error of lorag's, and soon."""

import time
from typing import Any

import pytest

from lorag.base.base_model import BaseModel
from lorag.base.runner import BankBase
from lorag.errors import ArtifactError, BankError, ConfigError, LayoutError
from lorag.files.stored import Count, Number, PositiveNumbers, Stored, Text, Texts


class _Example(Stored):
    name: Text
    rank: Count
    strength: Number
    sizes: PositiveNumbers = ()
    words: Texts = ()
    rest: dict[str, Any] = {}


SOUND = {"name": "a", "rank": 1, "strength": 1, "sizes": [1, 2.5], "words": ["b"], "rest": {"c": [1]}, "unknown": 0}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"name": 3}, "got name: 3; expected .*string"),
        ({"rank": 0}, "got rank: 0; expected .*greater than or equal to 1"),
        ({"rank": 1.0}, "got rank: 1.0; expected .*integer"),
        ({"rank": True}, "got rank: True; expected .*integer"),
        ({"strength": "1"}, "got strength: 1; expected .*number"),
        ({"strength": float("nan")}, "got strength: nan; expected .*finite"),
        ({"strength": 10**400}, "got strength: 10+; expected .*number"),
        ({"sizes": [1.0, 0]}, r"got sizes\.1: 0; expected .*greater than 0"),
        ({"words": "word"}, "got words: word; expected .*tuple"),
        ({"words": [["b"]]}, r"got words\.0: a list; expected .*string"),
        ({"rest": [1]}, "got rest: a list; expected .*dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(broken, said):
    """Nothing is taken for another type, and a container is not shown whole."""
    read = _Example.read(SOUND, "an example cannot be read", ArtifactError)
    assert (read.rank, read.strength, read.sizes, read.rest) == (1, 1.0, (1.0, 2.5), {"c": [1]})
    with pytest.raises(ArtifactError, match=f"an example cannot be read; {said}"):
        _Example.read(SOUND | broken, "an example cannot be read", ArtifactError)


def test_what_is_missing_is_named():
    """A key that is not there, and a list where an object belongs."""
    with pytest.raises(ArtifactError, match="got no rank; expected"):
        _Example.read({key: value for key, value in SOUND.items() if key != "rank"}, "it", ArtifactError)
    with pytest.raises(ArtifactError, match="got a list; expected"):
        _Example.read([SOUND], "it", ArtifactError)


def test_a_million_faults_cost_as_much_as_one():
    """A list ends at its first."""
    begun = time.perf_counter()
    for key in ("words", "sizes"):
        with pytest.raises(ArtifactError, match=rf"{key}\.0"):
            _Example.read(SOUND | {key: [{}] * 1_000_000}, "it", ArtifactError)
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        ({"model": None}, BankError, "got model: None"),
        ({"model": {"name": "a"}}, BankError, "kind"),
        ({"model": {"name": "a", "kind": "causal_lm", "code": "x"}}, BankError, "code"),
        ({"model": {"name": "//host/share", "kind": "causal_lm"}}, ConfigError, "name"),
        ({"model": {"name": "a", "kind": "sorcery"}}, ConfigError, "kind"),
        ({"identity": ["sha256:0"]}, BankError, "got identity: a list"),
        ({"objective": 3}, BankError, "got objective: 3"),
        ({"settings": "max_length"}, BankError, "got settings: max_length"),
        ({"layout": {}}, LayoutError, "got no target_modules"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(llama_layout, broken, error, said):
    """The part is named; what a base model or a layout refuses by itself keeps its own error."""
    base = BankBase(BaseModel("tiny-base", "causal_lm"), "sha256:0123", llama_layout, "causal_lm", {"max_length": 64})
    assert BankBase.from_dict(base.to_dict()) == base
    with pytest.raises(error, match=said):
        BankBase.from_dict(base.to_dict() | broken)
