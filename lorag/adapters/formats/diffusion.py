"""LoRA files of diffusers and of kohya's trainers: factors for several models in one file, told apart by the start of their names.

diffusers writes paths with dots behind the name of a pipeline's part (`text_encoder.`, `transformer.`); kohya writes them with
underscores alone, so that only the base model's own names tell where a part of a path ends.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorag.adapters.checks import Scalings, check_config
from lorag.adapters.formats.format import AdapterFormat, Base, PeftForm, Update, peft_form
from lorag.errors import AdapterError, ArtifactError, BaseModelError, FactorShapeError, MissingTensorError, UnsupportedLoraError
from lorag.files.artifacts import parse_json
from lorag.files.tensors import load_tensors, read_header

if TYPE_CHECKING:
    from lorag.base.layout import ModuleShape

__all__ = ["Diffusion"]

logger = logging.getLogger(__name__)

_DOTTED = re.compile(r"(text_encoder(?:_\d)?|unet|transformer(?:_\d)?|diffusion_model|prior|controlnet)\.(.+)")
_FLAT = re.compile(r"lora_(te\d?|unet|transformer|prior)_(\w+)")
_ENDS = {
    **{".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"},
    **{".lora.down.weight": "A", ".lora.up.weight": "B", ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B"},
}
# What else such files hold: other methods, and convolutions in three factors.
_OTHERS = (".dora_scale", ".lora_magnitude_vector", ".hada_", ".lokr_", ".lora_mid.", ".oft_", ".diff", ".glora", ".norm")
# Paths of CLIP's and of T5's encoders, whose underscores can be told from dots without the model.
_PIECE = r"text_model|encoder|layers?|self_attn|[qkv]_proj|out_proj|mlp|fc[12]|block|SelfAttention|DenseReluDense|wi_[01]|w[io]|[qkvo]|\d+"
_KNOWN_PATH = re.compile(rf"(?:{_PIECE})(?:_(?:{_PIECE}))*")
_METADATA = "lora_adapter_metadata"


@dataclass
class _Part:
    """What a file holds for one model of a pipeline: keys of A, B and alpha by the module's name as the file spells it."""

    flat: bool
    keys: dict[str, dict[str, str]] = field(default_factory=dict)


class Diffusion(AdapterFormat):
    """Names start with a part of a pipeline, and end in lora_A, lora_down or the like."""

    name = "diffusers"
    title = "diffusers or kohya"

    def weights(self, folder: Path) -> list[Path]:
        """Safetensors files of such names; one that cannot be read is passed over, and said."""
        files = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                files += [path] if path.is_file() and self.recognises(path) else []
            except ArtifactError as error:
                logger.warning("passed over a file: %s", error)
        return files

    def recognises(self, file: Path) -> bool:
        """By any name that starts and ends so."""
        return file.suffix == ".safetensors" and any(_place(key) is not None for key in read_header(file, every_type=True)[0])

    def read(self, file: Path, base: Base) -> PeftForm:
        """Reads what the file holds for the base model; what it holds for other models is left out, and said."""
        spec, metadata = read_header(file)
        parts = _parts(file, spec)
        layers = base.linear_layers()
        resolved = {name: _resolved(part, layers) for name, part in parts.items()}
        chosen = _choose(file, parts, resolved, {key: shape for key, (_, shape) in spec.items()}, layers)
        for name, part in parts.items():
            if name != chosen:
                logger.warning("%s: left out %d modules of %s, another model's", file, len(part.keys), name)
        tensors = load_tensors(file)
        scalings = _scalings(file, chosen, metadata)
        updates = {}
        for module, keys in resolved[chosen].items():
            updates[module] = _update(file, module, keys, tensors, scalings)
        return peft_form(updates)


def _place(key: str) -> tuple[str, str, str, bool] | None:
    """Part, module, side of a tensor, and whether its path is flat; None for other names."""
    for end, side in _ENDS.items():
        if key.endswith(end):
            name = key.removesuffix(end)
            for pattern, flat in ((_FLAT, True), (_DOTTED, False)):
                match = pattern.fullmatch(name)
                if match is not None:
                    return match[1], match[2], side, flat
    return None


def _parts(file: Path, spec: Mapping[str, Any]) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    for key in spec:
        place = _place(key)
        if place is None:
            other = next((end for end in _OTHERS if end in key), None)
            remedy = "Train or convert it as plain LoRA."
            what = f"{file} holds more than plain LoRA" if other else f"{file}: a name is not known"
            raise UnsupportedLoraError(what, got=key[:120], expected="lora_A and lora_B, or lora_down and lora_up", remedy=remedy)
        name, module, side, flat = place
        part = parts.setdefault(name, _Part(flat))
        if side in part.keys.setdefault(module, {}):
            raise AdapterError(f"{file}: a factor is there under two names", got=key[:120])
        part.keys[module][side] = key
    for name, part in parts.items():
        for module, keys in part.keys.items():
            if not {"A", "B"} <= keys.keys():
                got = f"{name}: {module[:100]} with {', '.join(sorted(keys))}"
                raise MissingTensorError(f"{file}: a tensor is missing", got=got, expected="both factors of a module")
    return parts


def _resolved(part: _Part, layers: Mapping[str, ModuleShape]) -> dict[str, dict[str, str]]:
    """Keys by the module's path in a base model; without one, paths with dots and those of known encoders stand as they are."""
    names = {name.replace(".", "_"): name for name in layers}
    by_path = {}
    for module, keys in part.keys.items():
        flat = module.replace(".", "_")
        path = names.get(flat) or names.get(flat.removeprefix("text_model_")) or names.get(f"text_model_{flat}")
        if path is None and not names:
            path = ".".join(re.findall(_PIECE, module)) if part.flat and _KNOWN_PATH.fullmatch(module) else None if part.flat else module
        if path is not None:
            by_path[path] = keys
    return by_path


def _choose(
    file: Path,
    parts: Mapping[str, _Part],
    resolved: Mapping[str, Mapping[str, Mapping[str, str]]],
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, ModuleShape],
) -> str:
    """The part of the file that belongs to the base model."""
    held = ", ".join(f"{name} ({len(part.keys)} modules)" for name, part in parts.items())
    fitting = [name for name, part in parts.items() if len(resolved[name]) == len(part.keys) and _fits(resolved[name], shapes, layers)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise AdapterError(
            f"{file} holds LoRA for several models", got=held, expected="one", remedy="Name the base model: --base-model, or --base."
        )
    if layers:
        raise BaseModelError(f"{file} holds nothing for the base model", got=held, expected=f"modules such as {next(iter(layers))}")
    remedy = (
        "Give the base model, whose names tell: --base-model, or --base. U-Nets have no such names: lorag reads what transformers opens."
    )
    raise BaseModelError(f"{file}: names of modules cannot be told from their flattened form", got=held, remedy=remedy)


def _fits(modules: Mapping[str, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, ModuleShape]) -> bool:
    for name, keys in modules.items():
        size = layers.get(name)
        if size is not None and (shapes[keys["A"]][-1:], shapes[keys["B"]][:1]) != ((size.in_features,), (size.out_features,)):
            return False
    return True


def _scalings(file: Path, part: str, metadata: Mapping[str, str]) -> Scalings | None:
    """What diffusers' metadata say of one part; without them the scaling is 1, or each module's own alpha / r."""
    if _METADATA not in metadata:
        return None
    stated = parse_json(metadata[_METADATA], f"{_METADATA} of {file}")
    config = (
        {key.removeprefix(f"{part}."): value for key, value in stated.items() if key.startswith(f"{part}.")}
        if isinstance(stated, dict)
        else {}
    )
    return check_config({"peft_type": "LORA", **config}, file) if "r" in config else None


def _update(file: Path, module: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], scalings: Scalings | None) -> Update:
    a, b = tensors[keys["A"]], tensors[keys["B"]]
    if a.dim() == b.dim() == 4 and a.shape[2:] == b.shape[2:] == (1, 1):  # a linear layer that was trained as a convolution of one point
        a, b = a.flatten(1), b.flatten(1)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        got = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise FactorShapeError(f"{file}: factors of {module[:120]} cannot be used", got=got, expected="A (r, i) and B (o, r)")
    if "alpha" in keys:
        alpha = tensors[keys["alpha"]]
        if alpha.numel() != 1 or not alpha.isfinite().all() or alpha == 0:
            raise AdapterError(f"{file}: alpha of {module[:120]} cannot be used", got=alpha.flatten()[:3].tolist(), expected="a number")
        return Update(a, b, float(alpha) / a.shape[0])
    return Update(a, b, 1.0 if scalings is None else scalings.of(module)[1])
