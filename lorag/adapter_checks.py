"""What a PEFT LoRA folder must be, judged from its config and its file header before a tensor is allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorag.errors import AdapterError
from lorag.layout import LoraLayout
from lorag.tensor_files import TensorSpec

__all__ = ["CONFIG", "KEY", "MAX_RANK", "PROVENANCE", "WEIGHTS", "Factors", "check_alpha", "check_config", "check_spec", "fold"]

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> A (r, i), B (o, r)

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "lorag.json"
KEY = "base_model.model.{module}.lora_{factor}.weight"
MAX_RANK = 4096
_MAX_ALPHA = 1e6
_FLOATS = {"F16", "BF16", "F32", "F64"}
# Settings that change what the weights mean; lorag reads plain LoRA only.
_PLAIN = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Initialisations that also change the base weights, so that ΔW is relative to another base model.
_SHIFTING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_alpha(alpha: object, where: str) -> float:
    """Returns a lora_alpha that is a finite number other than 0, of sane size."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or not 0 < abs(alpha) <= _MAX_ALPHA:
        raise AdapterError(f"{where} cannot be used", got=repr(alpha)[:40], expected=f"a number other than 0, at most {_MAX_ALPHA:g}")
    return float(alpha)


def _check_rank(rank: object, where: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"{where} cannot be used", got=repr(rank)[:40], expected=f"an integer from 1 to {MAX_RANK}")
    return rank


def check_config(config: Mapping[str, Any], layout: LoraLayout, folder: Path) -> dict[str, tuple[int, float]]:
    """Returns rank and scaling of each module, as PEFT would derive them."""
    where = f"{folder / CONFIG}:"
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where} peft_type cannot be used", got=repr(config.get("peft_type"))[:40], expected="LORA")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise AdapterError(
                f"{where} {key} is set", got=repr(config[key])[:60], expected="plain LoRA", remedy="Train or convert it without."
            )
    start = str(config.get("init_lora_weights"))
    if start.lower().startswith(_SHIFTING):
        raise AdapterError(
            f"{where} init_lora_weights changes the base weights",
            got=repr(start)[:40],
            expected="plain LoRA",
            remedy="Convert it with PEFT's path_initial_model_for_weight_conversion.",
        )
    rank, alpha = _check_rank(config.get("r"), f"{where} r"), check_alpha(config.get("lora_alpha"), f"{where} lora_alpha")
    ranks, alphas = (_check_pattern(config.get(key) or {}, f"{where} {key}") for key in ("rank_pattern", "alpha_pattern"))
    scalings = {}
    for name in layout.names:
        own_rank = _check_rank(_by_pattern(ranks, name, rank), f"{where} rank_pattern")
        own_alpha = check_alpha(_by_pattern(alphas, name, alpha), f"{where} alpha_pattern")
        scalings[name] = (own_rank, own_alpha / (math.sqrt(own_rank) if config.get("use_rslora") else own_rank))
    return scalings


def _check_pattern(pattern: object, where: str) -> Mapping[str, Any]:
    if not isinstance(pattern, dict):
        raise AdapterError(f"{where} is no mapping", got=type(pattern).__name__)
    for key in pattern:
        if not re.fullmatch(r"\^?[\w.-]+", key):
            raise AdapterError(
                f"{where} has an expression as a key", got=repr(key)[:60], expected="module names", remedy="Spell out the modules."
            )
    return pattern


def _by_pattern(pattern: Mapping[str, Any], name: str, default: float) -> object:
    """PEFT's rule: the first key that ends the module's path decides, and `^` demands all of it. Keys are no expressions."""
    for key, value in pattern.items():
        if name == key.removeprefix("^") or (not key.startswith("^") and name.endswith(f".{key}")):
            return value
    return default


def check_spec(
    spec: TensorSpec, layout: LoraLayout, scalings: Mapping[str, tuple[int, float]], folder: Path, allow_missing: bool
) -> dict[str, tuple[str, str]]:
    """Matches tensor names and shapes of the header to modules: module -> keys of A and B."""
    where = folder / WEIGHTS
    if spec and not any(key.startswith("base_model.model.") for key in spec):
        raise AdapterError(f"{where}: keys lack PEFT's prefix", got=next(iter(spec))[:80], expected="base_model.model.…")
    found, left = {}, set(spec)
    for module in layout.modules:
        keys = (KEY.format(module=module.name, factor="A"), KEY.format(module=module.name, factor="B"))
        present = [key in spec for key in keys]
        if not any(present) and allow_missing:
            continue
        if not all(present):
            raise AdapterError(f"{where}: a tensor is missing", got=keys[present.index(False)][:120])
        rank = scalings[module.name][0]
        shapes = ((rank, module.in_features), (module.out_features, rank))
        for key, shape in zip(keys, shapes, strict=True):
            if spec[key][1] != shape or spec[key][0] not in _FLOATS:
                raise AdapterError(f"{where}: {key} does not fit", got=f"{spec[key][0]} {spec[key][1]}", expected=f"floats {shape}")
        found[module.name] = keys
        left -= set(keys)
    if left:
        raise AdapterError(f"{where}: extra tensors", got=f"{len(left)} such as {min(left)[:100]}", expected="only the layout's factors")
    if not found:
        raise AdapterError(f"{where}: holds no factors of this layout")
    return found


def fold(pairs: Factors, scalings: Mapping[str, tuple[int, float]], layout: LoraLayout) -> tuple[Factors, float]:
    """Brings mixed ranks and scalings to one rank and one alpha; ΔW stays the same."""
    used = {scalings[name] for name in pairs}
    if len(used) == 1 and len(pairs) == len(layout):
        rank, scaling = used.pop()
        return {name: pairs[name] for name in layout.names}, scaling * rank
    rank = max(scalings[name][0] for name in pairs)
    folded: Factors = {}
    for module in layout.modules:
        own = pairs.get(module.name, (torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0)))
        rows, columns = own[0].float(), own[1].float() * scalings[module.name][1]
        pad = rank - rows.shape[0]
        folded[module.name] = (torch.nn.functional.pad(rows, (0, 0, 0, pad)), torch.nn.functional.pad(columns, (0, pad)))
    return folded, float(rank)
