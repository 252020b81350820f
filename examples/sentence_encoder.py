"""A bank for a sentence encoder: each expert turns all-MiniLM-L6-v2 towards one aspect of a text.

    python examples/sentence_encoder.py [FOLDER]

The texts are the same for all tasks; only the labels differ. A class is the mean embedding of a few labelled texts
(objective `prototypes`), so that label names help nobody and the adapter alone decides what counts as near.
"""

import itertools
import random
import sys
from pathlib import Path

from lorag import AdapterBank, generate_lora
from lorag.adapters.factors import Factors
from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.base.base_model import BaseModel
from lorag.base.names import MINILM
from lorag.config import load_config
from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.training.train import TrainConfig, train

SUBJECTS = {
    "sports": ["the second half", "our new goalkeeper", "the last lap", "that penalty", "the relay team", "the home game"],
    "cooking": ["the lentil soup", "my sourdough", "the roast", "that sponge cake", "the fish curry", "the salad dressing"],
    "travel": ["the night train", "our hotel room", "the border queue", "that ferry", "the city tour", "the rental car"],
}
MOODS = {
    "pleased": ["made my whole week", "was better than I had hoped", "is something I would praise to anybody"],
    "cross": ["ruined my whole week", "was worse than I had feared", "is something I would warn anybody of"],
}
MANNERS = {"formal": ["Dear Sir or Madam, {}.", "I wish to inform you that {}."], "casual": ["hey guys, {} lol", "ok so {}, just saying"]}
ASPECTS = {
    "topic": (("sort texts by topic: sports, cooking or travel", "what is the text about?"), SUBJECTS),
    "mood": (("sort texts by mood: pleased or cross", "is the writer happy or angry?"), MOODS),
    "manner": (("sort texts by manner: formal or casual", "is it written politely or as among friends?"), MANNERS),
}
# In other words than those above.
TYPED = {"mood": "does this person sound glad or annoyed?", "topic": "is it about a match, a meal or a journey?"}
STEPS = 15


def suite() -> TaskSuite:
    """Three tasks on the same texts."""
    rows = []
    for (topic, subjects), (mood, ends), (manner, frames) in itertools.product(SUBJECTS.items(), MOODS.items(), MANNERS.items()):
        for number, (subject, end) in enumerate(itertools.product(subjects, ends)):
            text = frames[number % len(frames)].format(f"{subject} {end}")
            # Subjects of the test examples never occur in training.
            rows.append((text, {"topic": topic, "mood": mood, "manner": manner}, "test" if subject in subjects[4:] else "train"))
    random.Random(0).shuffle(rows)
    return TaskSuite(
        Task(name, "aspects", words, tuple(labels), "CC0-1.0", "made", tuple(Example(text, own[name], split) for text, own, split in rows))
        for name, (words, labels) in ASPECTS.items()
    )


def main(out: Path) -> None:
    """Runs it; a second run goes on with what is there."""
    tasks = suite()
    tasks.save(out / "tasks")  # `lorag bank build` and `lorag train` read this folder as well

    # 1. One expert per task, all trained at once over one frozen encoder.
    base = BaseModel(MINILM, "encoder")
    recipe = ExpertConfig(
        target_modules=["query", "value"], ranks=[4], steps=STEPS, batch=3, learning_rate=3e-3, checkpoints=1, test_limit=0
    )
    bank = build_bank(out / "bank", tasks, base, "prototypes", {"max_length": 32, "shots": 4}, recipe, device="cpu", quiet=True)
    print(f"1. {out / 'bank'}: {len(bank)} experts of {MINILM}, {', '.join(bank.names)}")

    # 2. With three experts there is nothing to regress on: a description mixes those that are nearest to it.
    settings = [f"bank={out / 'bank'}", f"out={out / 'generator'}", "method=top_k", "tasks=null", "validation=0", "strength=1.0"]
    generator = train(load_config(TrainConfig, None, settings), quiet=True)
    print(f"2. {out / 'generator'}: {generator.method.name}")

    # 3. Descriptions in other words.
    runner = generator.runner()
    for name, text in TYPED.items():
        adapter = generate_lora(text, generator=generator)
        adapter.save_pretrained(out / name)
        near = ", ".join(f"{expert} {cosine:.2f}" for expert, cosine in adapter.info["neighbours"])
        print(f"3. {text!r}: {near}")
        for label, own in (("base", None), ("adapted", Factors.stack([adapter.factors])), ("expert", expert_of(bank, name))):
            (score,) = runner.scores(own, [tasks[name]], limit=36)
            print(f"   {label:<8} accuracy on {name}: {score['accuracy']:.2f}")


def expert_of(bank: AdapterBank, name: str) -> dict:
    """The task's own expert, stacked as the base model runs it."""
    return Factors.stack([bank.adapter(name).factors])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/sentence_encoder"))
