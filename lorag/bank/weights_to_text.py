"""What adapters do, read off their weights: a ridge regression from sketches of ΔW to descriptions' vectors, learned on a bank.

Experts of like tasks have like weights, and like descriptions. So what a bank remembers of both (`BankIndex`, `DescriptionIndex`) is
enough to say which known tasks an adapter without a description is near, to find such adapters by text, and to notice a card
that speaks of something else. How well this works depends on the bank, and is measured on the bank itself, each expert left out
in turn, before anything is said. (The question of W2T, arXiv 2603.15990, whose network reads canonical factors.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lorag.bank.candidates import ImportOptions, read_candidate
from lorag.bank.index import BankIndex, DescriptionIndex
from lorag.errors import BankError, LoragError
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.adapters.sources import Source
    from lorag.bank.bank import AdapterBank
    from lorag.text.embedding import TextEmbedder

__all__ = ["Described", "WeightReader", "describe_adapters"]

_FEWEST = 24  # experts to learn from
_PENALTIES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
_TELLING, _TRUSTED = 0.8, 0.97  # share of pairs of right and wrong descriptions told apart, for proposals and for doubts
_RARE = 0.01  # share of experts left out whose weights fit their own description no better than a doubtful adapter's
_WRONG = 0.1  # share of wrong descriptions that fit better than a doubtful one


@dataclass(frozen=True)
class WeightReader:
    """A ridge regression from weights to the text space, in its dual form.

    Attributes:
        names: The n experts that it learned from.
        sketches: Their unit sketches less the mean (n, d).
        dual: Dual coefficients (n, e).
        texts: Their description vectors less the mean (n, e).
        sketch_mean: Mean unit sketch (d,).
        text_mean: Mean description vector (e,).
        penalty: ρ, as a share of the mean of the kernel's diagonal.
        separation: Share of pairs of a right and a wrong description that the experts, each left out, tell apart: .5 is chance.
        matches: Cosine (n,) of each expert's own description with what is read off its weights, itself left out.
        wrong: Cosine that one wrong description in ten reaches.
    """

    names: tuple[str, ...]
    sketches: Tensor
    dual: Tensor
    texts: Tensor
    sketch_mean: Tensor
    text_mean: Tensor
    penalty: float
    separation: float
    matches: Tensor
    wrong: float

    @classmethod
    def fit(cls, names: Sequence[str], sketches: Tensor, texts: Tensor, penalties: Sequence[float] = _PENALTIES) -> WeightReader | None:
        """Learns from experts; None if they are too few to learn from.

        The penalty is the one with which experts, each left out in closed form, come nearest to their own descriptions.

        Args:
            names: n experts.
            sketches: Of their ΔW (n, d), of any length.
            texts: Unit vectors of their descriptions (n, e).
            penalties: Those that are tried.
        """
        if len(names) < _FEWEST:
            return None
        units = F.normalize(sketches.double(), dim=1)
        sketch_mean, text_mean = units.mean(0), texts.double().mean(0)
        x, y = units - sketch_mean, texts.double() - text_mean
        vectors, roots, _ = torch.linalg.svd(x, full_matrices=False)  # of a large bank far less than the kernel's eigenvectors
        values = roots.square()
        size = x.square().sum(1).mean().clamp_min(1e-12)
        turned = vectors.T @ y
        best: tuple[float, float, Tensor, Tensor] | None = None
        for penalty in penalties:
            shrunk = 1 / (values + penalty * size)
            dual = vectors @ (shrunk[:, None] * turned)
            # Each left out in closed form, from the mean of the others too: otherwise a mean without it gives it away.
            leverage = vectors.square() @ (values * shrunk) + 1 / len(y)
            without_it = y - (y - x @ (x.T @ dual)) / (1 - leverage)[:, None] + y / (len(y) - 1)
            cosine = F.cosine_similarity(without_it, y, dim=1).mean().item()
            if best is None or cosine > best[0]:
                best = cosine, penalty, dual, without_it
        if best is None:
            raise AssertionError("no penalty was tried")
        _, penalty, dual, without_it = best
        cosines = F.normalize(without_it, dim=1) @ F.normalize(y, dim=1).T
        matches = cosines.diagonal()
        wrong = ~torch.eye(len(y), dtype=torch.bool)
        separation = (matches[:, None] > cosines)[wrong].double().mean().item()
        reached = cosines[wrong].sort().values[-max(1, round(_WRONG * int(wrong.sum())))].item()
        return cls(
            names=tuple(names),
            sketches=x.float(),
            dual=dual.float(),
            texts=y.float(),
            sketch_mean=sketch_mean.float(),
            text_mean=text_mean.float(),
            penalty=penalty,
            separation=separation,
            matches=matches.float(),
            wrong=reached,
        )

    @classmethod
    def of_bank(cls, index: BankIndex, descriptions: DescriptionIndex) -> WeightReader | None:
        """Learns from all that both indices know; None if that is too little to learn from."""
        sketches, texts = index.sketches(), descriptions.vectors()
        names = [name for name in sketches if name in texts]
        if len(names) < _FEWEST:
            return None
        return cls.fit(names, torch.stack([sketches[name] for name in names]), torch.stack([texts[name] for name in names]))

    @property
    def telling(self) -> bool:
        """Whether this bank's weights tell what its experts do, so that what is read off an adapter's means something."""
        return self.separation >= _TELLING

    @property
    def trusted(self) -> bool:
        """Whether they tell it so surely that a description may be doubted."""
        return self.separation >= _TRUSTED

    def read(self, sketch: Tensor) -> Tensor:
        """What weights say: a unit vector (..., e) in the text space, less the bank's mean, from sketches (..., d)."""
        unit = F.normalize(sketch.float(), dim=-1) - self.sketch_mean
        return F.normalize(unit @ self.sketches.T @ self.dual, dim=-1)

    def nearest(self, sketch: Tensor, keep: int = 5, but: str | None = None) -> list[tuple[str, float]]:
        """The experts whose descriptions are nearest to what an adapter's weights say, best first, with cosines.

        Args:
            sketch: The adapter's (d,).
            keep: How many.
            but: An expert to leave out, such as the adapter itself.
        """
        cosines = F.normalize(self.texts, dim=1) @ self.read(sketch)
        if but in self.names:
            cosines[self.names.index(but)] = -2.0
        best = cosines.topk(min(keep, len(self.names) - (but in self.names)))
        return [(self.names[place], value) for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def fits(self, sketch: Tensor, text: Tensor) -> float:
        """Cosine of what weights say with a description's unit vector (e,)."""
        return (self.read(sketch) @ F.normalize(text.float() - self.text_mean, dim=-1)).item()

    def doubtful(self, fit: float) -> bool:
        """Whether weights fit a description (`fits`) worse than nearly all of the bank's experts fit theirs, and as wrong ones do.

        Never where the bank's weights do not tell what they do (`trusted`).
        """
        return self.trusted and fit < self.wrong and (self.matches <= fit).float().mean().item() <= _RARE

    def doubts(self) -> list[str]:
        """Experts of the bank itself, each left out in turn, whose weights do not fit their descriptions."""
        return [name for name, fit in zip(self.names, self.matches.tolist(), strict=True) if self.trusted and fit < self.wrong]


@dataclass(frozen=True)
class Described:
    """What one adapter's weights say.

    Attributes:
        source: Where it is.
        near: Experts whose descriptions are nearest, best first, with cosines.
        match: Cosine with the text that is looked for; None without one.
        error: Why it cannot be read, or None.
    """

    source: str
    near: tuple[tuple[str, float], ...] = ()
    match: float | None = None
    error: LoragError | None = None


def describe_adapters(
    bank: AdapterBank,
    sources: Sequence[Source],
    embedder: TextEmbedder,
    options: ImportOptions | None = None,
    *,
    find: str | None = None,
    keep: int = 5,
    quiet: bool = True,
) -> list[Described]:
    """Reads off adapters' weights which of a bank's tasks they are near; with a text, those come first that it describes best.

    Args:
        bank: Experts with descriptions, of the same base model.
        sources: The adapters; whether anything describes them does not matter.
        embedder: Embeds descriptions.
        options: How adapters are read.
        find: A description of what is looked for.
        keep: Experts named for each.
        quiet: No progress bars.

    Raises:
        BankError: If the bank has too few experts to learn from, or their weights do not tell what they do.
    """
    index = BankIndex.load(bank, quiet=quiet)
    reader = WeightReader.of_bank(index, DescriptionIndex.load(bank, embedder, quiet=quiet))
    if reader is None or not reader.telling:
        got = f"{len(bank)} experts" if reader is None else f"{reader.separation:.0%} of right and wrong descriptions told apart"
        expected = f"at least {_FEWEST} experts, and {_TELLING:.0%}"
        raise BankError("this bank's weights do not tell what its experts do", got=got, expected=expected, remedy="Add experts to it.")
    sought = None if find is None else embedder.embed([find])[0].pooled
    reading = replace(options or ImportOptions(), descriptions=("-",))  # whatever it says of itself is not asked for
    described = []
    for source in progress_bar(sources, desc="reading adapters", disable=quiet or len(sources) < 16, leave=False):
        candidate = read_candidate((bank.base, reading), source)
        if candidate.error is not None or candidate.adapter is None:
            described.append(Described(source.label, error=candidate.error))
            continue
        sketch = index.sketch(candidate.adapter)
        match = None if sought is None else reader.fits(sketch, sought)
        described.append(Described(source.label, tuple(reader.nearest(sketch, keep)), match))
    return described if sought is None else sorted(described, key=lambda one: -2.0 if one.match is None else one.match, reverse=True)
