"""A generator's folder: generator.safetensors with all tensors, and generator.json, which comes last and says what they are."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorag import __version__
from lorag.base.runner import BankBase
from lorag.errors import ArtifactError, GeneratorError
from lorag.files.artifacts import GENERATOR_FORMAT, check_manifest, embedded, safe_name, sha256, write_manifest
from lorag.files.hub import fetch
from lorag.files.stored import Count, Number, Stored, Text, Texts
from lorag.files.tensors import load_tensors, read_header, save_tensors
from lorag.generator.gate import Gate
from lorag.methods import method_type
from lorag.spaces import open_space
from lorag.text.conditioning import Conditioner
from lorag.text.embedding import Embedding, TextEmbedder
from lorag.text.spelling import Spelling
from lorag.text.vectors import open_embedder

if TYPE_CHECKING:
    from lorag.generator.lora_generator import LoraGenerator

__all__ = ["DEFAULT", "MANIFEST", "find_generator", "read_parts", "write_generator"]

MANIFEST, _WEIGHTS, _KIND = "generator.json", "generator.safetensors", "generator"

DEFAULT = "sandbox"  # the generator that is used where none is named
_SHIPPED = {"sandbox": "house", "house": "house", "multitask": "multitask", "smollm2": "smollm2"}  # name -> folder in checkpoints/


class _StoredGenerator(Stored):
    """generator.json; parts that have a reader of their own are objects here, and checked there."""

    base: dict[str, Any]
    space: dict[str, Any]
    experts: Texts
    licenses: dict[str, Any] = {}
    method: Text
    settings: dict[str, Any]
    shape: dict[str, Any]
    embedder: Text
    rank: Count
    strength: Number
    origin: dict[str, Any] = {}
    gate: dict[str, Any] | None = None
    words: Text = ""
    files: dict[str, Any]


def find_generator(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a generator.

    Args:
        name: A folder, the name of a shipped generator, or a hub id; a folder wins.
        revision: Revision on the hub.

    Raises:
        ArtifactError: If there is none.
    """
    if not Path(name).is_dir() and isinstance(name, str) and safe_name(name) == name:
        shipped = _shipped()
        if name in shipped:
            return shipped[name]
        expected = f"{', '.join(shipped)}, a folder, or a hub id such as user/name"
        raise ArtifactError(f"no generator {name}", got="neither a folder nor the name of a shipped one", expected=expected)
    return fetch(name, "generator", revision)


def _shipped() -> dict[str, Path]:
    """Folders of the generators that this installation has, by name."""
    folders = {}
    for name, folder in _SHIPPED.items():
        with contextlib.suppress(ArtifactError):  # it may be left out
            folders[name] = embedded(f"checkpoints/{folder}")
    return folders


def write_generator(generator: LoraGenerator, folder: Path) -> str:
    """Writes generator.safetensors, with the settings in its metadata too, and the manifest last.

    Stored values are rounded; the generator takes them over, so that it goes on as the opened one does.

    Returns:
        The revision: a digest of the stored weights.
    """
    space, space_values = generator.space.tensors()
    tensors = {f"space.{name}": value for name, value in space.items()}
    tensors["conditioner.centroids"] = generator.conditioner.centroids.half()  # of unit length: cosines to three decimals
    state = generator.method.state()
    for name, value in state.tensors.items():
        # Matrices in half precision: the experts that they imitate are no more precise.
        half = value.dtype == torch.float32 and value.dim() >= 2 and value.abs().max() < 6e4
        tensors[f"method.{name}"] = (value.half() if half else value).contiguous()
    fields = {
        "kind": _KIND,
        "format": GENERATOR_FORMAT,
        "lorag": __version__,
        "base": generator.base.to_dict(),
        "space": space_values,
        "experts": list(generator.conditioner.names),
        "licenses": dict(generator.licenses),
        "method": generator.method.name,
        "settings": generator.method.values(),
        "shape": state.shape,
        "embedder": generator.embedder.name,
        "rank": generator.rank,
        "strength": generator.strength,
        "origin": dict(generator.origin),
    }
    if generator.gate is not None:
        fields["gate"] = generator.gate.to_dict()
        tensors |= {"gate.wordings": generator.gate.wordings, "gate.owners": generator.gate.owners}
    save_tensors(folder / _WEIGHTS, tensors, {"lorag": json.dumps(fields, sort_keys=True)})
    write_manifest(folder, MANIFEST, fields | {"words": " ".join(generator.spelling.words)}, [_WEIGHTS])
    stored = {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
    generator.method.restore(stored, state.shape)
    generator.conditioner = Conditioner(generator.conditioner.names, tensors["conditioner.centroids"].float())
    return "sha256:" + sha256(folder / _WEIGHTS)[:16]


def read_parts(folder: Path, embedder: TextEmbedder | None, device: str) -> dict[str, Any]:
    """Reads a generator folder: the arguments of `LoraGenerator`.

    Args:
        folder: The folder.
        embedder: Used instead of loading the embedder that it was fitted with.
        device: Where the embedder runs.

    Raises:
        ArtifactError: If it is not a complete generator of a known format.
        GeneratorError: If its parts do not fit together, or the embedder is another one.
    """
    older = f"Convert it: lorag convert {folder} --out NEW_FOLDER."
    manifest = check_manifest(folder, MANIFEST, _KIND, GENERATOR_FORMAT, older=older)
    stored = _StoredGenerator.read(manifest, f"{folder / MANIFEST} cannot be read", GeneratorError)
    if _WEIGHTS not in stored.files:
        raise GeneratorError(f"{folder / MANIFEST} has no checksum of {_WEIGHTS}")
    read_header(folder / _WEIGHTS)
    tensors = load_tensors(folder / _WEIGHTS)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    base = BankBase.from_dict(stored.base)
    method = method_type(stored.method).with_settings(stored.settings)
    space = open_space(part("space."), stored.space)
    wanted = ["conditioner.centroids", *(() if stored.gate is None else ("gate.wordings", "gate.owners"))]
    try:
        centroids, *of_gate = (tensors[name] for name in wanted)
    except KeyError as error:
        raise GeneratorError(f"{folder / _WEIGHTS} lacks a tensor", expected=error.args[0]) from error
    gate = None if stored.gate is None else Gate.from_dict(stored.gate, *of_gate, modules=len(base.layout), experts=len(stored.experts))
    centroids = centroids.float().clone()  # into memory of its own, aligned as in training: sums round alike
    if space.layout != base.layout or centroids.dim() != 2 or len(centroids) != len(stored.experts):
        raise GeneratorError(f"{folder}: weight space, base and experts do not fit together")
    conditioner = Conditioner(stored.experts, centroids)
    method.restore(part("method."), stored.shape)
    vector = torch.nn.functional.normalize(torch.ones(centroids.shape[1]), dim=0)
    method.try_out(conditioner(Embedding(vector, vector[None])), space.size, lambda codes: space.decode(codes, stored.rank))
    if embedder is None:
        embedder = open_embedder(stored.embedder, device)
    if embedder.name != stored.embedder or embedder.size != centroids.shape[1]:
        got = f"{embedder.name}, size {embedder.size}"
        raise GeneratorError("the text embedder is not the generator's", got=got, expected=stored.embedder)
    return {
        "base": base,
        "space": space,
        "conditioner": conditioner,
        "method": method,
        "embedder": embedder,
        "rank": stored.rank,
        "strength": stored.strength,
        "origin": stored.origin,
        "licenses": {name: str(text) for name, text in stored.licenses.items()},
        "revision": "sha256:" + stored.files[_WEIGHTS]["sha256"][:16],
        "gate": gate,
        "spelling": Spelling(stored.words.split()),
    }
