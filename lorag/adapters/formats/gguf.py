"""LoRA adapters in GGUF files, as llama.cpp loads them, for base models of llama's, Qwen's and Gemma's kind.

llama.cpp stores the rows of llama's q and k weights in another order than transformers (its rotary embedding turns neighbouring
values, not halves), and so it must be with the rows of B: `convert_hf_to_gguf.py` permutes them for llama and Mistral, and for no
other architecture here. How many heads there are says the base model's config, which a file of lorag's repeats.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.adapters.formats.format import TIED, AdapterFormat, Base, PeftForm, Update, peft_form
from lorag.adapters.formats.gguf_header import GgufHeader, is_gguf, read_gguf_header, says_adapter
from lorag.base.base_model import stored_config
from lorag.errors import AdapterError, ArtifactError, BaseModelError, MissingDependencyError
from lorag.files.artifacts import parse_json

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = ["Gguf"]

# transformers' model type -> llama.cpp's architecture. All of them call their linear layers alike.
_ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"},
}
_PERMUTED = ("llama",)
_PARTS = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"},
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
}
_MODULES = {part: module for module, part in _PARTS.items()}
_IN_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.weight")
_IN_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,5})\.([\w.]+)")
_SIDES = {"lora_a": "A", "lora_b": "B"}
_HUB = "https://huggingface.co/"
_PROVENANCE = "lorag.provenance"  # lorag.json, as one text


class Gguf(AdapterFormat):
    """`general.type` is "adapter"; tensors are named blk.N.attn_q.weight.lora_a (r, i) and .lora_b (o, r)."""

    name = "gguf"
    title = "GGUF"
    writes = "file"
    next_step = "llama-cli -m BASE.gguf --lora {out}"
    version = 2
    start = 2**16  # bytes of a file in which an adapter says that it is one

    @staticmethod
    def says_adapter(start: bytes) -> bool:
        """Whether the first bytes of a file state `general.type` adapter."""
        return says_adapter(start)

    def weights(self, folder: Path) -> list[Path]:
        """GGUF files that say that they are adapters; models are left where they are."""
        return [path for path in sorted(folder.glob("*.gguf")) if path.is_file() and _is_adapter(path)]

    def recognises(self, file: Path) -> bool:
        """By the first four bytes."""
        return is_gguf(file)

    def read(self, file: Path, base: Base) -> PeftForm:
        """Reads adapters of any type that the package gguf dequantises."""
        header = read_gguf_header(file)
        fields = header.fields
        if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
            got = f"a {fields.get('general.type', 'model')} of {fields.get('general.architecture')}"
            remedy = "A model belongs where a base model is named." if fields.get("general.type") != "adapter" else None
            raise AdapterError(f"GGUF file {file} is not a LoRA adapter", got=got, expected="general.type adapter", remedy=remedy)
        architecture = str(fields.get("general.architecture"))
        if architecture not in _ARCHITECTURES.values():
            raise BaseModelError(
                f"GGUF file {file} belongs to an architecture that lorag does not know", got=architecture, expected=_architectures()
            )
        alpha = fields.get("adapter.lora.alpha", 0.0)
        info = _info(file, fields)
        stated = _stated_base(fields) or _known_base(info)
        heads = self._heads(file, header, base, stated) if architecture in _PERMUTED else {}
        values = _values(file, header)
        composite = base.model is not None and hasattr(stored_config(base.model.name, base.model.revision), "text_config")
        updates = {}
        for name, (a, b) in _pairs(file, values).items():
            part, module = _module(file, name, composite)
            if part in heads:
                b = _unpermuted(b, heads[part], name)
            scaling = alpha / a.shape[0] if alpha else 1.0  # llama.cpp takes 0 for a scaling of 1
            updates[module] = Update(a, b, scaling)
        return peft_form(updates, base_model=stated, task_type="CAUSAL_LM", info=info)

    @staticmethod
    def _heads(file: Path, header: GgufHeader, base: Base, stated: str | None) -> dict[str, int]:
        """Heads of q and k: what a given base model says, else the file, else the base model that the file names."""
        if base.model is None:
            queries, keys = (header.fields.get(f"llama.attention.head_count{end}") for end in ("", "_kv"))
            if isinstance(queries, int) and isinstance(keys, int) and queries > 0 and keys > 0:
                return {"attn_q": queries, "attn_k": keys}
        if base.model is None and stated is None:
            raise BaseModelError(
                f"GGUF file {file} does not say how its rows are ordered",
                got="an adapter of a Llama, without the number of its heads and without a base model",
                expected="the base model, whose config knows it",
                remedy="Name it: --base-model ID_OR_FOLDER, or --base for a new bank.",
            )
        name, revision = (str(stated), None) if base.model is None else (base.model.name, base.model.revision)
        config = _text_config(name, revision)
        if _ARCHITECTURES.get(str(config.model_type)) not in _PERMUTED:
            got = f"{name} of type {config.model_type}"
            raise BaseModelError(f"GGUF file {file} belongs to a base model of another architecture", got=got, expected="llama or mistral")
        return _config_heads(config)

    def write(self, adapter: LoraAdapter, out: Path, base: Base) -> None:
        """Writes fp32, which is exact, with the architecture's own order of rows; lora_alpha states the scaling."""
        writer_type = _library().GGUFWriter
        model = base.model or adapter.stated_base()
        config = _text_config(model.name, model.revision)
        kind = str(config.model_type)
        if kind not in _ARCHITECTURES:
            remedy = "Merge it with --merge, and convert the model with llama.cpp's convert_hf_to_gguf.py."
            got = f"{model.name} of type {kind}"
            raise BaseModelError("adapters of this base model cannot be written as GGUF", got=got, expected=_architectures(), remedy=remedy)
        architecture = _ARCHITECTURES[kind]
        heads = _config_heads(config) if architecture in _PERMUTED else {}
        tensors: dict[str, Tensor] = {}
        for module, (a, b) in adapter.factors.tensors.items():
            name = _tensor_name(module, bool(getattr(config, "tie_word_embeddings", False)))
            part = name.split(".")[2] if name.startswith("blk.") else name
            values = b.float()
            tensors[f"{name}.lora_a"] = a.float().contiguous()
            tensors[f"{name}.lora_b"] = _permuted(values, heads[part], name) if part in heads else values.contiguous()
        writer = writer_type(out, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.alpha)
        if heads:
            writer.add_head_count(heads["attn_q"])
            writer.add_head_count_kv(heads["attn_k"])
        _state_origin(writer, adapter, model.name)
        for name in sorted(tensors):
            writer.add_tensor(name, tensors[name].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _architectures() -> str:
    return f"one of {', '.join(_ARCHITECTURES)}"


def _library() -> Any:  # noqa: ANN401 - the package
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("adapters in GGUF files need the package gguf", remedy="Install it: pip install 'lorag[gguf]'")
    import gguf

    return gguf


def _is_adapter(path: Path) -> bool:
    try:
        return read_gguf_header(path).fields.get("general.type") == "adapter"
    except ArtifactError:  # a model, whose header is larger; a damaged file is refused where it is named
        return False


# --- heads and rows ---------------------------------------------------------------------------------------------------


def _text_config(name: str, revision: str | None) -> Any:  # noqa: ANN401 - a config of transformers
    """The config of a base model's language model."""
    config: Any = stored_config(name, revision)
    return config.get_text_config() if hasattr(config, "text_config") else config


def _config_heads(config: Any) -> dict[str, int]:  # noqa: ANN401
    queries = int(config.num_attention_heads)
    return {"attn_q": queries, "attn_k": int(getattr(config, "num_key_value_heads", None) or queries)}


def _permuted(b: Tensor, heads: int, name: str) -> Tensor:
    """Rows (o = heads · 2 · d) of B in llama.cpp's order: of each head first and second half by turns."""
    _check_heads(b, heads, name)
    return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape).contiguous()


def _unpermuted(b: Tensor, heads: int, name: str) -> Tensor:
    """The reverse of `_permuted`."""
    _check_heads(b, heads, name)
    return b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape).contiguous()


def _check_heads(b: Tensor, heads: int, name: str) -> None:
    if b.shape[0] % (2 * heads):
        raise BaseModelError(f"{name} does not fit the base model", got=f"{b.shape[0]} rows", expected=f"a multiple of {2 * heads}")


# --- names ------------------------------------------------------------------------------------------------------------


def _tensor_name(module: str, tied: bool) -> str:
    """llama.cpp's name of a module's weight."""
    if module == "lm_head" and not tied:
        return "output.weight"
    match = _IN_LAYER.fullmatch(module)
    if match is None or match[2] not in _PARTS:
        head = module == "lm_head"
        why = "a head that the base model ties to its embeddings" if head else module
        raise AdapterError(
            "the adapter changes a module that llama.cpp's adapters cannot",
            got=why[:120],
            expected=f"{', '.join(_PARTS)} of a layer",
            remedy=TIED if head else "Merge it into the base model: --merge.",
        )
    return f"blk.{match[1]}.{_PARTS[match[2]]}.weight"


def _module(file: Path, name: str, composite: bool) -> tuple[str, str]:
    """Part and path of the module of one of llama.cpp's names."""
    if name == "output.weight":
        return "output", "lm_head"
    match = _IN_BLOCK.fullmatch(name)
    if match is None or match[2] not in _MODULES:
        expected = f"blk.N. and one of {', '.join(_MODULES)}"
        raise AdapterError(f"GGUF file {file} changes a tensor that lorag does not know", got=name[:120], expected=expected)
    return match[2], f"model.{'language_model.' if composite else ''}layers.{int(match[1])}.{_MODULES[match[2]]}"


def _pairs(file: Path, values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the tensor that they change."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in values.items():
        name, _, side = key.rpartition(".")
        if side not in _SIDES or value.dim() != 2:
            got = f"{key[:120]} of shape {tuple(value.shape)}"
            raise AdapterError(f"GGUF file {file} holds more than plain LoRA", got=got, expected="matrices .lora_a and .lora_b")
        sides.setdefault(name, {})[_SIDES[side]] = value
    for name, factors in sides.items():
        if len(factors) < 2:
            raise AdapterError(f"GGUF file {file} is not whole", got=f"{name[:120]} with {next(iter(factors))} alone", expected="A and B")
        a, b = factors["A"], factors["B"]
        if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise AdapterError(f"factors of {name[:120]} do not fit each other", got=f"A {tuple(a.shape)}, B {tuple(b.shape)}")
    if not sides:
        raise AdapterError(f"GGUF file {file} holds no tensors", remedy="Convert the adapter again.")
    return {name: (factors["A"], factors["B"]) for name, factors in sides.items()}


# --- values and origin ------------------------------------------------------------------------------------------------


def _values(file: Path, header: GgufHeader) -> dict[str, Tensor]:
    """All tensors, dequantised to fp32."""
    library = _library()
    try:
        reader = library.GGUFReader(file)
        tensors = {}
        for tensor in reader.tensors:
            values = library.dequantize(tensor.data, tensor.tensor_type)
            tensors[str(tensor.name)] = torch.tensor(values.reshape(header.shapes[str(tensor.name)]), dtype=torch.float32)
    except Exception as error:  # its reader has no errors of its own: a damaged file fails wherever it is met
        got = f"{type(error).__name__}: {error}"[:160]
        raise ArtifactError(f"GGUF file {file} is cut short or damaged", got=got, remedy="Download it again.") from error
    return tensors


def _stated_base(fields: Mapping[str, Any]) -> str | None:
    """The base model's hub id, as llama.cpp's converter writes it."""
    for key in ("general.base_model.0.repo_url", "general.base_model.0.url"):
        address = fields.get(key)
        if isinstance(address, str) and re.fullmatch(re.escape(_HUB) + r"[\w.-]{1,96}/[\w.-]{1,96}/?", address):
            return address.removeprefix(_HUB).rstrip("/")
    return None


def _known_base(info: Mapping[str, Any]) -> str | None:
    """The base model's name in what lorag wrote down: a folder or a name of its own, for which llama.cpp's converter has no place."""
    base = info.get("base_model")
    name = base.get("name") if isinstance(base, dict) else None
    return name if isinstance(name, str) and name else None


def _info(file: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of the adapter: lorag's own words, else the general ones."""
    text = fields.get(_PROVENANCE)
    if isinstance(text, str):
        provenance = parse_json(text, f"{_PROVENANCE} in {file}")
        if not isinstance(provenance, dict):
            raise ArtifactError(f"{_PROVENANCE} in {file} cannot be read", got=type(provenance).__name__, expected="a JSON object")
        return provenance
    texts = {"description": fields.get("general.description"), "license": fields.get("general.license")}
    return {key: text.strip() for key, text in texts.items() if isinstance(text, str) and text.strip()}


def _state_origin(writer: Any, adapter: LoraAdapter, base_name: str) -> None:  # noqa: ANN401 - the library's writer
    info = adapter.info
    for add, key in ((writer.add_description, "description"), (writer.add_license, "license")):
        if isinstance(info.get(key), str):
            add(info[key])
    named = adapter.base_model if adapter.base_model and _on_hub(adapter.base_model) else base_name
    if _on_hub(named):
        organisation, _, name = named.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organisation)
        writer.add_base_model_repo_url(0, _HUB + named)
    writer.add_string(_PROVENANCE, json.dumps(dict(info), sort_keys=True, allow_nan=False, ensure_ascii=False))


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and not Path(name).exists()
