"""Bring adapters into a bank: each one checked, described, compared with what is there, and kept as soon as it is written.

Adapters are written in runs of bounded size, so that a thousand of them take no more memory than some dozen; one that is
refused leaves the others alone. What the bank remembers of its experts, its bases among it, grows with each one added and
never needs the earlier ones again.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.bank.bank import AdapterBank
from lorag.bank.candidates import DUPLICATE, Candidate, ImportOptions, check_norm, read_candidate
from lorag.bank.index import BankIndex, DescriptionIndex, stamp
from lorag.bank.weights_to_text import WeightReader
from lorag.errors import BankError, LoragError, StorageError, UndescribedError
from lorag.parallel import Backend
from lorag.tasks.descriptions import same_words

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.adapters.sources import Source
    from lorag.text.embedding import TextEmbedder

__all__ = ["ImportOptions", "Imported", "import_adapters"]

logger = logging.getLogger(__name__)

_RUN, _RUN_VALUES = 64, 2**23  # adapters written together
_PROPOSED = 3  # tasks that an adapter's weights look like


@dataclass(frozen=True)
class Imported:
    """What became of one adapter.

    Attributes:
        source: Where it came from.
        name: Its name in the bank.
        error: Why it was refused, or None.
        existed: Whether the bank has it already, same name, weights and descriptions; nothing was added then.
        rank: Rank of its factors.
        norm: ‖ΔW‖_F over all modules.
        described_by: What its descriptions were taken from.
        energy: Share of ‖ΔW‖² that lies in the bases of the experts before it; None for the first.
        by_weight: Experts before it with the nearest ΔW, and their cosines.
        by_description: Those with the nearest descriptions; empty if these were not compared.
        same_weights: Experts whose ΔW has a cosine above .999.
        same_description: Experts that share a description.
        missing: Modules of the layout without factors, which count as unchanged.
        ignored: Modules outside of the layout, left out.
        ignored_share: Their share of ‖ΔW‖²; None if it is not known.
        looks_like: Experts with descriptions nearest to what its weights say, with cosines, where its own description is not
            among what they say (`WeightReader.doubtful`); empty otherwise.
    """

    source: str
    name: str
    error: LoragError | None = None
    existed: bool = False
    rank: int = 0
    norm: float = 0.0
    described_by: str = ""
    energy: float | None = None
    by_weight: tuple[tuple[str, float], ...] = ()
    by_description: tuple[tuple[str, float], ...] = ()
    same_weights: tuple[str, ...] = ()
    same_description: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ignored_share: float | None = 0.0
    looks_like: tuple[tuple[str, float], ...] = ()


@dataclass
class _Import:
    """A bank that is being added to, and adapters that wait to be written."""

    bank: AdapterBank
    options: ImportOptions
    index: BankIndex
    descriptions: DescriptionIndex | None
    quiet: bool
    reader: WeightReader | None = None
    wordings: dict[str, list[str]] = field(default_factory=dict)  # words -> experts
    waiting: list[tuple[Imported, LoraAdapter, tuple[str, ...], str]] = field(default_factory=list)

    def take(self, source: Source, candidate: Candidate) -> Imported | None:
        """Checks one adapter against the bank; returns what became of it, or None where it now waits to be written."""
        name, adapter = self.options.name or source.name, candidate.adapter
        try:
            if candidate.error is not None:
                raise self._proposed(candidate) or candidate.error
            if adapter is None:
                raise AssertionError("neither an adapter nor an error")
            if not self.options.any_norm:
                norms = [*self.index.norms.values(), *(one.norm for one, *_ in self.waiting)]
                check_norm(candidate.norm, norms, candidate.where)
            if self._has(name, adapter, candidate.descriptions):
                return Imported(source.label, name, existed=True)
        except LoragError as error:
            traceback.clear_frames(error.__traceback__)  # what is kept of the error must not keep what was being read
            return Imported(source.label, name, error)
        one = Imported(source.label, name, rank=adapter.rank, norm=candidate.norm, described_by=candidate.origin)
        one = replace(one, missing=candidate.missing, ignored=candidate.ignored, ignored_share=candidate.ignored_share)
        self.waiting.append((one, adapter, candidate.descriptions, candidate.licence))
        return None

    def _proposed(self, candidate: Candidate) -> UndescribedError | None:
        """The error of an adapter that nothing describes, with what its weights look like; None where they tell nothing."""
        if candidate.adapter is None or self.reader is None or not self.reader.telling:
            return None
        near = self.reader.nearest(self.index.sketch(candidate.adapter), _PROPOSED)
        shown = "; ".join(f'{name} {cosine:.2f} ("{self.bank[name].descriptions[0][:80]}")' for name, cosine in near if name in self.bank)
        return UndescribedError(
            f"nothing says what {candidate.where} is for",
            got=f"weights that look like those of {shown}",
            remedy='If that is its task, say so in words of your own: --description "…".',
        )

    def _has(self, name: str, adapter: LoraAdapter, texts: Sequence[str]) -> bool:
        """Whether the bank has just this expert, as after an interruption; another one of its name is an error."""
        taken = name in self.bank or any(one.name == name for one, *_ in self.waiting)
        if not taken:
            return False
        if name in self.bank and tuple(text.strip() for text in texts) == self.bank[name].descriptions:
            stored, given = self.bank.adapter(name).factors, adapter.factors
            if given.cosine(stored) > 1 - 1e-5 and abs(stored.norm() / given.norm() - 1) < 1e-2:
                return True
        raise BankError("the bank already has an expert of this name", got=name, remedy="Choose another with --name, or remove that one.")

    @property
    def full(self) -> bool:
        """Whether what waits should be written."""
        values = sum(adapter.layout.values(adapter.rank) for _, adapter, *_ in self.waiting)
        return len(self.waiting) >= _RUN or values >= _RUN_VALUES

    def write(self) -> Iterator[Imported]:
        """Writes what waits, a shard for each rank, then compares each with the experts before it."""
        waiting, self.waiting = self.waiting, []
        groups: dict[int, list[tuple[Imported, LoraAdapter, tuple[str, ...], str]]] = {}
        for entry in waiting:
            groups.setdefault(entry[1].rank, []).append(entry)
        refused: dict[str, LoragError] = {}
        for group in groups.values():
            try:
                self._add(group)
            except StorageError:
                raise
            except LoragError as error:  # of one of them, such as a name that another process has taken meanwhile
                if len(group) == 1:
                    refused[group[0][0].name] = error
                    continue
                for entry in group:
                    try:
                        self._add([entry])
                    except StorageError:
                        raise
                    except LoragError as failure:
                        refused[entry[0].name] = failure
        if self.descriptions is not None:
            self.descriptions.cover(self.bank, quiet=self.quiet)
        for one, adapter, texts, _ in waiting:
            if one.name in refused:
                yield replace(one, error=refused[one.name])
            else:
                yield self._compared(one, adapter, texts)
        self.index = self.index.cover(self.bank, quiet=self.quiet)  # what other processes added

    def _add(self, group: Sequence[tuple[Imported, LoraAdapter, tuple[str, ...], str]]) -> None:
        details = {one.name: {"license": licence} for one, _, _, licence in group}
        self.bank = self.bank.add([(one.name, texts, [adapter]) for one, adapter, texts, _ in group], details=details)

    def _compared(self, one: Imported, adapter: LoraAdapter, texts: Sequence[str]) -> Imported:
        energy, nearest = self.index.energy(adapter), self.index.nearest(adapter, self.bank)
        alike = [] if self.descriptions is None else self.descriptions.nearest(one.name, self.index.norms)
        same = {other for text in texts for other in self.wordings.get(same_words(text), [])}
        for text in texts:
            self.wordings.setdefault(same_words(text), []).append(one.name)
        self.index.insert(one.name, stamp(self.bank, self.bank[one.name]), adapter)
        return replace(
            one,
            looks_like=self._doubted(one.name, adapter),
            energy=energy,
            by_weight=tuple(nearest[:3]),
            by_description=tuple(alike),
            same_weights=tuple(name for name, similarity in nearest if similarity > DUPLICATE),
            same_description=tuple(sorted(same)),
        )

    def _doubted(self, name: str, adapter: LoraAdapter) -> tuple[tuple[str, float], ...]:
        """What an adapter's weights look like, where they do not fit its description."""
        if self.reader is None or self.descriptions is None:
            return ()
        sketch = self.index.sketch(adapter)
        doubtful = self.reader.doubtful(self.reader.fits(sketch, self.descriptions.vector(name)))
        return tuple(self.reader.nearest(sketch, _PROPOSED)) if doubtful else ()

    def save(self) -> None:
        """Writes what is remembered, of the bank as it now is. It can be made anew, so that a failure is not a reason to fail."""
        try:
            with self.bank.locked() as now:
                self.index.cover(now).save(now)
                if self.descriptions is not None:
                    self.descriptions.cover(now)
                    self.descriptions.save(now)
        except (BankError, StorageError) as error:
            logger.warning("what the bank remembers of its experts was not written and will be worked out again: %s", error)


def import_adapters(
    bank_folder: str | Path,
    sources: Iterable[Source],
    options: ImportOptions | None = None,
    *,
    embedder: TextEmbedder | None = None,
    backend: Backend | None = None,
    quiet: bool = True,
) -> Generator[Imported, None, None]:
    """Adds adapters to a bank, one after the other, and says of each what became of it.

    On Ray, workers fetch, read and check adapters ahead; they are compared with the bank and written here, in their order,
    so that the bank is the same.

    Args:
        bank_folder: The bank.
        sources: The adapters.
        options: How they are taken in.
        embedder: Compares descriptions; without one they are not compared.
        backend: Where adapters are read; None is here. Workers elsewhere must see folders under the same paths.
        quiet: No progress bars.

    Yields:
        What became of each; an adapter that is refused stops none of the others.

    Raises:
        ArtifactError, BankError: If there is no bank in the folder.
        StorageError: If the bank cannot be written.
    """
    bank = AdapterBank.from_pretrained(bank_folder)
    index = BankIndex.load(bank, quiet=quiet)
    descriptions = None if embedder is None else DescriptionIndex.load(bank, embedder, quiet=quiet)
    reader = None if descriptions is None else WeightReader.of_bank(index, descriptions)
    job = _Import(bank, options or ImportOptions(), index, descriptions, quiet, reader)
    for expert in bank.experts:
        for text in expert.descriptions:
            job.wordings.setdefault(same_words(text), []).append(expert.name)
    try:
        listed = list(sources)
        backend = Backend() if backend is None else backend
        for read in backend.run(read_candidate, (bank.base, job.options), listed, ordered=True):
            refused = job.take(listed[read.place], read.result())
            if refused is not None:
                yield refused
            if job.full:
                yield from job.write()
        yield from job.write()
    finally:
        # A caller's uncaught error keeps this generator until the interpreter ends, and then no thread (of a bar, say) starts.
        if len(job.bank) and not sys.is_finalizing():
            job.save()
