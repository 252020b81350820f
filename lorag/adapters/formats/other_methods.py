"""Adapters of PEFT's other methods, and DoRA, as LoRA: what PEFT's own merge adds to the base model's weights, factored.

The difference of merged and unmerged weights is exact for every method that changes linear layers, DoRA's magnitudes included; PEFT's
`convert_to_lora` leaves those out, without a word. Most of these updates have full rank, so that a LoRA holds a share of them.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.adapters.checks import CONFIG, WEIGHTS, check_config
from lorag.adapters.factors import MAX_RANK, balanced
from lorag.adapters.formats.format import AdapterFormat, Base, PeftForm, Update, peft_form
from lorag.adapters.patterns import Patterns
from lorag.base.base_model import BaseModel, is_trusted, kind_of
from lorag.errors import AdapterError, BaseModelError, ConfigError, PeftTypeError, UnsupportedLoraError
from lorag.files.artifacts import read_json, require_plain
from lorag.files.tensors import read_header
from lorag.progress import progress_bar, quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OtherMethods"]

logger = logging.getLogger(__name__)

_MAX_CONFIG = 2**20
# Methods of PEFT that add to, or turn, the weights of single layers. X-LoRA's config names other adapters, which PEFT would fetch.
_METHODS = {
    *("ADALORA", "BOFT", "BONE", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT", "PSOFT"),
    *("RANDLORA", "ROAD", "SHIRA", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
_LARGEST_SETTING = 10**6  # of any whole number in a config: PEFT allocates what it says
_REMEDY = "Let PEFT merge it, which writes a whole model."


class OtherMethods(AdapterFormat):
    """PEFT folders of another peft_type than LORA, or with use_dora; asked for by name, since most of them lose something.

    Args:
        keep: Share of ‖ΔW‖² of each module that its factors keep at least.
    """

    name = "peft"
    title = "another of PEFT's methods"
    config = CONFIG

    def __init__(self, keep: float) -> None:
        if not 0 < keep <= 1:
            raise ConfigError("keep cannot be used", got=keep, expected="a share of ‖ΔW‖², above 0 and at most 1")
        self.keep = keep

    def __repr__(self) -> str:
        return f"{super().__repr__()} {self.keep}"

    def weights(self, folder: Path) -> list[Path]:
        """The weights of a folder whose config is of another method."""
        path = folder / WEIGHTS
        return [path] if path.is_file() and (folder / CONFIG).is_file() and self.recognises(path) else []

    def recognises(self, file: Path) -> bool:
        """By peft_type and use_dora of the config beside it."""
        config = read_json(file.parent / CONFIG, _MAX_CONFIG)
        return bool(config.get("use_dora")) if config.get("peft_type") == "LORA" else isinstance(config.get("peft_type"), str)

    @staticmethod
    def stated(file: Path, base: Base) -> Base:
        """The base model alone: the one that is given, else the one that the config names."""
        if base.model is not None:
            return Base(base.model)
        config = read_json(file.parent / CONFIG, _MAX_CONFIG)
        name, revision, task = (config.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
        if not isinstance(name, str) or not name:
            return Base()
        at = revision if isinstance(revision, str) and revision else None
        return Base(BaseModel(name, kind_of(name, at, task if isinstance(task, str) else None), at, is_trusted(name)))

    def read(self, file: Path, base: Base) -> PeftForm:
        """Loads the base model, lets PEFT merge the adapter into it, and factors what was added to each linear layer."""
        config = read_json(file.parent / CONFIG, _MAX_CONFIG)
        method = "DoRA" if config.get("use_dora") else str(config.get("peft_type"))[:40]
        if config.get("use_dora"):
            check_config({**config, "use_dora": False}, file.parent / CONFIG)  # DoRA, and nothing else beside it
        elif method not in _METHODS:
            got, expected = repr(method), f"DoRA or one of {', '.join(sorted(_METHODS))}"
            raise PeftTypeError(f"{file.parent} cannot become a LoRA", got=got, expected=expected, remedy="Train a LoRA.")
        require_plain(file)
        read_header(file)
        if base.model is None:
            raise BaseModelError(
                f"{file.parent}: {method} takes the base model's weights to become a LoRA",
                got="no base model",
                expected="the one that it was trained on",
                remedy="Give it: --base-model, or --base for a new bank.",
            )
        model = base.model.load("cpu", "float32")
        _check_sizes(config, model, file.parent / CONFIG)
        before = {name: layer.weight.detach().clone() for name, layer in _layers(model).items()}
        others = {name: _sum(value) for name, value in model.state_dict().items() if name.removesuffix(".weight") not in before}
        merged = _merged(model, file.parent, method)
        changed = [name for name, value in merged.state_dict().items() if name in others and _sum(value) != others[name]]
        if changed:
            raise UnsupportedLoraError(
                f"{file.parent}: {method} changes more than linear layers",
                got=changed[0][:120],
                expected="their weights alone",
                remedy=_REMEDY,
            )
        return self._form(merged, before, config, method, file.parent)

    def _form(self, merged: nn.Module, before: dict[str, Tensor], config: Mapping[str, Any], method: str, folder: Path) -> PeftForm:
        updates: dict[str, Update] = {}
        whole = lost = 0.0
        layers = {name: layer for name, layer in _layers(merged).items() if name in before}
        for name, layer in progress_bar(layers.items(), total=len(layers), desc=f"factoring {folder.name}", disable=len(layers) < 8):
            delta = layer.weight.detach().double() - before.pop(name).double()
            if not delta.any():
                continue
            if not delta.isfinite().all():
                raise AdapterError(f"{folder}: {method} makes weights of {name[:120]} that are not finite", remedy="Train it again.")
            if _is_transposed(layer):
                delta = delta.T
            left, values, right = torch.linalg.svd(delta, full_matrices=False)
            kept = values.square().cumsum(0)
            rank = min(MAX_RANK, int((kept < self.keep * kept[-1] * (1 - 1e-12)).sum().item()) + 1)
            whole, lost = whole + kept[-1].item(), lost + (kept[-1] - kept[rank - 1]).clamp(min=0).item()
            updates[name] = Update(*balanced((left, values, right.T), rank), 1.0)
        if not updates:
            raise AdapterError(f"{folder}: {method} changes no linear layer of the base model", remedy="Is it the right base model?")
        error = math.sqrt(lost / whole)
        most = max(update.a.shape[0] for update in updates.values())
        logger.info("%s: %s became a LoRA of rank %d; relative error of ΔW: %.3g", folder, method, most, error)
        named, task = config.get("base_model_name_or_path"), config.get("task_type")
        return peft_form(
            updates,
            base_model=named if isinstance(named, str) else None,
            task_type=task if isinstance(task, str) else None,
            info={"converted": {"method": method, "keep": self.keep, "error": round(error, 6)}},
        )


def _layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers by path."""
    from transformers.pytorch_utils import Conv1D

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def _is_transposed(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _sum(value: Tensor) -> float:
    """What tells a tensor that was changed from one that was not."""
    return value.double().abs().sum().item() if value.is_floating_point() else 0.0


def _check_sizes(config: Mapping[str, Any], model: nn.Module, where: Path) -> None:
    """Judges what PEFT would allocate and match at a config's word."""
    for key, value in config.items():
        if type(value) is int and abs(value) > (MAX_RANK if key in ("r", "rank") else _LARGEST_SETTING):
            raise AdapterError(
                f"{where}: {key[:60]} is too large", got=value, expected=f"at most {MAX_RANK if key == 'r' else _LARGEST_SETTING}"
            )
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(key), str):
            pattern = Patterns({config[key]: 1}, f"{where}: {key}")
            for name, _ in model.named_modules():
                pattern.of(name, 0)


def _merged(model: PreTrainedModel, folder: Path, method: str) -> nn.Module:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(), quiet_loading():
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, str(folder))
            lost = [name for name, value in wrapped.named_parameters() if value.is_meta]
            if lost:
                raise AdapterError(f"{folder} is not whole", got=f"no {lost[0][:120]}")
            merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
            return merged
    except AdapterError:
        raise
    except Exception as error:  # whatever a config or a file that does not fit makes fail in PEFT
        got = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise AdapterError(f"PEFT cannot merge {folder} into the base model", got=got, expected=f"an adapter of it by {method}") from error
