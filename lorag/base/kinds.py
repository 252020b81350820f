"""Kinds of base models: the class that loads them, PEFT's word for their task, and the configs by which they are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["KINDS", "Kind", "kind_named", "kind_of_config", "kind_of_task"]


@dataclass(frozen=True)
class Kind:
    """A kind of base model.

    Attributes:
        name: Its name in settings, files and objectives.
        loader: The class of transformers that loads it.
        recognises: Whether a config is of this kind, as far as no kind that was registered later takes it.
        task_type: PEFT's task type; None where PEFT's wrapper for it passes on arguments that such models do not take.
        misstated: Whether trainers state this task type of a config that is of another kind; None where the task type alone decides.
        reads_images: Whether a processor of texts and images stands in for the tokenizer.
    """

    name: str
    loader: str
    recognises: Callable[[PretrainedConfig], bool]
    task_type: str | None = None
    misstated: Callable[[PretrainedConfig], bool] | None = None
    reads_images: bool = False


def kind_named(name: object) -> Kind | None:
    """The kind of a name, which may come from a file; None if there is none, or it is not a name at all."""
    return KINDS.get(name) if isinstance(name, str) else None


def kind_of_task(task_type: object) -> Kind | None:
    """The kind that has a task type of PEFT's; None if no kind has it."""
    return next((kind for kind in KINDS.values() if kind.task_type is not None and kind.task_type == task_type), None)


def kind_of_config(config: PretrainedConfig) -> Kind:
    """The kind of base model that a config describes; of kinds that recognise it the one that was registered last."""
    return next(kind for kind in reversed(KINDS.values()) if kind.recognises(config))


# --- what configs say -------------------------------------------------------------------------------------------------


def _class_name(config: PretrainedConfig) -> str:
    return str((getattr(config, "architectures", None) or [""])[0])


def _has_decoder(config: PretrainedConfig) -> bool:
    """Whether an encoder and a decoder belong to it."""
    return bool(getattr(config, "is_encoder_decoder", False))


def _has_towers(config: PretrainedConfig) -> bool:
    """Whether it embeds texts and images side by side."""
    both = hasattr(config, "text_config") and hasattr(config, "vision_config")
    return both and not _class_name(config).endswith("ForConditionalGeneration")


def _only_sees(config: PretrainedConfig) -> bool:
    """Whether transformers has a class of texts and images for it, and none of texts alone: trainers call these causal, too."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def _writes_of_images(config: PretrainedConfig) -> bool:
    return hasattr(config, "vision_config") if _has_decoder(config) else _only_sees(config)


def _continues_text(config: PretrainedConfig) -> bool:
    return not _has_decoder(config) and _class_name(config).endswith(("ForCausalLM", "LMHeadModel"))


def _answers_text(config: PretrainedConfig) -> bool:
    return _has_decoder(config) and not hasattr(config, "vision_config")


# From the general to the special: a config is shown to the last one first, and the first one takes what is left.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("encoder", "AutoModel", lambda config: True, "FEATURE_EXTRACTION"),
        Kind("two_towers", "AutoModel", _has_towers, reads_images=True),
        Kind("image_seq2seq", "AutoModelForImageTextToText", _writes_of_images, reads_images=True),
        Kind("seq2seq_lm", "AutoModelForSeq2SeqLM", _answers_text, "SEQ_2_SEQ_LM"),
        Kind("causal_lm", "AutoModelForCausalLM", _continues_text, "CAUSAL_LM", _only_sees),
    )
}
