"""From the name of a model to an adapter's folder: parsed, looked up in the store, else generated, taken from the bank, or fused."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorag import __version__
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.base_model import BaseModel
from lorag.base.names import same_model
from lorag.errors import BaseModelError, ConfigError, ServedNameError, UnknownTaskWarning
from lorag.files.artifacts import sha256
from lorag.generator.generate import default_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.settings import ON_UNKNOWN
from lorag.serving.names import PREFIX, DescribedTask, NamedExpert, Requested, alias, parse_name
from lorag.serving.store import AdapterStore, StoreLimits

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = ["AdapterResolver", "ServingSettings"]

logger = logging.getLogger(__name__)

_HUB_FOLDER = "models--"  # of the hub's cache: models--USER--NAME/snapshots/REVISION


@dataclass(frozen=True)
class ServingSettings:
    """What a server serves.

    Attributes:
        generator: Folder or hub id; None is the embedded one.
        bank: The generator's bank, folder or hub id: for `lorag:expert/` and `lorag:fuse/`, and so that a known task gets its expert.
        on_unknown: What becomes of a description that the gate refuses: "raise" refuses the request, "fallback" answers as the base
            model does, "warn" generates and says so in the log, "ignore" does not ask the gate.
        folder: Of the adapters; several servers may share it. None is `~/.cache/lorag/serving`.
        max_adapters: How many adapters it may hold.
        max_bytes: How many bytes they may take together.
        max_rank: The engine's largest rank, vLLM's `--max-lora-rank`: fusions are cut to it, larger adapters refused.
        max_waiting: How many new requests may wait for their adapters.
        log_texts: Whether descriptions may stand in logs, metrics and the list of models; else a hash stands for each.
    """

    generator: str | None = None
    bank: str | None = None
    on_unknown: str = "raise"
    folder: str | None = None
    max_adapters: int = 1000
    max_bytes: int = 4 * 2**30
    max_rank: int = 16
    max_waiting: int = 32
    log_texts: bool = False

    def __post_init__(self) -> None:
        if self.on_unknown not in ON_UNKNOWN:
            raise ConfigError("on_unknown cannot be used", got=repr(self.on_unknown)[:40], expected=" or ".join(ON_UNKNOWN))
        for name in ("max_adapters", "max_bytes", "max_rank", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} cannot be used", got=getattr(self, name), expected="1 or more")


class AdapterResolver:
    """Answers names with adapter folders. Thread-safe; adapters are made one after the other.

    Args:
        generator: Makes adapters from descriptions.
        store: Keeps them.
        bank: The generator's bank, for experts and fusions.
        settings: The rest; its paths are not opened here.
    """

    def __init__(
        self, generator: LoraGenerator, store: AdapterStore, bank: AdapterBank | None = None, settings: ServingSettings | None = None
    ) -> None:
        self.settings = ServingSettings() if settings is None else settings
        generator.check_bank(bank)
        if generator.rank > self.settings.max_rank:
            raise ConfigError(
                "the generator's adapters do not fit the engine",
                got=f"rank {generator.rank}, max_rank {self.settings.max_rank}",
                remedy=f"Set max_rank: {generator.rank}, and start vLLM with --max-lora-rank {generator.rank} or more.",
            )
        self.generator, self.store, self.bank = generator, store, bank
        self._making = threading.Lock()
        self._made_by = self._identity()

    @classmethod
    def from_settings(cls, settings: ServingSettings) -> AdapterResolver:
        """Opens what the settings name."""
        generator = default_generator() if settings.generator is None else LoraGenerator.from_pretrained(settings.generator)
        bank = None if settings.bank is None else find_bank(settings.bank)
        folder = Path.home() / ".cache/lorag/serving" if settings.folder is None else Path(settings.folder)
        return cls(generator, AdapterStore.open(folder, StoreLimits(settings.max_adapters, settings.max_bytes)), bank, settings)

    def check_base(self, served: str) -> None:
        """Checks that the model that is served is the one that the adapters are for: by name, or else by its weights.

        Args:
            served: Name or folder that the engine loaded.

        Raises:
            BaseModelError: If it is another one.
        """
        base = self.generator.base
        if same_model(served, base.model.name) or base.model.name == _hub_id(served):
            return
        model = BaseModel(served, base.model.kind)
        if not Path(served).is_dir() or not model.has_identity(base.identity):  # without weights an identity is but a revision
            raise BaseModelError(
                "the model that is served is not the one of the generator",
                got=f"{served}, {model.identity()}",
                expected=f"{base.model.name}, {base.identity}",
                remedy="Serve that one, or name a generator for this one.",
            )

    def find(self, requested: Requested) -> Path | None:
        """The folder that answers a request, if it was made before."""
        return self.store.find(self._key(requested))

    def make(self, requested: Requested) -> Path:
        """The folder that answers a request, made now unless it is there.

        Raises:
            UnknownTaskError: If the gate refuses the description and `on_unknown` is "raise"; it names the nearest tasks.
            ServedNameError: If there is no such expert, or no bank.
            StoreFullError: If the store is full.
            StorageError: If it cannot be written.
        """
        with self._making:
            key, began = self._key(requested), time.monotonic()
            folder = self.store.find(key)
            if folder is None:
                self.store.check_room()
                folder = self.store.add(key, self._adapter(requested).save_pretrained)
                shown = requested.canonical if self.settings.log_texts else alias(requested.canonical)
                logger.info("%s: adapter %s made in %.2f s", shown, folder.name[:12], time.monotonic() - began)
        return folder

    def resolve(self, name: str) -> Path | None:
        """The folder that answers the name of a model; None if the name is not for lorag to answer."""
        requested = parse_name(name)
        return None if requested is None else self.find(requested) or self.make(requested)

    def _adapter(self, requested: Requested) -> LoraAdapter:
        if isinstance(requested, DescribedTask):
            return self._generated(requested.description)
        if self.bank is None:
            raise ServedNameError("this server has no bank", remedy=f"Ask by a description: {PREFIX}summarise legal text.")
        names = [requested.name] if isinstance(requested, NamedExpert) else [name for name, _ in requested.weights]
        missing = [name for name in names if name not in self.bank]
        if missing:
            raise ServedNameError("the bank has no such expert", got=missing[0])
        if isinstance(requested, NamedExpert):
            adapter = self.bank.adapter(requested.name)
            if adapter.rank > self.settings.max_rank:
                raise ServedNameError("the expert's rank is too large", got=adapter.rank, expected=f"at most {self.settings.max_rank}")
            return adapter
        weights = [weight for _, weight in requested.weights]
        rank = min(self.settings.max_rank, sum(self.bank[name].rank for name in names))
        return self.bank.fuse(names, "cat", weights=weights, rank=rank)

    def _generated(self, description: str) -> LoraAdapter:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnknownTaskWarning)
            adapter = self.generator.generate(description, on_unknown=self.settings.on_unknown, bank=self.bank)
        if any(issubclass(warning.category, UnknownTaskWarning) for warning in caught):
            shown = description if self.settings.log_texts else alias(description)
            logger.warning("%s: no task of the bank is like it; served as on_unknown=%s says", shown, self.settings.on_unknown)
        if adapter.info["gate"]["served"] == "fallback":  # all of them change nothing: one folder serves them
            info = {"method": "fallback", "base_model": adapter.info["base_model"], "license": adapter.info["license"]}
            return replace(adapter, factors=Factors.zeros(adapter.layout), info=info)
        if adapter.rank > self.settings.max_rank:
            raise ServedNameError("the adapter's rank is too large", got=adapter.rank, expected=f"at most {self.settings.max_rank}")
        return adapter

    def _key(self, requested: Requested) -> str:
        return hashlib.sha256(f"{self._made_by}\0{requested.canonical}".encode()).hexdigest()[:40]

    def _identity(self) -> str:
        """What else an adapter depends on: generator, gate, bank, settings, version."""
        gate = self.generator.gate
        parts = {
            "lorag": __version__,
            "generator": self.generator.revision,
            "strength": self.generator.strength,
            "gate": None if gate is None else gate.to_dict(),
            "bank": None if self.bank is None else sha256(self.bank.folder / "bank.json"),
            "on_unknown": self.settings.on_unknown,
            "max_rank": self.settings.max_rank,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hub_id(folder: str) -> str | None:
    """user/name of a snapshot in the hub's cache, which is what an engine without a network calls its model."""
    part = next((part for part in Path(folder).parts if part.startswith(_HUB_FOLDER)), None)
    return None if part is None else part.removeprefix(_HUB_FOLDER).replace("--", "/")
