"""A toy world for generators: descriptions name a colour and an animal, and ΔW is the sum of what the two words stand for."""

import dataclasses
import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import WORDS, gauge

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank, BankBase
from lorag.base.base_model import BaseModel
from lorag.base.layout import LoraLayout
from lorag.base.runner import Runner
from lorag.methods.baselines import Nearest
from lorag.methods.training_loop import TrainingLoop
from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.text.embedding import Embedding, SentenceEmbedder
from lorag.training.preparation import Prepared, SpaceChoice, prepare

COLOURS = ("red", "green", "blue", "grey", "pink")
ANIMALS = ("cat", "dog", "bird", "fish", "horse")
HELD_OUT = (("red", "dog"), ("blue", "fish"), ("pink", "cat"), ("grey", "horse"))
TRAINING = tuple((c, a) for c in COLOURS for a in ANIMALS if (c, a) not in HELD_OUT)


class WordEmbedder:
    """Each word is a fixed random vector; a text is its words, and their normalised sum."""

    name, size = "words", 48

    def embed(self, texts, *, quiet=True):
        """Embeds texts in order."""
        return [self._one(text) for text in texts]

    def _one(self, text):
        tokens = torch.stack([self._word(word) for word in text.lower().split()])
        return Embedding(torch.nn.functional.normalize(tokens.sum(0), dim=0), tokens)

    def _word(self, word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
        return torch.nn.functional.normalize(torch.randn(self.size, generator=torch.Generator().manual_seed(seed)), dim=0)


def use_words(monkeypatch):
    """Whatever opens a sentence embedder by its name gets one of this world's words, which takes no time to load."""
    monkeypatch.setattr(SentenceEmbedder, "from_pretrained", lambda *_, **__: WordEmbedder())


def name_of(colour, animal):
    """Name of a task."""
    return f"{colour}-{animal}"


def describe(colour, animal):
    """Two wordings of a task."""
    return [f"paint the {colour} {animal}", f"{colour} {animal} please"]


def save_base(folder: Path, tiny, tokenizer) -> BankBase:
    """Writes the tiny Llama with its tokenizer and returns what a bank of its adapters states."""
    model = tiny.build()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.5)  # calm enough that what is learned on some texts holds on others
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = BaseModel(str(folder), "causal_lm")
    return BankBase(base, base.identity(), tiny.layout(model), "causal_lm", {"template": "{input}\n", "max_length": 64})


def true_adapter(layout: LoraLayout, colour: str, animal: str) -> LoraAdapter:
    """The right adapter: rank 2 of the colour beside rank 2 of the animal."""
    factors = {}
    for module in layout.modules:
        parts = []
        for word in (colour, animal):
            rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{word}/{module.name}".encode()).digest()[:4]))
            rows, columns = torch.randn(2, module.in_features, generator=rng), torch.randn(module.out_features, 2, generator=rng)
            parts.append((rows * 0.2, columns * 0.2))
        factors[module.name] = (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1))
    return LoraAdapter(layout, Factors(factors))


def other_form(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """The same ΔW in another gauge, in rank 6 instead of 4, with another alpha."""
    turned = gauge(adapter, seed)
    padded = {n: (torch.cat([a, a[:2]]), torch.cat([b, torch.zeros(len(b), 2)], 1)) for n, (a, b) in turned.factors.items()}
    return LoraAdapter(adapter.layout, Factors({n: (a, b * 3) for n, (a, b) in padded.items()}, 1 / 3))


def make_bank(folder: Path, base: BankBase, cells, change=None) -> AdapterBank:
    """A bank of the right adapters of some cells; `change(adapter, number)` may rewrite each. Two late checkpoints each."""
    bank = AdapterBank.create(folder, base)
    experts = []
    for number, cell in enumerate(cells):
        adapter = true_adapter(base.layout, *cell)
        adapter = gauge(adapter, number) if change is None else change(adapter, number)
        experts.append((name_of(*cell), describe(*cell), [adapter.scaled(0.98), adapter]))
    return bank.add(experts)


def make_suite(cells, train=24, test=6) -> TaskSuite:
    """Tasks whose answer is always the colour and the animal's place in the vocabulary, whatever the text."""
    tasks = []
    for number, (colour, animal) in enumerate(cells):
        rng = torch.Generator().manual_seed(number)
        answer = f"{WORDS[COLOURS.index(colour)]} {WORDS[5 + ANIMALS.index(animal)]}"
        texts = {" ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=rng).tolist()): None for _ in range(train + test)}
        rows = tuple(Example(text, answer, "train" if i < train else "test") for i, text in enumerate(texts))
        tasks.append(Task(name_of(colour, animal), "toy", tuple(describe(colour, animal)), None, "MIT", "made", rows))
    return TaskSuite(tasks)


def prepare_toy(bank, tasks=None, rule=None, space=None, k=8) -> Prepared:
    """A bank made ready for fitting, with the base model where there are tasks with examples."""
    runner = None if tasks is None or tasks.suite is None else Runner.open(bank.base, "cpu")
    return prepare(bank, WordEmbedder(), tasks, rule, runner=runner, space=space or SpaceChoice(k=k), quiet=True)


class LookedUp(Nearest):
    """A lookup that claims to have learned from descriptions, and so owes the ladder its controls."""

    baseline = False


def quiet_loop(folder=None, seed=0) -> TrainingLoop:
    """A loop on the CPU that shows nothing."""
    return TrainingLoop(folder, torch.Generator().manual_seed(seed), quiet=True, accelerator=Accelerator(cpu=True))


def interruptible_loop(folder=None, stop=None, stage=None) -> TrainingLoop:
    """The same; it validates and keeps its state every five steps, and is interrupted before step `stop` of a stage, or of any."""
    loop = quiet_loop(folder)
    run = loop.run

    def changed(name, module, loss, validate, settings):
        def stopping(m, step):
            if step == stop and stage in (None, name):
                raise KeyboardInterrupt
            return loss(m, step)

        return run(name, module, stopping, validate, dataclasses.replace(settings, validate_every=5))

    loop.run = changed
    return loop
