"""Look at every expert of a bank: what is wrong with it, what is odd about it, and what to do about that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorag.bank.candidates import DUPLICATE, check_norm, check_size
from lorag.bank.index import BankIndex, DescriptionIndex
from lorag.bank.weights_to_text import WeightReader
from lorag.errors import LoragError
from lorag.progress import progress_bar
from lorag.tables import Table, render
from lorag.tasks.descriptions import same_words

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank, Expert
    from lorag.text.embedding import TextEmbedder

__all__ = ["Finding", "check_bank", "format_findings"]

_FOREIGN = 0.3  # share of energy in the bank's bases below which an expert has little to do with the others


@dataclass(frozen=True)
class Finding:
    """What is known of one expert.

    Attributes:
        name: Its name.
        rank: Rank of its factors.
        norm: ‖ΔW‖_F over all modules; None if it cannot be read.
        energy: Share of ‖ΔW‖² that lies in the bank's bases.
        nearest: The expert with the nearest ΔW, and the cosine.
        problem: What is wrong or odd, or None.
        remedy: What to do about it.
        severe: Whether the expert must not be used as it is.
    """

    name: str
    rank: int
    norm: float | None = None
    energy: float | None = None
    nearest: tuple[str, float] | None = None
    problem: str | None = None
    remedy: str | None = None
    severe: bool = False


def check_bank(bank: AdapterBank, *, embedder: TextEmbedder | None = None, quiet: bool = True) -> list[Finding]:
    """Reads every checkpoint of every expert and compares the experts with each other; writes nothing.

    Args:
        bank: The bank.
        embedder: With one, descriptions are compared with what weights say (`WeightReader`).
        quiet: No progress bars.
    """
    broken = {
        expert.name: problem
        for expert, problem in progress_bar(
            bank.check(), desc="reading experts", total=len(bank), disable=quiet or len(bank) < 16, leave=False
        )
        if problem
    }
    index = BankIndex.load(bank, quiet=quiet)
    words: dict[str, list[str]] = {}
    for expert in bank.experts:
        for text in {same_words(text) for text in expert.descriptions}:
            words.setdefault(text, []).append(expert.name)
    doubts: dict[str, str] = {}
    if embedder is not None:
        reader = WeightReader.of_bank(index, DescriptionIndex.load(bank, embedder, quiet=quiet))
        if reader is not None:
            sketches = index.sketches()
            doubts = {name: reader.nearest(sketches[name], 1, but=name)[0][0] for name in reader.doubts()}
    bar = progress_bar(bank.experts, desc="comparing experts", disable=quiet or len(bank) < 16, leave=False)
    return [_finding(bank, index, expert, broken.get(expert.name), words, doubts.get(expert.name)) for expert in bar]


def _finding(
    bank: AdapterBank, index: BankIndex, expert: Expert, broken: str | None, words: dict[str, list[str]], looks_like: str | None
) -> Finding:
    name, rank = expert.name, expert.rank
    remove = f"lorag bank remove {name} --bank {bank.folder}"
    if name not in index.norms:
        return Finding(name, rank, problem=broken, remedy=f"{remove}, then add it again from its source", severe=True)
    adapter, norm = bank.adapter(name), index.norms[name]
    near = index.nearest(adapter, bank, but=name)
    nearest, energy = (near[0] if near else None), index.energy(adapter)
    problem: str | None = broken
    remedy, severe = f"{remove}; train it again", True
    if problem is None:
        try:
            check_size(norm, "it")
            check_norm(norm, (size for other, size in index.norms.items() if other != name), "it")
        except LoragError as error:
            problem, remedy = (
                f"‖ΔW‖ far outside of the others': {error.got}, expected {error.expected}",
                f"check its lora_alpha, or {remove}",
            )
    if problem is None:
        severe = False
        twin = next((other for text in expert.descriptions for other in words[same_words(text)] if other != name), None)
        if nearest is not None and nearest[1] > DUPLICATE:
            problem, remedy = f"same weights as {nearest[0]}", f"keep one of them: {remove}"
        elif twin is not None:
            problem, remedy = f"shares a description with {twin}", "say how their tasks differ, or keep one of them"
        elif looks_like is not None:
            problem, remedy = f"its weights do not fit its description; they look like {looks_like}'s", "lorag try it, and describe it anew"
        elif len(bank) > 1 and energy is not None and energy < _FOREIGN:
            problem, remedy = (
                "has little in common with the bank",
                "fine if its task is unlike the others; generators will hardly reproduce it",
            )
    return Finding(name, rank, norm, energy, nearest, problem, remedy if problem else None, severe and problem is not None)


def format_findings(findings: Sequence[Finding], *, every: bool = False, terminal: bool = False) -> str:
    """A table of the experts with something to say about, or of all, the severe ones first; ruled for a terminal."""
    chosen = sorted((one for one in findings if every or one.problem), key=lambda one: (not one.severe, one.problem is None, one.name))
    rows = []
    for one in chosen:
        near = "" if one.nearest is None else f"{one.nearest[0]} {one.nearest[1]:.2f}"
        norm, energy = "" if one.norm is None else f"{one.norm:.3g}", "" if one.energy is None else f"{one.energy:.0%}"
        problem = f"{one.problem or 'none'}{f' -> {one.remedy}' if one.remedy else ''}"
        rows.append((one.name, str(one.rank), norm, energy, near, problem))
    header = ("expert", "rank", "norm", "energy", "nearest by weight", "problem -> what to do")
    return render(Table(header, rows, text=(0, 4, 5)), terminal=terminal) if chosen else ""
