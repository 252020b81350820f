"""A PEFT LoRA folder: what its config and header state, then its values, looked at one by one, loaded and folded to one rank and alpha."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorag.adapters.checks import CONFIG, PROVENANCE, WEIGHTS, Match, Rename, Scalings, check_config, match
from lorag.adapters.factors import Factors, Pair, check_values
from lorag.adapters.portability import Facts
from lorag.adapters.tensor_names import PREFIX, read_names
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.errors import AdapterError, ArtifactError, FormatVersionError, StorageError
from lorag.files.artifacts import decode_text, finish_replacing, read_bounded, read_json, require_plain
from lorag.files.tensors import TensorSpec, read_header

__all__ = [
    "CHAT_FILES",
    "AdapterParts",
    "own_chat_template",
    "own_layout",
    "read_facts",
    "read_folder",
    "read_provenance",
    "side_files",
    "warn_of_side_files",
    "weight_digest",
]

logger = logging.getLogger(__name__)

CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json")  # where trainers leave the chat template that they used
# An adapter's files are small; what is larger is refused before it is parsed.
_MAX_CONFIG, _MAX_PROVENANCE, _MAX_CHAT = 2**20, 4 * 2**20, 16 * 2**20  # a tokenizer's config lists its added tokens
# With one of these, the names in target_modules match more modules than the adapter changes.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
_MAX_HEADER, _HEADER_OF_MODULE = 4 * 2**20, 1024
_PIECE = 2**18  # values looked at in one go
_MOST_GRAM = 512
_WEIGHTS_OF_SOMETHING = re.compile(r".+\.(safetensors|bin|pt|pth|ckpt|h5|npz)", re.I)
# The adapter itself in another form, and states that trainers go on from.
_NO_PART = re.compile(
    r"adapter_model\.(safetensors|bin)|(\d+_)?adapters\.(safetensors|npz)|pytorch_lora_weights\.(safetensors|bin)"
    r"|(optimizer|scheduler|scaler|rng_state|random_states|training_args)[\w.-]*",
    re.I,
)
_PROVENANCE_FORMATS = (None, 1)
_CODE = "opening it may run code; load it with PEFT where it was trained, and save it again with save_pretrained"
_UNREAD = {**dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _CODE), ".npz": "save it with a newer mlx-lm, as adapters.safetensors"}


# --- what a folder states ----------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    finish_replacing(folder, CONFIG)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is not a PEFT adapter", got=f"no {CONFIG}", remedy="Give the folder that PEFT wrote.")
    return read_json(folder / CONFIG, _MAX_CONFIG)


def _read_spec(folder: Path, *most: int) -> TensorSpec:
    """Types and shapes by key, from a header of at most so many bytes, or as `read_header` bounds any."""
    if not (folder / WEIGHTS).is_file():
        others = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", *_UNREAD))
        got = ", ".join(path.name for path in others[:4]) or None
        raise AdapterError(f"{folder} has no {WEIGHTS}", got=got, remedy=weights_remedy(others))
    return read_header(folder / WEIGHTS, *most)[0]


def weights_remedy(files: Iterable[Path]) -> str:
    """What to do about weights that are not named, or not stored, as PEFT's are."""
    for file in files:
        if file.suffix == ".safetensors" and _holds_factors(file):
            return f"{file.name} holds PEFT's factors: rename it {WEIGHTS}, with its {CONFIG} beside it, and give the folder."
        if file.suffix in _UNREAD:
            return f"{file.name} is never read: {_UNREAD[file.suffix]}."
    return "Save it with PEFT as safetensors."


def _holds_factors(file: Path) -> bool:
    try:
        return any(".lora_A." in key or ".lora_B." in key for key in read_header(file, every_type=True)[0])
    except ArtifactError:  # damaged, or something else
        return False


def read_facts(folder: Path, *, values: bool = True) -> Facts:
    """Reads config and header of an adapter folder.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        values: Whether to look for NaN and infinite values too, one tensor at a time.

    Raises:
        AdapterError: If one of the files is missing.
        ArtifactError: If one cannot be read.
    """
    config = _read_config(folder)
    spec = _read_spec(folder)
    return Facts(config, spec, _first_broken(folder / WEIGHTS, spec) if values else None, _is_wrapper(config))


def _is_wrapper(config: Mapping[str, Any]) -> bool | None:
    """Whether the base model wraps a language model, if it is a folder here whose config says it."""
    name = config.get("base_model_name_or_path")
    path = Path(name, "config.json") if isinstance(name, str) and name and not name.startswith(("\\\\", "//")) else None
    try:
        base_config = read_json(path, _MAX_CONFIG) if path is not None and path.is_file() else None
    except (ArtifactError, OSError, ValueError):  # of a base model that others judge
        return None
    return None if base_config is None else any(key in base_config for key in ("vision_config", "audio_config"))


def _first_broken(path: Path, spec: TensorSpec) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(spec):
                value = file.get_tensor(name)
                if value.is_floating_point() and not torch.isfinite(value).all():
                    return name
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file", got=str(error)[:120]) from error
    return None


def own_chat_template(folder: Path) -> str | None:
    """The chat template that lies beside an adapter, with which it was trained; None if there is none.

    Raises:
        ArtifactError: If one of the files is a link, too large, not UTF-8 or not strict JSON.
    """
    written, config = (folder / name for name in CHAT_FILES)
    if written.is_file():
        return decode_text(read_bounded(written, _MAX_CONFIG), written)
    stated = read_json(config, _MAX_CHAT).get("chat_template") if config.is_file() else None
    return stated if isinstance(stated, str) and stated.strip() else None


def own_layout(config: Mapping[str, Any], spec: TensorSpec, folder: Path, *, repair: bool = False) -> LoraLayout:
    """The layout that an adapter's own tensors imply, for when no base model is at hand to ask.

    Modules come in the order of their names, numbers by value; that is the base model's order of layers, but inside a
    layer it may not be. Whether the base model has these modules, and no further ones that the targets name, is checked
    when the adapter is applied.

    Raises:
        AdapterError: If there is no pair of factors, or a factor is not a matrix.
    """
    names = read_names(spec, folder / WEIGHTS, repair=repair)
    modules = []
    for name in sorted(names.modules, key=_natural):
        a, b = (spec[key][1] for key in names.modules[name])
        if any(len(shape) != 2 or min(shape) < 1 for shape in (a, b)):
            what = f"{folder / WEIGHTS}: the factors of {name[:80]} cannot be used"
            raise AdapterError(what, got={"A": a, "B": b}, expected="A (r, i) and B (o, r)")
        modules.append(ModuleShape(name, a[1], b[0]))
    if not modules:
        got = f"{len(spec)} tensors such as {min(spec)[:80]}" if spec else "no tensor"
        raise AdapterError(f"{folder / WEIGHTS} holds no LoRA factors", got=got, expected=f"{PREFIX}…lora_A.weight")
    return LoraLayout(_targets(config, modules), tuple(modules), bool(config.get("fan_in_fan_out")))


def _targets(config: Mapping[str, Any], modules: list[ModuleShape]) -> tuple[str, ...]:
    """The config's target names, if they name just these modules as far as can be told; else the modules' full paths."""
    named = config.get("target_modules")
    full = tuple(sorted(module.name for module in modules))
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named) or any(config.get(key) for key in _NARROWING):
        return full
    used = {name for name in named for module in modules if module.name == name or module.name.endswith(f".{name}")}
    covered = all(any(module.name == name or module.name.endswith(f".{name}") for name in named) for module in modules)
    return tuple(sorted(used)) if covered else full


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


# --- its values --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterParts:
    """What a PEFT folder holds, folded.

    Attributes:
        factors: Of each module of the layout; those of missing modules are zero.
        config: adapter_config.json.
        info: lorag.json, or nothing.
        missing: Modules of the layout without tensors.
        ignored: Modules outside of the layout, whose factors were left out.
        ignored_share: Their share of ‖ΔW‖² of the whole adapter; None for ranks above 512.
        copies: Digest of the base model's own weight of each module of which the file repeats it.
        norm: ‖ΔW‖_F over the layout's modules; None for ranks above 512.
    """

    factors: Factors
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ignored_share: float | None = 0.0
    copies: Mapping[str, str] = field(default_factory=dict)
    norm: float | None = None


def read_folder(
    folder: Path,
    layout: LoraLayout,
    *,
    allow_missing: bool = False,
    ignore_extra: bool = False,
    rename: Rename | None = None,
    repair: bool = False,
    check: Callable[[Mapping[str, Any], Mapping[str, Any], Match], None] | None = None,
    check_norm: Callable[[float], None] | None = None,
) -> AdapterParts:
    """Reads adapter_config.json, adapter_model.safetensors and lorag.json.

    Args:
        folder: Holds them.
        layout: The layout of the base model that the adapter must fit.
        allow_missing: Whether modules of the layout without tensors count as unchanged.
        ignore_extra: Whether factors of modules outside of the layout are left out.
        rename: Finds the base model's names of modules that the layout lacks, because transformers renamed them.
        repair: Whether names that a wrapped model's tensors have are put right.
        check: Gets config, lorag.json and the modules that match, and may refuse the adapter before a value is read.
        check_norm: Gets ‖ΔW‖_F over the layout's modules, and may refuse the adapter before it is loaded. Not called for
            ranks above 512, whose Gram matrices would be as large as what they save.

    Raises:
        AdapterError: If it is not a whole, finite, plain LoRA of this layout; docs/importing.md lists the subclasses.
        ArtifactError: If a file is not strict JSON or not safetensors, or too large for what it is.
        BaseMismatchError: If it belongs to another base model.
    """
    config = _read_config(folder)
    scalings = check_config(config, folder / CONFIG)
    weights, spec = folder / WEIGHTS, _read_spec(folder, _MAX_HEADER + _HEADER_OF_MODULE * len(layout))
    matched = match(spec, layout, scalings, weights, allow_missing=allow_missing, ignore_extra=ignore_extra, rename=rename, repair=repair)
    info = read_provenance(folder)
    with os.scandir(folder) as entries:
        warn_of_side_files([entry.name for entry in entries if not entry.is_dir()], folder)
    if check is not None:
        check(config, info, matched)
    squares = _squares(weights, spec, matched, scalings)
    inside = sum(squares[name] for name in matched.factors) if squares is not None else None
    outside = sum(squares[name] for name in matched.extra) if squares is not None else 0.0
    norm = None if inside is None else inside**0.5
    if check_norm is not None and norm is not None:
        check_norm(norm)
    factors = _fold(_load(weights, matched), scalings, layout)
    share = outside / (inside + outside) if inside is not None and outside else None if matched.extra else 0.0
    copies = {name: _digest(weights, key) for name, key in matched.copies.items()}
    return AdapterParts(factors, config, info, matched.missing, tuple(matched.extra), share, copies, norm)


def side_files(names: Iterable[str]) -> list[str]:
    """Of the files beside an adapter those that hold weights of something else, such as non_lora_trainables.bin or a value head.

    Other forms of the same adapter and states of a trainer do not belong to it.
    """
    return sorted(name for name in names if _WEIGHTS_OF_SOMETHING.fullmatch(name) and not _NO_PART.fullmatch(name))


def warn_of_side_files(names: Iterable[str], where: object) -> None:
    """Says which files beside an adapter hold weights of something else. They are not opened."""
    beside = side_files(names)
    if beside:
        shown = ", ".join(beside[:4]) + (f" and {len(beside) - 4} more" if len(beside) > 4 else "")
        logger.warning(
            "passed over %s beside the LoRA of %s: weights that were trained or saved along (a head, a projector, embeddings), without "
            "which it may not do what it was trained for",
            shown,
            where,
        )


def _digest(path: Path, key: str) -> str:
    with safe_open(path, framework="pt") as file:
        return weight_digest(file.get_tensor(key))


def weight_digest(weight: Tensor, dtype: str | None = None) -> str:
    """What tells a weight from others: its precision, or the one that is named, and sixteen hex digits of its bytes in it."""
    name = str(weight.dtype).removeprefix("torch.") if dtype is None else dtype
    values = weight.detach().to("cpu", getattr(torch, name)).contiguous().view(torch.uint8)
    return f"{name}:{hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"


def _load(path: Path, matched: Match) -> dict[str, Pair]:
    with safe_open(path, framework="pt") as file:
        return {name: (file.get_tensor(a), file.get_tensor(b)) for name, (a, b) in matched.factors.items()}


def read_provenance(folder: Path) -> dict[str, Any]:
    """Reads lorag.json beside an adapter; without one, nothing is known.

    Raises:
        ArtifactError: If it is not strict JSON or belongs to something else.
        FormatVersionError: If its format is not known.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    require_plain(path)
    info = read_json(path, _MAX_PROVENANCE)
    if info.get("kind", "adapter") != "adapter":
        raise ArtifactError(f"{path} belongs to something else", got=f"kind {str(info['kind'])[:40]!r}", expected="kind 'adapter'")
    if info.get("format") not in _PROVENANCE_FORMATS:
        raise FormatVersionError(f"{path} cannot be read", got=f"format {str(info['format'])[:20]}", expected=1, remedy="Update lorag.")
    return info


def _pieces(file: safe_open, spec: TensorSpec, key: str, axis: int) -> Iterator[Tensor]:
    """Slices of one tensor along an axis, each of bounded size: nothing large is allocated for an adapter that is refused."""
    shape = spec[key][1]
    step, values = max(1, _PIECE // shape[1 - axis]), file.get_slice(key)
    for start in range(0, shape[axis], step):
        yield values[:, start : start + step] if axis else values[start : start + step]


def _look_at(path: Path, file: safe_open, spec: TensorSpec, module: str, keys: tuple[str, str]) -> float | None:
    """Looks at every value of A and B, piece by piece. Returns ‖B·A‖², or None for a huge rank."""
    rank = spec[keys[0]][1][0]
    grams = [torch.zeros(rank, rank, dtype=torch.float64) for _ in "AB"] if rank <= _MOST_GRAM else None
    for side, (factor, key) in enumerate(zip("AB", keys, strict=True)):
        for piece in _pieces(file, spec, key, 1 - side):
            check_values(piece, f"{path}: factor {factor} of {module[:160]}")
            if grams is not None:
                values = piece.double() if side else piece.double().T
                grams[side] += values.T @ values
    return None if grams is None else max(0.0, (grams[0] * grams[1]).sum().item())


def _squares(path: Path, spec: TensorSpec, matched: Match, scalings: Scalings) -> dict[str, float] | None:
    """‖ΔW‖² of each module that the file has, every value looked at; None where a huge rank makes that too large a job."""
    try:
        with safe_open(path, framework="pt") as file:
            squares = {name: _look_at(path, file, spec, name, keys) for name, keys in {**matched.factors, **matched.extra}.items()}
    except SafetensorError as error:  # the library is stricter still, for instance about UTF-8
        raise ArtifactError(f"{path} is not a safetensors file", got=str(error)[:120]) from error
    except RuntimeError as error:  # what torch says where a file cannot be mapped
        raise StorageError(f"{path} cannot be read: {str(error).splitlines()[0][:160]}") from error
    scaled = {name: scalings.of(name)[1] ** 2 * square for name, square in squares.items() if square is not None}
    return scaled if len(scaled) == len(squares) else None


def _fold(pairs: Mapping[str, Pair], scalings: Scalings, layout: LoraLayout) -> Factors:
    """Brings mixed ranks and scalings to one rank and one scaling; ΔW stays the same."""
    used = {scalings.of(name) for name in pairs}
    if len(used) == 1 and len(pairs) == len(layout):
        return Factors({name: pairs[name] for name in layout.names}, used.pop()[1])
    rank = max(scalings.of(name)[0] for name in pairs)
    folded: dict[str, Pair] = {}
    for module in layout.modules:
        pair = pairs.get(module.name, (torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0)))
        folded |= Factors({module.name: pair}, scalings.of(module.name)[1]).padded(rank)
    return Factors(folded)
