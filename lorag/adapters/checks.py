"""What a PEFT LoRA folder must be, judged from its config and its file header before a tensor is allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.factors import MAX_RANK, check_alpha
from lorag.adapters.patterns import Patterns
from lorag.adapters.tensor_names import CONVERT, DORA, KEY, WHOLE, read_names
from lorag.errors import (
    BaseMismatchError,
    ExtraTensorError,
    FactorShapeError,
    FormatVersionError,
    MissingTensorError,
    PeftTypeError,
    RankRangeError,
    UnsupportedLoraError,
)

if TYPE_CHECKING:
    from lorag.base.layout import LoraLayout, ModuleShape
    from lorag.files.tensors import TensorSpec

__all__ = ["CONFIG", "PROVENANCE", "WEIGHTS", "Match", "Scalings", "check_config", "match", "shifting_start"]

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "lorag.json"
Rename = Callable[[Sequence[str]], Mapping[str, str]]  # from modules that a base model lacks to its own names of them
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
_WHOLE = ("modules_to_save", "trainable_token_indices")  # of which PEFT can make a whole model
# Initialisations that also change the base weights, so that ΔW is relative to another base model.
_SHIFTING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What PEFT writes beside them up to this version. A PEFT ignores keys that it does not know, a newer one may know them.
_KNOWN_PEFT = (0, 21)
_HARMLESS = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "target_modules", "task_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "exclude_modules", "lora_dropout"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}


@dataclass(frozen=True)
class Scalings:
    """Rank and scaling of any module, as PEFT derives them from a config."""

    rank: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rank_stabilised: bool

    def of(self, module: str) -> tuple[int, float]:
        """Rank r and scaling alpha / r, or alpha / √r under rsLoRA (arXiv 2312.03732), of one module."""
        rank, alpha = self.ranks.of(module, self.rank), self.alphas.of(module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class Match:
    """Which tensors of a file belong to which modules.

    Attributes:
        factors: Keys of A and B for each module of the layout that has them.
        missing: Modules of the layout without tensors.
        extra: Keys of A and B of modules outside of the layout.
        copies: Keys of the base model's own weights, which PEFT writes beside an adapted head, by module.
    """

    factors: Mapping[str, tuple[str, str]]
    missing: tuple[str, ...]
    extra: Mapping[str, tuple[str, str]]
    copies: Mapping[str, str]


def _check_rank(rank: object, where: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise RankRangeError(f"{where} cannot be used", got=repr(rank)[:40], expected=f"an integer from 1 to {MAX_RANK}")
    return rank


def shifting_start(config: Mapping[str, Any]) -> str | None:
    """How an adapter's weights began, if that changed the base model's weights; None for a plain start."""
    start = str(config.get("init_lora_weights"))
    return start[:40] if start.lower().startswith(_SHIFTING) else None


def check_config(config: Mapping[str, Any], where: Path) -> Scalings:
    """Checks that a config describes plain LoRA and nothing else.

    Args:
        config: What adapter_config.json holds.
        where: Its path, for messages.

    Raises:
        PeftTypeError: If it is of another PEFT method.
        UnsupportedLoraError: If a setting makes more of the adapter than the ΔW of its factors.
        RankRangeError, AlphaRangeError, NonFiniteError: If a rank or an alpha cannot be used.
        FormatVersionError: If a newer PEFT wrote it and set what lorag does not know.
    """
    if config.get("peft_type") != "LORA":
        got = repr(config.get("peft_type"))[:40]
        raise PeftTypeError(f"{where}: peft_type cannot be used", got=got, expected="LORA", remedy=CONVERT)
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            remedy = DORA if key == "use_dora" else WHOLE if key in _WHOLE else "Train or convert it without."
            raise UnsupportedLoraError(f"{where}: {key} is set", got=repr(config[key])[:60], expected="plain LoRA", remedy=remedy)
    start = shifting_start(config)
    if start is not None:
        raise UnsupportedLoraError(
            f"{where}: init_lora_weights changes the base weights",
            got=repr(start),
            expected="plain LoRA",
            remedy="Convert it with PEFT's path_initial_model_for_weight_conversion.",
        )
    _check_version(config, where)
    rank, alpha = _check_rank(config.get("r"), f"{where}: r"), check_alpha(config.get("lora_alpha"), f"{where}: lora_alpha")
    ranks, alphas = (_check_pattern(config.get(key) or {}, f"{where}: {key}") for key in ("rank_pattern", "alpha_pattern"))
    return Scalings(
        rank,
        alpha,
        Patterns({key: _check_rank(value, f"{where}: rank_pattern") for key, value in ranks.items()}, f"{where}: rank_pattern"),
        Patterns({key: check_alpha(value, f"{where}: alpha_pattern") for key, value in alphas.items()}, f"{where}: alpha_pattern"),
        bool(config.get("use_rslora")),
    )


def _check_version(config: Mapping[str, Any], where: Path) -> None:
    written = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("peft_version")))
    if written is None or (int(written[1]), int(written[2])) <= _KNOWN_PEFT:
        return
    strange = sorted(key for key, value in config.items() if value not in (None, False, [], {}) and key not in _HARMLESS | _PLAIN.keys())
    if strange:
        raise FormatVersionError(
            f"{where}: {strange[0][:60]} is set, which lorag does not know",
            got=f"a config of PEFT {str(config['peft_version'])[:20]}",
            expected=f"one of PEFT {'.'.join(map(str, _KNOWN_PEFT))}, or nothing new set",
            remedy="Update lorag.",
        )


def _check_pattern(pattern: object, where: str) -> Mapping[str, Any]:
    if not isinstance(pattern, dict):
        raise UnsupportedLoraError(f"{where} is not a mapping", got=type(pattern).__name__)
    return pattern


def match(
    spec: TensorSpec,
    layout: LoraLayout,
    scalings: Scalings,
    where: Path,
    *,
    allow_missing: bool = False,
    ignore_extra: bool = False,
    rename: Rename | None = None,
    repair: bool = False,
) -> Match:
    """Matches tensor names and shapes of a header to the modules of a layout.

    Args:
        spec: Types and shapes by key.
        layout: The base model's.
        scalings: Rank and scaling of each module.
        where: The file, for messages.
        allow_missing: Whether modules of the layout may lack tensors.
        ignore_extra: Whether there may be tensors of further modules.
        rename: Finds the base model's names of modules that the layout lacks.
        repair: Whether names of a running model's tensors are put right.

    Raises:
        MissingPrefixError, MissingTensorError, ExtraTensorError, FactorShapeError, UnsupportedLoraError: Naming the tensor.
        BaseMismatchError: If the tensors are whole and belong to a base model of other modules or sizes.
    """
    names = read_names(spec, where, repair=repair)
    modules, copies = names.modules, names.copies
    shapes = {module.name: module for module in layout.modules}
    strange = [name for name in modules if name not in shapes]
    if strange and rename is not None:
        new = {old: name for old, name in rename(strange).items() if name not in modules}
        modules = {new.get(name, name): keys for name, keys in modules.items()}
        copies = {new.get(name, name): key for name, key in copies.items()}
    present = {name: modules[name] for name in layout.names if name in modules}
    extra = {name: keys for name, keys in sorted(modules.items()) if name not in shapes}
    missing = tuple(name for name in layout.names if name not in modules)
    for name, keys in {**present, **extra}.items():
        _check_pair(spec, name, keys, shapes.get(name), scalings.of(name)[0], where)
    for name, key in copies.items():
        size = shapes.get(name)
        if size is not None and spec[key][1] not in ((size.out_features, size.in_features), (size.in_features, size.out_features)):
            raise UnsupportedLoraError(
                f"{where}: the vocabulary was resized, and {name[:80]} was saved along",
                got=f"{key[:120]} of shape {spec[key][1]}",
                expected=f"({size.out_features}, {size.in_features}), as the base model has it",
                remedy=WHOLE,
            )
    if not present:
        raise BaseMismatchError(
            f"{where} belongs to a base model of other modules",
            got=f"factors of {min(extra)[:100]}",
            expected=f"{layout.names[0]} and the others of layout {layout.fingerprint}",
        )
    if extra and not ignore_extra:
        raise ExtraTensorError(
            f"{where}: extra tensors",
            got=f"factors of {len(extra)} more modules such as {min(extra)[:100]}",
            expected=f"only factors of the layout's {len(layout)} modules",
            remedy="Take a bank whose layout has them, or drop them with --ignore-extra, which says how much of the adapter they are.",
        )
    if missing and not allow_missing:
        raise MissingTensorError(f"{where}: a tensor is missing", got=KEY.format(module=missing[0], factor="A")[:160])
    return Match(present, missing, extra, {name: key for name, key in copies.items() if name in present})


def _check_pair(spec: TensorSpec, name: str, keys: tuple[str, str], module: ModuleShape | None, rank: int, where: Path) -> None:
    """Checks A and B of one module; without a ModuleShape it lies outside of the layout and may have any sizes."""
    (type_a, of_a), (type_b, of_b) = (spec[key] for key in keys)
    for key, kind, shape in zip(keys, (type_a, type_b), (of_a, of_b), strict=True):
        if kind not in _FLOATS or len(shape) != 2 or 0 in shape:
            raise FactorShapeError(f"{where}: {key[:160]} is not a matrix of floats", got=f"{kind} {shape}")
    i, o = (of_a[1], of_b[0]) if module is None else (module.in_features, module.out_features)
    if of_a == (rank, i) and of_b == (o, rank):
        return
    what = f"{where}: factors of {name[:120]} do not fit ({keys[0][:160]})"
    got, expected = f"A {of_a}, B {of_b}", f"A ({rank}, {i}), B ({o}, {rank})"
    if of_a == (i, rank) or of_b == (rank, o):
        raise FactorShapeError(f"{what}: transposed", got=got, expected=expected, remedy="Save it with PEFT's save_pretrained.")
    if of_a[0] != rank or of_b[1] != rank:
        raise FactorShapeError(f"{what}: not of the config's rank", got=got, expected=expected, remedy="r and rank_pattern must tell it.")
    raise BaseMismatchError(
        f"{where} belongs to a base model of other sizes: {name[:120]}",
        got=got,
        expected=expected,
        remedy="Look for the same base model's adapters.",
    )
