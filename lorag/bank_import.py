"""Bring PEFT LoRA folders into a bank: validated, folded to one rank and scaling, compared with what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorag.adapter import CONFIG, LoraAdapter
from lorag.artifacts import read_json, slug
from lorag.bank import AdapterBank, Expert
from lorag.base_model import locate
from lorag.errors import AdapterError, BaseModelError
from lorag.weight_space import SharedSubspace

__all__ = ["add_folder"]

_MOST_COMPARED = 64


def add_folder(
    bank_folder: str | Path,
    folder: str | Path,
    descriptions: Sequence[str],
    *,
    name: str | None = None,
    licence: str = "unknown",
) -> tuple[Expert, float | None]:
    """Adds one adapter to a bank.

    Args:
        bank_folder: The bank.
        folder: A PEFT LoRA folder of the bank's base model. Modules of the bank's layout that it lacks count as unchanged.
        descriptions: What its task is. Without one, that of its lorag.json is used.
        name: Its name in the bank; by default made from the folder's name.
        licence: Licence of the adapter.

    Returns:
        The new entry, and the share of its energy that lies in the subspace of the other experts (None without others).

    Raises:
        AdapterError: If it is not a plain LoRA adapter of the bank's layout, or nothing says what it is for.
        BaseModelError: If it names another base model.
    """
    bank = AdapterBank.from_pretrained(bank_folder)
    folder = Path(folder)
    adapter = LoraAdapter.from_pretrained(folder, bank.base.layout, allow_missing=True)
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    own = bank.base.model.name
    if named and named != own and str(named) != locate(own):
        raise BaseModelError(
            f"{folder} was made for another base model", got=str(named)[:120], expected=own, remedy="A bank has one base model."
        )
    if not descriptions and adapter.info.get("description"):
        descriptions = [str(adapter.info["description"])]
    if not descriptions:
        raise AdapterError(f"nothing says what {folder} is for", remedy='Give it with --description "…".')
    energy = None
    if len(bank):
        compared = bank.names[:: max(1, len(bank) // _MOST_COMPARED)]
        energy = SharedSubspace.fit(lambda: bank.adapters(compared), bank.base.layout).energy(adapter)
    key = name if name is not None else slug(folder.resolve().name)
    bank = bank.add([(key, descriptions, [adapter])], details={key: {"license": licence}})
    return bank[key], energy
