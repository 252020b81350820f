"""The two calls that most users need: descriptions to adapters."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.bank.bank import AdapterBank, find_bank
from lorag.errors import GeneratorError
from lorag.files.artifacts import sha256
from lorag.generator.files import MANIFEST, find_generator
from lorag.generator.lora_generator import LoraGenerator

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = ["DEFAULT", "default_generator", "generate_lora", "generate_loras", "open_generator"]

DEFAULT = "sandbox"
_KEPT = 2  # generators that stay open: a user compares two, and each may have an embedder of its own

_opened: OrderedDict[tuple[str, str], LoraGenerator] = OrderedDict()
_lock = threading.Lock()


def open_generator(name: str | Path | None = None, *, device: str = "auto") -> LoraGenerator:
    """A generator by name, folder or hub id, opened once: it is opened again only when its files have changed.

    Args:
        name: Name of a shipped one, such as "sandbox", a folder or a hub id; None is the default.
        device: Where the embedder runs.

    Raises:
        ArtifactError: If there is none, or it is not complete.
        GeneratorError: If its parts do not fit together.
    """
    folder = find_generator(DEFAULT if name is None else name)
    # The manifest states the digest of all other files.
    key = sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else str(folder), device
    with _lock:
        if key not in _opened:
            _opened[key] = LoraGenerator.from_pretrained(folder, device=device)
            while len(_opened) > _KEPT:
                _opened.popitem(last=False)
        _opened.move_to_end(key)
        return _opened[key]


def default_generator() -> LoraGenerator:
    """The shipped generator that is used where none is named."""
    return open_generator()


def generate_lora(
    description: str,
    *,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
    rank: int | None = None,
    examples: Sequence[tuple[str, str]] = (),
    refine_steps: int = 0,
    on_unknown: str = "warn",
    bank: AdapterBank | str | Path | None = None,
    details: Sequence[str] = (),
) -> LoraAdapter:
    """Turns the description of a task into a LoRA adapter, in one pass: no data, no fine-tuning.

    Args:
        description: What the adapter should do, such as "summarise legal text".
        generator: A generator, its folder or hub id, or the name of a shipped one, such as "sandbox"; by default the shipped one.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        rank: Rank of the adapter; by default the generator's.
        examples: (input, output) of the task, if there happen to be some.
        refine_steps: Gradient steps on the examples, from the generated adapter.
        on_unknown: What becomes of a description that the gate refuses, because the bank has nothing near it: "warn",
            "raise", "fallback" (an adapter that changes nothing) or "ignore" (the gate is not asked).
        bank: The generator's bank, its folder or hub id, or "sandbox": a known task then gets its own expert, a close one a fusion.
        details: More texts on the task, such as `read_skill("SKILL.md").pieces`: those that are about the same as the description are
            read with it; `info["details"]` says which.

    Returns:
        The adapter: `save_pretrained(folder)` writes it for PEFT, `apply_to(model)` loads it; `info["gate"]` says how far
        to trust it, and by which evidence.

    Raises:
        DescriptionError: If the description is empty, too long or not text.
        GeneratorError: If the generator has no adapters of the rank.
        TaskError: If the examples are not pairs of texts, or are missing where `refine_steps` needs them.
        UnknownTaskError: If the gate refuses the description and `on_unknown` is "raise".
    """
    return _open(generator).generate(
        description,
        seed=seed,
        strength=strength,
        rank=rank,
        examples=examples,
        refine_steps=refine_steps,
        on_unknown=on_unknown,
        bank=None if bank is None else find_bank(bank),
        details=details,
    )


def generate_loras(
    descriptions: Sequence[str],
    *,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
    rank: int | None = None,
    on_unknown: str = "warn",
) -> list[LoraAdapter]:
    """`generate_lora` for several descriptions; each adapter is the same, byte for byte, as if made alone."""
    if isinstance(descriptions, str):
        raise GeneratorError("descriptions must be a list", got="one str", remedy="Use generate_lora for one description.")
    return list(_open(generator).generate_many(descriptions, seed=seed, strength=strength, rank=rank, on_unknown=on_unknown))


def _open(generator: LoraGenerator | str | Path | None) -> LoraGenerator:
    if generator is None:
        return default_generator()
    return generator if isinstance(generator, LoraGenerator) else open_generator(generator)
