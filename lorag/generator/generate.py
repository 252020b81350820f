"""From descriptions to adapters: the two calls that most users need, and many descriptions to folders."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.adapters.checks import CONFIG
from lorag.adapters.reading import read_provenance
from lorag.bank.bank import AdapterBank, find_bank
from lorag.errors import ConfigError, DescriptionError, GeneratorError, LoragError, UnknownTaskWarning
from lorag.files.artifacts import decode_text, parse_json, read_bounded, require_name, sha256, slug
from lorag.generator.files import DEFAULT, MANIFEST, find_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.settings import ON_UNKNOWN
from lorag.parallel import Backend
from lorag.tasks.descriptions import check_description
from lorag.text.vectors import vector_text

if TYPE_CHECKING:
    from lorag.adapters.adapter import LoraAdapter

__all__ = [
    "AdapterRequest",
    "AdapterResult",
    "BatchSettings",
    "default_generator",
    "generate_lora",
    "generate_loras",
    "open_generator",
    "read_requests",
    "write_adapters",
]

_KEPT = 2  # generators that stay open: a user compares two, and each may have an embedder of its own

_opened: OrderedDict[tuple[str, str], LoraGenerator] = OrderedDict()
_lock = threading.Lock()


def open_generator(name: str | Path | None = None, *, device: str = "auto") -> LoraGenerator:
    """A generator by name, folder or hub id, opened once: it is opened again only when its files have changed.

    Args:
        name: Name of a shipped one, such as "sandbox", a folder or a hub id; None is the default.
        device: Where the embedder runs.

    Raises:
        ArtifactError: If there is none, or it is not complete.
        GeneratorError: If its parts do not fit together.
    """
    folder = find_generator(DEFAULT if name is None else name)
    # The manifest states the digest of all other files.
    key = sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else str(folder), device
    with _lock:
        if key not in _opened:
            _opened[key] = LoraGenerator.from_pretrained(folder, device=device)
            while len(_opened) > _KEPT:
                _opened.popitem(last=False)
        _opened.move_to_end(key)
        return _opened[key]


def default_generator() -> LoraGenerator:
    """The shipped generator that is used where none is named."""
    return open_generator()


def generate_lora(
    description: str | None = None,
    *,
    vector: Sequence[float] | None = None,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
    rank: int | None = None,
    examples: Sequence[tuple[str, str]] = (),
    refine_steps: int = 0,
    on_unknown: str = "warn",
    bank: AdapterBank | str | Path | None = None,
    details: Sequence[str] = (),
    wordings: Sequence[str] = (),
) -> LoraAdapter:
    """Turns the description of a task, or a few examples of it, into a LoRA adapter, in one pass: no fine-tuning.

    Args:
        description: What the adapter should do, such as "summarise legal text".
        vector: Instead of a description, for a generator of a bank whose entries carry vectors (`lorag.text.vectors`).
        generator: A generator, its folder or hub id, or the name of a shipped one, such as "sandbox"; by default the shipped one.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        rank: Rank of the adapter; by default the generator's.
        examples: (input, output) of the task, if there happen to be some. A generator that reads them (`settings.pairs`) needs no
            description then; others take them for `refine_steps`.
        refine_steps: Gradient steps on the examples, from the generated adapter.
        on_unknown: What becomes of a description that the gate refuses, because the bank has nothing near it: "warn",
            "raise", "fallback" (an adapter that changes nothing) or "ignore" (the gate is not asked).
        bank: The generator's bank, its folder or hub id, or "sandbox": a known task then gets its own expert, a close one a fusion.
        details: More texts on the task, such as `read_skill("SKILL.md").pieces`: those that are about the same as the description are
            read with it; `info["details"]` says which.
        wordings: The same task in other words, one description each. The adapter is made from the mean of all, which depends less on
            how one of them is put; the gate judges the description alone.

    Returns:
        The adapter: `save_pretrained(folder)` writes it for PEFT, `apply_to(model)` loads it; `info["gate"]` says how far
        to trust it, and by which evidence.

    Raises:
        DescriptionError: If the description is empty, too long or not text, the vector cannot be used, both are given, or there are
            neither of them nor examples.
        GeneratorError: If the generator has no adapters of the rank, or makes none from examples alone.
        TaskError: If the examples are not pairs of texts, or are missing where `refine_steps` needs them.
        UnknownTaskError: If the gate refuses the description and `on_unknown` is "raise".
    """
    if vector is not None:
        if description is not None:
            raise DescriptionError("an adapter is made from a description or from a vector", got="both")
        description = vector_text(vector)
    if wordings and description is None:
        raise DescriptionError(
            "other wordings stand beside a description, and there is none", remedy="Give one of them as the description."
        )
    if description is None and not examples:
        raise DescriptionError("an adapter is made from a description, from a vector or from examples", got="none of them")
    opened = _open(generator)
    task = opened.read_examples(examples, seed=seed) if description is None else description
    return opened.generate(
        task,
        seed=seed,
        strength=strength,
        rank=rank,
        examples=examples,
        refine_steps=refine_steps,
        on_unknown=on_unknown,
        bank=None if bank is None else find_bank(bank),
        details=details,
        wordings=wordings,
    )


def generate_loras(
    descriptions: Sequence[str],
    *,
    generator: LoraGenerator | str | Path | None = None,
    seed: int = 0,
    strength: float = 1.0,
    rank: int | None = None,
    on_unknown: str = "warn",
) -> list[LoraAdapter]:
    """`generate_lora` for several descriptions; each adapter is the same, byte for byte, as if made alone."""
    if isinstance(descriptions, str):
        raise GeneratorError("descriptions must be a list", got="one str", remedy="Use generate_lora for one description.")
    return list(_open(generator).generate_many(descriptions, seed=seed, strength=strength, rank=rank, on_unknown=on_unknown))


def _open(generator: LoraGenerator | str | Path | None) -> LoraGenerator:
    if generator is None:
        return default_generator()
    return generator if isinstance(generator, LoraGenerator) else open_generator(generator)


# --- many descriptions to folders -------------------------------------------------------------------------------------


_MOST_BYTES = 2**28
_TOGETHER = 8  # descriptions that a local run decodes at once; an interruption loses at most so many


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter to be made: the name of its folder, and what it should do, at will in several wordings."""

    name: str
    description: str
    wordings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchSettings:
    """What all adapters of a batch have in common.

    Attributes:
        generator: Name of a shipped one, folder or hub id; None is the default. Workers of other machines must find it under the
            same name.
        seed: Seed of methods that sample.
        strength: Factor on ΔW.
        on_unknown: As `LoraGenerator.generate` takes it.
        rank: Rank of the adapters; None is the generator's.
    """

    generator: str | None = None
    seed: int = 0
    strength: float = 1.0
    on_unknown: str = "warn"
    rank: int | None = None


@dataclass(frozen=True)
class AdapterResult:
    """What became of one description.

    Attributes:
        request: What was asked for.
        folder: Its folder.
        existed: Whether it had been made before.
        info: Of the adapter that was made now.
        error: Why there is none, or None.
    """

    request: AdapterRequest
    folder: Path
    existed: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    error: LoragError | None = None


def read_requests(path: str | Path) -> list[AdapterRequest]:
    """Reads a file of descriptions: one per line, or JSON lines with `description` and, if it likes, `name` and a list of `wordings`.

    A description without a name is named by its first words and a digest of all, whatever line it stands in.

    Raises:
        ArtifactError: If the file cannot be read, or a line or name cannot be.
        DescriptionError: If a line is not a usable description, or one that was given before.
    """
    requests: dict[str, AdapterRequest] = {}
    lines = decode_text(read_bounded(Path(path), _MOST_BYTES, named=True), path).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, name, text, wordings = f"{path}, line {number}", None, line.strip(), []
        if text.startswith("{"):
            row = parse_json(text, where)
            if not isinstance(row, dict) or not isinstance(row.get("description"), str) or row.keys() - {"name", "description", "wordings"}:
                raise DescriptionError(f"{where} cannot be read", got=text[:80], expected='{"name": …, "description": …}')
            name, text, wordings = row.get("name"), row["description"].strip(), row.get("wordings", [])
        try:
            if not isinstance(wordings, list):
                raise DescriptionError("wordings is not a list", got=repr(wordings)[:80])
            for one in (text, *wordings):
                check_description(one)
        except DescriptionError as error:
            raise DescriptionError(f"{where}: {error}") from error
        name = slug(text) if name is None else require_name(name, f"{where}: name")
        if name in requests:
            raise DescriptionError(f"{where}: an adapter is asked for twice", got=name, remedy="Give each line its own name.")
        requests[name] = AdapterRequest(name, text, tuple(wordings))
    if not requests:
        raise DescriptionError(f"{path} holds no description")
    return list(requests.values())


def write_adapters(
    requests: Sequence[AdapterRequest], out: str | Path, settings: BatchSettings | None = None, *, backend: Backend | None = None
) -> Iterator[AdapterResult]:
    """Makes an adapter folder for each description, each the same, byte for byte, as if made alone.

    Here several descriptions are decoded at once. On Ray each is a task of its own; adapters come back through the cluster and are
    written here as they are finished.

    Args:
        requests: Names and descriptions, which were checked.
        out: Gets a folder for each.
        settings: What they have in common.
        backend: Where adapters are generated; None is here.

    Yields:
        What became of each: first of those that existed, then of the others as they are finished. An error of one stops none
        of the others.

    Raises:
        ConfigError: If a setting cannot be used.
        GeneratorError: If the generator has no adapters of the rank.
    """
    settings, out = BatchSettings() if settings is None else settings, Path(out)
    backend = Backend() if backend is None else backend
    if settings.on_unknown not in ON_UNKNOWN:
        raise ConfigError("on_unknown cannot be used", got=repr(settings.on_unknown)[:40], expected=" or ".join(ON_UNKNOWN))
    missing = []
    for request in requests:
        folder = out / request.name
        if not (folder / CONFIG).exists():
            missing.append(request)
            continue
        same = _answers(folder, request, settings)
        error = GeneratorError(f"{folder} holds another adapter", remedy="Choose another folder, or delete it.")
        yield AdapterResult(request, folder, existed=same, error=None if same else error)
    together = _TOGETHER if backend.name == "local" else 1
    groups = [missing[start : start + together] for start in range(0, len(missing), together)]
    for outcome in backend.run(_generate, settings, groups, ordered=False):
        for request, result in zip(groups[outcome.place], outcome.result(), strict=True):
            if isinstance(result, LoragError):
                yield AdapterResult(request, out / request.name, error=result)
            else:
                yield AdapterResult(request, result.save_pretrained(out / request.name), info=result.info)


def _answers(folder: Path, request: AdapterRequest, settings: BatchSettings) -> bool:
    """Whether a folder holds what this generator makes of a description with these settings."""
    try:
        info = read_provenance(folder)
    except LoragError:
        return False
    generator = open_generator(settings.generator)
    rank = generator.rank if settings.rank is None else settings.rank
    asked = {"description": request.description, "seed": settings.seed, "strength": settings.strength, "rank": rank}
    made_by = info.get("generator")
    revision = made_by.get("revision") if isinstance(made_by, dict) else None
    same = {key: info.get(key) for key in asked} == asked and info.get("wordings", []) == list(request.wordings)
    return same and revision == generator.revision


def _generate(settings: BatchSettings, requests: Sequence[AdapterRequest]) -> list[LoraAdapter | LoragError]:
    """Adapters of a few descriptions, or why there is none, on whatever worker; its process keeps the generator for the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownTaskWarning)  # `info["gate"]` says it
        generator = open_generator(settings.generator)
        adapters: list[LoraAdapter | LoragError] = []
        for wordings, group in itertools.groupby(requests, lambda request: request.wordings):
            adapters += generator.generate_each(
                [request.description for request in group],
                seed=settings.seed,
                strength=settings.strength,
                rank=settings.rank,
                on_unknown=settings.on_unknown,
                wordings=wordings,
            )
        return adapters
