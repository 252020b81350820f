"""Cards: what an adapter, bank, generator or suite is, in a few lines a person can read."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import CONFIG, PROVENANCE
from lorag.adapters.formats import adapter_files, format_of, hub_name, named_base, peft_folder
from lorag.adapters.portability import check_portability
from lorag.adapters.provenance import UNKNOWN, derive, licence_of, prompt_of
from lorag.adapters.reading import read_facts, read_provenance
from lorag.bank.bank import AdapterBank
from lorag.bank.index import BankIndex
from lorag.errors import ArtifactError, LoragError, printable
from lorag.evaluation.harness import lm_eval_command
from lorag.files.artifacts import read_json
from lorag.files.tensors import load_tensors, read_header
from lorag.methods.vae import Diagnostics
from lorag.serving.commands import start_commands
from lorag.spaces import SPACES
from lorag.tasks.suite import TaskSuite

__all__ = ["describe_path"]

_INDENT, _WIDTH = 16, 120
_LOOKED_AT = 48  # experts of a bank that are read for its card, evenly spread


class Unwrapped(str):
    """A command, which stands on one line of its own so that it can be copied."""


def describe_path(path: str | Path, base_model: str | None = None) -> str:
    """Describes a folder, or a file with an adapter in another format than PEFT's.

    Args:
        path: The folder or file; of adapters also a place on the hub.
        base_model: An adapter's base model, where its format does not say enough of it.

    Raises:
        ArtifactError: If it holds nothing that lorag knows, or what it holds cannot be read.
        BaseModelError: If an adapter's format asks for the base model.
    """
    on_hub = isinstance(path, str) and hub_name(path) is not None
    path = peft_folder(path, named_base(base_model)) if on_hub else Path(path)
    ours = any((path / marker).is_file() for marker in ("bank.json", "generator.json", "tasks.jsonl"))
    files = [path] if path.is_file() else adapter_files(path) if path.is_dir() and not ours else []
    if files:
        return _shown(_foreign(path, files[0], base_model))
    for marker, describe in (
        ("bank.json", _bank),
        ("generator.json", _generator),
        (CONFIG, _adapter),
        ("tasks.jsonl", _suite),
        (PROVENANCE, _merged),
    ):
        if (path / marker).is_file():
            try:
                described = describe(path)
            except LoragError:
                raise
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ArtifactError(f"{path / marker} cannot be read", got=repr(error)[:120]) from error
            return "\n".join([_shown(described), *(_starts(path) if marker == CONFIG else ())])
    raise ArtifactError(
        f"{path} holds nothing that lorag knows", expected="a folder with bank.json, generator.json, adapter_config.json or tasks.jsonl"
    )


def _starts(path: Path) -> list[str]:
    """Commands that start engines with an adapter: on lines of their own, as long as they are, so that they can be pasted."""
    lines = []
    for start in start_commands(path, read_facts(path, values=False), read_provenance(path)):
        lines += ["", f"start in {start.engine}:", printable(start.command), *([printable(start.ask)] if start.ask else ())]
    return lines


def _shown(card: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{key}:\n{printable(value)}" if isinstance(value, Unwrapped) else _line(key, printable(str(value))) for key, value in card.items()
    )


def _line(key: str, text: str) -> str:
    """A row of a card; what does not fit into a line goes on below itself."""
    head = f"{key + ':':<{_INDENT}}"
    below = " " * _INDENT
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=below, break_on_hyphens=False) or head.rstrip()


def _bank(path: Path) -> dict[str, Any]:
    bank = AdapterBank.from_pretrained(path)
    ranks = Counter(expert.rank for expert in bank.experts)
    scores = [expert.score for expert in bank.experts if expert.score is not None]
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    checkpoints = sum(expert.checkpoints for expert in bank.experts)
    card = {
        "kind": "bank",
        "experts": f"{len(bank)}" + (f", such as {bank.names[0]}: {bank.experts[0].descriptions[0][:80]!r}" if len(bank) else ""),
        "base model": f"{bank.base.model.name} ({bank.base.identity})",
        "modules": _modules(bank.base.layout.names),
        "objective": bank.base.objective,
        "ranks": ", ".join(f"{rank} ({count} experts)" for rank, count in sorted(ranks.items())) or "none",
        "checkpoints": f"{checkpoints}, {checkpoints / max(1, len(bank)):.3g} of each expert",
    }
    if len(bank):
        card |= _looked_at(bank)
    return card | {
        "licence": _licence(expert.license for expert in bank.experts),
        "score": f"{statistics.fmean(scores):.3f} on average, {min(scores):.3f} at worst, of {len(scores)} experts on their own tests"
        if scores
        else "not measured",
        "size": f"{size / 1e6:.1f} MB",
        "look closer": f"lorag bank check {path}",
    }


def _looked_at(bank: AdapterBank) -> dict[str, str]:
    """Norms, shared energy and likeness of experts, of some of them where there are many."""
    chosen = bank.experts[:: -(-len(bank) // _LOOKED_AT)]
    part = AdapterBank(bank.folder, bank.base, chosen, bank.files)
    index = BankIndex(bank.base.layout).cover(part)
    norms = sorted(index.norms.values())
    if not norms:
        return {"norm of ΔW": "no expert can be read"}
    adapters = {name: part.adapter(name) for name in index.norms}
    energies = {name: index.energy(adapter) or 0.0 for name, adapter in adapters.items()}
    least = min(energies, key=lambda name: energies[name])
    near = {name: nearest[0] for name, adapter in adapters.items() if (nearest := index.nearest(adapter, part, but=name))}
    who = f"of {len(norms)} experts" if len(norms) < len(bank) else "of all experts"
    card = {
        "norm of ΔW": f"{statistics.median(norms):.3g} in the middle, {norms[0]:.3g} to {norms[-1]:.3g}, {who}",
        "energy kept": f"{statistics.fmean(energies.values()):.1%} of ‖ΔW‖² lies in 32 directions that they share on a module's two sides; "
        f"least {energies[least]:.1%}, {least}",
    }
    if near:
        best = max(near, key=lambda name: near[name][1])
        alike = statistics.median(cosine for _, cosine in near.values())
        first, (second, cosine) = best, near[best]
        card["likeness"] = f"to the nearest expert by weight {alike:.2f} in the middle; most alike {first} and {second}, {cosine:.2f}"
    return card


def _modules(names: Sequence[str]) -> str:
    """How many modules of each kind: `12: 4 q_proj, 4 v_proj, 4 down_proj`."""
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return f"{len(names)}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _by_kind(norms: Mapping[str, float]) -> str:
    """Root mean square of the norms of each kind of module."""
    kinds: dict[str, list[float]] = {}
    for name, norm in norms.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(norm)
    return ", ".join(f"{kind} {math.sqrt(statistics.fmean(n * n for n in values)):.3g}" for kind, values in sorted(kinds.items()))


def _generator(path: Path) -> dict[str, Any]:
    manifest = read_json(path / "generator.json")
    spec, _ = read_header(path / "generator.safetensors")

    def values(prefix: str) -> int:
        total = 0
        for name, (_, shape) in spec.items():
            if name.startswith(prefix):
                count = 1
                for axis in shape:
                    count *= axis
                total += count
        return total

    base = manifest["base"]
    base_values = values("method.coordinates.")  # a VAE's coordinates are found as a weight space is, not learned
    vae = load_tensors(path / "generator.safetensors", prefix="method.diagnostics.")
    return {
        "kind": "generator",
        "method": manifest["method"],
        "base model": f"{base['model']['name']} ({base['identity']})",
        "modules": _modules([name for name, *_ in base["layout"]["modules"]]),
        "weight space": _space(manifest["space"]["kind"], spec),
        "writes": f"adapters of rank {manifest['rank']}, their ΔW times {manifest['strength']} (chosen on held-out training tasks)",
        "learned from": f"{len(manifest['experts'])} experts, such as {', '.join(manifest['experts'][:3])}",
        "licence": _licence(
            manifest.get("licenses", {}).get(name, UNKNOWN) for name in {*manifest["experts"], *manifest.get("licenses", {})}
        ),
        "embedder": manifest["embedder"],
        "gate": _gate(manifest.get("gate")),
        "values": f"{values('method.') - base_values:,} in the method, {values('space.') + base_values:,} in the weight space",
        "size": f"{(path / 'generator.safetensors').stat().st_size / 1e6:.1f} MB",
        "settings": ", ".join(f"{key}={value}" for key, value in manifest["settings"].items()) or "none",
        **(Diagnostics.from_tensors(vae).lines() if vae else {}),
    }


def _space(kind: str, spec: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    if kind not in SPACES:
        return kind
    prefix = "space."
    return SPACES[kind].describe({name.removeprefix(prefix): shape for name, (_, shape) in spec.items() if name.startswith(prefix)})


def _gate(stored: Mapping[str, Any] | None) -> str:
    if stored is None:
        return "none, so that it refuses nothing; lorag gate fit adds one"
    facts = stored["fitted"]
    text = f"refuses descriptions above novelty {stored['refuse_above']}; fitted on {facts['held_out_tasks']} held-out tasks"
    text += f", tells known from unknown with an AUROC of {facts['auroc']}"
    closed, error = (facts.get(name, facts.get(older)) for name, older in (("gap_closed", "gain"), ("gap_closed_error", "gain_error")))
    return text if error is None else f"{text}, closes {closed:.1%} of the gap there, expected within {error:.1%}"


def _adapter(path: Path) -> dict[str, Any]:
    facts = read_facts(path)
    config = facts.config
    card = {
        "kind": "adapter",
        "base model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "modules": ", ".join(map(str, named)) if isinstance(named := config.get("target_modules"), list) else named,
    }
    info = read_provenance(path)
    for key in ("description", "method", "seed", "strength", "embedder"):
        if key in info:
            card[key] = info[key]
    if (prompt := prompt_of(info)) is not None:
        card["prompt"] = f"{prompt}: serve it the same way"
    if info.get("novelty") is not None:
        card["novelty"] = f"{info['novelty']}, the estimated probability that no task of the bank is of its kind"
    card["norm of ΔW"] = _norms(path)
    if isinstance(info.get("gate"), dict):
        card["gate"] = f"{info['gate'].get('served')}: {info['gate'].get('reason')}"
    if "neighbours" in info:
        card["neighbours"] = _pairs(info["neighbours"])
    if isinstance(info.get("parents"), list):
        card["parents"] = _parents(info["parents"])
    derived = licence_of(info)
    card["licence"] = f"{derived.name}: {derived.reason}" if info else "not stated: no lorag.json"
    card |= {f"in {verdict.target}": verdict.line() for verdict in check_portability(facts)}
    command = lm_eval_command(path, config, info)
    return card | ({} if command is None else {"to score it": Unwrapped(command)})


def _foreign(path: Path, file: Path, base_model: str | None) -> dict[str, Any]:
    """An adapter in another format, by what it is in PEFT's."""
    folder = peft_folder(path, named_base(base_model))
    adapter_format = format_of(file)
    card = _adapter(folder)
    card.pop("to score it", None)  # the harness reads PEFT's format alone
    return {"kind": f"{card.pop('kind')} in the format of {adapter_format.title if adapter_format else 'PEFT'}", **card}


def _norms(path: Path) -> str:
    """Of its weights as they are, whatever its sidecar says."""
    try:
        norms = LoraAdapter.from_pretrained(path).norms()
    except LoragError as error:
        return f"not known: {error}"
    return f"{math.hypot(*norms.values()):.3g} in all; of a module (root mean square of its kind): {_by_kind(norms)}"


def _merged(path: Path) -> dict[str, Any]:
    info = read_json(path / PROVENANCE)
    if info.get("kind") != "merged":
        raise ArtifactError(f"{path / PROVENANCE} belongs to something else", got=str(info.get("kind"))[:40], expected="merged")
    card = {"kind": "base model with an adapter merged into its weights", "base model": info["base_model"]["name"]}
    card |= {key: info[key] for key in ("description", "method", "seed") if key in info}
    derived = licence_of(info)
    return card | {"factor on ΔW": info["merged_strength"], "licence": f"{derived.name}: {derived.reason}"}


def _licence(licences: Iterable[str]) -> str:
    derived = derive(licences)
    return f"{derived.name}: {derived.reason}"


def _pairs(neighbours: object) -> str:
    """Names and cosines, from a file that anybody may have written."""
    try:
        return "by description (cosine): " + ", ".join(f"{name} {float(score):.2f}" for name, score in list(neighbours)[:5])  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            "the neighbours in lorag.json cannot be read", got=str(error)[:80], expected="pairs of a name and a number"
        ) from error


def _parents(parents: list[Any]) -> str:
    weighted = [p for p in parents if isinstance(p, dict) and isinstance(p.get("weight"), int | float)]
    if not weighted:
        return f"all {len(parents)} experts and tasks that the generator learned from together"
    shown = ", ".join(f"{p.get('name')} {p['weight']:.2f}" for p in weighted[:5])
    return shown + (f" and {len(weighted) - 5} more" if len(weighted) > 5 else "")


def _suite(path: Path) -> dict[str, Any]:
    suite = TaskSuite.from_folder(path)
    splits = read_json(path / "splits.json") if (path / "splits.json").is_file() else {}
    return {
        "kind": "task suite",
        "tasks": len(suite),
        "splits": ", ".join(f"{name} ({len(names)})" for name, names in splits.items()) or "none",
        "with labels": f"{sum(task.labels is not None for task in suite)} tasks",
        "examples": f"{sum(len(task.examples) for task in suite):,}",
        "descriptions": f"{sum(len(task.descriptions) for task in suite):,}"
        + next((f", such as {task.descriptions[0][:80]!r}" for task in suite), ""),
        "licences": ", ".join(sorted({task.license for task in suite}))[:200],
    }
