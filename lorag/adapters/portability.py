"""Where an adapter can be loaded: rule tables for the programs that people serve adapters with, read from its config and its header.

Each rule stands in docs/portability.md with its source, and with the test that ran the program, if one did. A rule sees what the
adapter's files state, and no more of the base model than whether it reads images too: whether a program knows its architecture is
not asked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorag.adapters.checks import shifting_start
from lorag.adapters.tensor_names import PREFIX

if TYPE_CHECKING:
    from lorag.files.tensors import TensorSpec

__all__ = ["TARGETS", "Facts", "Finding", "Rule", "Verdict", "check_portability"]

# Of vLLM's LoRAConfig: the default, and what max_lora_rank may be.
_VLLM_DEFAULT_RANK = 16
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_OUTER = ("lm_head", "embed_tokens", "wte", "shared")
_ONE_SCALING = "`lorag export ADAPTER --out DIR` writes the same ΔW with one rank and one alpha"
_MERGE = "merge it into the base model instead"
_OF_TEXT_CLASS = re.compile(r"model\.layers\.\d+\.")
# Base models whose usual class reads images too, by name: their text-only classes call modules otherwise.
_WRAPPED = re.compile(
    r"gemma-3-(4|12|27)b|gemma-3n|gemma-4|qwen-?[23](\.\d+)?-?(vl|omni)|qwen3\.[56]|llama-4|llama-3\.2-(11|90)b|mistral-small-3\.[12]|"
    r"ministral-3|llava|pixtral|internvl|glm-4\.\dv|smolvlm",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Facts:
    """What an adapter's files state.

    Attributes:
        config: adapter_config.json.
        spec: Types and shapes in adapter_model.safetensors.
        broken: The first tensor with NaN or infinite values, if one has been found.
        wrapper: Whether the base model wraps a language model with what reads images or sounds; None if that is not known.
    """

    config: Mapping[str, Any]
    spec: TensorSpec
    broken: str | None = None
    wrapper: bool | None = None


@dataclass(frozen=True)
class Finding:
    """What a rule has to say.

    Attributes:
        fits: False if the program refuses the adapter, or computes something else with it; True for a condition.
        text: What is so.
        remedy: What can be done, or under which setting it fits.
    """

    fits: bool
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Rule:
    """A rule of one program; `name` is its row in docs/portability.md."""

    name: str
    find: Callable[[Facts], Finding | None]


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter fits a program, with what the rules found."""

    target: str
    findings: tuple[Finding, ...]

    @property
    def fits(self) -> bool:
        """Whether it loads there and means the same."""
        return all(finding.fits for finding in self.findings)

    def line(self) -> str:
        """One line for people: yes, yes with a setting, or no with reasons."""
        if not self.findings:
            return "yes"
        shown = [finding for finding in self.findings if finding.fits == self.fits]
        reasons = "; ".join(f"{one.text}{f' ({one.remedy})' if one.remedy else ''}" for one in shown)
        return f"{'yes, if' if self.fits else 'no:'} {reasons}"


# --- what several programs ask ----------------------------------------------------------------------------------------


def _set(config: Mapping[str, Any], *keys: str) -> str | None:
    """The first of some settings that is on."""
    return next((key for key in keys if config.get(key)), None)


def _rank(facts: Facts) -> int:
    pattern = facts.config.get("rank_pattern")
    values = [facts.config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max((value for value in values if type(value) is int), default=0)


def _modules(facts: Facts) -> Iterator[str]:
    for key in facts.spec:
        for end in _FACTORS:
            if key.endswith(end):
                yield key.removeprefix(PREFIX).removesuffix(end)


def _type(facts: Facts) -> Finding | None:
    kind = facts.config.get("peft_type")
    return None if kind == "LORA" else Finding(False, f"peft_type is {str(kind)[:40]}, not LORA")


def _finite(facts: Facts) -> Finding | None:
    return None if facts.broken is None else Finding(False, f"{facts.broken[:100]} holds NaN or infinite values")


def _odd_tensors(facts: Facts, *allowed: str) -> str | None:
    return next((key for key in sorted(facts.spec) if not key.endswith(_FACTORS) and not any(part in key for part in allowed)), None)


def _pairs(facts: Facts) -> Finding | None:
    twins = {"lora_A": "lora_B", "lora_B": "lora_A"}
    for key in sorted(facts.spec):
        for factor, other in twins.items():
            if f".{factor}." in key and key.replace(f".{factor}.", f".{other}.") not in facts.spec:
                return Finding(False, f"{key[:100]} has no {other}")
    return None


def _foreign_start(facts: Facts) -> Finding | None:
    start, remedy = shifting_start(facts.config), "convert it with PEFT's path_initial_model_for_weight_conversion"
    return None if start is None else Finding(False, f"init_lora_weights={start} belongs to a changed base model", remedy)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def _peft_prefix(facts: Facts) -> Finding | None:
    lost = next((key for key in sorted(facts.spec) if not key.startswith(PREFIX)), None)
    return None if lost is None else Finding(False, f"{lost[:80]} lacks the prefix {PREFIX} and would be left out with a warning at most")


def _peft_shapes(facts: Facts) -> Finding | None:
    """A is (r, i) and B is (o, r); only with a rank_pattern may another r occur."""
    pattern = facts.config.get("rank_pattern")
    ranks = [facts.config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    for key, (_, shape) in sorted(facts.spec.items()):
        axis = 0 if key.endswith(".lora_A.weight") else 1 if key.endswith(".lora_B.weight") else None
        if axis is not None and (len(shape) < 2 or shape[axis] not in ranks):
            return Finding(False, f"{key[:100]} has shape {shape}, which does not fit r = {facts.config.get('r')}")
    return None


def _peft_start(facts: Facts) -> Finding | None:
    start = shifting_start(facts.config)
    if start is None:
        return None
    return Finding(True, f"the base model is the untouched one: init_lora_weights={start} changes its weights on loading")


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _vllm_rank(facts: Facts) -> Finding | None:
    rank = _rank(facts)
    if rank > _VLLM_RANKS[-1]:
        return Finding(False, f"rank {rank} is above the largest max_lora_rank, {_VLLM_RANKS[-1]}", _MERGE)
    if rank > _VLLM_DEFAULT_RANK:
        needed = next(value for value in _VLLM_RANKS if value >= rank)
        return Finding(True, f"started with --max-lora-rank {needed}", f"rank {rank}, the default takes {_VLLM_DEFAULT_RANK}")
    return None


def _vllm_settings(facts: Facts) -> Finding | None:
    if facts.config.get("bias") not in (None, "none"):
        return Finding(False, f"bias is {str(facts.config['bias'])[:20]}, and biases of adapters are refused", _MERGE)
    keys = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
    setting = _set(facts.config, *keys, "alora_invocation_tokens", "use_qalora", "use_bdlora")
    return Finding(False, f"{setting} is set, which vLLM does not serve", _MERGE) if setting else None


def _vllm_patterns(facts: Facts) -> Finding | None:
    setting = _set(facts.config, "rank_pattern", "alpha_pattern")
    return Finding(False, f"{setting} is set, but every module is scaled by the one lora_alpha / r", _ONE_SCALING) if setting else None


def _vllm_tensors(facts: Facts) -> Finding | None:
    odd = _odd_tensors(facts)
    return Finding(False, f"{odd[:100]} is not a LoRA factor", _MERGE) if odd else None


def _vllm_outer(facts: Facts) -> Finding | None:
    outer = sorted({name for name in _modules(facts) if name.rsplit(".", 1)[-1] in _OUTER})
    return Finding(True, f"its class for this base model adapts {outer[0]}") if outer else None


def _vllm_task(facts: Facts) -> Finding | None:
    if facts.config.get("task_type") == "SEQ_2_SEQ_LM":
        return Finding(False, "adapters of encoder-decoders are not served", _MERGE)
    if facts.config.get("fan_in_fan_out"):
        return Finding(False, "models with Conv1D layers, such as GPT-2, take no adapters", _MERGE)
    return None


def _vllm_wrapper(facts: Facts) -> Finding | None:
    """Names of the text-only class, of a base model that vLLM may load in a wrapper for images."""
    text_alone = sorted(name for name in _modules(facts) if _OF_TEXT_CLASS.match(name))
    base = str(facts.config.get("base_model_name_or_path"))
    if not text_alone or facts.wrapper is False or (facts.wrapper is None and not _WRAPPED.search(base)):
        return None
    text = (
        f"{text_alone[0][:80]} is a name of the text-only class: in vLLM's wrapper for images it matches nothing and does nothing, silently"
    )
    if facts.wrapper:
        return Finding(False, text, _MERGE)
    return Finding(True, f"{base[:60]} is served as its text-only class", text)


# --- SGLang -----------------------------------------------------------------------------------------------------------


def _sglang_settings(facts: Facts) -> Finding | None:
    if facts.config.get("bias") not in (None, "none"):
        return Finding(False, f"bias is {str(facts.config['bias'])[:20]}, and biases of adapters are not served", _MERGE)
    keys = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
    setting = _set(facts.config, *keys)
    return Finding(False, f"{setting} is set, which SGLang does not serve", _MERGE) if setting else None


def _sglang_scaling(facts: Facts) -> Finding | None:
    setting = _set(facts.config, "use_rslora", "rank_pattern", "alpha_pattern")
    return Finding(False, f"{setting} is set, but every module is scaled by the one lora_alpha / r", _ONE_SCALING) if setting else None


def _sglang_outer(facts: Facts) -> Finding | None:
    outer = sorted({name for name in _modules(facts) if name.rsplit(".", 1)[-1] in _OUTER})
    return Finding(True, f"started with --lora-target-modules that name {outer[0].rsplit('.', 1)[-1]}") if outer else None


# --- Ollama and MLX ---------------------------------------------------------------------------------------------------


def _ollama_adapter(facts: Facts) -> Finding:
    return Finding(
        False,
        "`ollama create` refuses ADAPTER since 0.34.1",
        "`lorag export ADAPTER --merge --out DIR`, and `ollama create` from the model; older versions take what --gguf writes",
    )


def _mlx_format(facts: Facts) -> Finding:
    return Finding(True, "exported first", "`lorag export ADAPTER --mlx --out DIR`: mlx-lm reads a format of its own")


def _mlx_names(facts: Facts) -> Finding | None:
    odd = sorted(name for name in _modules(facts) if not _OF_TEXT_CLASS.match(name) and name != "lm_head")
    return Finding(False, f"mlx-lm has no module {odd[0][:80]}, and would pass over it", _MERGE) if odd else None


def _mlx_tensors(facts: Facts) -> Finding | None:
    odd = _odd_tensors(facts, ".base_layer.weight")
    return Finding(False, f"{odd[:100]} is not a LoRA factor", _MERGE) if odd else None


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _gguf_scaling(facts: Facts) -> Finding | None:
    setting = _set(facts.config, "use_rslora", "alpha_pattern")
    if setting:
        remedy = "`lorag export ADAPTER --gguf --out FILE` folds it into the factors"
        return Finding(False, f"its converter ignores {setting}: every module is scaled by lora_alpha / r", remedy)
    if facts.config.get("lora_alpha") == 0:
        return Finding(False, "lora_alpha is 0, which is taken for a scaling of 1", "delete the adapter: it changes nothing")
    return None


def _gguf_tensors(facts: Facts) -> Finding | None:
    odd = _odd_tensors(facts, "_layernorm", ".norm", ".base_layer.weight")
    return Finding(False, f"the converter stops at {odd[:100]}, which is not a LoRA factor", _MERGE) if odd else None


def _gguf_transposed(facts: Facts) -> Finding | None:
    if not facts.config.get("fan_in_fan_out"):
        return None
    return Finding(False, "factors of Conv1D layers, as in GPT-2, would be transposed", _MERGE)


def _gguf_layers(facts: Facts) -> Finding | None:
    replicated = facts.config.get("layer_replication")
    return Finding(False, "layer_replication is set, but the base model keeps its layers", _MERGE) if replicated else None


def _gguf_outer(facts: Facts) -> Finding | None:
    heads = sorted({name for name in _modules(facts) if name.rsplit(".", 1)[-1] == "lm_head"})
    return Finding(True, f"the base model does not tie {heads[0]} to its embeddings") if heads else None


def _gguf_base(facts: Facts) -> Finding | None:
    name = facts.config.get("base_model_name_or_path")
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return None
    return Finding(
        True, "given the base model: `lorag export --gguf --base-model`, or the converter's --base DIR", "the adapter names none of the hub"
    )


TARGETS: Mapping[str, Sequence[Rule]] = {
    "PEFT": (
        Rule("type", _type),
        Rule("prefix", _peft_prefix),
        Rule("pairs", _pairs),
        Rule("shapes", _peft_shapes),
        Rule("finite", _finite),
        Rule("start", _peft_start),
    ),
    "transformers": (
        Rule("type", _type),
        Rule("pairs", _pairs),
        Rule("shapes", _peft_shapes),
        Rule("finite", _finite),
        Rule("start", _peft_start),
    ),
    "vLLM": (
        Rule("type", _type),
        Rule("rank", _vllm_rank),
        Rule("settings", _vllm_settings),
        Rule("patterns", _vllm_patterns),
        Rule("tensors", _vllm_tensors),
        Rule("pairs", _pairs),
        Rule("outer", _vllm_outer),
        Rule("start", _foreign_start),
        Rule("task", _vllm_task),
        Rule("wrapper", _vllm_wrapper),
        Rule("finite", _finite),
    ),
    "SGLang": (
        Rule("type", _type),
        Rule("settings", _sglang_settings),
        Rule("scaling", _sglang_scaling),
        Rule("tensors", _vllm_tensors),
        Rule("pairs", _pairs),
        Rule("outer", _sglang_outer),
        Rule("start", _foreign_start),
        Rule("finite", _finite),
    ),
    "llama.cpp": (
        Rule("type", _type),
        Rule("scaling", _gguf_scaling),
        Rule("tensors", _gguf_tensors),
        Rule("pairs", _pairs),
        Rule("transposed", _gguf_transposed),
        Rule("outer", _gguf_outer),
        Rule("start", _foreign_start),
        Rule("layers", _gguf_layers),
        Rule("base", _gguf_base),
        Rule("finite", _finite),
    ),
    "Ollama": (Rule("adapter", _ollama_adapter),),
    "MLX": (
        Rule("type", _type),
        Rule("format", _mlx_format),
        Rule("names", _mlx_names),
        Rule("tensors", _mlx_tensors),
        Rule("pairs", _pairs),
        Rule("start", _foreign_start),
        Rule("finite", _finite),
    ),
}


def check_portability(facts: Facts) -> list[Verdict]:
    """Asks every rule of every program.

    Args:
        facts: What the adapter's files state.

    Returns:
        One verdict per program, in the order of `TARGETS`.
    """
    return [Verdict(target, tuple(f for rule in rules if (f := rule.find(facts)) is not None)) for target, rules in TARGETS.items()]
