"""Typing errors in use: which words are led back, which are left alone, and that a generator says what it read."""

import random
from dataclasses import replace

import pytest
from toy_world import TRAINING, WordEmbedder, make_bank, save_base

from lorag.generator.lora_generator import LoraGenerator
from lorag.text.embedding import CachedEmbedder
from lorag.text.misspelling import misspell
from lorag.text.spelling import Spelling
from lorag.training.train import TrainConfig, train


class Knowing(WordEmbedder):
    """Knows a few words."""

    def knows(self, word):
        return word in {"talk", "brief", "crown"}


SPELLING = Spelling.of(["Summarise the legal text", "summarise reports for the lawyer", "carry on", "grown bread"])


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("sumarise teh legal text", "summarise teh legal text"),  # a letter left out; of a short word nothing is certain
        ("summmarise", "summarise"),  # one too many
        ("summsrise", "summarise"),  # another one
        ("sumamrise", "summarise"),  # exchanged
        ("SUMARISE the Txet", "SUMMARISE the Txet"),  # small or large as typed; a capital within a text is a name's
        ("Sumarise", "Summarise"),
        ("brief talks, lawyers", "brief talks, lawyers"),  # known to the embedder, or by their endings
        ("crown, not grown", "crown, not grown"),  # one error apart, and both known
        ("sumrise", "sumrise"),  # two errors
        ("lawyer's reprots: 3-legal", "lawyer's reports: 3-legal"),
        ("要約して", "要約して"),
    ],
)
def test_what_is_corrected_and_what_is_not(typed, read):
    """One error in a word that nobody knows."""
    assert SPELLING.corrected(typed, Knowing()) == read


def test_every_error_of_training_is_led_back_where_one_word_is_near():
    """Of long words; and an embedder that cannot tell which words it knows leaves all as they are."""
    words = ["summarise", "translation", "paragraph", "questionnaire"]
    spelling = Spelling(words)
    for seed in range(200):
        word = random.Random(seed).choice(words)
        assert spelling.corrected(misspell(word, random.Random(seed)), Knowing()) == word
        assert spelling.corrected(misspell(word, random.Random(seed)), WordEmbedder()) == misspell(word, random.Random(seed))
    assert CachedEmbedder(WordEmbedder()).knows("sumarise") and not CachedEmbedder(Knowing()).knows("sumarise")


def test_the_commoner_word_is_taken():
    """Of two that are as near, the one that the descriptions use more often."""
    assert Spelling.of(["cart", "care care"]).corrected("caru", Knowing()) == "care"


@pytest.mark.slow
def test_a_generator_reads_what_was_meant(tmp_path, tiny_models, tokenizer):
    """The same adapter as without the error, which says how it was read; the words come back from its folder, and old folders have none."""
    base = save_base(tmp_path / "base", tiny_models["llama"], tokenizer)
    make_bank(tmp_path / "bank", base, TRAINING[:6])
    config = TrainConfig(
        bank=str(tmp_path / "bank"), method="kernel", tasks=None, settings={"steps": 2}, k=8, out=str(tmp_path / "g"), strength=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorag.training.train.open_embedder", lambda name, device: Knowing())
        train(config, quiet=True)
    generator = LoraGenerator.from_pretrained(tmp_path / "g", embedder=Knowing())
    assert {"paint", "please", "horse"} <= set(generator.spelling.words)
    right, typed = (generator.generate(text) for text in ("paint the green horse", "paitn the gren horse"))
    assert typed.info["read_as"] == "paint the green horse" and typed.info["description"] == "paitn the gren horse"
    assert "read_as" not in right.info
    assert all((a == b).all() for name in right.factors for a, b in zip(right.factors[name], typed.factors[name], strict=True))
    first, second = (generator.condition(text).similarities for text in ("paint the green horse", "paitn the gren horse"))
    assert first.equal(second)
    bare = replace(generator, spelling=Spelling()).generate("paitn the gren horse")
    assert "read_as" not in bare.info
    assert any(not (a == b).all() for name in right.factors for a, b in zip(right.factors[name], bare.factors[name], strict=True))
