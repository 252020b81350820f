"""Reproduction: how faithfully a generator gives back the experts that it learned from, and what it weighs beside them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.factors import Factors

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.bank.bank import AdapterBank
    from lorag.generator.lora_generator import LoraGenerator

__all__ = ["Reproduction", "bank_bytes", "delta_error", "generator_bytes"]


def delta_error(adapter: LoraAdapter, expert: LoraAdapter) -> float:
    """‖ΔW − ΔW_expert‖_F / ‖ΔW_expert‖_F over all modules, without a matrix of the base model's size.

    Beside an expert that changes nothing, anything else has an error of 1.
    """
    apart = Factors.concatenated([adapter.factors, expert.factors], [1.0, -1.0]).norm()
    whole = expert.factors.norm()
    return apart / whole if whole else float(apart > 0)


def bank_bytes(bank: AdapterBank, names: Sequence[str]) -> int:
    """Bytes that a bank's files take for one adapter, the final checkpoint, of each of these experts."""
    members: dict[str, int] = {}
    for expert in bank.experts:
        for file in filter(None, (expert.file, expert.bases)):
            members[file] = members.get(file, 0) + 1
    sizes = {file: (bank.folder / file).stat().st_size / count for file, count in members.items()}
    chosen = [bank[name] for name in names]
    return round(sum(sizes[expert.file] / expert.checkpoints + (sizes[expert.bases] if expert.bases else 0) for expert in chosen))


def generator_bytes(generator: LoraGenerator) -> int:
    """Bytes of generator.safetensors, whether it was ever saved or not: network or codes, weight space and centroids."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because saving rounds what it saves.
        replace(generator, method=copy.deepcopy(generator.method)).save_pretrained(folder)
        return (Path(folder) / "generator.safetensors").stat().st_size


@dataclass
class Reproduction:
    """Collects generated adapters of known tasks beside the tasks' own experts.

    Attributes:
        bank: The training bank.
        names: The evaluated tasks' experts, in order.
    """

    bank: AdapterBank
    names: Sequence[str]
    _errors: dict[str, list[float]] = field(default_factory=dict)

    def add(self, method: str, adapters: Sequence[LoraAdapter]) -> None:
        """Notes what a method made for each task, for one seed."""
        errors = [delta_error(generated, self.bank.adapter(name)) for generated, name in zip(adapters, self.names, strict=True)]
        self._errors.setdefault(method, []).append(sum(errors) / len(errors))

    def report(self, generators: Mapping[str, Sequence[LoraGenerator]], scores: Mapping[str, float], expert: float) -> dict[str, Any]:
        """For each method that made adapters, four numbers.

        Args:
            generators: The generators by method; the first is weighed.
            scores: Mean score of each method.
            expert: Mean score of the experts.

        Returns:
            `score_kept` (score / the experts' score, None if that is 0), `delta_error` (mean over tasks and seeds), `bytes`
            of generator.safetensors, and `bank_bytes` of one adapter for each expert that it learned from.
        """
        experts = bank_bytes(self.bank, self.bank.names)
        return {
            method: {
                "score_kept": round(scores[method] / expert, 4) if expert else None,
                "delta_error": round(sum(errors) / len(errors), 4),
                "bytes": generator_bytes(generators[method][0]),
                "bank_bytes": experts,
            }
            for method, errors in self._errors.items()
        }
