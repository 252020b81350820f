"""Find what a report shows: scores from a ladder's report, distances, judgements and norms from the opened generators and banks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lorag
from lorag.adapters.provenance import public_name
from lorag.errors import LoragError
from lorag.evaluation.ladder import CONTROLS, baseline_rows, learned_rows, shown_descriptions
from lorag.evaluation.report.findings import Absent, Curves, Distances, Findings, MethodScore, Norms, Pairs, Selective, Stage, Tasks
from lorag.evaluation.rivals import WITH_EXAMPLES
from lorag.evaluation.statistics import bootstrap
from lorag.files.metrics import METRICS, read_metrics
from lorag.generator.calibration import risk_coverage
from lorag.progress import progress_bar
from lorag.tasks.unknown import unknown_tasks
from lorag.text.task_map import TaskMap
from lorag.training.calibrate import gap_closed

if TYPE_CHECKING:
    from lorag.bank.bank import AdapterBank
    from lorag.evaluation.folders import Ladder
    from lorag.generator.evidence import Evidence
    from lorag.generator.lora_generator import LoraGenerator

__all__ = ["gather_findings"]

_BINS, _LEAST_BIN = 4, 4
_MOST_EXPERTS = 512  # whose norms are read, evenly spread over the bank
_MOST_ROWS = 24
_PERCENTILES = (0.05, 0.5, 0.95)
_NO_GAINS = "No share of the gap is known: it needs the scores of the base model and of oracles (--oracles BANK), and the generator's own."


def gather_findings(ladder: Ladder, report: Mapping[str, Any], *, quiet: bool = True) -> Findings:
    """Puts together what the figures show.

    Args:
        ladder: What was evaluated.
        report: What `Ladder.evaluate` said of it.
        quiet: No progress bar.
    """
    subject = next(iter(learned_rows(ladder.generators) or ladder.generators))
    generator = ladder.generators[subject][0]
    tasks, seeds = list(ladder.suite), int(report["seeds"])
    shown = [list(texts) for texts in zip(*(shown_descriptions(tasks, seed) for seed in range(seeds)), strict=True)]
    shown = [list(dict.fromkeys(texts)) for texts in shown]  # of each task, each once
    shares = _gaps_closed(report, subject)
    with progress_bar(total=len(tasks), desc="gathering", disable=quiet, leave=False) as bar:
        distances, places, evidence = [], [], []
        for texts in shown:
            evidence.append([generator.gather(text) for text in texts])
            conditions = [one.condition for one in evidence[-1]]
            distances.append(sum(condition.distance for condition in conditions) / len(texts))
            places.append(torch.stack([condition.embedding.pooled for condition in conditions]).mean(0))
            bar.update()
    names = [task.name for task in tasks]
    return Findings(
        subject=subject,
        facts=_facts(ladder, report, subject),
        metric=str(report["metric"]).replace("_", " "),
        tasks=len(tasks),
        examples=int(report["examples"]),
        seeds=seeds,
        ladder=_method_scores(report, baseline_rows(ladder.generators)),
        pairs=_pairs(report),
        distances=_distances(names, distances, shares),
        map=_map(generator, names, torch.stack(places), shares),
        selective=_selective(generator, evidence, shares, quiet),
        norms=_norms(ladder.bank, generator, [of_task[0] for of_task in evidence], quiet),
        curves=_curves(ladder, subject),
    )


def _facts(ladder: Ladder, report: Mapping[str, Any], subject: str) -> dict[str, str]:
    generators = ladder.generators[subject]
    model, layout = generators[0].base.model, generators[0].base.layout
    seen = sum(task.key in ladder.bank for task in ladder.suite)
    shown = f"{seen} of which have an expert" if seen else "none of which has an expert"
    return {
        "Generator": f"{subject}, revision {generators[0].revision[:16]}"
        + (f", and {len(generators) - 1} more seeds" if len(generators) > 1 else ""),
        "Base model": f"{public_name(model.name)}; {len(layout)} modules: {', '.join(layout.target_modules[:8])}",
        "Bank": f"{len(ladder.bank)} experts",
        "Tasks": f"{len(report['tasks'])} of {report['suite']}, {shown} in the bank",
        "Score": f"{str(report['metric']).replace('_', ' ')} on up to {report['examples']} test examples per task, {_seeds(report)}",
        "Upper end": "no oracles" if ladder.oracles is None else "experts trained on the tasks' own examples (oracle)",
        "Made with": f"lorag {lorag.__version__}",
    }


def _seeds(report: Mapping[str, Any]) -> str:
    return "1 seed" if report["seeds"] == 1 else f"{report['seeds']} seeds"


def _method_scores(report: Mapping[str, Any], baselines: Sequence[str]) -> tuple[MethodScore, ...]:
    scores = []
    for name, row in report["methods"].items():
        low, high = row["ci95"]
        scores.append(MethodScore(name, _role(name, baselines), row["score"], low, high, row["gap_closed"]))
    return tuple(scores)


def _role(name: str, baselines: Sequence[str]) -> str:
    if name in ("base", "oracle"):
        return "bound"
    if name in CONTROLS or name in baselines or WITH_EXAMPLES.fullmatch(name):
        return "baseline"
    return "control" if name.endswith(("_shuffled", "_junk", "_prompted")) else "generator"


def _pairs(report: Mapping[str, Any]) -> tuple[Pairs, ...] | Absent:
    pairs = []
    for name, row in report["methods"].items():
        other, apart = report["methods"].get(f"{name}_shuffled"), report["differences"].get(f"{name} - {name}_shuffled")
        if other is None or apart is None:
            continue
        tasks = tuple(row["per_task"])
        matched, shuffled = (tuple(one["per_task"][task] for task in tasks) for one in (row, other))
        pairs.append(Pairs(name, tasks, matched, shuffled, apart["difference"], *apart["ci95"]))
    return tuple(pairs) or Absent("No generator was scored beside its shuffled control, which needs at least two tasks.")


def _gaps_closed(report: Mapping[str, Any], subject: str) -> list[float | None] | None:
    """Share of the gap that the subject closes on each task, from −1 to 1; None for a task whose expert learned next to nothing."""
    rows = [report["methods"].get(name) for name in ("base", subject, "oracle")]
    if any(row is None for row in rows):
        return None
    floor, scores, ceiling = (
        torch.tensor([row["per_task"].get(task, float("nan")) for task in report["tasks"]], dtype=torch.float64)
        for row in rows
        if row is not None
    )
    shares = [None if math.isnan(share) else share for share in gap_closed(scores, floor, ceiling).tolist()]
    return shares if any(share is not None for share in shares) else None


def _distances(names: Sequence[str], novelty: Sequence[float], shares: Sequence[float | None] | None) -> Distances | Absent:
    if shares is None:
        return Absent(_NO_GAINS)
    rows = sorted((far, name, share) for far, name, share in zip(novelty, names, shares, strict=True) if share is not None)
    bins = []
    for part in torch.arange(len(rows)).tensor_split(min(_BINS, max(1, len(rows) // _LEAST_BIN))):
        group = [rows[i] for i in part.tolist()]
        low, high = bootstrap(torch.tensor([share for _, _, share in group]))
        bins.append((_mean([far for far, _, _ in group]), _mean([share for _, _, share in group]), low, high))
    far, named, gained = zip(*rows, strict=True)
    return Distances(named, far, gained, tuple(bins))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _map(generator: LoraGenerator, names: Sequence[str], places: Tensor, shares: Sequence[float | None] | None) -> Tasks | Absent:
    try:
        tasks = TaskMap.fit(generator.conditioner.names, generator.conditioner.centroids)
    except LoragError as error:
        return Absent(f"The map cannot be drawn: {error}.")
    unit = torch.nn.functional.normalize(places.float(), dim=1)  # as the experts' centroids are
    return Tasks(
        experts=tuple((float(x), float(y)) for x, y in tasks.points.tolist()),
        names=tuple(names),
        points=tuple(tasks.place(one) for one in unit),
        gap_closed=tuple(shares) if shares is not None else (None,) * len(names),
        kept=tasks.kept,
    )


def _selective(
    generator: LoraGenerator, evidence: Sequence[Sequence[Evidence]], shares: Sequence[float | None] | None, quiet: bool
) -> Selective | Absent:
    if generator.gate is None or generator.gate.gap_closed is None:
        return Absent("The generator has no gate that expects a gap to be closed; lorag gate fit GENERATOR fits one.")
    if shares is None:
        return Absent(_NO_GAINS)
    strange = [text for texts in unknown_tasks("test").values() for text in texts]
    rows = [(of_task, 1 - share) for of_task, share in zip(evidence, shares, strict=True) if share is not None]
    held_out = len(rows)
    rows += [([generator.gather(text)], 1.0) for text in progress_bar(strange, desc="judging", disable=quiet, leave=False)]
    expected = [_mean([float(generator.gate.decide(one).expected_gap_closed or 0.0) for one in described]) for described, _ in rows]
    trust, risk = torch.tensor(expected, dtype=torch.float64), torch.tensor([lost for _, lost in rows], dtype=torch.float64)
    return Selective(
        risk_coverage(trust[:held_out], risk[:held_out]),
        risk_coverage(-risk[:held_out], risk[:held_out]),
        risk_coverage(trust, risk),
        risk_coverage(-risk, risk),
        held_out,
        len(strange),
        trust[:held_out].mean().item(),
        1 - risk[:held_out].mean().item(),
    )


def _norms(bank: AdapterBank, generator: LoraGenerator, evidence: Sequence[Evidence], quiet: bool) -> Norms | Absent:
    if not len(bank):
        return Absent("The bank holds no expert to compare with.")
    step = -(-len(bank) // _MOST_EXPERTS)
    chosen = bank.names[::step]
    experts = [bank.adapter(name).norms() for name in progress_bar(chosen, desc="measuring experts", disable=quiet, leave=False)]
    adapters = [
        generator.space.decode(one.code, generator.rank)[0].scaled(generator.strength).norms()
        for one in progress_bar(evidence, desc="measuring adapters", disable=quiet, leave=False)
    ]
    modules = list(bank.base.layout.names)
    grouped = len(modules) > _MOST_ROWS
    members: dict[str, list[str]] = {}
    for label, module in zip(_labels(modules), modules, strict=True):
        members.setdefault(module.rpartition(".")[2] if grouped else label, []).append(module)
    real, generated = (
        tuple(_percentiles([_root_mean_square([one[m] for m in members_of]) for one in rows]) for members_of in members.values())
        for rows in (experts, adapters)
    )
    return Norms(tuple(members), real, generated, len(experts), len(adapters), grouped)


def _root_mean_square(values: Sequence[float]) -> float:
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(_PERCENTILES, dtype=torch.float64)).tolist()
    return low, middle, high


def _labels(modules: Sequence[str]) -> list[str]:
    """Names of modules without the parts that all of them share at the start: `3.self_attn.q_proj`."""
    parts = [module.split(".") for module in modules]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _curves(ladder: Ladder, subject: str) -> Curves | Absent:
    folder = ladder.folders.get(subject)
    if folder is None or not (folder / METRICS).is_file():
        return Absent(f"The generator's folder holds no {METRICS}; lorag train writes one.")
    try:
        rows = read_metrics(folder)
    except LoragError:  # its message names a path, which is nobody's business
        return Absent(f"The generator's {METRICS} cannot be read as rows of metrics.")
    stages = []
    for name in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == name and row.get("loss") is not None]
        seen = [row for row in of_stage if row.get("validation") is not None]
        if of_stage:
            steps, loss = ([row[key] for row in of_stage] for key in ("step", "loss"))
            validated, validation = ([row[key] for row in seen] for key in ("step", "validation"))
            stages.append(Stage(str(name), tuple(steps), tuple(loss), tuple(validated), tuple(validation)))
    return Curves(tuple(stages)) if stages else Absent(f"The generator's {METRICS} holds no losses.")
