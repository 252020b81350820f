"""LoRA adapters of Apple's mlx-lm, and of mlx-vlm: adapters.safetensors with transposed factors, adapter_config.json with their scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.formats.format import TIED, AdapterFormat, Base, PeftForm, Update, peft_form
from lorag.base.base_model import stored_config
from lorag.errors import AdapterError, AlphaRangeError, ArtifactError, FactorShapeError, MissingTensorError, UnsupportedLoraError
from lorag.files.artifacts import read_json, write_json
from lorag.files.tensors import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = ["Mlx"]

WEIGHTS, _CONFIG = "adapters.safetensors", "adapter_config.json"
_MAX_CONFIG = 2**20
_FACTOR = re.compile(r"(.+)\.(?:(lora_a|A)|lora_b|B)")
_ENDS = (".lora_a", ".lora_b")
_VISION = {"rank", "alpha"}  # what mlx-vlm writes, whose factors are called A and B
_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
_LARGEST_SCALE = 1e6


class Mlx(AdapterFormat):
    """ΔW = scale · (A·B)ᵀ with A (i, r) and B (r, o): names end in .lora_a and .lora_b (mlx-vlm's in .A and .B), one scale for all."""

    name = "mlx"
    title = "MLX"
    writes = "folder"
    config = _CONFIG
    next_step = "mlx_lm.generate --model BASE --adapter-path {out}"

    def weights(self, folder: Path) -> list[Path]:
        """adapters.safetensors; what mlx-lm saved on the way, such as 0000100_adapters.safetensors, is an earlier state of it."""
        path = folder / WEIGHTS
        return [path] if path.is_file() and self.recognises(path) else []

    def recognises(self, file: Path) -> bool:
        """By the ends of its tensors' names; DoRA of MLX and whole layers count too, so that they are refused by name."""
        if file.suffix != ".safetensors":
            return False
        if file.name.endswith(WEIGHTS) and (file.parent / _CONFIG).is_file():
            config = read_json(file.parent / _CONFIG, _MAX_CONFIG)
            return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config or config.keys() >= _VISION)
        return any(key.endswith(_ENDS) for key in read_header(file)[0])

    def read(self, file: Path, base: Base) -> PeftForm:
        """Reads weights and the config beside them, without which there is no scale."""
        path = file.parent / _CONFIG
        if not path.is_file():
            raise AdapterError(f"{file} has no {_CONFIG} beside it", expected="lora_parameters with a scale", remedy="Copy both files.")
        config = read_json(path, _MAX_CONFIG)
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora":
            remedy = "Train a LoRA: --fine-tune-type lora."
            raise UnsupportedLoraError(f"{path}: fine_tune_type cannot be used", got=repr(kind)[:40], expected="lora", remedy=remedy)
        scale = _scale(config, path)
        spec, _ = read_header(file)
        tensors = load_tensors(file)
        sides: dict[str, dict[str, str]] = {}
        for key in spec:
            match = _FACTOR.fullmatch(key)
            if match is None or len(spec[key][1]) != 2:
                got = f"{key[:120]} of shape {spec[key][1]}"
                raise UnsupportedLoraError(
                    f"{file} holds more than LoRA of linear layers", got=got, expected="matrices .lora_a and .lora_b"
                )
            sides.setdefault(match[1], {})["A" if match[2] else "B"] = key
        updates = {}
        for name, keys in sides.items():
            if len(keys) < 2:
                raise MissingTensorError(f"{file}: a tensor is missing", got=f"{next(iter(keys.values()))[:120]} alone", expected="A and B")
            a, b = tensors[keys["A"]].T, tensors[keys["B"]].T
            if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise FactorShapeError(f"{file}: factors of {name[:120]} do not fit", got=f"A {tuple(a.shape)}, B {tuple(b.shape)}")
            updates[name] = Update(a, b, scale)
        if not updates:
            raise MissingTensorError(f"{file} holds no tensors", remedy="Train the adapter again.")
        model = config.get("model")
        return peft_form(
            updates, base_model=model if isinstance(model, str) and model else None, task_type=None if "alpha" in config else "CAUSAL_LM"
        )

    def write(self, adapter: LoraAdapter, out: Path, base: Base) -> None:
        """Writes the two files; every layer gets the keys that any layer has, as mlx-lm wants it, and absent factors count as none."""
        if "lm_head" in adapter.factors.tensors:
            model = base.model or adapter.stated_base()
            if getattr(stored_config(model.name, model.revision).get_text_config(), "tie_word_embeddings", False):
                got = f"lm_head, which {model.name} ties to its embeddings"
                raise AdapterError("mlx-lm has no such module, and would leave its factors out", got=got, remedy=TIED)
        tensors = {}
        keys: set[str] = set()
        for module, (a, b) in adapter.factors.tensors.items():
            match = _LAYER.fullmatch(module)
            if match is None and module != "lm_head":
                remedy = "Merge it into the base model: --merge."
                raise AdapterError("mlx-lm has no such module", got=module[:120], expected="model.layers.N.… or lm_head", remedy=remedy)
            keys.add(module if match is None else match[1])
            tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = a.T.contiguous(), b.T.contiguous()
        save_tensors(out / WEIGHTS, tensors, {"format": "mlx"})
        config = {
            "fine_tune_type": "lora",
            "model": adapter.base_model,
            "num_layers": -1,  # all of them
            "lora_parameters": {"rank": adapter.rank, "scale": adapter.factors.scaling, "dropout": 0.0, "keys": sorted(keys)},
        }
        write_json(out / _CONFIG, config)


def _scale(config: Mapping[str, Any], path: Path) -> float:
    parameters = config.get("lora_parameters")
    if parameters is None and config.keys() >= _VISION:
        parameters = {"scale": config["alpha"]}
    if not isinstance(parameters, Mapping):
        raise ArtifactError(f"{path} has no lora_parameters", got=type(parameters).__name__, expected="rank and scale")
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or not 0 < abs(scale) <= _LARGEST_SCALE:
        what = f"{path}: scale cannot be used"
        raise AlphaRangeError(what, got=repr(scale)[:40], expected=f"a number other than 0, at most {_LARGEST_SCALE:g}")
    return float(scale)
