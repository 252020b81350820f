"""What the page computes: adapters for a description, what is known of them, and answers with and without them.

Nothing here knows the page. An adapter follows from its `Request` alone, so that a request is all that is kept of a user.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorag.adapters.factors import Factors
from lorag.bank.bank import find_bank
from lorag.base.objectives import OBJECTIVES, objective_type
from lorag.errors import ConfigError, TaskError
from lorag.generator.files import DEFAULT
from lorag.generator.lora_generator import LoraGenerator
from lorag.text.task_map import TaskMap
from lorag.web.requests import MOST_INPUT, MOST_INPUTS, Answers, Preview, Request, Result

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.generator.evidence import Evidence

__all__ = ["Session"]

_REMEMBERED = 16  # adapters; of a large base model each has some 100 MB

Progress = Callable[[float, str], object]


class Session:
    """Generators of one base model, and that model, for several users at once.

    Args:
        generators: Label to generator; labels are unique and shown.
        sources: Label to what `generate_lora(generator=...)` takes for it; None for the embedded one.
        bank: The generators' bank, as `generate_lora(bank=...)` takes it: a known task is then served its own expert.

    Raises:
        ArtifactError, BankError: If there is no such bank, or it is not the one that every generator learned from.
        ConfigError: If there is no generator, or two of them are for different base models.
    """

    def __init__(
        self,
        generators: Mapping[str, LoraGenerator],
        sources: Mapping[str, str | None] | None = None,
        bank: str | Path | None = None,
    ) -> None:
        if not generators:
            raise ConfigError("no generator to show")
        self.generators = dict(generators)
        self.sources: dict[str, str | None] = dict.fromkeys(generators) | dict(sources or {})
        self.first = next(iter(generators.values()))
        if not objective_type(self.first.base.objective).reads_texts:
            raise ConfigError(
                "the page works with base models of text",
                got=f"{self.first.base.model.name}, {self.first.base.model.kind}",
                expected=", ".join(dict.fromkeys(one.kind for one in OBJECTIVES.values() if one.reads_texts)),
                remedy="Use lorag generate.",
            )
        for label, generator in generators.items():
            if generator.base != self.first.base:
                raise ConfigError(
                    f"generator {label} is for another base model or layout",
                    got=generator.base.model.name,
                    expected=self.first.base.model.name,
                    remedy="Start one page for each base model.",
                )
            if generator.embedder.name == self.first.embedder.name:
                generator.embedder = self.first.embedder  # one in memory, and each description is embedded once
        self.bank_place = None if bank is None else str(bank)
        self.bank = None if bank is None else find_bank(bank)
        for generator in generators.values():
            generator.check_bank(self.bank)
        self._maps: dict[str, TaskMap] = {}
        self._adapters: OrderedDict[tuple[object, ...], tuple[LoraAdapter, float]] = OrderedDict()
        self._gathered: OrderedDict[tuple[str, str, int], Evidence] = OrderedDict()
        self._lock = threading.Lock()  # hooks on the one base model must not meet

    @classmethod
    def from_folders(cls, names: Sequence[str], *, bank: str | Path | None = None, device: str = "auto") -> Session:
        """Opens generators by name, folder or hub id; the default one if there are none."""
        if not names:
            return cls({DEFAULT: LoraGenerator.from_pretrained(DEFAULT, device=device)}, bank=bank)
        generators: dict[str, LoraGenerator] = {}
        sources: dict[str, str | None] = {}
        for name in dict.fromkeys(names):
            generator = LoraGenerator.from_pretrained(name, device=device)
            label = generator.method.name
            if label in generators:
                label = f"{label} ({Path(name).name})"
            if label in generators:
                label = f"{generator.method.name} ({name})"
            generators[label], sources[label] = generator, name
        return cls(generators, sources, bank)

    @property
    def writes(self) -> bool:
        """Whether the base model writes answers; a sentence encoder chooses among candidates instead."""
        return objective_type(self.first.base.objective).generates

    @property
    def can_refuse(self) -> bool:
        """Whether a generator has a gate, which refuses what lies outside its bank's reach."""
        return any(generator.gate is not None for generator in self.generators.values())

    def warm_up(self) -> None:
        """Loads all that the first user would wait for: embedder, maps, base model and its tokenizer."""
        for label in self.generators:
            self.preview("warm up", label)
        runner = self.first.runner()
        with self._lock, torch.inference_mode():
            runner.hidden(["warm up"])

    def preview(self, description: str, label: str, seed: int = 0) -> Preview:
        """Compares a description with the bank of a generator, whose gate judges it by the same evidence.

        Raises:
            DescriptionError: If it cannot be used.
        """
        with self._lock:
            evidence = self._evidence(description, label, seed)
            verdict = self._generator(label).judge(evidence)
        condition, tasks = evidence.condition, self._map(label)
        return Preview(condition.neighbours, tasks.place(condition.embedding.pooled), tasks, verdict.to_dict())

    def make(self, request: Request, progress: Progress = lambda share, text: None) -> list[Result]:
        """Carries out a request.

        Args:
            request: What is asked for.
            progress: Told the share done, from 0 to 1, and what comes next.

        Returns:
            The adapters, by generator, then by seed.

        Raises:
            LoragError: If a generator refuses the description, or cannot work from a description alone.
        """
        results: list[Result] = []
        total = len(request.methods) * int(request.samples)
        for method in request.methods:
            several = len(self.generators) > 1 or request.samples > 1
            of_method: list[Result] = []
            for seed in range(int(request.seed), int(request.seed) + int(request.samples)):
                label = f"{method}, seed {seed}" if several else method
                progress((len(results) + len(of_method)) / total, f"generating: {label}")
                adapter, seconds = self._adapter(request, method, seed)
                twin = next((one.label for one in of_method if one.repeats is None and _same(one.adapter, adapter)), None)
                of_method.append(Result(label, method, seed, adapter, seconds, twin))
            results += of_method
        return results

    def answers(
        self,
        results: Sequence[Result],
        inputs: Sequence[str],
        candidates: Sequence[str] = (),
        progress: Progress = lambda share, text: None,
    ) -> Answers:
        """Runs the base model on a user's own inputs, bare and with each adapter.

        Args:
            results: The adapters.
            inputs: At most `MOST_INPUTS` texts.
            candidates: For sentence encoders, which choose the nearest of them: at least two texts.
            progress: Told the share done, from 0 to 1, and what comes next.

        Raises:
            TaskError: If inputs or candidates are missing, too many or too long.
        """
        texts = _checked("example inputs", inputs, least=1)
        choices = () if self.writes else _checked("candidates", candidates, least=2)
        runner = self.first.runner()
        columns = []
        distinct = [one for one in results if one.repeats is None]
        for number, one in enumerate((None, *distinct)):
            label = "base" if one is None else one.label
            progress(number / (len(distinct) + 1), f"answering: {label}")
            with self._lock:
                adapters = None if one is None else Factors.stack([one.adapter.factors], runner.device)
                if choices:
                    chosen = [f"{choice} ({cosine:.2f})" for choice, cosine in runner.choose(texts, choices, adapters)]
                columns.append((label, tuple(chosen if choices else runner.generate(texts, adapters))))
        return Answers(tuple(texts), tuple(columns))

    def python(self, request: Request, result: Result) -> str:
        """Three lines of Python that make the same adapter."""
        arguments = [repr(request.description.strip())]
        if (source := self.sources[result.method]) is not None:
            arguments.append(f"generator={source!r}")
        if self.bank_place is not None:
            arguments.append(f"bank={self.bank_place!r}")
        if result.seed:
            arguments.append(f"seed={result.seed}")
        if request.strength != 1:
            arguments.append(f"strength={request.strength!r}")
        call = f"adapter = generate_lora({', '.join(arguments)})"
        return f'from lorag import generate_lora\n{call}\nadapter.save_pretrained("adapter")\n'

    def _generator(self, label: str) -> LoraGenerator:
        if label not in self.generators:
            raise ConfigError("no generator has this label", got=repr(label)[:60], expected=" or ".join(self.generators))
        return self.generators[label]

    def _map(self, label: str) -> TaskMap:
        if label not in self._maps:
            conditioner = self._generator(label).conditioner
            self._maps[label] = TaskMap.fit(conditioner.names, conditioner.centroids)
        return self._maps[label]

    def _evidence(self, description: str, label: str, seed: int) -> Evidence:
        """Gathered once for the preview, the gate and the adapter."""
        key = (description, label, seed)
        if key not in self._gathered:
            self._gathered[key] = self._generator(label).gather(description, seed=seed)
            while len(self._gathered) > _REMEMBERED:
                self._gathered.popitem(last=False)
        return self._gathered[key]

    def _adapter(self, request: Request, method: str, seed: int) -> tuple[LoraAdapter, float]:
        """The adapter, and the seconds that it took when it was made."""
        generator = self._generator(method)
        key = (request.description, method, seed, request.strength, request.anyway)
        with self._lock:
            if key not in self._adapters:
                start = time.perf_counter()
                asked = "warn" if request.anyway else "raise"
                evidence = self._evidence(request.description, method, seed)
                adapter = generator.generate(evidence, seed=seed, strength=float(request.strength), on_unknown=asked, bank=self.bank)
                self._adapters[key] = adapter, time.perf_counter() - start
                while len(self._adapters) > _REMEMBERED:
                    self._adapters.popitem(last=False)
            self._adapters.move_to_end(key)
            return self._adapters[key]


def _same(one: LoraAdapter, other: LoraAdapter) -> bool:
    pairs = zip(one.factors.values(), other.factors.values(), strict=True)
    return one.rank == other.rank and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def _checked(what: str, texts: Sequence[str], least: int) -> list[str]:
    lines = [text.strip() for text in texts if text.strip()]
    if not least <= len(lines) <= MOST_INPUTS:
        raise TaskError(f"{what} cannot be used", got=len(lines), expected=f"{least} to {MOST_INPUTS}, one on each line")
    longest = max(map(len, lines))
    if longest > MOST_INPUT:
        raise TaskError(f"{what} cannot be used", got=f"a line of {longest} characters", expected=f"at most {MOST_INPUT}")
    return lines
