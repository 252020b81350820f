"""What a bank remembers of its experts' weights and descriptions: one more adapter is compared with all without reading them again.

`index.safetensors` lies beside the manifest and can always be made anew: it holds the bases that the experts share,
refitted as experts come, and of each expert its norm and a sketch. Inner products of sketches estimate those of ΔW, which
finds candidates for the nearest; what is reported of them is computed from the experts themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.adapters.spans import RunningSpan
from lorag.errors import ArtifactError, FormatVersionError, LoragError
from lorag.files.artifacts import parse_json
from lorag.files.tensors import load_tensors, read_header, save_tensors
from lorag.progress import progress_bar

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter
    from lorag.bank.bank import AdapterBank, Expert
    from lorag.base.layout import LoraLayout
    from lorag.text.embedding import TextEmbedder

__all__ = ["BankIndex", "DescriptionIndex", "stamp"]

logger = logging.getLogger(__name__)

_FILE = "index.safetensors"
_FORMAT = 1  # of both files
_K = 32  # as weight spaces have by default
_PROBES = 1024  # an estimated cosine is off by about 1/√1024
_CANDIDATES = 4
_MOST_WAITING = 4 * _K


@lru_cache(maxsize=64)
def _probes(side: str, size: int) -> Tensor:
    """Fixed random vectors (d, size) for one side of all modules of one size."""
    rng = torch.Generator().manual_seed(2 * size + (side == "in"))
    return torch.randn(_PROBES, size, generator=rng) / _PROBES**0.25


@lru_cache(maxsize=4)
def _signs(modules: int) -> Tensor:
    """Random signs (m, d): modules of one size share their probes, and without signs their ΔW would mix."""
    return torch.randint(0, 2, (modules, _PROBES), generator=torch.Generator().manual_seed(modules)) * 2.0 - 1.0


def _sketch(adapter: LoraAdapter) -> Tensor:
    """Sketch (d,): entry j is Σ_m ε_mj u_jᵀ ΔW_m v_j, so that the product of two sketches has the mean ⟨ΔW, ΔW'⟩."""
    total = torch.zeros(_PROBES)
    for module, signs in zip(adapter.layout.modules, _signs(len(adapter.layout)), strict=True):
        a, b = adapter.factors[module.name]
        left, right = _probes("out", module.out_features) @ b, _probes("in", module.in_features) @ a.T
        total += signs * (left * right).sum(1)
    return total


def stamp(bank: AdapterBank, expert: Expert) -> str:
    """Names an expert's stored weights."""
    return f"{str(bank.files[expert.file]['sha256'])[:16]}:{expert.index}"


class BankIndex:
    """Bases, norms and sketches of the experts of one layout. Load one with `load`.

    Args:
        layout: The bank's layout.
    """

    def __init__(self, layout: LoraLayout) -> None:
        self.layout = layout
        self.norms: dict[str, float] = {}
        self._stamps: dict[str, str] = {}
        self._sketches: dict[str, Tensor] = {}
        self._spans = [(RunningSpan(m.out_features, 2 * _K), RunningSpan(m.in_features, 2 * _K)) for m in layout.modules]
        self._bases: list[tuple[Tensor, Tensor]] | None = None
        self._since = 0
        self._latest: tuple[LoraAdapter, Tensor] | None = None  # an adapter is compared, then taken in

    def __len__(self) -> int:
        return len(self._stamps)

    # --- what it takes in ----------------------------------------------------------------------------------------

    def insert(self, name: str, mark: str, adapter: LoraAdapter) -> None:
        """Takes one more expert in, and refits the bases when the bank has grown by an eighth since they were."""
        self._take(name, mark, adapter)
        if self._since >= max(1, len(self) // 8):
            self._refit()

    def _take(self, name: str, mark: str, adapter: LoraAdapter) -> None:
        for module, (out_span, in_span) in zip(self.layout.modules, self._spans, strict=True):
            left, values, right = adapter.factors.svd(module.name)
            out_span.add(left * values)
            in_span.add(right * values)
        self.norms[name], self._stamps[name], self._sketches[name] = adapter.factors.norm(), mark, self.sketch(adapter)
        self._since += 1
        if self._spans[0][0].waiting >= _MOST_WAITING:
            self._refit()

    def sketches(self) -> dict[str, Tensor]:
        """Sketch (d,) of each expert's ΔW."""
        return dict(self._sketches)

    def sketch(self, adapter: LoraAdapter) -> Tensor:
        """Sketch (d,) of any adapter's ΔW: entry j is Σ_m ε_mj u_jᵀ ΔW_m v_j, so that products of two estimate ⟨ΔW, ΔW'⟩."""
        if self._latest is None or self._latest[0] is not adapter:
            self._latest = adapter, _sketch(adapter)
        return self._latest[1]

    def _refit(self) -> None:
        for out_span, in_span in self._spans:
            out_span.refit()
            in_span.refit()
        self._bases, self._since = None, 0

    def cover(self, bank: AdapterBank, *, quiet: bool = True) -> BankIndex:
        """Returns an index of just the experts of a bank: reads those that it does not know yet.

        Bases cannot forget, so that an expert that is gone or was replaced means beginning anew.
        """
        marks = {expert.name: stamp(bank, expert) for expert in bank.experts}
        if any(marks.get(name) != mark for name, mark in self._stamps.items()):
            return BankIndex(self.layout).cover(bank, quiet=quiet)
        new = [name for name in bank.names if name not in self._stamps]
        for name in progress_bar(new, desc="indexing experts", disable=quiet or len(new) < 16, leave=False):
            try:
                adapter = bank.adapter(name)
            except LoragError as error:
                logger.warning("expert %s is left out of comparisons: %s", name, error)
                continue
            self._take(name, marks[name], adapter)
        if self._since:
            self._refit()
        return self

    # --- what it answers -----------------------------------------------------------------------------------------

    def energy(self, adapter: LoraAdapter) -> float | None:
        """Share of ‖ΔW‖² that lies in the k leading directions of the experts taken in; None without experts."""
        if not self._stamps:
            return None
        if self._bases is None:
            self._bases = [(out_span.basis(_K), in_span.basis(_K)) for out_span, in_span in self._spans]
        kept = 0.0
        for name, (u_out, u_in) in zip(self.layout.names, self._bases, strict=True):
            a, b = adapter.factors.pair(name, torch.float64)
            kept += ((u_out.T @ b) @ (a @ u_in)).square().sum().item()
        whole = adapter.factors.norm() ** 2
        return min(1.0, kept / whole) if whole else 1.0

    def nearest(self, adapter: LoraAdapter, bank: AdapterBank, *, but: str | None = None) -> list[tuple[str, float]]:
        """The experts whose ΔW have the largest cosine with an adapter's, best first.

        Args:
            adapter: The adapter.
            bank: Where the candidates that the sketches find are read, so that the cosines are exact.
            but: An expert to leave out, such as the adapter itself.
        """
        names = [name for name in self._stamps if name != but]
        whole = adapter.factors.norm()
        if not names or not whole:
            return []
        sizes = torch.tensor([self.norms[name] for name in names]).clamp_min(1e-30)
        estimates = torch.stack([self._sketches[name] for name in names]) @ self.sketch(adapter) / (whole * sizes)
        candidates = [names[i] for i in estimates.topk(min(_CANDIDATES, len(names))).indices.tolist()]
        cosines = [(name, adapter.factors.cosine(bank.adapter(name).factors)) for name in candidates if name in bank]
        return sorted(cosines, key=lambda pair: -pair[1])

    # --- its file ------------------------------------------------------------------------------------------------

    def save(self, bank: AdapterBank) -> None:
        """Writes the index beside the bank's manifest."""
        names = list(self._stamps)
        tensors = {
            "norms": torch.tensor([self.norms[name] for name in names], dtype=torch.float64),
            "sketches": torch.stack([self._sketches[name] for name in names]) if names else torch.zeros(0, _PROBES),
        }
        self._refit()
        for number, spans in enumerate(self._spans):
            for side, span in zip(("out", "in"), spans, strict=True):
                tensors[f"{number}.{side}"] = span.columns
        values = {"format": _FORMAT, "layout": self.layout.fingerprint, "probe": _fingerprint(), "experts": self._stamps}
        save_tensors(bank.folder / _FILE, tensors, {"index": json.dumps(values)})

    @classmethod
    def load(cls, bank: AdapterBank, *, quiet: bool = True) -> BankIndex:
        """The index of all experts of a bank: what its file has, if it can be used, and the rest worked out."""
        path, index = bank.folder / _FILE, cls(bank.base.layout)
        if path.is_file():
            try:
                index = cls._read(bank)
            except LoragError as error:
                logger.warning("%s cannot be used and is made anew: %s", path, error)
        return index.cover(bank, quiet=quiet)

    @classmethod
    def _read(cls, bank: AdapterBank) -> BankIndex:
        path, index = bank.folder / _FILE, cls(bank.base.layout)
        spec, metadata = read_header(path)
        values: Mapping[str, Any] = parse_json(metadata.get("index", "null"), f"the metadata of {path}")
        wanted = {"format": _FORMAT, "layout": index.layout.fingerprint, "probe": _fingerprint()}
        if not isinstance(values, dict) or {key: values.get(key) for key in wanted} != wanted:
            raise FormatVersionError("it was written by another version, or for another bank")
        marks = values.get("experts")
        if not isinstance(marks, dict) or not all(isinstance(mark, str) for mark in marks.values()):
            raise ArtifactError("it lists no experts")
        shapes = {"norms": ("F64", (len(marks),)), "sketches": ("F32", (len(marks), _PROBES))}
        for number, module in enumerate(index.layout.modules):
            for side, size in (("out", module.out_features), ("in", module.in_features)):
                kept = spec.get(f"{number}.{side}", ("", (0, 0)))[1][-1:]
                shapes[f"{number}.{side}"] = ("F32", (size, *kept))
                if not kept or kept[0] > 2 * _K:
                    raise ArtifactError("it keeps more directions than an index does")
        if spec != shapes:
            raise ArtifactError("its tensors do not fit the bank's layout")
        tensors = load_tensors(path)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ArtifactError("it holds NaN or infinite values")
        index._stamps = dict(marks)
        index.norms = dict(zip(marks, tensors["norms"].tolist(), strict=True))
        index._sketches = dict(zip(marks, tensors["sketches"], strict=True))
        for number, (out_span, in_span) in enumerate(index._spans):
            out_span.columns, in_span.columns = tensors[f"{number}.out"], tensors[f"{number}.in"]
        return index


def _fingerprint() -> str:
    """Tells apart sketches made with other random numbers, which another version of torch may draw."""
    return f"{_probes('out', 8)[0, 0].item():.5f} {_PROBES}"


# --- descriptions -----------------------------------------------------------------------------------------------------


_DESCRIPTIONS_FILE = "descriptions.safetensors"
_WORDINGS = 4  # of an expert; their mean hardly moves with more, and a bank may have forty of each


def _digest(expert: Expert) -> str:
    return hashlib.sha256("\0".join(expert.descriptions).encode()).hexdigest()[:16]


class DescriptionIndex:
    """Mean unit vectors of experts' descriptions under one embedder. Load one with `load`.

    Args:
        embedder: Embeds descriptions.
    """

    def __init__(self, embedder: TextEmbedder) -> None:
        self._embedder = embedder
        self._digests: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._rows = torch.empty(0, embedder.size)  # with room for more than there are

    def cover(self, bank: AdapterBank, *, quiet: bool = True) -> DescriptionIndex:
        """Embeds what is new or was changed, forgets the experts that are gone, and returns the same index."""
        if any(name not in bank for name in self._digests):
            self._forget(bank)
        new = [expert for expert in bank.experts if self._digests.get(expert.name) != _digest(expert)]
        texts = [expert.descriptions[:_WORDINGS] for expert in new]
        flat = iter(self._embedder.embed([text for wordings in texts for text in wordings], quiet=quiet or sum(map(len, texts)) < 64))
        for expert, wordings in zip(new, texts, strict=True):
            mean = torch.stack([next(flat).pooled for _ in wordings]).mean(0)
            self._put(expert.name, torch.nn.functional.normalize(mean, dim=-1))
            self._digests[expert.name] = _digest(expert)
        return self

    def _forget(self, bank: AdapterBank) -> None:
        """Leaves out the experts that a bank lacks."""
        kept = [name for name in self._digests if name in bank]
        self._rows = self._rows[[self._places[name] for name in kept]]
        self._digests = {name: self._digests[name] for name in kept}
        self._places = {name: place for place, name in enumerate(kept)}

    def _put(self, name: str, vector: Tensor) -> None:
        place = self._places.setdefault(name, len(self._places))
        if place == len(self._rows):
            self._rows = torch.cat([self._rows, torch.zeros(max(64, place), self._rows.shape[1])])
        self._rows[place] = vector

    def vector(self, name: str) -> Tensor:
        """Mean unit vector (e,) of one expert's descriptions."""
        return self._rows[self._places[name]]

    def vectors(self) -> dict[str, Tensor]:
        """Those of all experts."""
        return {name: self.vector(name) for name in self._places}

    def nearest(self, name: str, among: Collection[str], keep: int = 3) -> list[tuple[str, float]]:
        """The experts of a collection whose descriptions have the largest cosine with those of one expert, best first."""
        names = list(self._places)
        cosines = self._rows[: len(names)] @ self._rows[self._places[name]]
        # Nearly all are in the collection, so that few more than are wanted have to be looked at.
        for count in (keep + 1 + max(0, len(names) - len(among)), len(names)):
            best = cosines.topk(min(count, len(names)))
            near = [(names[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            near = [(other, value) for other, value in near if other != name and other in among]
            if len(near) >= keep:
                break
        return near[:keep]

    def save(self, bank: AdapterBank) -> None:
        """Writes the vectors beside the bank's manifest."""
        if not self._digests:
            return
        values = {"format": _FORMAT, "embedder": self._embedder.name, "experts": self._digests}
        tensors = {"centroids": self._rows[[self._places[name] for name in self._digests]]}
        save_tensors(bank.folder / _DESCRIPTIONS_FILE, tensors, {"index": json.dumps(values)})

    @classmethod
    def load(cls, bank: AdapterBank, embedder: TextEmbedder, *, quiet: bool = True) -> DescriptionIndex:
        """The vectors of all experts of a bank: those in its file, if they are this embedder's, and the rest embedded."""
        path, index = bank.folder / _DESCRIPTIONS_FILE, cls(embedder)
        if path.is_file():
            try:
                index._read(bank)
            except LoragError as error:
                logger.warning("%s cannot be used and is made anew: %s", path, error)
                index = cls(embedder)
        return index.cover(bank, quiet=quiet)

    def _read(self, bank: AdapterBank) -> None:
        path = bank.folder / _DESCRIPTIONS_FILE
        spec, metadata = read_header(path)
        values = parse_json(metadata.get("index", "null"), f"the metadata of {path}")
        if not isinstance(values, dict) or (values.get("format"), values.get("embedder")) != (_FORMAT, self._embedder.name):
            raise ArtifactError("it was written by another version, or with another embedder")
        digests = values.get("experts")
        if not isinstance(digests, dict) or spec != {"centroids": ("F32", (len(digests), self._embedder.size))}:
            raise ArtifactError("its vectors do not fit the experts that it lists")
        centroids = load_tensors(path)["centroids"]
        if not torch.isfinite(centroids).all():
            raise ArtifactError("it holds NaN or infinite values")
        self._digests, self._rows = dict(digests), centroids
        self._places = {name: place for place, name in enumerate(digests)}
