"""Objectives: how a base model is trained on and scored for a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorag.errors import ConfigError
from lorag.objectives.base import Objective, take
from lorag.objectives.language_model import CausalLM, Seq2SeqLM
from lorag.objectives.sentence_encoder import LabelMatching, Prototypes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OBJECTIVES", "Objective", "make_objective", "take"]

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (CausalLM, Seq2SeqLM, LabelMatching, Prototypes)}


def make_objective(name: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None) -> Objective:
    """Makes a registered objective.

    Raises:
        ConfigError: If the name or a setting is unknown.
    """
    if name not in OBJECTIVES:
        raise ConfigError("objective is unknown", got=repr(name), expected=" or ".join(OBJECTIVES))
    try:
        return OBJECTIVES[name](tokenizer, **(settings or {}))
    except TypeError as error:
        raise ConfigError(f"a setting of objective {name} is unknown", got=str(error)[:120]) from error
