"""LoraRouter measured: which expert it chooses, what that is worth, how fast it writes. `python -m benchmarks.routing choice speed`.

`choice`: tasks of the embedded world that have an expert, described in wordings that neither the generator nor the router saw, with
texts that were not among the examples. `speed`: tokens a second of one core's time, each row of a batch with an adapter of its own, against
PEFT, which switches adapters between requests. Time is the process's own, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from lorag import LoraAdapter, LoraGenerator
from lorag.adapters.factors import Factors
from lorag.adapters.merging import merge
from lorag.base.layout import LoraLayout
from lorag.base.names import locate
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner
from lorag.files.artifacts import embedded
from lorag.serving.retrieval import TextIndex
from lorag.serving.router import LoraRouter
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import TaskSuite
from lorag.text.conditioning import Conditioner
from lorag.text.embedding import SentenceEmbedder
from lorag.worlds.sandbox.wordings import describe

EXAMPLES, TESTS = 8, 8


def choice(count: int) -> None:
    """Accuracy of the chosen expert, and exact match of what is served, beside the pinned expert's and beside one adapter for all."""
    router = LoraRouter.from_pretrained()
    suite = {task.key: task for task in find_tasks("sandbox", "train").tasks}
    names = list(router.generator.conditioner.names)
    router.learn_texts({name: [e.input for e in suite[name].split("train")[:EXAMPLES]] for name in names if name in suite})
    rng = random.Random(0)
    chosen = rng.sample([name for name in names if name in suite], count)
    found: dict[str, list[float]] = {}
    served: dict[str, list[LoraAdapter]] = {}
    for name in chosen:
        domain, skill, style = name.rsplit("-", 2)
        description = describe(skill, domain, style, "eval", rng, 1)[0]
        text = suite[name].split("test")[0].input
        condition = router.generator.condition(description)
        ways = {
            "description, by words": condition.neighbours[0][0],
            "description, by code": router.nearest_expert(description)[0],
        }
        for way, expert in ways.items():
            found.setdefault(way, []).append(expert == name)
            served.setdefault(f"expert of: {way}", []).append(router.bank.adapter(expert))
        domains = {route.experts[0][0].rsplit("-", 2)[0] for route in router.route([text])}
        found.setdefault("text alone, its domain", []).append(domain in domains)
        served.setdefault("the router, told the description", []).append(
            router.adapter(router.route([text], descriptions=[description])[0])
        )
        served.setdefault("pinned right expert", []).append(router.bank.adapter(name))
    for way, right in found.items():
        print(f"chosen by {way:<28} {statistics.mean(right):.3f} of {len(right)}")
    runner = Runner.open(router.generator.base, device="cpu")
    tasks = [suite[name] for name in chosen]
    multitask = LoraGenerator.from_pretrained(embedded("checkpoints/multitask")).generate("any", on_unknown="ignore")
    served["one multitask adapter"] = [multitask] * count
    served["mean of all experts"] = [merge(list(router.bank.adapters()), "mean", rank=16)] * count
    for way, adapters in served.items():
        scores = []
        for start in range(0, count, 16):
            stacked = Factors.stack([adapter.factors for adapter in adapters[start : start + 16]])
            scores += [score["exact_match"] for score in runner.scores(stacked, tasks[start : start + 16], limit=TESTS)]
        print(f"exact match of {way:<45} {statistics.mean(scores):.3f}")


def speed(base: str, rows: tuple[int, ...], tokens: int) -> None:
    """Tokens a second of the process's own time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    layout = LoraLayout.from_model(model, "all-linear")
    adapters = [_random(layout, seed) for seed in range(max(rows))]
    runner = Runner(model, layout, make_objective("causal_lm", tokenizer, {"template": "{input}\n"}))
    model.generation_config.eos_token_id = None
    texts = [f"Write a sentence about the number {place}." for place in range(max(rows))]
    for count in rows:
        stacked = Factors.stack([adapter.factors for adapter in adapters[:count]])
        began = time.process_time()
        with runner.use(stacked) as adapted:
            _write(adapted, tokenizer, texts[:count], tokens)
        together = count * tokens / (time.process_time() - began)
        print(f"row adapters, {count} rows, {count} adapters: {together:.1f} tokens a second")
    peft = adapters[0].apply_to(model, name="a0")
    some = min(8, len(adapters))
    for number in range(1, some):
        adapters[number].apply_to(peft, name=f"a{number}")
    began = time.process_time()
    for number in range(some):
        peft.set_adapter(f"a{number}")
        _write(peft, tokenizer, [texts[number]], tokens)
    alone = some * tokens / (time.process_time() - began)
    print(f"PEFT, adapters switched between {some} requests: {alone:.1f} tokens a second; at {max(rows)} rows {together / alone:.1f} x")


@torch.inference_mode()
def _write(model: torch.nn.Module, tokenizer: object, texts: list[str], tokens: int) -> None:
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    written = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    if written.shape[1] != inputs["input_ids"].shape[1] + tokens:
        raise RuntimeError("fewer tokens were written than are counted")


def _random(layout: LoraLayout, seed: int) -> LoraAdapter:
    rng = torch.Generator().manual_seed(seed)
    factors = {
        m.name: (torch.randn(8, m.in_features, generator=rng) * 0.02, torch.randn(m.out_features, 8, generator=rng) * 0.02)
        for m in layout.modules
    }
    return LoraAdapter(layout, Factors(factors))


def suites(folders: list[str], only: set[str]) -> None:
    """Which task a test input belongs to: by its text, by a description that was kept back, and by the sum of both cosines."""
    found = [task for folder in folders for task in TaskSuite.from_folder(folder).tasks]
    tasks = [
        t for t in found if len(t.split("train")) >= 16 and t.split("test") and len(t.descriptions) > 1 and (not only or t.name in only)
    ]
    embedder, rng = SentenceEmbedder.from_pretrained(device="cpu"), random.Random(0)
    texts = TextIndex.embed(
        {t.key: [e.input for e in rng.sample(t.split("train"), min(32, len(t.split("train"))))] for t in tasks}, embedder
    )
    words = Conditioner.fit([t.key for t in tasks], [embedder.embed(t.descriptions[:-1]) for t in tasks])
    right: dict[str, list[bool]] = {}
    for place, task in enumerate(tasks):
        tests = rng.sample(task.split("test"), min(8, len(task.split("test"))))
        by_text = texts.scores(torch.stack([one.pooled for one in embedder.embed([e.input for e in tests])]))
        by_words = words(embedder.embed([task.descriptions[-1]])[0]).similarities.expand_as(by_text)
        for name, scores in (("text", by_text), ("description", by_words), ("both", by_text + by_words)):
            right.setdefault(name, []).extend((scores.argmax(1) == place).tolist())
    for name, hits in right.items():
        print(f"{len(tasks)} tasks of {len(folders)} suites, by {name}: {statistics.mean(hits):.3f} of {len(hits)} test inputs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["choice", "speed"])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--suites", nargs="*", default=[], help="folders of suites")
    parser.add_argument("--only", type=Path, help="JSON list of the names of their tasks that count")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "choice" in given.what:
        choice(given.tasks)
    if "speed" in given.what:
        speed(locate(given.base), (1, 8, 64), given.tokens)
    if given.suites:
        suites(given.suites, set(json.loads(given.only.read_text(encoding="utf-8"))) if given.only else set())
