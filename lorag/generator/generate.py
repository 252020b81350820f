"""The two calls that most users need: descriptions to adapters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from lorag.adapters.adapter import LoraAdapter
from lorag.bank.bank import AdapterBank, find_bank
from lorag.errors import GeneratorError
from lorag.files.artifacts import embedded
from lorag.generator.lora_generator import LoraGenerator
from lorag.tasks.suite import check_description

__all__ = ["default_generator", "generate_lora", "generate_loras"]

DEFAULT = "checkpoints/house"


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
    on_unknown: str = "warn",
    bank: AdapterBank | str | Path | None = None,
) -> LoraAdapter:
    """Turns the description of a task into a LoRA adapter, in one pass: no data, no fine-tuning.

    Args:
        description: What the adapter should do, such as "summarise legal text".
        generator: A generator, or its folder or hub id; by default the embedded one.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        examples: (input, output) of the task, if there happen to be some.
        refine_steps: Gradient steps on the examples, from the generated adapter.
        on_unknown: What becomes of a description that the gate refuses, because the bank has nothing near it: "warn",
            "raise", "fallback" (an adapter that changes nothing) or "ignore" (the gate is not asked).
        bank: The generator's bank, its folder or hub id, or "sandbox": a known task then gets its own expert, a close one a fusion.

    Returns:
        The adapter: `save_pretrained(folder)` writes it for PEFT, `apply_to(model)` loads it; `info["gate"]` says how far
        to trust it.

    Raises:
        DescriptionError: If the description is empty, too long or not text.
        TaskError: If the examples are not pairs of texts, or are missing where `refine_steps` needs them.
        UnknownTaskError: If the gate refuses the description and `on_unknown` is "raise".
    """
    description = check_description(description)
    return _open(generator).generate(
        description,
        seed=seed,
        strength=strength,
        examples=examples,
        refine_steps=refine_steps,
        on_unknown=on_unknown,
        bank=None if bank is None else find_bank(bank),
    )


def generate_loras(
    descriptions: Sequence[str],
    *,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
    on_unknown: str = "warn",
) -> list[LoraAdapter]:
    """`generate_lora` for several descriptions; each adapter is the same, byte for byte, as if made alone."""
    if isinstance(descriptions, str):
        raise GeneratorError("descriptions must be a list", got="one str", remedy="Use generate_lora for one description.")
    checked = [check_description(text) for text in descriptions]
    return list(_open(generator).generate_many(checked, seed=seed, strength=strength, on_unknown=on_unknown))


def _open(generator: LoraGenerator | str | Path | None) -> LoraGenerator:
    if generator is None:
        return default_generator()
    return generator if isinstance(generator, LoraGenerator) else LoraGenerator.from_pretrained(generator)
