"""Zips of adapters in one private folder: the only files that the page hands out."""

from __future__ import annotations

import secrets
import shutil
import threading
import zipfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.adapters.checks import CONFIG, PROVENANCE, WEIGHTS
from lorag.adapters.publishing import CARD
from lorag.files.artifacts import slug

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = ["Downloads"]

_CONTENTS = (CONFIG, WEIGHTS, PROVENANCE, CARD)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same adapter gives the same bytes


class Downloads:
    """Packs adapters and forgets the oldest.

    Args:
        folder: Exists, private to this process; whoever made it removes it.
        most: Zips kept at a time.
    """

    def __init__(self, folder: Path, most: int = 24) -> None:
        self.folder, self._most = folder, most
        self._kept: deque[Path] = deque()
        self._lock = threading.Lock()

    def pack(self, adapter: LoraAdapter, name: str) -> Path:
        """Writes the adapter with its card as a zip that unpacks to one PEFT folder.

        Args:
            adapter: What to pack.
            name: What the folder and the zip are called after, such as the description.

        Raises:
            StorageError: If it cannot be written.
        """
        place = self.folder / secrets.token_urlsafe(16)  # nobody else can guess the address
        place.mkdir()
        called = slug(name)
        adapter.save_pretrained(place / called)
        packed = place / f"{called}.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            for file in _CONTENTS:
                entry = zipfile.ZipInfo(f"{called}/{file}", _EPOCH)
                entry.external_attr = 0o644 << 16
                kind = zipfile.ZIP_STORED if file == WEIGHTS else zipfile.ZIP_DEFLATED  # factors hardly shrink
                archive.writestr(entry, (place / called / file).read_bytes(), kind)
        shutil.rmtree(place / called)
        with self._lock:
            self._kept.append(place)
            while len(self._kept) > self._most:
                shutil.rmtree(self._kept.popleft(), ignore_errors=True)
        return packed
