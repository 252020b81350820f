"""From a description to an adapter: embedder, conditioner, method and weight space behind one door."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.provenance import base_fields, licence_of, parents, public_name, versions
from lorag.adapters.publishing import push_generator_folder
from lorag.base.runner import Runner
from lorag.errors import BankError, ConfigError, GeneratorError, LoragError
from lorag.generator.evidence import Evidence, gather
from lorag.generator.files import find_generator, read_parts, write_generator
from lorag.generator.gate import Gate, Verdict, report_unknown, unasked, unfitted
from lorag.generator.refine import check_examples, likelier, refine
from lorag.generator.settings import ON_UNKNOWN, GenerateSettings
from lorag.tasks.descriptions import check_description
from lorag.text.conditioning import Condition, Conditioner, mixture_weights
from lorag.text.embedding import Embedding, with_details
from lorag.text.spelling import Spelling

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank, BankBase
    from lorag.methods import Method
    from lorag.spaces import WeightSpace
    from lorag.text.embedding import TextEmbedder

__all__ = ["LoraGenerator"]

_FUSED, _FUSED_TEMPERATURE = 4, 0.05  # experts that are fused, and of the softmax over their cosines
_TOGETHER = 8  # codes decoded at once: they share the reading of the bases; eight adapters of an 8 B model take 1.3 GB


@dataclass(frozen=True)
class _Plan:
    """What a description is served: an expert's adapter, or a code that is still to be decoded."""

    evidence: Evidence
    verdict: Verdict
    served: str
    shares: Tensor | None
    adapter: LoraAdapter | None = None
    code: Tensor | None = None
    factor: float = 1.0


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
        licenses: Licence of each expert by name, as the bank states it, and of tasks without an expert that it learned from.
        revision: Digest of the stored weights; "unsaved" before saving.
        gate: Judges descriptions; None if none was fitted.
        spelling: Leads mistyped words back to those of the descriptions that it learned from.
    """

    base: BankBase
    space: WeightSpace
    conditioner: Conditioner
    method: Method
    embedder: TextEmbedder
    rank: int
    strength: float = 1.0
    origin: Mapping[str, Any] = field(default_factory=dict)
    licenses: Mapping[str, str] = field(default_factory=dict)
    revision: str = "unsaved"
    gate: Gate | None = None
    spelling: Spelling = field(default_factory=Spelling)
    _runner: Runner | None = field(default=None, repr=False, compare=False)

    # --- use -----------------------------------------------------------------------------------------------------

    def condition(self, description: str, examples: Sequence[tuple[str, str]] = ()) -> Condition:
        """Embeds a description, alone, and compares it with the bank's; inputs of examples give it a task vector.

        Raises:
            DescriptionError: If the description cannot be used.
        """
        return self._condition(self.read(check_description(description)), examples)

    def read(self, description: str) -> str:
        """A description as it is read: mistyped words are led back to those that it learned from."""
        return self.spelling.corrected(description, self.embedder)

    def runner(self) -> Runner:
        """The base model with its objective, loaded once: needed for examples only."""
        if self._runner is None:
            self._runner = Runner.open(self.base)
        return self._runner

    def judge(self, description: str | Evidence) -> Verdict:
        """What the gate says of a description, or of the evidence on one, without decoding an adapter.

        Raises:
            DescriptionError: If the description cannot be used.
        """
        evidence = description if isinstance(description, Evidence) else self.gather(description)
        return unfitted(evidence.condition) if self.gate is None else self.gate.decide(evidence)

    def gather(self, description: str, *, seed: int = 0, examples: Sequence[tuple[str, str]] = ()) -> Evidence:
        """The evidence on a description, with the code that the method made of it.

        Args:
            description: What an adapter should do.
            seed: Seed of methods that sample.
            examples: (input, output) of the task, if there are some.

        Raises:
            DescriptionError: If the description cannot be used.
        """
        return self._gather(check_description(description), seed, examples, (), (), ask=True)

    def read_examples(self, examples: Sequence[tuple[str, str]], *, seed: int = 0) -> Evidence:
        """What a few examples say alone, without any description, for `generate`; the gate, which judges descriptions, is not asked.

        Args:
            examples: (input, output) of the task; at most 16 are read.
            seed: Seed of methods that sample.

        Raises:
            GeneratorError: If the method reads no examples.
            TaskError: If the examples cannot be used, or there are none.
        """
        pairs = check_examples(examples, 0, least=1)
        if not self.method.reads_pairs:
            raise GeneratorError(
                "the generator makes no adapter from examples alone",
                got=f"method {self.method.name} without a reader of pairs",
                remedy="Teach it with lorag pairs GENERATOR (method house), or give a description.",
            )
        size, names = self.embedder.size, self.conditioner.names
        nothing = Condition(Embedding(torch.zeros(size), torch.zeros(0, size)), torch.zeros(len(names)), (), 1.0)
        return Evidence("", nothing, names, self._read(nothing, pairs, seed), made_from="examples")

    def generate(self, description: str | Evidence, **settings: Unpack[GenerateSettings]) -> LoraAdapter:
        """Makes an adapter for a task that is only described.

        Args:
            description: What the adapter should do, at most 4,096 characters, or what `gather` or `read_examples` gave with the same seed.
            settings: `seed`, `strength`, `rank` and the others of `GenerateSettings`.

        Returns:
            The adapter; its `info` says how it came about, `info["gate"]` what the gate decided, by which evidence, and what was
            served.

        Raises:
            DescriptionError: If the description cannot be used.
            GeneratorError: If the weight space has no adapters of the rank.
            TaskError: If the examples cannot be used.
            UnknownTaskError: If the gate refuses the description and `on_unknown` is "raise".
            BankError: If the bank is not one of this generator's base model and experts.
        """
        return next(self.generate_many([description], **settings))

    def generate_many(self, descriptions: Sequence[str | Evidence], **settings: Unpack[GenerateSettings]) -> Iterator[LoraAdapter]:
        """`generate` for one description after the other, decoded several at once; each adapter has the bytes it has alone."""
        checked = [text if isinstance(text, Evidence) else check_description(text) for text in descriptions]
        for one in self.generate_each(checked, **settings):
            if isinstance(one, LoragError):
                raise one
            yield one

    def generate_each(
        self,
        descriptions: Sequence[str | Evidence],
        *,
        seed: int = 0,
        strength: float = 1.0,
        rank: int | None = None,
        examples: Sequence[tuple[str, str]] = (),
        refine_steps: int = 0,
        on_unknown: str = "warn",
        bank: AdapterBank | None = None,
        details: Sequence[str] = (),
        wordings: Sequence[str] = (),
    ) -> Iterator[LoraAdapter | LoragError]:
        """`generate_many` for descriptions that were checked; an error that concerns one of them stands in the place of its adapter."""
        examples = check_examples(examples, refine_steps)
        details, wordings = ([check_description(text) for text in texts] for texts in (details, wordings))
        if on_unknown not in ON_UNKNOWN:
            raise ConfigError("on_unknown cannot be used", got=repr(on_unknown)[:40], expected=" or ".join(ON_UNKNOWN))
        decoded_rank = self._rank(rank)
        self.check_bank(bank)
        for start in range(0, len(descriptions), _TOGETHER):
            plans: list[_Plan | LoragError] = []
            for given in descriptions[start : start + _TOGETHER]:
                try:
                    if not isinstance(given, Evidence):
                        given = self._gather(given, seed, examples, details, wordings, ask=on_unknown != "ignore")
                    plans.append(self._plan(given, on_unknown, bank, rank))
                except LoragError as error:
                    plans.append(error)
            codes = [plan.code for plan in plans if isinstance(plan, _Plan) and plan.code is not None]
            decoded = iter(self.space.decode(torch.cat(codes), decoded_rank) if codes else ())
            for plan in plans:
                if isinstance(plan, LoragError):
                    yield plan
                    continue
                adapter = plan.adapter
                if adapter is None:
                    adapter = LoraAdapter(self.base.layout, next(decoded).check_values()).scaled(plan.factor)
                yield self._finished(plan, adapter.scaled(strength), seed, strength, examples, refine_steps)

    # --- the steps of it -----------------------------------------------------------------------------------------

    def _condition(self, text: str, examples: Sequence[tuple[str, str]] = (), details: Mapping[str, Embedding] | None = None) -> Condition:
        condition = self.conditioner(with_details(self.embedder.embed([text])[0], list((details or {}).values())))
        if not examples:
            return condition
        return replace(condition, task_vector=self.runner().hidden([given for given, _ in examples]).mean(0).cpu())

    def _read(self, condition: Condition, examples: Sequence[tuple[str, str]], seed: int) -> Tensor:
        """The code (1, c) that examples alone ask for."""
        condition = replace(condition, pairs=self.runner().read_pairs(examples).cpu())
        return self.method.generate(condition, torch.Generator().manual_seed(seed))

    def _gather(
        self,
        description: str,
        seed: int,
        examples: Sequence[tuple[str, str]],
        details: Sequence[str],
        wordings: Sequence[str],
        *,
        ask: bool,
    ) -> Evidence:
        text = self.read(description)
        read = text if text != description else ""
        about = self._about(text, details)
        condition = self._condition(text, examples, about)

        def condition_of(reworded: Embedding) -> Condition:
            return self.conditioner(with_details(reworded, list(about.values())))

        reference, needed = (None, ()) if self.gate is None or not ask else (self.gate.reference, self.gate.needed)
        evidence = gather(self, text, condition, seed=seed, reference=reference, needed=needed, condition_of=condition_of)
        evidence = replace(evidence, text=description, read=read, details=tuple(about), wordings=tuple(wordings))
        if wordings:
            conditions = [condition_of(self.embedder.embed([self.read(wording)])[0]) for wording in wordings]
            conditions = [replace(one, task_vector=condition.task_vector) for one in conditions]  # of the same examples
            others = [self.method.generate(one, torch.Generator().manual_seed(seed)) for one in conditions]
            evidence = replace(evidence, code=torch.stack([evidence.code, *others]).mean(0))
        if not examples or not self.method.reads_pairs:
            return evidence
        codes = torch.cat([evidence.code, self._read(condition, examples, seed)])
        best = likelier(self.runner(), self.space, self.space.scaled(codes, self.strength), examples)
        return replace(evidence, code=codes[best : best + 1], made_from=("description", "examples")[best])

    def _about(self, text: str, details: Sequence[str]) -> dict[str, Embedding]:
        """Those of further texts that are about what a description says; the others would drown it."""
        if not details:
            return {}
        description, *others = self.embedder.embed([text, *details])
        least = self.conditioner.usual_similarity
        return {detail: other for detail, other in zip(details, others, strict=True) if float(description.pooled @ other.pooled) > least}

    def _plan(self, evidence: Evidence, on_unknown: str, bank: AdapterBank | None, rank: int | None) -> _Plan:
        """What is served for a description, and how much each expert counts in it."""
        condition = evidence.condition
        verdict = unasked(condition) if on_unknown == "ignore" or not evidence.text else self.judge(evidence)
        if verdict.decision == "refuse":
            report_unknown(evidence.text, verdict, on_unknown)
        names = self.conditioner.names
        if verdict.decision == "expert" and verdict.known is not None and bank is not None:
            share = torch.eye(len(names))[names.index(verdict.known)]
            expert = bank.adapter(verdict.known)
            if rank is not None and rank != expert.rank:
                factors = expert.factors.padded(rank) if rank > expert.rank else expert.factors.truncated(rank)[0]
                expert = replace(expert, factors=factors)
            return _Plan(evidence, verdict, "expert", share, adapter=expert)
        if verdict.decision == "refuse" and on_unknown == "fallback":
            return _Plan(evidence, verdict, "fallback", torch.zeros(len(names)), code=self.space.zero[None], factor=0.0)
        if verdict.decision == "fuse" and bank is not None:
            shares, code = self.fuse_nearest(bank, condition.similarities)
            return _Plan(evidence, verdict, "fusion", shares, code=code)
        served = "reconstruction" if verdict.decision == "expert" else "generated"
        return _Plan(evidence, verdict, served, self.method.shares(condition), code=evidence.code, factor=self.strength)

    def fuse_nearest(self, bank: AdapterBank, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """Shares (n,) of the experts nearest to a description, a softmax over similarities (n,), and the code (1, c) of their fusion."""
        shares = mixture_weights(similarities, _FUSED, _FUSED_TEMPERATURE)
        chosen = shares.nonzero()[:, 0].tolist()
        codes = torch.stack([self.space.encode(bank.adapter(self.conditioner.names[i]).factors) for i in chosen])
        return shares, (shares[chosen] @ codes)[None]

    def _finished(
        self, plan: _Plan, adapter: LoraAdapter, seed: int, strength: float, examples: Sequence[tuple[str, str]], refine_steps: int
    ) -> LoraAdapter:
        """The adapter of a plan, refined if that is asked for, with where it came from."""
        if refine_steps and plan.served != "fallback":
            started, adapter = adapter, refine(self.runner(), adapter, examples, refine_steps, seed)
            refine_steps = 0 if adapter is started else refine_steps
        norms, model = adapter.factors.norms(), self.base.model
        info: dict[str, Any] = {
            "description": plan.evidence.text,
            "method": self.method.name if plan.served in ("generated", "reconstruction") else plan.served,
            "neighbours": [list(pair) for pair in plan.evidence.condition.neighbours],
            "novelty": plan.verdict.novelty,
            "gate": plan.verdict.to_dict() | {"served": plan.served},
            "seed": seed,
            "strength": strength,
            "rank": adapter.rank,
            "examples": len(examples),
            "refine_steps": refine_steps,
            "generator": {"revision": self.revision, "strength": self.strength},
            "base_model": base_fields(model, self.base.identity, self.base.layout, self.base.settings),
            "embedder": public_name(self.embedder.name),
            "parents": parents(self.conditioner.names, self.licenses, None if plan.shares is None else plan.shares.tolist()),
            "norm": round(math.hypot(*norms.values()), 6),
            "norms": {name: round(norm, 6) for name, norm in norms.items()},
            "versions": versions(),
        }
        if plan.evidence.read:
            info["read_as"] = plan.evidence.read
        if plan.evidence.made_from:
            info["made_from"] = plan.evidence.made_from
        if plan.evidence.details:
            info["details"] = list(plan.evidence.details)
        if plan.evidence.wordings:
            info["wordings"] = list(plan.evidence.wordings)
        info["license"] = licence_of(info).name
        return replace(adapter, base_model=model.name, task_type=model.task_type, info=info)

    def _rank(self, rank: int | None) -> int:
        """The rank of adapters: the one asked for, if the weight space has it, or the generator's own."""
        if rank is None:
            return self.rank
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
        best = self.space.best_rank(rank) if whole else self.rank
        if best != rank:
            expected = f"{best}, the nearest that it has" if whole else "a whole number above 0"
            raise GeneratorError("rank: the generator has no adapters of this rank", got=repr(rank)[:40], expected=expected)
        return rank

    def check_bank(self, bank: AdapterBank | None) -> None:
        """Raises a BankError if a bank is not the one that the generator learned from."""
        if bank is not None and (bank.base != self.base or not set(self.conditioner.names) <= set(bank.names)):
            raise BankError("the bank is not the one that the generator learned from", remedy="Give that one, or none.")

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a generator folder, as `generator.files` does, and takes over the rounding of what is stored."""
        folder = Path(folder)
        self.revision = write_generator(self, folder)
        return folder

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, embedder: TextEmbedder | None = None, device: str = "auto", revision: str | None = None
    ) -> LoraGenerator:
        """Opens a generator folder, a shipped generator, or one on the hub.

        Args:
            path: Folder, name of a shipped one, or hub id.
            embedder: Used instead of loading the embedder that it was fitted with.
            device: Where the embedder runs.
            revision: Revision on the hub.

        Raises:
            ArtifactError: If it is not a complete generator of a known format.
            GeneratorError: If its parts do not fit together, or the embedder is another one.
        """
        return cls(**read_parts(find_generator(path, revision), embedder, device))

    def push_to_hub(self, repository: str, *, private: bool = True) -> str:
        """Publishes the generator, as `save_pretrained` writes it, to user/name and returns the commit's address."""
        with tempfile.TemporaryDirectory(prefix="lorag-") as staging:
            return push_generator_folder(self.save_pretrained(staging), repository, private=private)
