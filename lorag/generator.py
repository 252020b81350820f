"""From a description to an adapter: embedder, conditioner, method and weight space behind one door."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorag import __version__
from lorag.adapter import LoraAdapter
from lorag.artifacts import check_manifest, embedded, sha256, write_manifest
from lorag.bank import BankBase
from lorag.base_model import TASK_TYPES
from lorag.conditioning import Condition, Conditioner
from lorag.embedding import CachedEmbedder, SentenceEmbedder, TextEmbedder
from lorag.errors import GeneratorError, LoragError
from lorag.generators import Generator, generator_type
from lorag.hub import fetch
from lorag.objectives import Objective, make_objective
from lorag.provenance import base_fields, licence_of, parents, public_name, versions
from lorag.publishing import push_generator_folder
from lorag.refinement import check_examples, refine
from lorag.row_adapters import RowAdapters
from lorag.tasks import check_description
from lorag.tensor_files import load_tensors, read_header, save_tensors
from lorag.weight_space import FlatFactors, SharedSubspace, weight_space_from_tensors

__all__ = ["LoraGenerator", "default_generator", "generate_lora", "generate_loras"]

_MANIFEST, _WEIGHTS, _KIND, _FORMAT = "generator.json", "generator.safetensors", "generator", 1
DEFAULT = "checkpoints/house"


@dataclass
class LoraGenerator:
    """A fitted generator with all that it needs to serve descriptions.

    Attributes:
        base: Base model, layout and objective of the bank that it was fitted on.
        space: Turns codes into factors.
        conditioner: Compares descriptions with the bank's.
        method: Turns conditions into codes.
        embedder: Embeds descriptions.
        rank: Rank of the adapters that it writes.
        strength: Factor on ΔW, chosen on held-out training tasks.
        origin: How it was trained: settings, seed, bank, validation.
        licenses: Licence of each expert by name, as the bank states it.
        revision: Digest of the stored weights; "unsaved" before saving.
    """

    base: BankBase
    space: SharedSubspace | FlatFactors
    conditioner: Conditioner
    method: Generator
    embedder: TextEmbedder
    rank: int
    strength: float = 1.0
    origin: Mapping[str, Any] = field(default_factory=dict)
    licenses: Mapping[str, str] = field(default_factory=dict)
    revision: str = "unsaved"
    _runtime: tuple[RowAdapters, Objective] | None = field(default=None, repr=False, compare=False)

    # --- use -----------------------------------------------------------------------------------------------------

    def condition(self, description: str, examples: Sequence[tuple[str, str]] = ()) -> Condition:
        """Embeds a description, alone, and compares it with the bank's; inputs of examples give it a task vector."""
        condition = self.conditioner(self.embedder.embed([check_description(description)])[0])
        if not examples:
            return condition
        rows, objective = self.runtime()
        states = objective.hidden(rows.model, [text for text, _ in examples])
        return replace(condition, task_vector=states.mean(0).cpu())

    def runtime(self) -> tuple[RowAdapters, Objective]:
        """The base model, loaded once, and its objective: needed for examples only."""
        if self._runtime is None:
            model = self.base.model.load()
            objective = make_objective(self.base.objective, self.base.model.tokenizer(), self.base.settings)
            self._runtime = RowAdapters(model, self.base.layout), objective
        return self._runtime

    def generate(
        self,
        description: str,
        *,
        seed: int = 0,
        strength: float = 1.0,
        examples: Sequence[tuple[str, str]] = (),
        refine_steps: int = 0,
    ) -> LoraAdapter:
        """Makes an adapter for a task that is only described.

        Args:
            description: What the adapter should do, at most 4,096 characters.
            seed: Seed of methods that sample; the same seed gives the same bytes.
            strength: Factor on ΔW, on top of the generator's own.
            examples: (input, output) of the task, if there are some: they condition the methods that can use them.
            refine_steps: Gradient steps on the examples, from the generated adapter; 0 takes it as generated.

        Returns:
            The adapter; its `info` says how it came about.

        Raises:
            DescriptionError: If the description cannot be used.
            TaskError: If the examples cannot be.
        """
        examples = check_examples(examples, refine_steps)
        condition = self.condition(description, examples)
        codes = self.method.generate(condition, torch.Generator().manual_seed(seed))
        (factors,) = self.space.decode(codes, self.rank)
        model = self.base.model
        adapter = LoraAdapter(self.base.layout, factors, float(self.rank), model.name, TASK_TYPES[model.kind])
        adapter = adapter.scaled(self.strength * strength)
        if refine_steps:
            adapter = refine(*self.runtime(), adapter, examples, refine_steps, seed)
        norms, shares = adapter.norms(), self.method.shares(condition)
        info: dict[str, Any] = {
            "description": description.strip(),
            "method": self.method.name,
            "neighbours": [list(pair) for pair in condition.neighbours],
            "novelty": round(condition.novelty, 4),
            "seed": seed,
            "strength": strength,
            "examples": len(examples),
            "refine_steps": refine_steps,
            "generator": {"revision": self.revision, "strength": self.strength},
            "base_model": base_fields(model, self.base.identity, self.base.layout),
            "embedder": public_name(self.embedder.name),
            "parents": parents(self.conditioner.names, self.licenses, None if shares is None else shares.tolist()),
            "norm": round(sum(norm**2 for norm in norms.values()) ** 0.5, 6),
            "norms": {name: round(norm, 6) for name, norm in norms.items()},
            "versions": versions(),
        }
        info["license"] = licence_of(info).name
        return LoraAdapter(adapter.layout, adapter.factors, adapter.alpha, adapter.base_model, adapter.task_type, info)

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes generator.safetensors, with the settings in its metadata too, and the manifest last.

        Stored values are rounded; this generator takes them over, so that it goes on as the opened one does.
        """
        folder = Path(folder)
        space, space_values = self.space.tensors()
        tensors = {f"space.{name}": value for name, value in space.items()}
        tensors["conditioner.centroids"] = self.conditioner.centroids
        for name, value in self.method.tensors().items():
            # Matrices in half precision: the experts that they imitate are no more precise.
            half = value.dtype == torch.float32 and value.dim() >= 2 and value.abs().max() < 6e4
            tensors[f"method.{name}"] = (value.half() if half else value).contiguous()
        fields = {
            "kind": _KIND,
            "format": _FORMAT,
            "lorag": __version__,
            "base": self.base.to_dict(),
            "space": space_values,
            "experts": list(self.conditioner.names),
            "licenses": dict(self.licenses),
            "method": self.method.name,
            "settings": self.method.values(),
            "embedder": self.embedder.name,
            "rank": self.rank,
            "strength": self.strength,
            "origin": dict(self.origin),
        }
        save_tensors(folder / _WEIGHTS, tensors, {"lorag": json.dumps(fields, sort_keys=True)})
        write_manifest(folder, _MANIFEST, fields, [_WEIGHTS])
        self.method.restore({name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")})
        self.revision = "sha256:" + sha256(folder / _WEIGHTS)[:16]
        return folder

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, embedder: TextEmbedder | None = None, device: str = "auto", revision: str | None = None
    ) -> LoraGenerator:
        """Opens a generator folder, or one on the hub.

        Args:
            path: Folder or hub id.
            embedder: Used instead of loading the embedder that it was fitted with.
            device: Where the embedder runs.
            revision: Revision on the hub.

        Raises:
            ArtifactError: If it is not a complete generator of a known format.
            GeneratorError: If its parts do not fit together, or the embedder is another one.
        """
        folder = fetch(path, "generator", revision)
        manifest = check_manifest(folder, _MANIFEST, _KIND, _FORMAT)
        read_header(folder / _WEIGHTS)
        tensors = load_tensors(folder / _WEIGHTS)

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        try:
            base = BankBase.from_dict(manifest["base"])
            method = generator_type(manifest["method"]).with_settings(manifest["settings"])
            space = weight_space_from_tensors(part("space."), manifest["space"])
            centroids = tensors["conditioner.centroids"].float()
            names, rank, strength = list(manifest["experts"]), int(manifest["rank"]), float(manifest["strength"])
            wanted = str(manifest["embedder"])
            licenses = {str(name): str(text) for name, text in manifest.get("licenses", {}).items()}
            digest = str(manifest["files"][_WEIGHTS]["sha256"])
            if not all(isinstance(name, str) for name in names):
                raise TypeError("an expert's name that is no text")
        except LoragError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise GeneratorError(f"{folder / _MANIFEST} cannot be read", got=repr(error)[:120]) from error
        if space.layout != base.layout or centroids.dim() != 2 or len(centroids) != len(names):
            raise GeneratorError(f"{folder}: weight space, base and experts do not fit together")
        conditioner = Conditioner(names, centroids)
        method.restore_whole(part("method."), conditioner, space.size, lambda codes: space.decode(codes, rank))
        if embedder is None:
            embedder = CachedEmbedder(SentenceEmbedder.from_pretrained(wanted, device))
        if embedder.name != wanted or embedder.size != centroids.shape[1]:
            raise GeneratorError("the text embedder is not the generator's", got=f"{embedder.name}, size {embedder.size}", expected=wanted)
        return cls(
            base=base,
            space=space,
            conditioner=conditioner,
            method=method,
            embedder=embedder,
            rank=rank,
            strength=strength,
            origin=manifest.get("origin", {}),
            licenses=licenses,
            revision="sha256:" + digest[:16],
        )

    def push_to_hub(self, repository: str, *, private: bool = True) -> str:
        """Publishes the generator, as `save_pretrained` writes it, to user/name and returns the commit's address."""
        with tempfile.TemporaryDirectory(prefix="lorag-") as staging:
            return push_generator_folder(self.save_pretrained(staging), repository, private=private)


@functools.lru_cache(maxsize=1)
def default_generator() -> LoraGenerator:
    """The embedded generator, loaded once."""
    return LoraGenerator.from_pretrained(embedded(DEFAULT))


def generate_lora(
    description: str,
    *,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
    examples: Sequence[tuple[str, str]] = (),
    refine_steps: int = 0,
) -> LoraAdapter:
    """Turns the description of a task into a LoRA adapter, in one pass: no data, no fine-tuning.

    Args:
        description: What the adapter should do, such as "summarise legal text".
        generator: A generator, or its folder or hub id; by default the embedded one.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        examples: (input, output) of the task, if there happen to be some.
        refine_steps: Gradient steps on the examples, from the generated adapter.

    Returns:
        The adapter: `save_pretrained(folder)` writes it for PEFT, `apply_to(model)` loads it.

    Raises:
        DescriptionError: If the description is empty, too long or not text.
        TaskError: If the examples are not pairs of texts, or are missing where `refine_steps` needs them.
    """
    description = check_description(description)
    return _open(generator).generate(description, seed=seed, strength=strength, examples=examples, refine_steps=refine_steps)


def generate_loras(
    descriptions: Sequence[str],
    *,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
) -> list[LoraAdapter]:
    """`generate_lora` for several descriptions; each adapter is the same, byte for byte, as if made alone."""
    if isinstance(descriptions, str):
        raise GeneratorError("descriptions must be a list", got="one str", remedy="Use generate_lora for one description.")
    checked = [check_description(text) for text in descriptions]
    opened = _open(generator)
    return [opened.generate(text, seed=seed, strength=strength) for text in checked]


def _open(generator: LoraGenerator | str | Path | None) -> LoraGenerator:
    if generator is None:
        return default_generator()
    return generator if isinstance(generator, LoraGenerator) else LoraGenerator.from_pretrained(generator)
