"""Names of tensors in a PEFT LoRA file: which module a factor belongs to, what else is saved along, and what went wrong with a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.errors import ExtraTensorError, MissingPrefixError, MissingTensorError, UnsupportedLoraError

if TYPE_CHECKING:
    from lorag.files.tensors import TensorSpec

__all__ = ["CONVERT", "DORA", "KEY", "PREFIX", "WHOLE", "Names", "read_names", "repaired"]

PREFIX = "base_model.model."
KEY = "base_model.model.{module}.lora_{factor}.weight"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_COPY = re.compile(r"base_model\.model\.(.+)\.base_layer\.weight")
# What wrappers of a running model put into names: torch.compile, FSDP, activation checkpointing; DDP only in front.
_WRAPPERS = re.compile(r"(?<![\w])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"^(base_model\.model\.)?module\.")
_ADAPTER = re.compile(r"\.lora_([AB])\.([\w-]+)\.weight$")
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|shared|embeddings)\.weight$")
CONVERT = "`lorag export --convert` and `lorag bank add --convert` make a LoRA of it, where it adds to the base model's weights."
DORA = (
    "Its magnitudes rescale the rows of W + ΔW, which takes the base model's weights: `lorag export --convert` and `lorag bank add "
    "--convert` read them and make the nearest LoRA, and `lorag export --merge --convert` a whole model, exactly."
)
WHOLE = (
    "Let PEFT merge it, which writes a whole model: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(DIR), the "
    "base resized first where its vocabulary grew; or train again on linear layers alone."
)
_SAVED_ALONG = f"If no token was added, save it again with save_pretrained(DIR, save_embedding_layers=False). Otherwise: {WHOLE}"


@dataclass(frozen=True)
class Names:
    """What the keys of a file name.

    Attributes:
        modules: Keys of A and B of each module, whole pairs only.
        copies: Keys of the base model's own weights beside an adapted layer, by module: PEFT saves those of a head.
    """

    modules: Mapping[str, tuple[str, str]]
    copies: Mapping[str, str]


def repaired(spec: TensorSpec) -> dict[str, str]:
    """New name of each key, without what the wrappers of a running model put in, where that is unambiguous.

    Returns:
        Name by key: the keys themselves where nothing is to be put right, or two keys would get one name.
    """
    adapters = {match[2] for key in spec if (match := _ADAPTER.search(key))}
    names = {}
    for key in spec:
        name = _PARALLEL.sub(r"\1", _WRAPPERS.sub("", key))
        if len(adapters) == 1:
            name = _ADAPTER.sub(r".lora_\1.weight", name)
        names[key] = name
    if names and all(name.endswith((".lora_A.weight", ".lora_B.weight")) and not name.startswith("base_model.") for name in names.values()):
        names = {key: PREFIX + name for key, name in names.items()}
    return names if max(Counter(names.values()).values(), default=1) == 1 else {key: key for key in spec}


def read_names(spec: TensorSpec, where: Path, *, repair: bool = False) -> Names:
    """Finds the modules that a header names.

    Args:
        spec: Types and shapes by key.
        where: The file, for messages.
        repair: Whether names of a running model's tensors are put right, instead of being refused.

    Raises:
        MissingTensorError: If there is no tensor, or a module lacks a factor.
        MissingPrefixError: If keys lack PEFT's prefix.
        ExtraTensorError: If a tensor is something else, named with what it is.
        UnsupportedLoraError: If it holds more than plain LoRA of linear layers.
    """
    if not spec:
        raise MissingTensorError(f"{where} holds no tensors", remedy="Save it with PEFT's save_pretrained.")
    right = repaired(spec)
    names = right if repair else {key: key for key in spec}
    wrong = next((key for key in sorted(spec) if names[key] != right[key]), None)
    remedy = f"PEFT would load none of them, silently. `lorag export {where.parent} --out DIR` writes them under the right names."
    bare = sorted(key for key, name in names.items() if not name.startswith(PREFIX))
    if bare:
        raise MissingPrefixError(f"{where}: keys lack PEFT's prefix", got=bare[0][:80], expected=f"{PREFIX}…", remedy=remedy)
    if wrong is not None:
        what = f"{where}: tensors have the names of a model that was still wrapped"
        raise ExtraTensorError(what, got=wrong[:120], expected=right[wrong][:120], remedy=remedy)
    sides: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    others: list[str] = []
    for key in sorted(spec):
        parsed, copied = _FACTOR.fullmatch(names[key]), _COPY.fullmatch(names[key])
        if parsed is not None:
            sides.setdefault(parsed[1], {})[parsed[2]] = key
        elif copied is not None:
            copies[copied[1]] = key
        else:
            others.append(key)
    others += [key for name, key in copies.items() if name not in sides]
    if others:
        raise _explained(min(others), where)
    for name, factors in sides.items():
        if len(factors) == 1:
            lacking = KEY.format(module=name, factor="A" if "B" in factors else "B")
            raise MissingTensorError(f"{where}: a tensor is missing", got=f"no {lacking[:160]}", expected="both factors of a module")
    return Names({name: (factors["A"], factors["B"]) for name, factors in sides.items()}, copies)


def _explained(key: str, where: Path) -> ExtraTensorError | UnsupportedLoraError:
    """Why a tensor that is not a factor of a linear layer cannot be used."""
    if "lora_magnitude_vector" in key:
        return UnsupportedLoraError(f"{where} holds the magnitudes of DoRA", got=key[:120], expected="plain LoRA", remedy=DORA)
    if key.endswith((".lora_A.bias", ".lora_B.bias")):
        what = f"{where} holds biases of its factors (lora_bias)"
        return UnsupportedLoraError(what, got=key[:120], expected="plain LoRA", remedy="Train it without lora_bias.")
    if ".lora_embedding_" in key:
        return UnsupportedLoraError(
            f"{where} adapts an embedding", got=key[:120], expected="LoRA of linear layers", remedy=f"lorag adapts linear layers. {WHOLE}"
        )
    if _VOCABULARY.search(key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")):
        what = f"{where}: embeddings were saved along, as after training them (modules_to_save), or with a resized vocabulary"
        return ExtraTensorError(what, got=key[:120], expected="factors of linear layers alone", remedy=_SAVED_ALONG)
    if ".lora_A." in key or ".lora_B." in key:
        what = f"{where}: a factor has a name that PEFT does not write"
        return ExtraTensorError(what, got=key[:120], expected=KEY.format(module="…", factor="A or B"))
    what = f"{where}: a tensor is not a LoRA factor, but a weight that was trained whole or saved along"
    return ExtraTensorError(what, got=key[:120], expected=KEY.format(module="…", factor="A or B"), remedy=WHOLE)
