"""What the tests of the page share: toy generators, and a gate that knows no robots."""

import torch
from accelerate import Accelerator
from toy_world import TRAINING, WordEmbedder, make_bank, save_base

from lorag.base.runner import BankBase
from lorag.generator.gate import Verdict
from lorag.methods import method_type
from lorag.methods.training_loop import TrainingLoop
from lorag.training.preparation import SpaceChoice, prepare
from lorag.training.train import fit_generator

SAMPLED = {"steps": 20, "width": 32, "latent": 8}
TEXTS = ["the cat sat on the mat", "a red dog ran", "good bird under sky"]


class Picky:
    """A gate that refuses robots and takes everything else."""

    reference, needed = None, frozenset()

    def decide(self, evidence):
        """The verdict on a description."""
        near = evidence.condition.neighbours[:3]
        if "robot" in evidence.text:
            return Verdict("refuse", "novelty 0.97 exceeds 0.50: the bank has nothing near it", 0.97, 0.01, (0.0, 0.05), near)
        return Verdict("generate", "novelty 0.10 is within the bank's reach", 0.1, 0.62, (0.4, 0.8), near)


def fit(prepared, name, **settings):
    """A generator of the toy bank, with that gate."""
    loop = TrainingLoop(None, torch.Generator().manual_seed(0), quiet=True, accelerator=Accelerator(cpu=True))
    made = fit_generator(prepared, method_type(name).with_settings(settings), loop, rank=8, strength=1.0, origin={})
    made.gate = Picky()
    return made


def toy_generators(folder, tiny, tokenizer):
    """Two of one base model, of which only the second samples."""
    bank = make_bank(folder / "bank", save_base(folder / "base", tiny, tokenizer), TRAINING)
    prepared = prepare(bank, WordEmbedder(), space=SpaceChoice(k=16), quiet=True)
    return {"ridge": fit(prepared, "ridge"), "sg_lora": fit(prepared, "sg_lora", **SAMPLED)}


def encoder_generator(folder, tiny, tokenizer):
    """One of a sentence encoder."""
    causal = save_base(folder / "base", tiny, tokenizer)
    model = type(causal.model)(causal.model.name, "encoder")
    base = BankBase(model, model.identity(), causal.layout, "label_matching", {"max_length": 32})
    bank = make_bank(folder / "bank", base, TRAINING[:6])
    return fit(prepare(bank, WordEmbedder(), space=SpaceChoice(k=8), quiet=True), "ridge")
