"""Cards: what an adapter, bank, generator or suite is, in a few lines a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorag.adapters.checks import CONFIG, PROVENANCE
from lorag.adapters.folder import read_facts
from lorag.adapters.reading import read_provenance
from lorag.banks.bank import AdapterBank
from lorag.errors import ArtifactError, LoragError, printable
from lorag.files.artifacts import read_json
from lorag.files.tensors import load_tensors, read_header
from lorag.generators.latent import Diagnostics
from lorag.publishing.licences import UNKNOWN, derive
from lorag.publishing.portability import check_portability
from lorag.publishing.provenance import licence_of
from lorag.tasks.suite import TaskSuite

__all__ = ["describe_path"]


def describe_path(path: Path) -> str:
    """Describes a folder.

    Raises:
        ArtifactError: If it holds nothing that lorag knows, or what it holds cannot be read.
    """
    for marker, describe in (
        ("bank.json", _bank),
        ("generator.json", _generator),
        (CONFIG, _adapter),
        ("tasks.jsonl", _suite),
        (PROVENANCE, _merged),
    ):
        if (path / marker).is_file():
            try:
                found = describe(path)
            except LoragError:
                raise
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ArtifactError(f"{path / marker} cannot be read", got=repr(error)[:120]) from error
            return "\n".join(f"{key + ':':<16}{printable(str(value))}" for key, value in found.items())
    raise ArtifactError(
        f"{path} holds nothing that lorag knows", expected="a folder with bank.json, generator.json, adapter_config.json or tasks.jsonl"
    )


def _bank(path: Path) -> dict[str, Any]:
    bank = AdapterBank.from_pretrained(path)
    ranks = Counter(expert.rank for expert in bank.experts)
    scores = [expert.score for expert in bank.experts if expert.score is not None]
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    return {
        "kind": "bank",
        "experts": len(bank),
        "base model": f"{bank.base.model.name} ({bank.base.identity})",
        "modules": f"{len(bank.base.layout)}: {', '.join(bank.base.layout.target_modules)}",
        "objective": bank.base.objective,
        "ranks": ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items())),
        "checkpoints": sum(expert.checkpoints for expert in bank.experts),
        "licence": _licence(expert.license for expert in bank.experts),
        "mean score": f"{sum(scores) / len(scores):.3f} of {len(scores)}" if scores else "not measured",
        "size": f"{size / 1e6:.1f} MB",
    }


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
        "modules": f"{len(base['layout']['modules'])}: {', '.join(base['layout']['target_modules'])}",
        "space": manifest["space"]["kind"],
        "rank": manifest["rank"],
        "strength": manifest["strength"],
        "experts": len(manifest["experts"]),
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


def _gate(stored: Mapping[str, Any] | None) -> str:
    if stored is None:
        return "none; lorag gate fit adds one"
    facts = stored["fitted"]
    return f"refuses above novelty {stored['refuse_above']}; fitted on {facts['held_out_tasks']} held-out tasks, AUROC {facts['auroc']}"


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
    for key in ("description", "method", "novelty", "seed", "strength", "norm", "embedder"):
        if key in info:
            card[key] = info[key]
    if isinstance(info.get("gate"), dict):
        card["gate"] = f"{info['gate'].get('served')}: {info['gate'].get('reason')}"
    if "neighbours" in info:
        card["neighbours"] = _pairs(info["neighbours"])
    if isinstance(info.get("parents"), list):
        card["parents"] = _parents(info["parents"])
    derived = licence_of(info)
    card["licence"] = f"{derived.name}: {derived.reason}" if info else "not stated: no lorag.json"
    return card | {f"in {verdict.target}": verdict.line() for verdict in check_portability(facts)}


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
        return ", ".join(f"{name} {float(score):.2f}" for name, score in list(neighbours)[:5])  # type: ignore[call-overload]
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
        "with labels": sum(task.labels is not None for task in suite),
        "examples": sum(len(task.examples) for task in suite),
        "descriptions": sum(len(task.descriptions) for task in suite),
        "licences": ", ".join(sorted({task.license for task in suite}))[:200],
    }
