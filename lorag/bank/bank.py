"""Banks: folders of experts, which are adapters of one base model with descriptions of their tasks.

A bank is `bank.json` and shards `experts/*.safetensors`. A shard stacks experts of one rank with their
checkpoints, so that a thousand small adapters are not a hundred thousand tensors. Experts are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.merging import merge
from lorag.adapters.publishing import bank_card, push_files, require_public
from lorag.bank.shards import PRECISIONS, Expert, ShardReader, check_shards, shard_name, stack_checkpoints
from lorag.base.runner import BankBase
from lorag.errors import BankError, LoragError
from lorag.files.artifacts import check_manifest, embedded, require_name, resolve_inside, write_manifest
from lorag.files.atomic import locked
from lorag.files.hub import fetch
from lorag.files.stored import first_fault
from lorag.files.tensors import save_tensors
from lorag.tasks.descriptions import check_description

if TYPE_CHECKING:
    from lorag.adapters.factors import Pair

__all__ = ["AdapterBank", "BankBase", "Expert", "find_bank"]

_MANIFEST, _KIND, _FORMAT = "bank.json", "bank", 1
_PATIENCE = 120.0  # seconds that another process may take to write to a bank
_EMBEDDED = {"sandbox": "data/sandbox/bank"}  # banks that come with the package, by name


def find_bank(name: AdapterBank | str | Path) -> AdapterBank:
    """Opens a bank by its folder, its hub id, or the name of one that comes with the package, such as "sandbox".

    Raises:
        ArtifactError: If there is none, or it is not a complete bank of a known format.
    """
    if isinstance(name, AdapterBank):
        return name
    return AdapterBank.from_pretrained(embedded(_EMBEDDED[name]) if isinstance(name, str) and name in _EMBEDDED else name)


def _entry(**values: Any) -> Expert:  # noqa: ANN401 - whatever a manifest or a caller gives
    try:
        return Expert(**values)
    except ValidationError as error:
        got, expected = first_fault(error)
        raise BankError(f"the entry of expert {str(values.get('name'))[:80]!r} cannot be used", got=got, expected=expected) from error


class AdapterBank:
    """Experts of one base model. Open one with `from_pretrained`, start one with `create`.

    Args:
        folder: Where it is stored.
        base: What its experts share.
        experts: Their entries.
        files: Size and sha256 of the shards, as the manifest has them.
    """

    def __init__(
        self, folder: Path, base: BankBase, experts: Sequence[Expert], files: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.folder, self.base = folder, base
        self.experts, self.files = tuple(experts), dict(files or {})
        self._by_name = {expert.name: expert for expert in self.experts}
        self._shards = ShardReader(folder, base.layout)

    # --- open and create -----------------------------------------------------------------------------------------

    @classmethod
    def without_experts(cls, base: BankBase) -> AdapterBank:
        """A bank that holds nothing and is stored nowhere, for a generator that learns from the examples of tasks alone."""
        return cls(Path(), base, ())

    @classmethod
    def create(cls, folder: str | Path, base: BankBase) -> AdapterBank:
        """Starts an empty bank, or opens the one that is there if it has the same base.

        Raises:
            BankError: If the folder holds a bank of another base model, layout or objective.
        """
        folder = Path(folder)
        if (folder / _MANIFEST).exists():
            bank = cls.from_pretrained(folder)
            if not bank.base.same(base):
                raise BankError(
                    f"{folder} holds a bank of another base",
                    got=f"{bank.base.model.name}, {len(bank.base.layout)} modules, {bank.base.objective}",
                    expected=f"{base.model.name}, {len(base.layout)} modules, {base.objective}",
                    remedy="Choose another folder.",
                )
            return bank
        bank = cls(folder, base, ())
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"{folder} cannot be made a bank", got=error.strerror or error, remedy="Choose another folder.") from error
        with bank._lock():
            exists = (folder / _MANIFEST).exists()  # by another process, while this one waited
            if not exists:
                bank.write_manifest()
        return cls.create(folder, base) if exists else bank

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> AdapterBank:
        """Opens a bank folder, or one on the hub, and checks its files against the manifest.

        Raises:
            ArtifactError: If it is not a complete bank of a known format.
            BankError: If an entry contradicts its shard.
        """
        folder = fetch(path, "bank", revision)
        bank = cls._open(folder, contents=True)
        check_shards(folder, bank.experts, bank.base.layout)
        return bank

    @classmethod
    def _open(cls, folder: Path, *, contents: bool) -> AdapterBank:
        """Reads the manifest; with `contents`, every file's checksum is compared, which takes as long as reading the bank."""
        manifest = check_manifest(folder, _MANIFEST, _KIND, _FORMAT, contents=contents)
        try:
            experts = [_entry(**entry) for entry in manifest["experts"]]
        except (KeyError, TypeError) as error:
            raise BankError(f"{folder / _MANIFEST} has an unreadable entry", got=repr(error)[:120]) from error
        bank = cls(folder, BankBase.from_dict(manifest.get("base", {})), experts, manifest["files"])
        if len(bank._by_name) != len(experts):
            raise BankError(f"{folder / _MANIFEST} names an expert twice")
        unknown = sorted(set(bank._listed()) - bank.files.keys())
        if unknown:
            raise BankError(f"{folder / _MANIFEST} has no checksum of a shard", got=unknown[0][:80])
        return bank

    def _listed(self) -> list[str]:
        """Shards, and bases of compressed experts."""
        return sorted({expert.file for expert in self.experts} | {expert.bases for expert in self.experts if expert.bases})

    @contextmanager
    def locked(self) -> Iterator[AdapterBank]:
        """Gives the bank as it now is, and keeps other processes from writing to it meanwhile."""
        with self._lock():
            yield AdapterBank._open(self.folder, contents=False)

    def _lock(self) -> AbstractContextManager[None]:
        return locked(self.folder / ".lock", _PATIENCE, "Wait for it to finish.")

    def write_manifest(self) -> AdapterBank:
        """Writes the manifest and returns the bank as it now is. Shards that the manifest before listed are not read again."""
        entries = [{**asdict(expert), "descriptions": list(expert.descriptions)} for expert in self.experts]
        entries = [{key: value for key, value in entry.items() if key != "bases" or value} for entry in entries]
        fields = {"kind": _KIND, "format": _FORMAT, "base": self.base.to_dict(), "experts": entries}
        write_manifest(self.folder, _MANIFEST, fields, self._listed(), self.files)
        return AdapterBank._open(self.folder, contents=False)

    # --- read ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.experts)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Expert:
        if name not in self._by_name:
            raise BankError("the bank has no such expert", got=repr(name)[:80], remedy="See lorag bank list.")
        return self._by_name[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all experts, in order."""
        return tuple(self._by_name)

    def adapter(self, name: str, checkpoint: int = -1) -> LoraAdapter:
        """Reads one checkpoint of an expert, by default the final one."""
        expert = self[name]
        factors = self._shards.read(expert, checkpoint)
        info = {"expert": name, "descriptions": list(expert.descriptions), "license": expert.license}
        model = self.base.model
        return LoraAdapter(self.base.layout, factors, model.name, model.task_type, info, model.revision)

    def adapters(self, names: Sequence[str] | None = None) -> Iterator[LoraAdapter]:
        """Reads final checkpoints one at a time."""
        return (self.adapter(name) for name in (self.names if names is None else names))

    def factors(self, module: str, at_once: int = 2**21) -> Iterator[Pair]:
        """Stacks A (n, r, i) and B (n, o, r) of one module with ΔW = B·A, in fp64, of all final checkpoints, in order, a few at a time.

        A few are as many as have `at_once` values of one factor, or one.
        """
        return self._shards.stacks(self.experts, module, at_once)

    def fuse(self, names: Sequence[str], method: str = "mean", **settings: Any) -> LoraAdapter:  # noqa: ANN401 - the rule's own
        """Merges experts into one adapter by a rule of `lorag.adapters.merging.merge`, which says what the rules' settings are.

        One adapter cannot tell apart tasks that share their inputs; `lorag.training.fuse.fuse` looks at them and warns.
        """
        return merge([self.adapter(name) for name in names], method, **settings)

    def push_to_hub(self, repository: str, *, private: bool = True) -> str:
        """Publishes manifest, shards and a card as user/name on the hub, and returns the commit's address."""
        model, entries = self.base.model, [(expert.name, expert.descriptions[0], expert.license) for expert in self.experts]
        require_public(model.name, "Build the bank with base=HUB_ID.")
        card = bank_card(base_model=model.name, modules=self.base.layout.target_modules, experts=entries)
        return push_files(self.folder, [_MANIFEST, *self.files], card, repository, kind="bank", private=private)

    # --- write ---------------------------------------------------------------------------------------------------

    def add(
        self,
        experts: Sequence[tuple[str, Sequence[str], Sequence[LoraAdapter]]],
        *,
        precision: str = "float32",
        details: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> AdapterBank:
        """Adds experts of one rank as one shard; what other processes added meanwhile is kept.

        Args:
            experts: Name, descriptions and checkpoints (the final one last) of each.
            precision: How the shard stores values: "float32", "float16" or "int8".
            details: For a name, values of `suite`, `license`, `score` and `examples`.

        Returns:
            The bank with them.

        Raises:
            BankError: If a name is taken, or if an adapter does not fit the bank's layout or the shard's rank.
        """
        if precision not in PRECISIONS:
            raise BankError("precision cannot be used", got=repr(precision), expected=" or ".join(PRECISIONS))
        if not experts or not all(checkpoints for _, _, checkpoints in experts):
            raise BankError("there is nothing to add", got="no expert, or one without a checkpoint")
        shapes = {(adapter.rank, len(checkpoints)) for _, _, checkpoints in experts for adapter in checkpoints}
        if len(shapes) != 1:
            raise BankError("experts of one shard must share rank and number of checkpoints", got=sorted(shapes))
        for name, descriptions, checkpoints in experts:
            require_name(name, "an expert's name")
            if not descriptions:
                raise BankError(f"expert {name!r} has no description", remedy="Give one with --description.")
            for adapter in checkpoints:
                if adapter.layout != self.base.layout:
                    raise BankError(f"adapter {name!r} does not fit the bank's layout", remedy="A bank has one base model and layout.")
                adapter.factors.check_values()
        names = [name for name, _, _ in experts]
        if len(set(names)) != len(names):
            raise BankError("an expert's name is given twice", got=max(names, key=names.count))
        file = shard_name(names)
        entries = [
            _entry(
                name=name,
                descriptions=tuple(check_description(text) for text in descriptions),
                rank=checkpoints[-1].rank,
                alpha=float(checkpoints[-1].rank),
                checkpoints=len(checkpoints),
                file=file,
                index=index,
                **(details or {}).get(name, {}),
            )
            for index, (name, descriptions, checkpoints) in enumerate(experts)
        ]
        factors = [[adapter.factors for adapter in checkpoints] for _, _, checkpoints in experts]
        tensors = stack_checkpoints(self.base.layout.names, factors, precision)
        with self.locked() as now:
            if now.base != self.base:
                raise BankError(f"{self.folder} was begun anew with another base meanwhile", remedy="Add to it again.")
            taken = [name for name in names if name in now]
            if taken:
                raise BankError("the bank already has an expert of this name", got=taken[0], remedy="Choose another name.")
            save_tensors(self.folder / file, tensors)
            return AdapterBank(self.folder, self.base, [*now.experts, *entries], now.files).write_manifest()

    def remove(self, names: Sequence[str]) -> AdapterBank:
        """Takes experts out of the bank; shards that no other expert needs are deleted.

        Raises:
            BankError: If it has no expert of a name; nothing is removed then.
        """
        with self.locked() as now:
            gone = {now[name].name for name in names}
            left = [expert for expert in now.experts if expert.name not in gone]
            bank = AdapterBank(self.folder, self.base, left, now.files).write_manifest()
            for file in now.files.keys() - bank.files.keys():
                resolve_inside(self.folder, file).unlink(missing_ok=True)
        return bank

    def copy_to(self, folder: str | Path, names: Sequence[str], precision: str) -> AdapterBank:
        """Writes a new bank of some experts in another precision, one shard for each rank and number of checkpoints."""
        bank = AdapterBank.create(folder, self.base)
        groups: dict[tuple[int, int], list[Expert]] = {}
        for name in names:
            expert = self[name]
            groups.setdefault((expert.rank, expert.checkpoints), []).append(expert)
        for members in groups.values():
            parts = [(e.name, e.descriptions, [self.adapter(e.name, i) for i in range(e.checkpoints)]) for e in members]
            details = {e.name: {"suite": e.suite, "license": e.license, "score": e.score, "examples": e.examples} for e in members}
            bank = bank.add(parts, precision=precision, details=details)
        return bank

    def describe(self, descriptions: Mapping[str, Sequence[str]]) -> AdapterBank:
        """Replaces the descriptions of experts."""
        with self.locked() as now:
            new = {name: tuple(map(check_description, given)) for name, given in descriptions.items()}
            experts = [replace(e, descriptions=new.get(e.name, e.descriptions)) for e in now.experts]
            return AdapterBank(self.folder, self.base, experts, now.files).write_manifest()

    def check(self) -> Iterator[tuple[Expert, str | None]]:
        """Reads every expert and yields it with what is wrong with it, or None."""
        for expert in self.experts:
            problem = None
            try:
                for index in range(expert.checkpoints):
                    if not self.adapter(expert.name, index).factors.norm():
                        problem = "changes nothing: all of its products are zero"
            except LoragError as error:
                problem = str(error)
            yield expert, problem
