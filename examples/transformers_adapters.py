"""Two generated adapters in plain transformers: loaded beside each other, switched, and switched off.

Usage: python examples/transformers_adapters.py [OUT]
"""

import sys
from pathlib import Path

from lorag import generate_lora
from lorag.base.runner import Runner
from lorag.generator.generate import default_generator
from lorag.tasks.finding import find_tasks

DESCRIPTIONS = {"summary": "summarise legal text", "person": "which person does this legal text name?"}


def main(out: Path) -> None:
    """Runs it."""
    runner = Runner.open(default_generator().base, device="cpu")
    model, answer = runner.model, runner.objective.generate
    text = find_tasks("sandbox", "test")["legal-summarise-plain"].examples[0].input
    for name, description in DESCRIPTIONS.items():
        model.load_adapter(str(generate_lora(description).save_pretrained(out / name)), adapter_name=name)
    for name in DESCRIPTIONS:
        model.set_adapter(name)
        print(f"{name:<8} {answer(model, [text])[0].strip()}")
    model.disable_adapters()
    print(f"{'base':<8} {answer(model, [text])[0].strip()}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/transformers_adapters"))
