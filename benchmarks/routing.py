"""LoraRouter measured: which task it chooses, what that is worth, how fast it writes. `python -m benchmarks.routing choice real speed`.

`choice`: tasks of the embedded world that have an expert, described in wordings that neither the generator nor the router saw, with
texts that were not among the examples. `real`: the same for tasks that SmolLM2's generator learned from, without experts; `--suites`:
for the tasks of any suites, by choice alone. `speed`: tokens per second of one core's time, each row of a batch with an adapter of its own,
against PEFT, which switches adapters between requests. Time is the process's own, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorag import LoraAdapter, LoraGenerator
from lorag.adapters.factors import Factors
from lorag.adapters.merging import merge
from lorag.base.layout import LoraLayout
from lorag.base.names import locate
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner
from lorag.evaluation.statistics import bootstrap
from lorag.files.artifacts import embedded
from lorag.generator.generate import open_generator
from lorag.serving.router import LoraRouter
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task, TaskSuite
from lorag.worlds.sandbox.wordings import describe

EXAMPLES, TESTS = 8, 8
REAL_EXAMPLES, REAL_TESTS = 256, 4


def _said(found: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Means, with intervals over tasks."""
    for way, by_task in found.items():
        means = torch.tensor([sum(own) / len(own) for own in by_task])
        low, high = bootstrap(means)
        print(f"{way:<62} {means.mean():.3f} ({low:.3f} to {high:.3f}) of {sum(map(len, by_task))}", flush=True)


def choice(count: int) -> None:
    """Accuracy of the chosen expert, and exact match of what is served, beside the pinned expert's and beside one adapter for all."""
    router = LoraRouter.from_pretrained()
    suite = {task.key: task for task in find_tasks("sandbox", "train").tasks}
    names = [name for name in router.known if name in suite]
    router.learn_texts({name: [e.input for e in suite[name].split("train")[:EXAMPLES]] for name in names})
    rng = random.Random(0)
    chosen = rng.sample(names, count)
    right: dict[str, list[list[float]]] = {}
    served: dict[str, list[LoraAdapter]] = {}
    for name in chosen:
        domain, skill, style = name.rsplit("-", 2)
        description = describe(skill, domain, style, "eval", rng, 1)[0]
        text = suite[name].split("test")[0].input
        ways = {
            "its words' neighbour": router.generator.condition(description).neighbours[0][0],
            "its words and code": router.nearest_task(description)[0],
            "its words, code and text": router.nearest_task(description, text)[0],
        }
        for way, expert in ways.items():
            right.setdefault(f"right expert by {way}", []).append([expert == name])
            served.setdefault(f"exact match of the expert by {way}", []).append(router.bank.adapter(expert))
        domains = {route.experts[0][0].rsplit("-", 2)[0] for route in router.route([text])}
        right.setdefault("right domain by text alone", []).append([domain in domains])
        described = router.route([text], descriptions=[description])[0]
        served.setdefault("exact match of the router, told the description", []).append(router.adapter(described))
        served.setdefault("exact match of the pinned right expert", []).append(router.bank.adapter(name))
    _said(right)
    runner = Runner.open(router.generator.base, device="cpu")
    tasks = [suite[name] for name in chosen]
    multitask = LoraGenerator.from_pretrained(embedded("checkpoints/multitask")).generate("any", on_unknown="ignore")
    served["exact match of one multitask adapter"] = [multitask] * count
    served["exact match of the mean of all experts"] = [merge(list(router.bank.adapters()), "mean", rank=16)] * count
    for way, adapters in served.items():
        scores: list[list[float]] = []
        for start in range(0, count, 16):
            stacked = Factors.stack([adapter.factors for adapter in adapters[start : start + 16]])
            scores += [[score["exact_match"]] for score in runner.scores(stacked, tasks[start : start + 16], limit=TESTS)]
        _said({way: scores})


def _held(task: Task) -> tuple[list[str], str]:
    """A task's descriptions that a router may know, and one that it does not."""
    if task.eval_descriptions:
        return list(task.descriptions), task.eval_descriptions[0]
    return list(task.descriptions[:-1]), task.descriptions[-1]


def _router(tasks: Sequence[Task], rng: random.Random) -> LoraRouter:
    router = LoraRouter(open_generator("smollm2"), known={task.key: _held(task)[0] for task in tasks})
    texts = {task.key: [e.input for e in task.split("train")] for task in tasks}
    router.learn_texts({name: rng.sample(own, min(REAL_EXAMPLES, len(own))) for name, own in texts.items()})
    return router


def choose(tasks: Sequence[Task], tests: int) -> None:
    """Which task a test input belongs to: by its text, by a description that was kept back, and by both."""
    rng = random.Random(0)
    router = _router(tasks, rng)
    by_name = {task.key: task for task in tasks}
    right: dict[str, list[list[float]]] = {}
    for task in tasks:
        description = _held(task)[1]
        asked = rng.sample(task.split("test"), min(tests, len(task.split("test"))))
        by_text = [route.experts[0][0] for route in router.route([one.input for one in asked])]
        by_both = [router.nearest_task(description, one.input)[0] for one in asked]
        ways = {"text": by_text, "description": [router.nearest_task(description)[0]] * len(asked), "both": by_both}
        for way, found in ways.items():
            right.setdefault(f"right task of {len(tasks)} by {way}", []).append([name == task.key for name in found])
        fit = [one.output in (by_name[name].labels or ()) or name == task.key for name, one in zip(by_both, asked, strict=True)]
        right.setdefault("by both, or one that has the wanted answer among its labels", []).append(fit)
    _said(right)


def real(count: int) -> None:
    """The choice among tasks that SmolLM2's generator learned from, and the exact match of what is served to four texts of each."""
    rng = random.Random(0)
    suite = [task for task in find_tasks("smollm2", "train").tasks if "+" not in task.name and not task.free_text]
    tasks = rng.sample(suite, count)
    choose(tasks, REAL_TESTS)
    router = _router(tasks, random.Random(0))
    asked = [(task, one) for task in tasks for one in rng.sample(task.split("test"), REAL_TESTS)]
    texts, words = [one.input for _, one in asked], [_held(task)[1] for task, _ in asked]
    ways = {
        "the pinned task's adapter": {"models": [f"lorag:expert/{task.key}" for task, _ in asked]},
        "the router, told the description": {"descriptions": words},
        "the adapter of the task by description and text": {
            "models": [f"lorag:expert/{router.nearest_task(word, text)[0]}" for word, text in zip(words, texts, strict=True)]
        },
        "the router, told nothing": {},
        "the base model": {"models": ["base"] * len(asked)},
    }

    def say(way: str, answers: Sequence[str]) -> None:
        hits = [float(answer.strip() == one.output.strip()) for answer, (_, one) in zip(answers, asked, strict=True)]
        _said({f"exact match of {way}": [hits[start : start + REAL_TESTS] for start in range(0, len(hits), REAL_TESTS)]})

    for way, told in ways.items():
        say(way, [answer.text for answer in router.generate(texts, **told, max_new_tokens=12)])
    mean = merge([router.adapter(router.route(["x"], models=[f"lorag:expert/{task.key}"])[0]) for task in tasks], "mean", rank=16)
    written: list[str] = []
    for start in range(0, len(texts), 32):
        written += router.runner.generate(texts[start : start + 32], Factors.stack([mean.factors]), max_new_tokens=12)
    say("the mean of all adapters", written)


def speed(base: str, rows: tuple[int, ...], tokens: int) -> None:
    """Tokens per second of the process's own time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    layout = LoraLayout.from_model(model, "all-linear")
    adapters = [random_adapter(layout, seed) for seed in range(max(rows))]
    runner = Runner(model, layout, make_objective("causal_lm", tokenizer, {"template": "{input}\n"}))
    model.generation_config.eos_token_id = None
    texts = [f"Write a sentence about the number {place}." for place in range(max(rows))]
    for count in rows:
        stacked = Factors.stack([adapter.factors for adapter in adapters[:count]])
        began = time.process_time()
        with runner.use(stacked) as adapted:
            _write(adapted, tokenizer, texts[:count], tokens)
        together = count * tokens / (time.process_time() - began)
        print(f"row adapters, {count} rows, {count} adapters: {together:.1f} tokens per second")
    peft = adapters[0].apply_to(model, name="a0")
    some = min(8, len(adapters))
    for number in range(1, some):
        adapters[number].apply_to(peft, name=f"a{number}")
    began = time.process_time()
    for number in range(some):
        peft.set_adapter(f"a{number}")
        _write(peft, tokenizer, [texts[number]], tokens)
    alone = some * tokens / (time.process_time() - began)
    print(f"PEFT, adapters switched between {some} requests: {alone:.1f} tokens per second; at {max(rows)} rows {together / alone:.1f} x")


@torch.inference_mode()
def _write(model: torch.nn.Module, tokenizer: object, texts: list[str], tokens: int) -> None:
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    written = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    if written.shape[1] != inputs["input_ids"].shape[1] + tokens:
        raise RuntimeError("fewer tokens were written than are counted")


def random_adapter(layout: LoraLayout, seed: int) -> LoraAdapter:
    """An adapter of rank 8 with random values."""
    rng = torch.Generator().manual_seed(seed)
    factors = {
        m.name: (torch.randn(8, m.in_features, generator=rng) * 0.02, torch.randn(m.out_features, 8, generator=rng) * 0.02)
        for m in layout.modules
    }
    return LoraAdapter(layout, Factors(factors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["choice", "speed"])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--real-tasks", type=int, default=30)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--suites", nargs="*", default=[], help="folders of suites")
    parser.add_argument("--only", type=Path, help="JSON list of the names of their tasks that count")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "choice" in given.what:
        choice(given.tasks)
    if "real" in given.what:
        real(given.real_tasks)
    if "speed" in given.what:
        speed(locate(given.base), (1, 8, 64), given.tokens)
    if given.suites:
        only = set(json.loads(given.only.read_text(encoding="utf-8"))) if given.only else None
        found = [task for folder in given.suites for task in TaskSuite.from_folder(folder).tasks if only is None or task.name in only]
        choose([task for task in found if len(task.split("train")) >= 16 and task.split("test") and len(task.descriptions) > 1], 16)
