"""Objectives: how a base model is trained on and scored for a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorag.base.objectives.base import Objective, take
from lorag.base.objectives.causal_lm import CausalLM
from lorag.base.objectives.image_text import ImageText
from lorag.base.objectives.image_to_text import ImageSeq2Seq
from lorag.base.objectives.sentence_encoder import LabelMatching, Prototypes
from lorag.base.objectives.seq2seq_lm import Seq2SeqLM
from lorag.errors import ConfigError

__all__ = ["OBJECTIVES", "Objective", "make_objective", "objective_type", "objectives_of", "take"]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (CausalLM, Seq2SeqLM, LabelMatching, Prototypes, ImageText, ImageSeq2Seq)
}


def objective_type(name: str) -> type[Objective]:
    """The class of an objective's name.

    Raises:
        ConfigError: If none is registered under it.
    """
    if name not in OBJECTIVES:
        raise ConfigError("objective is unknown", got=repr(name), expected=" or ".join(OBJECTIVES))
    return OBJECTIVES[name]


def objectives_of(kind: str) -> list[str]:
    """Names of the objectives of a kind of base models, of which the first is what is meant where nobody says."""
    return [name for name, objective in OBJECTIVES.items() if objective.kind == kind]


def make_objective(name: str, tokenizer: Any, settings: Mapping[str, Any] | None = None) -> Objective:  # noqa: ANN401 - see below
    """Makes a registered objective.

    Args:
        name: Its key in `OBJECTIVES`.
        tokenizer: What `BaseModel.tokenizer` gives: a tokenizer, or a processor for objectives of images.
        settings: Its settings.

    Raises:
        ConfigError: If the name or a setting is unknown, or if an objective of images gets no processor.
    """
    chosen = objective_type(name)
    if chosen.needs_processor and not hasattr(tokenizer, "image_processor"):
        raise ConfigError(f"objective {name} needs a base model that sees images", got=type(tokenizer).__name__)
    try:
        return chosen(tokenizer, **(settings or {}))
    except TypeError as error:
        raise ConfigError(f"a setting of objective {name} is unknown", got=str(error)[:120]) from error
