"""SmolLM2's detectors where the answer must be one of its labels: `python -m benchmarks.choice [--seeds 3] [--limit 8]`.

`lorag evaluate` asks for the answer word for word, and whatever else a model writes is wrong. An engine can be held to the labels, by
a grammar or a list of choices. Here the label with the larger likelihood is the answer: of the generated adapter, of the one for another
task's description, and of the bare base model with the description in its prompt, which otherwise only chats. Balanced accuracy on
`unseen_label`, intervals over tasks. Bounded by the base model: two passes per example and row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from lorag.adapters.factors import Factors
from lorag.base.objectives.prompts import with_description
from lorag.base.objectives.text_metrics import balanced_accuracy
from lorag.base.runner import Runner
from lorag.evaluation.ladder import shown_descriptions
from lorag.evaluation.scoring import longer_prompts
from lorag.evaluation.statistics import bootstrap
from lorag.generator.generate import open_generator
from lorag.tasks.finding import find_tasks
from lorag.tasks.suite import Task

__all__ = ["by_likelihood", "measure"]


@torch.inference_mode()
def by_likelihood(runner: Runner, adapter: Factors, task: Task, limit: int) -> float:
    """Balanced accuracy, each test example being given its likelier label."""
    examples = task.split("test")[:limit]
    labels = sorted({example.output for example in task.examples})
    with runner.use(Factors.stack([adapter])) as model:
        judged = [runner.objective.judge(model, [(example.input, label) for example in examples]) for label in labels]
    best = torch.stack([torch.stack([tokens.sum() for _, tokens in one]) for one in judged]).argmax(0).tolist()
    outputs = [example.output for example in examples]
    return balanced_accuracy([labels[i] == output for i, output in zip(best, outputs, strict=True)], outputs)


def measure(seeds: Sequence[int], limit: int) -> dict[str, torch.Tensor]:
    """Balanced accuracy of each row (seeds, tasks)."""
    generator, tasks = open_generator("smollm2"), list(find_tasks("smollm2", "unseen_label"))
    runner = Runner.open(generator.base, dtype="fast")
    prompted, nothing = longer_prompts(runner, generator.base), Factors.zeros(generator.base.layout)
    rows: dict[str, list[list[float]]] = {"aligned": [], "aligned_shuffled": [], "base_prompted": []}
    for seed in seeds:
        shown = shown_descriptions(tasks, seed)
        made = [generator.generate(text, seed=seed, on_unknown="ignore").factors for text in shown]
        others = [*made[1:], made[0]]
        rows["aligned"].append([by_likelihood(runner, one, task, limit) for one, task in zip(made, tasks, strict=True)])
        rows["aligned_shuffled"].append([by_likelihood(runner, one, task, limit) for one, task in zip(others, tasks, strict=True)])
        asked = [with_description(task, [text]) for task, text in zip(tasks, shown, strict=True)]
        rows["base_prompted"].append([by_likelihood(prompted, nothing, task, limit) for task in asked])
        print(f"seed {seed}: " + ", ".join(f"{name} {sum(row[-1]) / len(tasks):.3f}" for name, row in rows.items()), flush=True)
    return {name: torch.tensor(row) for name, row in rows.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=8, help="test examples of a task")
    given = parser.parse_args()
    for name, values in measure(range(given.seeds), given.limit).items():
        low, high = bootstrap(values.mean(0))
        print(f"{name:<18}{values.mean():.3f} ({low:.3f} to {high:.3f})")
