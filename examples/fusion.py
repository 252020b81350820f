"""Two experts in one adapter: closed-form merges, and one that learns its weights from a few examples.

    python examples/fusion.py [FOLDER]

One adapter can serve several tasks only if their inputs tell them apart. These two read texts of different domains.
The same from a shell: lorag fuse legal-person-upper medical-amount-json --method cat --tasks sandbox --out FOLDER
"""

import sys
from pathlib import Path

from lorag import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import find_bank
from lorag.base.runner import Runner
from lorag.methods.support_examples import learn_weights
from lorag.tasks.finding import find_tasks

EXPERTS = ("legal-person-upper", "medical-amount-json")


def main(out: Path) -> None:
    """Runs it and writes the last adapter."""
    bank = find_bank("sandbox")
    runner = Runner.open(bank.base, "cpu")
    tasks = find_tasks("sandbox", "train").select(EXPERTS)

    def show(name: str, adapters: list[LoraAdapter] | None) -> None:
        own = None if adapters is None else Factors.stack([adapter.factors for adapter in adapters])
        found = runner.scores(own, list(tasks), limit=16)
        print(f"{name:<28}" + "".join(f"  {task.name} {score['exact_match']:.2f}" for task, score in zip(tasks, found, strict=True)))

    show("base model", None)
    show("each task's own expert", [bank.adapter(name) for name in EXPERTS])
    for method in ("mean", "ties"):  # these see no example
        merged = bank.fuse(EXPERTS, method)
        show(f"{method}, one adapter", [merged, merged])
    # Weights by expert and module, learned on eight examples of each task, by the loss of the task that is worst off.
    weights = learn_weights(runner, list(bank.adapters(EXPERTS)), list(tasks), steps=50, learning_rate=0.1, reduction="worst")
    learned = bank.fuse(EXPERTS, "cat", weights=weights)
    show("cat, one adapter", [learned, learned])
    learned.save_pretrained(out)
    print(f"{out}: rank {learned.rank}, made from {', '.join(learned.info['experts'])}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/fusion"))
