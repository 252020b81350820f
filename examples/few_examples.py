"""A description and a few examples: gradient steps that start from the generated adapter instead of from nothing.

    python examples/few_examples.py

The embedded world has the right answers, so that each step can be scored: on texts that the steps did not see.
"""

from dataclasses import replace

import torch

from lorag import LoraAdapter, generate_lora
from lorag.adapters.factors import Factors
from lorag.generator.generate import default_generator
from lorag.generator.refine import refine
from lorag.tasks.finding import find_tasks

# A vague wording, on purpose: whose name? Examples say what the description leaves open.
DESCRIPTION = "the name that matters in a news story, in quotation marks"
UNSEEN = "news-organisation-quoted"  # none of the generator's experts was trained on it
EXAMPLES, STEPS = 3, 20


def main() -> None:
    """Runs it; nothing is written."""
    generator = default_generator()
    task = find_tasks("sandbox", "test")[UNSEEN]
    known = [(example.input, example.output) for example in task.examples[:EXAMPLES]]
    rest = replace(task, examples=task.examples[EXAMPLES:])
    runner = generator.runner()

    def show(name: str, adapter: LoraAdapter | None) -> None:
        own = None if adapter is None else Factors.stack([adapter.factors])
        (score,) = runner.scores(own, [rest], limit=29)
        print(f"{name:<44} exact match {score['exact_match']:.2f}, log-likelihood {score['log_likelihood']:6.2f}")

    print(f"{DESCRIPTION!r}; for instance: {known[0][0]!r} -> {known[0][1]!r}")
    show("base model", None)
    # The generator's gate may refuse such wording; here we want to see what becomes of it all the same.
    described = generate_lora(DESCRIPTION, on_unknown="ignore")
    show("description alone", described)
    both = generate_lora(DESCRIPTION, examples=known, refine_steps=STEPS, on_unknown="ignore")
    show(f"description, {EXAMPLES} examples, {STEPS} steps", both)
    # The same steps from an adapter that changes nothing yet, as training from scratch starts: A random, B zero.
    show(f"no description, {EXAMPLES} examples, {STEPS} steps", refine(runner, fresh(described), known, STEPS, learning_rate=5e-3))


def fresh(like: LoraAdapter) -> LoraAdapter:
    """An untrained adapter of the same modules and rank."""
    rng = torch.Generator().manual_seed(0)
    factors = {}
    for module in like.layout.modules:
        rows = (torch.rand(like.rank, module.in_features, generator=rng) * 2 - 1) / module.in_features**0.5
        factors[module.name] = (rows, torch.zeros(module.out_features, like.rank))
    return LoraAdapter(like.layout, Factors(factors), like.base_model, like.task_type)


if __name__ == "__main__":
    main()
