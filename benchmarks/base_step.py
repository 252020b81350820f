"""A training step through SmolLM2-135M-Instruct: 16 adapters of rank 8 on q and v, some 2,048 tokens of prompts with answers of one word.

"Step" is `Runner.losses` and its backward pass, as expert and functional training run it; "plain" is one forward and backward pass of
the frozen base over the same tokens, from embeddings that ask for gradients to the last states, without head, adapters or loss: what
no step can go below. "Head everywhere" is the same with the head and the loss at every position, as `model(..., labels=...)` does it.
"Upper half" is a step with adapters in layers 15 to 29 alone. CPU seconds of one thread, the second of two runs, so that other work on the
machine counts little.

Bounded by matrix products with the frozen weights: 106 M weights, 2 FLOP a weight and token forwards and as many backwards. The head
(28 M weights) is applied to answers alone; given a slice of states that is not contiguous, torch copied it once for every row. In
bf16 attention is computed in plain products, whose backward pass is faster on a CPU than that of the fused kernel.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner
from lorag.tasks.suite import Example, Task

__all__ = ["TITLE", "measure"]

TITLE = "A training step through SmolLM2-135M-Instruct against its bare passes"

RANK, ADAPTERS, WORDS = 8, 16, 122


def measure(quick: bool) -> list[dict[str, str | float]]:
    """A row for each precision; `quick` takes the sandbox's base model and two adapters."""
    base = BaseModel("sandbox-lm" if quick else "smollm2-135m-instruct", "causal_lm")
    tasks = [_task(number, 8 if quick else WORDS) for number in range(2 if quick else ADAPTERS)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(base, tasks, dtype, 1) for dtype in ("bfloat16", "float32")]
    finally:
        torch.set_num_threads(threads)


def _row(base: BaseModel, tasks: list[Task], dtype: str, repeats: int) -> dict[str, str | float]:
    model: Any = base.load("cpu", dtype)
    objective = make_objective("causal_lm", base.tokenizer(), {"template": "{input}\n"})
    layers = model.config.num_hidden_layers
    layouts = [LoraLayout.from_model(model, ["q_proj", "v_proj"], chosen) for chosen in (None, range(layers // 2, layers))]
    runners = [Runner(model, layout, objective) for layout in layouts]
    ids = objective.sample(tasks, 1, "0").arguments["input_ids"]

    def step(runner: Runner) -> Callable[[], None]:
        shapes = {m.name: ((len(tasks), RANK, m.in_features), (len(tasks), m.out_features, RANK)) for m in runner.layout.modules}
        rng = torch.Generator().manual_seed(0)
        stacked = {
            name: tuple((torch.randn(*shape, generator=rng) * 0.02).requires_grad_() for shape in pair) for name, pair in shapes.items()
        }
        return lambda: runner.losses(stacked, tasks, 1, "0").sum().backward()  # type: ignore[arg-type]

    def plain(head: bool) -> None:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        if not head:
            model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state.float().sum().backward()
            return
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    runs = [step(runners[0]), step(runners[1]), lambda: plain(False), lambda: plain(True)]
    whole, upper, bare, everywhere = (_seconds(run, repeats) for run in runs)
    return {
        "dtype": dtype,
        "tokens": ids.numel(),
        "plain seconds": round(bare, 4),
        "step seconds": round(whole, 4),
        "step / plain": round(whole / bare, 2),
        "head everywhere seconds": round(everywhere, 4),
        "upper half seconds": round(upper, 4),
    }


def _seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return max(min(taken), 1e-9)


def _task(number: int, words: int) -> Task:
    rng = random.Random(number)
    text = [rng.choice("the cat sat on a mat and then ran home to see what was good about early birds".split()) for _ in range(words)]
    return Task(f"t{number}", "made", ("say yes",), None, "MIT", "made", (Example(" ".join(text), rng.choice(("yes", "no")), "train"),))
