"""The gate on the sandbox: `python -m benchmarks.gate [GENERATOR]` fits one in memory and measures it, and how much wordings matter.

Nothing is written but the report. Wordings: each task's score over 20 paraphrases that never occur in training, with typing
errors, in British and American spelling, in short and long forms.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, find_bank
from lorag.evaluation.gate import format_gate, measure_gate
from lorag.files.artifacts import embedded
from lorag.generator.evidence import FEATURES
from lorag.generator.files import DEFAULT
from lorag.generator.lora_generator import LoraGenerator
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task
from lorag.text.spelling import Spelling
from lorag.training.calibrate import scores_in_parts
from lorag.training.calibrate_gate import GateSettings, fit_gate
from lorag.training.split import RunTasks, SplitRule
from lorag.worlds.sandbox.grid import Cell, splits
from lorag.worlds.sandbox.wordings import describe

SPELLING = (
    ("summarise", "summarize"),
    ("colour", "color"),
    ("organisation", "organization"),
    ("favour", "favor"),
    ("catalogue", "catalog"),
)
EXAMPLES = 8


def with_typo(text: str, rng: random.Random) -> str:
    """The text with two neighbouring letters of one longer word exchanged."""
    words = text.split()
    places = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    at = rng.randrange(1, len(words[i]) - 2)
    word = words[i]
    words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def respelled(text: str) -> str:
    """British words in American spelling and the other way round."""
    for british, american in SPELLING:
        if british in text:
            return text.replace(british, american)
        if american in text:
            return text.replace(american, british)
    return text


def scores(generator: LoraGenerator, texts: Sequence[str], tasks: Sequence[Task]) -> torch.Tensor:
    """Scores (n,) of what is generated for each text on its task."""
    conditions = [generator.conditioner(one) for one in generator.embedder.embed([generator.read(text) for text in texts])]
    codes = torch.stack([generator.method.generate(one, torch.Generator().manual_seed(0))[0].float() for one in conditions])

    def generated(some: slice) -> list[Factors]:
        return [factors.scaled(generator.strength) for factors in generator.space.decode(codes[some], generator.rank)]

    return scores_in_parts(generator.runner(), generated, list(tasks), EXAMPLES)


def wordings(generator: LoraGenerator, tasks: Sequence[Task], cells: Sequence[Cell], count: int) -> dict[str, float]:
    """Consistency over paraphrases, and what typing errors, spelling and length change."""
    rng = random.Random(5)
    texts = [describe(c.skill, c.domain, c.style, "eval", rng, count) for c in cells]
    flat = scores(generator, [text for own in texts for text in own], [task for task in tasks for _ in range(count)]).view(-1, count)
    solved = flat.mean(1) > 0
    columns = flat.mean(0)
    found = {
        "paraphrases": count,
        "tasks": len(tasks),
        "score": flat.mean().item(),
        "worst of the sets / mean": (columns.min() / columns.mean()).item(),
        "worst of each task / its mean": (flat.min(1).values / flat.mean(1).clamp_min(1e-9))[solved].mean().item(),
        "spread within a task": flat.std(1).mean().item(),
    }
    plain = [own[0] for own in texts]
    mistyped = [with_typo(text, rng) for text in plain]
    found["typing errors"] = scores(generator, mistyped, tasks).mean().item()
    found["typing errors, read as they stand"] = scores(replace(generator, spelling=Spelling()), mistyped, tasks).mean().item()
    found["no typing error"] = flat[:, 0].mean().item()
    spelt = [(i, text) for i, own in enumerate(texts) for text in own if respelled(text) != text][: 2 * len(tasks)]
    if spelt:
        for name, change in (("spelling as written", str), ("spelling exchanged", respelled)):
            found[name] = scores(generator, [change(text) for _, text in spelt], [tasks[i] for i, _ in spelt]).mean().item()
    for name, choose in (("shortest", min), ("longest", max)):
        found[f"{name} paraphrase"] = scores(generator, [choose(own, key=len) for own in texts], tasks).mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def main(folder: str, report_to: Path | None) -> None:
    """Fits, measures and prints."""
    start = time.perf_counter()
    generator = LoraGenerator.from_pretrained(folder)
    bank = find_bank("sandbox")
    tasks = RunTasks.named("sandbox", len(bank))
    split = SplitRule.stated(generator.origin["config"]).split(bank.names, tasks)
    opened = time.perf_counter()
    print(f"opened in {opened - start:.0f} s", flush=True)
    generator.gate = fit_gate(generator, bank, tasks, split, settings=GateSettings())
    fitted = time.perf_counter()
    print(f"fitted in {fitted - opened:.0f} s: {json.dumps(dict(generator.gate.fitted))}", flush=True)
    gate = generator.gate
    print(f"refuses above {gate.refuse_above}, same above {gate.same_above}, fuses above {gate.fuse_above}, offsets {gate.offsets}")
    for name, model in (("novelty", gate.novelty), ("gap closed", gate.gap_closed)):
        if model is not None:
            print(f"{name}: " + ", ".join(f"{f} {w:+.2f}" for f, w in zip(FEATURES, model.weights, strict=True)))
    oracles = AdapterBank.from_pretrained(embedded("data/sandbox/oracles"))
    report = {}
    for split in ("test", "hard"):
        report[split] = measure_gate(generator, find_tasks("sandbox", split), oracles)
        print(f"\n{split}\n{format_gate(report[split])}", flush=True)
    measured = time.perf_counter()
    cells = splits()["test"]
    held_out = find_tasks("sandbox", "test")
    report["wordings"] = wordings(generator, [held_out[cell.name] for cell in cells], cells, 20)
    print(f"\nmeasured in {measured - fitted:.0f} s; wordings in {time.perf_counter() - measured:.0f} s\n")
    print("\n".join(f"{name:<32}{value:>8.3f}" for name, value in report["wordings"].items()))
    if report_to is not None:
        report_to.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", nargs="?", default=DEFAULT, help="a folder, or the name of a shipped one")
    parser.add_argument("report", nargs="?", type=Path, help="JSON file that gets the figures")
    given = parser.parse_args()
    main(given.generator, given.report)
