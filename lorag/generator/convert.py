"""Convert generators of an older format: names of tensors and settings change, no value does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorag import __version__
from lorag.errors import ConfigError, GeneratorError, LoragError
from lorag.files.artifacts import GENERATOR_FORMAT, check_manifest, write_manifest
from lorag.files.atomic import require_empty
from lorag.files.tensors import load_tensors, save_tensors
from lorag.methods import method_type

__all__ = ["convert_generator"]

_OLD = 2
_MANIFEST, _WEIGHTS, _KIND = "generator.json", "generator.safetensors", "generator"
_STORED = frozenset(("random", "mean", "multitask", "nearest", "top_k", "sg_mixture", "ridge"))  # whose tensors are as they were
_SIZES = {
    "mlp": ("embedding", "code"),
    "aligned": ("embedding", "code"),
    "hypernet": ("embedding", "code"),
    "house": ("embedding", "code"),
    "icm_lora": ("embedding", "vector", "elements"),
    "icm_fusion": ("elements", "vector"),
}
_RENAMED_TENSORS = {
    "house": (
        (r"^reading\.colleagues\.(\d+)\.", lambda match: f"network.readers.{int(match[1]) + 1}."),
        (r"^reading\.(reader|hidden)\.", r"network.readers.0.\1."),
        (r"^reading\.head\.known$", "network.head.experts"),
        (r"^reading\.head\.shares$", "network.head.weights"),
        (r"^reading\.head\.(blocks\.\d+\.body)\.3\.", r"network.head.\1.4."),
        (r"^reading\.head\.", "network.head."),
    ),
    "attention": ((r"^attention\.sharpness$", "network.attention.log_scale"), (r"^attention\.", "network.attention.")),
    "sg_lora": ((r"^network\.beliefs\.", "network.prior_network."),),
    "mlp": ((r"^", "network."),),
    "aligned": ((r"^", "network."),),
    "hypernet": ((r"^", "network."),),
}


def convert_generator(folder: Path, out: Path) -> str:
    """Writes a generator of format 2 in today's format; it makes the same adapters, byte for byte.

    Args:
        folder: The old generator; it stays as it is.
        out: A new folder.

    Returns:
        The name of its method, which may have changed.

    Raises:
        ArtifactError: If it is not a complete generator of that format.
        ConfigError: If the method is not one any more.
        GeneratorError: If its parts do not fit together.
        StorageError: If `out` holds something.
    """
    require_empty(out)
    manifest = check_manifest(folder, _MANIFEST, _KIND, _OLD)
    tensors = load_tensors(folder / _WEIGHTS)
    try:
        stored = {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
        name, settings = _convert_settings(str(manifest["method"]), manifest["settings"])
        stored, shape = _convert_tensors(name, stored)
        origin = dict(manifest.get("origin", {}))
        if isinstance(origin.get("config"), Mapping):
            config = dict(origin["config"])
            config["groups"] = config.pop("kin", "task")
            config["method"], config["settings"] = _convert_settings(str(config["method"]), config.get("settings", {}))
            origin["config"] = config
    except LoragError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise GeneratorError(f"{folder} cannot be converted", got=repr(error)[:120]) from error
    method_type(name).with_settings(settings).restore(stored, shape)
    others = {key: value for key, value in tensors.items() if not key.startswith("method.")}
    fields = {key: value for key, value in manifest.items() if key != "files"}
    fields |= {"format": GENERATOR_FORMAT, "lorag": __version__, "method": name, "settings": settings, "shape": shape, "origin": origin}
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(
        out / _WEIGHTS, others | {f"method.{key}": value for key, value in stored.items()}, {"lorag": json.dumps(fields, sort_keys=True)}
    )
    write_manifest(out, _MANIFEST, fields, [_WEIGHTS])
    return name


def _convert_settings(method: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Today's name of a method, and its settings under today's names."""
    values = dict(settings)
    if method == "house":
        source = values.pop("source", "description")
        if source not in ("description", "experts"):
            raise ConfigError(
                "this form of house is not a method any more", got=f"source={source}", remedy="Train it anew: lorag train method=house."
            )
        attends = source == "experts"
        apart = {key: values.pop(key) for key in ("view", "temperature", "offset") if key in values}
        if attends:
            return "attention", apart | {key: values[key] for key in ("word_dropout", "noise", "functional") if key in values}
        if "colleagues" in values:
            values["ensemble"] = values.pop("colleagues")
    if method == "icm_fusion":
        values.pop("second_order", None)
        if "temperature" in values:
            values["spread"] = values.pop("temperature")
        if "sharpness" in values:
            values["temperature"] = values.pop("sharpness")
    if method in ("sg_ridge", "sg_rescaled"):
        raise ConfigError("a control of SG-LoRA is not a method any more", got=method, remedy="python -m benchmarks.sg_controls fits it.")
    return method, values


def _convert_tensors(method: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A method's tensors under today's names, and the shape that was among them."""
    left = dict(tensors)
    shape: dict[str, Any] = {}
    if method not in _STORED and method != "kernel":
        sizes = left.pop("sizes").tolist()
        names = _SIZES.get(method, ())
        if method == "sg_lora":
            sizes = [sizes[0], *(sizes[1:-1] or [0]), sizes[-1]]
            names = ("merge", "embedding", "elements")
        if method == "attention":
            names = ("embedding", "code")
        shape = dict(zip(names, sizes, strict=True))
    if method == "kernel":
        shape = {"embedding": int(left.pop("embedding"))}
    if method == "hypernet":
        del shape["code"]
        shape["parts"] = left.pop("parts").tolist()
    if method == "aligned":
        shape |= dict(zip(("rank", "inputs", "outputs"), left.pop("shape").tolist(), strict=True))
        shape["entry"] = left.pop("entry").tolist()
    if method == "attention":
        shape |= {"modules": left.pop("modules").tolist(), "experts": len(left["attention.codes"])}
    if method == "icm_fusion":
        shape["code"] = len(left.get("network.directions.weight", ()))
    if method == "house":
        members = {name.split(".")[2] for name in left if name.startswith("reading.colleagues.")}
        shape["members"] = 1 + len(members)
        for name in ("kinds", "depths"):
            if name in left:
                shape[name] = left.pop(name).tolist()
        if "reading.head.known" in left:
            shape["experts"] = len(left["reading.head.known"])
    return {_renamed(method, name): value for name, value in left.items()}, shape


def _renamed(method: str, name: str) -> str:
    for pattern, new in _RENAMED_TENSORS.get(method, ()):
        changed, count = re.subn(pattern, new, name)  # type: ignore[call-overload]
        if count:
            return str(changed)
    return name
