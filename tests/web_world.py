"""What the tests of the page share: toy generators, and a gate that knows no robots."""

from toy_world import TRAINING, make_bank, prepare_toy, quiet_loop, save_base

from lorag.base.runner import BankBase
from lorag.generator.gate import Verdict
from lorag.methods import method_type
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
    made = fit_generator(prepared, method_type(name).with_settings(settings), quiet_loop(), rank=8, strength=1.0, origin={})
    made.gate = Picky()
    return made


def toy_generators(folder, tiny, tokenizer):
    """Two of one base model, of which only the second samples."""
    bank = make_bank(folder / "bank", save_base(folder / "base", tiny, tokenizer), TRAINING)
    prepared = prepare_toy(bank, k=16)
    return {"ridge": fit(prepared, "ridge"), "sg_lora": fit(prepared, "sg_lora", **SAMPLED)}


def encoder_generator(folder, tiny, tokenizer):
    """One of a sentence encoder."""
    causal = save_base(folder / "base", tiny, tokenizer)
    model = type(causal.model)(causal.model.name, "encoder")
    base = BankBase(model, model.identity(), causal.layout, "label_matching", {"max_length": 32})
    bank = make_bank(folder / "bank", base, TRAINING[:6])
    return fit(prepare_toy(bank), "ridge")
