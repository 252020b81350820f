"""Many adapters over one base model in one process: each request of a batch gets its own, chosen for it or named."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.adapters.merging import merge
from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.runner import Runner
from lorag.errors import BankError, TaskError
from lorag.generator.generate import default_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.serving.names import Fusion, NamedExpert, parse_name
from lorag.serving.retrieval import DescriptionIndex, TextIndex

if TYPE_CHECKING:
    from lorag.base.row_adapters import Stacked
    from lorag.tasks.suite import TaskSuite

__all__ = ["Answer", "LoraRouter", "Route"]

logger = logging.getLogger(__name__)

_TEMPERATURE = 0.05  # of the softmax over mean cosines: the likeliest right tasks, of 54 of nine public suites
_SURE = 0.5  # share of one task from which its expert alone is served
_FUSED = 4
_PADDING = 1.25  # rows that may be computed for each row that is asked for, before factors are copied instead


@dataclass(frozen=True)
class Route:
    """What a request is answered with, and why.

    Attributes:
        served: "expert", "fusion", "generated", or "base" for none.
        experts: Experts and their weights, if there are some; without a bank, known tasks.
        description: What the adapter was generated for, if it was.
        reason: In a sentence.
    """

    served: str
    experts: tuple[tuple[str, float], ...] = ()
    description: str | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, tuple[tuple[str, float], ...], str | None]:
        """The same for requests that get the same adapter."""
        return self.served, self.experts, self.description


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about."""

    text: str
    route: Route


@dataclass
class LoraRouter:
    """Answers batches of requests, each with its own adapter, in one pass of the base model.

    What a request needs is told (`lorag:…` as for vLLM's plug-in), described, or read off the request's own text, by the nearest
    examples of the bank's tasks. Nothing is trained.

    Attributes:
        generator: Makes adapters of descriptions, and judges them.
        bank: Its experts; without them the adapter that is generated for a known task stands for its expert.
        known: Descriptions of the tasks among which is chosen; with a bank, those of its experts.
        texts: What texts each expert's task is known by; None if requests are not to be judged by their texts.
        runner: The base model; loaded at the first request.
        kept: Most adapters in memory.
    """

    generator: LoraGenerator
    bank: AdapterBank | None = None
    known: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    texts: TextIndex | None = None
    runner: Runner | None = None
    kept: int = 256
    _adapters: collections.OrderedDict[tuple, LoraAdapter] = field(default_factory=collections.OrderedDict, repr=False)
    _descriptions: DescriptionIndex | None = field(default=None, repr=False)
    _text_weight: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.generator.check_bank(self.bank)
        if self.bank is not None:
            self.known = {name: self.bank[name].descriptions for name in self.generator.conditioner.names}

    @classmethod
    def from_pretrained(
        cls, generator: str | Path | None = None, bank: str | Path | None = None, tasks: TaskSuite | None = None, *, quiet: bool = True
    ) -> LoraRouter:
        """Opens a generator with its bank, both embedded ones by default.

        Args:
            generator: Folder, name of a shipped one, or hub id.
            bank: Folder, name or hub id; a generator that is named has none by default.
            tasks: Tasks with training examples, so that requests can be judged by their own texts: those of the bank's experts, or
                without a bank any among which the router is to choose.
            quiet: Whether no bar is shown while examples are embedded.
        """
        opened = default_generator() if generator is None else LoraGenerator.from_pretrained(generator)
        named = "sandbox" if generator is None and bank is None else bank
        experts = None if named is None else find_bank(named)
        router = cls(opened, experts, {} if tasks is None else {task.key: task.descriptions for task in tasks.tasks})
        if tasks is not None:
            router.learn_texts({task.key: [e.input for e in task.split("train")] for task in tasks.tasks}, quiet=quiet)
        return router

    def learn_texts(self, texts: Mapping[str, Sequence[str]], *, quiet: bool = True) -> None:
        """Remembers inputs of known tasks: task -> texts. Tasks without any are not found by a request's text.

        Raises:
            BankError: If none of the names is a known task's.
        """
        given = {name: texts[name] for name in self.known if texts.get(name)}
        if not given:
            raise BankError("no task with examples is one that the router knows", got=", ".join(list(texts)[:3]) or "no task")
        self.texts, self._text_weight = TextIndex.embed(given, self.generator.embedder, quiet=quiet), None

    # --- which adapter -------------------------------------------------------------------------------------------

    def route(
        self, texts: Sequence[str], *, descriptions: Sequence[str | None] | None = None, models: Sequence[str | None] | None = None
    ) -> list[Route]:
        """Chooses an adapter for each request.

        Args:
            texts: The requests.
            descriptions: What is to be done with each, where that is known.
            models: For those that are told: `lorag:expert/NAME`, `lorag:fuse/a=.7,b=.3` or `lorag:DESCRIPTION`.

        Returns:
            One route per request, in order.

        Raises:
            TaskError: If there are not as many descriptions or models as texts.
            ServedNameError: If a model's name cannot be used.
            BankError: If it names an expert that the bank lacks.
        """
        for name, given in (("descriptions", descriptions), ("models", models)):
            if given is not None and len(given) != len(texts):
                raise TaskError(f"{name} do not fit the texts", got=len(given), expected=len(texts))
        routes: list[Route | None] = [None] * len(texts)
        for place in range(len(texts)):
            model = None if models is None else models[place]
            description = None if descriptions is None else descriptions[place]
            if model is not None:
                routes[place] = self._told(model)
            elif description is not None:
                routes[place] = self._described(description)
        left = [place for place, route in enumerate(routes) if route is None]
        for place, route in zip(left, self._by_text([texts[place] for place in left]), strict=True):
            routes[place] = route
        return [route for route in routes if route is not None]

    def nearest_task(self, description: str, text: str | None = None) -> tuple[str, float]:
        """The known task that a description most probably names, and its share among all.

        Args:
            description: What is to be done.
            text: The request's own text, if it is to count: it must be like the task's examples.

        Raises:
            BankError: If no task is known.
            TaskError: If a text is given and no task's texts are known.
        """
        if not self.known:
            raise BankError("no task is known", remedy="Give a bank, or tasks to LoraRouter.from_pretrained.")
        if self._descriptions is None:
            self._descriptions = DescriptionIndex.generate(self.generator, self.known)
        logits, names = self._descriptions.scores([description])[0], self._descriptions.names
        if text is not None:
            texts = self._texts()
            if self._text_weight is None:
                self._text_weight = self._descriptions.fit_texts(texts)
            by_text = dict(zip(texts.names, self._text_scores([text])[0].tolist(), strict=True))
            logits = logits + self._text_weight * torch.tensor([by_text.get(name, -1.0) for name in names])
        share, place = logits.softmax(0).max(0)
        return names[int(place)], float(share)

    def _told(self, model: str) -> Route:
        requested = parse_name(model)
        if requested is None:
            return Route("base", reason=f"told: {model[:80]!r} is not for lorag")
        if isinstance(requested, NamedExpert):
            return Route("expert", ((self._require(requested.name), 1.0),), reason="told")
        if isinstance(requested, Fusion):
            return Route("fusion", tuple((self._require(name), weight) for name, weight in requested.weights), reason="told")
        return self._described(requested.description)

    def _require(self, name: str) -> str:
        """The name of an expert that there is."""
        if self.bank is not None:
            return self.bank[name].name
        if name not in self.known:
            raise BankError("no task of this name is known", got=name, remedy="Give a bank, or tasks to LoraRouter.from_pretrained.")
        return name

    def _described(self, description: str) -> Route:
        verdict = self.generator.judge(description)
        if verdict.decision == "refuse":
            return Route("base", reason=verdict.reason)
        if verdict.decision == "expert" and verdict.known is not None and self.bank is not None:
            return Route("expert", ((verdict.known, 1.0),), reason=verdict.reason)
        fused = verdict.decision == "fuse" and self.bank is not None
        return Route("fusion" if fused else "generated", description=description, reason=verdict.reason)

    def _texts(self) -> TextIndex:
        if self.texts is None:
            raise TaskError(
                "a request has neither a description nor a model, and no task's texts are known",
                remedy="Give descriptions or models, or tasks with examples to LoraRouter.from_pretrained.",
            )
        return self.texts

    def _text_scores(self, texts: Sequence[str]) -> Tensor:
        """How near texts are to the examples of each task (q, n)."""
        return self._texts().scores(torch.stack([one.pooled for one in self.generator.embedder.embed(list(texts))]))

    def _by_text(self, texts: Sequence[str]) -> list[Route]:
        if not texts:
            return []
        routes, names = [], self._texts().names
        for shares in (self._text_scores(texts) / _TEMPERATURE).softmax(1):
            best = shares.topk(min(_FUSED, len(names)))
            near = [(names[int(place)], value) for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            said = ", ".join(f"{name} {share:.0%}" for name, share in near[:3])
            if near[0][1] >= _SURE:
                served = "generated" if self.bank is None else "expert"
                routes.append(Route(served, ((near[0][0], 1.0),), reason=f"its text is like the examples of {said}"))
                continue
            whole = sum(share for _, share in near)
            weights = tuple((name, round(share / whole, 2)) for name, share in near if share / whole >= 0.05)
            routes.append(Route("fusion", weights, reason=f"its text is like the examples of several tasks: {said}"))
        return routes

    # --- answers -------------------------------------------------------------------------------------------------

    def generate(
        self,
        texts: Sequence[str],
        *,
        descriptions: Sequence[str | None] | None = None,
        models: Sequence[str | None] | None = None,
        max_new_tokens: int = 64,
        rows_at_once: int = 64,
    ) -> list[Answer]:
        """Greedy answers, each request with its own adapter.

        Args:
            texts: The requests; the base's objective puts each into its template.
            descriptions: What is to be done with each, where that is known.
            models: What each is told, as `route` takes it.
            max_new_tokens: Most tokens of an answer.
            rows_at_once: Requests that run together.

        Returns:
            One answer per request, in order, with its route.
        """
        routes = self.route(texts, descriptions=descriptions, models=models)
        if self.runner is None:
            self.runner = Runner.open(self.generator.base)
        answers: dict[int, str] = {}
        order = sorted(range(len(texts)), key=lambda place: routes[place].key)  # rows of one adapter stand together
        for start in range(0, len(order), rows_at_once):
            rows = order[start : start + rows_at_once]
            inputs, adapters, kept = self._batch([texts[place] for place in rows], [routes[place] for place in rows])
            written = self.runner.generate(inputs, adapters, max_new_tokens=max_new_tokens)
            answers |= {rows[row]: written[place] for row, place in enumerate(kept)}
        return [Answer(answers[place], routes[place]) for place in range(len(texts))]

    def _batch(self, texts: Sequence[str], routes: Sequence[Route]) -> tuple[list[str], Stacked | None, list[int]]:
        """Rows in equal runs of one adapter each: what is asked, the adapters, and where each request stands.

        Runs of different lengths are filled up where that costs little; else each row brings its own copy of its factors.
        """
        keys = [route.key for route in routes]
        sizes = collections.Counter(keys)
        if all(route.served == "base" for route in routes):
            return list(texts), None, list(range(len(texts)))
        distinct = list(dict.fromkeys(keys))
        device, longest = self.runner.device if self.runner is not None else "cpu", max(sizes.values())
        by_key = {route.key: route for route in routes}
        stacked = Factors.stack([self.adapter(by_key[key]).factors for key in distinct], device)
        if len(distinct) * longest <= _PADDING * len(texts):
            inputs: list[str] = []
            kept = []
            for key in distinct:
                same = [place for place, other in enumerate(keys) if other == key]
                kept += [(place, len(inputs) + row) for row, place in enumerate(same)]
                inputs += [texts[place] for place in same] + [texts[same[-1]]] * (longest - len(same))
            return inputs, stacked, [row for _, row in sorted(kept)]
        places = torch.tensor([distinct.index(key) for key in keys], device=device)
        return list(texts), {name: (a[places], b[places]) for name, (a, b) in stacked.items()}, list(range(len(texts)))

    def adapter(self, route: Route) -> LoraAdapter:
        """The adapter of a route, kept in memory for the next request."""
        if route.key in self._adapters:
            self._adapters.move_to_end(route.key)
            return self._adapters[route.key]
        generated = self._made(route)
        self._adapters[route.key] = generated
        if len(self._adapters) > self.kept:
            self._adapters.popitem(last=False)
        return generated

    def _made(self, route: Route) -> LoraAdapter:
        if route.description is not None:
            return self.generator.generate(route.description, bank=self.bank)
        names = [name for name, _ in route.experts]
        if not names:  # the base model, among rows that have adapters: one that changes nothing
            return LoraAdapter(self.generator.base.layout, Factors.zeros(self.generator.base.layout))
        experts = [self._expert(name) for name in names]
        if len(experts) == 1:
            return experts[0]
        return merge(experts, "cat", weights=[weight for _, weight in route.experts], rank=self.generator.rank)

    def _expert(self, name: str) -> LoraAdapter:
        if self.bank is not None:
            return self.bank.adapter(name)
        return self.generator.generate(self.known[name][0], on_unknown="ignore")
