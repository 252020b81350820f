"""Optimizer steps of expert training: n experts at once with row adapters, and one after another with stock PEFT and torch's AdamW.

All see the same texts, rows per step, rank and rate. "By hand" is the loop that PEFT's documentation leads to: for a language model
`model(..., labels=...)`, which computes logits and their loss at every position. "Tuned" gives PEFT what lorag's objectives do
anyway, logits at the answers' positions alone, and the fused AdamW. On SmolLM2 row adapters also pack the eight examples of a step into one
row, whose common beginning is read once; losses are equal. Times are milliseconds a step and expert, medians of
interleaved repeats, so that ratios hold on a busy machine too; experts a minute are at 80 steps each, as in the shipped bank.

What bounds it on a CPU: arithmetic. A step of the sandbox model with 8 rows of about 50 tokens is 1.6 GFLOP of matrix products with
the frozen weights, forwards and backwards through activations, and each expert has texts of its own, so nothing of it is shared;
element-wise passes over activations, which both sides run, cost more than twice that. Only the overhead of starting
kernels, logits that nobody needs and idle cores can be saved. Beyond some 8 experts activations leave the cache, and a step gets
slower again. On a GPU a step of one small model leaves the device idle, and n experts cost little more than one. With
sentence encoders a step is more arithmetic still, and row adapters win little on two cores; n is bounded by memory there.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.machine import device, interleaved_seconds, synchronise
from lorag.bank.experts import ExpertConfig, train_group
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.objectives import Objective, make_objective
from lorag.base.runner import Runner
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Example, Task
from lorag.worlds.sandbox import world
from lorag.worlds.sandbox.base_lm import TEMPLATE
from lorag.worlds.sandbox.grid import build_suite, splits

__all__ = ["TITLE", "measure"]

TITLE = "Experts a minute: row adapters against one-by-one PEFT training"

RANK, STEPS_OF_AN_EXPERT = 4, 80


@dataclass(frozen=True)
class Setting:
    """A base model, what its experts learn from, and the numbers of experts at once."""

    name: str
    base: BaseModel
    objective: Objective
    tasks: list[Task]
    targets: list[str]
    batch: int
    counts: tuple[int, ...]
    packed: Objective | None = None  # for row adapters: the examples of a task in one row
    dtype: str = "float32"

    @property
    def causal(self) -> bool:
        """Whether the base writes answers."""
        return self.base.kind == "causal_lm"


def measure(quick: bool) -> list[dict[str, str | float]]:
    """One row for each base model and number of experts; `quick` takes the sandbox model, one and two experts, one step."""
    if quick:
        return _rows(_sandbox((1, 2)), steps=1, repeats=1)
    on_gpu = device().type == "cuda"
    most = 256 if on_gpu else 64  # on a CPU 64 experts are past the best number, and 256 need about 7 GB of activations by estimate
    rows = _rows(_sandbox(tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 256) if n <= most)), steps=4, repeats=5)
    rows += _rows(_encoder((1, 4, 16, 64, 256) if on_gpu else (1, 4, 8)), steps=2, repeats=3)
    return rows + _rows(_smollm2((1, 16)), steps=2, repeats=2)


def _sandbox(counts: tuple[int, ...]) -> Setting:
    base = BaseModel("sandbox-lm", "causal_lm")
    tasks = list(build_suite(splits()["train"][: max(counts)], train=64, test=1, descriptions=1, wording="train"))
    objective = make_objective("causal_lm", base.tokenizer(), {"template": TEMPLATE})
    return Setting("sandbox LM, 1.3 M", base, objective, tasks, ["q_proj", "v_proj", "down_proj"], 8, counts)


def _encoder(counts: tuple[int, ...]) -> Setting:
    """all-MiniLM-L6-v2 on tasks whose classes are six domains of the sandbox's texts."""
    base = BaseModel("sentence-transformers/all-MiniLM-L6-v2", "encoder")
    tasks = []
    for number in range(max(counts)):
        rng = random.Random(number)
        labels = tuple(rng.sample(sorted(world.DOMAINS), 6))
        texts = [Example(world.write_text(label, rng).text, label, "train") for label in labels for _ in range(12)]
        tasks.append(
            Task(f"domains-{number}", "made", (f"which of {', '.join(labels)} a text is about",), labels, "MIT", "made", tuple(texts))
        )
    objective = make_objective("prototypes", base.tokenizer(), {"max_length": 64, "ways": 6})
    return Setting("all-MiniLM-L6-v2, 22.7 M", base, objective, tasks, ["query", "value"], 3, counts)


def _smollm2(counts: tuple[int, ...]) -> Setting:
    """SmolLM2 in bf16 on detectors of its own suite, whose texts are short beside the chat template's beginning."""
    base = BaseModel("smollm2-135m-instruct", "causal_lm")
    training = find_tasks("smollm2", "train")
    found = [task for task in training if {one.output for one in task.split("train")} == {"yes", "no"}]
    objectives = [make_objective("causal_lm", base.tokenizer(), {"pack": pack}) for pack in (0, 2048)]
    name, targets = "SmolLM2-135M-Instruct, bf16", ["q_proj", "v_proj"]
    spread = found[:: len(found) // max(counts)][: max(counts)]
    return Setting(name, base, objectives[0], spread, targets, 8, counts, objectives[1], "bfloat16")


def _rows(setting: Setting, *, steps: int, repeats: int) -> list[dict[str, str | float]]:
    where = device()
    model = setting.base.load(where.type, setting.dtype)
    runner = Runner(model, LoraLayout.from_model(model, setting.targets), setting.packed or setting.objective)
    config = ExpertConfig(target_modules=setting.targets, steps=steps, batch=setting.batch, checkpoints=1, weight_decay=6.0)
    config.initial_scale = 0.1
    found: list[dict[str, str | float]] = []
    for n in setting.counts:
        runs: list[Callable[[], object]] = [lambda n=n: train_group(runner, setting.tasks[:n], RANK, config)]
        runs.append(_alone(model, setting, config, tuned=True))
        runs += [_alone(model, setting, config, tuned=False)] if setting.causal else []
        seconds = interleaved_seconds([_finished(run, where) for run in runs], repeats)
        together, tuned = seconds[0] / (n * steps), seconds[1] / steps
        by_hand = seconds[2] / steps if setting.causal else tuned
        row: dict[str, str | float] = {"base": setting.name, "n": n, "row adapters ms": round(together * 1e3, 2)}
        row |= {"PEFT by hand ms": round(by_hand * 1e3, 2), "PEFT tuned ms": round(tuned * 1e3, 2)}
        row |= {"ratio": round(by_hand / together, 2), "ratio to tuned": round(tuned / together, 2)}
        found.append(row | {"experts a minute": round(60 / (together * STEPS_OF_AN_EXPERT), 1)})
    return found


def _finished(run: Callable[[], object], where: torch.device) -> Callable[[], None]:
    def whole() -> None:
        run()
        synchronise(where)

    return whole


def _alone(model: nn.Module, setting: Setting, config: ExpertConfig, *, tuned: bool) -> Callable[[], None]:
    """The training of one expert with PEFT, from wrapping the base model to the last step."""

    def train() -> None:
        settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=config.target_modules)
        wrapped = get_peft_model(copy.deepcopy(model), settings)
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=tuned or None
        )
        for step in range(config.steps):
            batch = setting.objective.sample(setting.tasks[:1], config.batch, f"0/{step}")
            loss = _labelled(wrapped, batch) if setting.causal and not tuned else setting.objective.losses(wrapped, batch).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return train


def _labelled(model: nn.Module, batch) -> Tensor:  # noqa: ANN001 - the objective's own batch
    """Transformers' own loss: labels at the answers, -100 elsewhere."""
    arguments = {name: value.to(model.device) for name, value in batch.arguments.items()}
    labels = torch.full_like(arguments["input_ids"], -100)
    labels[:, -batch.targets.shape[1] :] = batch.targets.to(labels.device)
    return model(**arguments, labels=labels, use_cache=False).loss
