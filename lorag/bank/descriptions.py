"""What a bank remembers of its experts' descriptions: one vector each, so that a new description is compared with all at once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorag.errors import ArtifactError, LoragError
from lorag.files.artifacts import parse_json
from lorag.files.tensors import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank, Expert
    from lorag.text.embedding import TextEmbedder

__all__ = ["DescriptionIndex", "same_words"]

logger = logging.getLogger(__name__)

FILE = "descriptions.safetensors"
_FORMAT = 1
_WORDINGS = 4  # of an expert; their mean hardly moves with more, and a bank may have forty of each


def same_words(text: str) -> str:
    """A description without what makes no other task of it: case, spaces and the full stop."""
    return " ".join(text.casefold().split()).rstrip(".!")


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

    def cover(self, bank: AdapterBank, *, quiet: bool = True) -> None:
        """Embeds what is new or was changed, and forgets the experts that are gone."""
        if any(name not in bank for name in self._digests):
            self._forget(bank)
        new = [expert for expert in bank.experts if self._digests.get(expert.name) != _digest(expert)]
        texts = [expert.descriptions[:_WORDINGS] for expert in new]
        flat = iter(self._embedder.embed([text for own in texts for text in own], quiet=quiet or sum(map(len, texts)) < 64))
        for expert, own in zip(new, texts, strict=True):
            mean = torch.stack([next(flat).pooled for _ in own]).mean(0)
            self._put(expert.name, torch.nn.functional.normalize(mean, dim=-1))
            self._digests[expert.name] = _digest(expert)

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
        save_tensors(bank.folder / FILE, tensors, {"index": json.dumps(values)})

    @classmethod
    def load(cls, bank: AdapterBank, embedder: TextEmbedder) -> DescriptionIndex:
        """Reads the vectors of a bank, or starts with none where they cannot be used or are another embedder's, and says so."""
        path, index = bank.folder / FILE, cls(embedder)
        if path.is_file():
            try:
                index._read(bank)
            except LoragError as error:
                logger.warning("%s cannot be used and is made anew: %s", path, error)
                return cls(embedder)
        return index

    def _read(self, bank: AdapterBank) -> None:
        path = bank.folder / FILE
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
