"""A folder of PEFT adapters that you have becomes a bank, the bank a generator, and a description an adapter.

    python examples/own_adapters.py [FOLDER]

Nothing here needs the examples that your adapters were trained on. The same from a shell:

    lorag bank add FOLDER/adapters --bank FOLDER/bank
    lorag train bank=FOLDER/bank method=ridge tasks=null out=FOLDER/generator
    lorag generate "return the city from this banking message as a JSON object" --generator FOLDER/generator --out FOLDER/new
"""

import sys
from dataclasses import replace
from pathlib import Path

from lorag import LoraAdapter, LoraGenerator, generate_lora
from lorag.adapters.factors import Factors
from lorag.adapters.sources import find_sources
from lorag.bank.bank import find_bank
from lorag.bank.importing import ImportOptions, import_adapters
from lorag.bank.new_bank import NewBank, start_bank
from lorag.config import load_config
from lorag.tasks.finding import find_tasks
from lorag.training.train import TrainConfig, train

DESCRIPTION = "return the city from this banking message as a JSON object"
UNSEEN = "finance-place-json"  # the task that it describes; none of the adapters below was trained on it


def your_adapters(folder: Path) -> None:
    """Stands for what you have: experts of the embedded bank, each a plain PEFT folder with a line on what it is for.

    Of a hub model's adapters the model card or lorag.json may say that instead of description.txt.
    """
    bank = find_bank("sandbox")
    for name in [name for name in bank.names if name.endswith("json")][::2]:
        replace(bank.adapter(name), info={}).save_pretrained(folder / name)
        (folder / name / "description.txt").write_text("\n".join(bank[name].descriptions[:2]), encoding="utf-8")


def main(out: Path) -> None:
    """Runs it; a second run goes on with what is there."""
    if not (out / "adapters").exists():
        your_adapters(out / "adapters")

    # 1. Adapters to a bank. Base model, modules and ranks are read from the adapters' own files; each one is checked.
    # (With `embedder=`, as the command line has it, descriptions are compared too, and twins warned of.)
    sources = find_sources([str(out / "adapters")])
    start_bank(out / "bank", sources, NewBank())
    done = list(import_adapters(out / "bank", sources, ImportOptions(licence="apache-2.0")))
    refused = [one for one in done if one.error is not None]
    print(f"1. {len(sources)} adapters, {len(refused)} refused; base model and modules are their own")

    # 2. The bank to a generator. A ridge regression is done in a second; `house` needs more experts, or their tasks' examples.
    config = load_config(TrainConfig, None, [f"bank={out / 'bank'}", f"out={out / 'generator'}", "method=ridge", "tasks=null"])
    generator = train(config, quiet=True)
    print(f"2. {out / 'generator'}: {config.method} from {len(generator.conditioner.names)} experts")

    # 3. A description to an adapter, for a task that no adapter of the folder does.
    adapter = generate_lora(DESCRIPTION, generator=generator)
    adapter.save_pretrained(out / "new")
    print(f"3. {out / 'new'}: rank {adapter.rank}, for {DESCRIPTION!r}")
    print(f"   nearest: {', '.join(f'{name} {cosine:.2f}' for name, cosine in adapter.info['neighbours'][:3])}")

    # 4. Does it work? The embedded world has right answers for that task. From 33 experts and no example of their tasks the model
    # moves towards them, and no further: docs/results-history.md says what more experts, and their tasks' examples, make of it.
    for name, score in scores(generator, adapter).items():
        print(f"   {name:<10} exact match {score['exact_match']:.2f}, log-likelihood of a right token {score['log_likelihood']:.2f}")


def scores(generator: LoraGenerator, adapter: LoraAdapter) -> dict[str, dict[str, float]]:
    """Base model, nearest expert and generated adapter on the unseen task."""
    runner = generator.runner()
    nearest = find_bank("sandbox").adapter(adapter.info["neighbours"][0][0])
    task = find_tasks("sandbox", "test")[UNSEEN]
    shown = {"base": None, "nearest": Factors.stack([nearest.factors]), "generated": Factors.stack([adapter.factors])}
    return {name: runner.scores(own, [task], limit=16)[0] for name, own in shown.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/own_adapters"))
