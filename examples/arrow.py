"""Route each token among experts with PEFT's Arrow: the bank's adapters, written with one rank, need no training for it.

Usage: python examples/arrow.py [OUT]
"""

import sys
from pathlib import Path

from peft import ArrowConfig, create_arrow_model

from lorag.bank.bank import find_bank
from lorag.bank.exporting import export_arrow
from lorag.base.runner import Runner
from lorag.tasks.finding import find_tasks

EXPERTS = ("legal-person-upper", "cooking-amount-quoted")


def main(out: Path) -> None:
    """Runs it."""
    bank = find_bank("sandbox")
    folders = list(export_arrow(bank, out, EXPERTS))
    print(f"{len(folders)} adapters in {out}")
    runner = Runner.open(bank.base, device="cpu")
    model = create_arrow_model(runner.model, [str(folder) for folder in folders], ArrowConfig(top_k=1, rng_seed=0)).eval()
    for name in EXPERTS:
        example = find_tasks("sandbox", "train")[name].split("test")[0]
        print(f"{name:<24} wanted {example.output!r}, Arrow: {runner.objective.generate(model, [example.input])[0]!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/arrow"))
