"""Vectors instead of descriptions: written, read, and turned into adapters by a generator of a bank whose entries carry them."""

import dataclasses

import pytest
import torch
from test_import import BASE, LAYOUT
from toy_world import quiet_loop

from lorag import generate_lora
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.errors import ConfigError, DescriptionError
from lorag.methods import method_type
from lorag.text.embedding import SentenceEmbedder
from lorag.text.vectors import VectorEmbedder, open_embedder, reads_vectors, vector_text
from lorag.training.preparation import SpaceChoice, prepare
from lorag.training.split import SplitRule
from lorag.training.train import fit_generator

LENGTH = 3


def _profile(seed):
    return torch.nn.functional.normalize(torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed)), dim=0).tolist()


def _adapter(profile):
    """What a profile asks for: one direction of ΔW for each of its values."""
    pairs = {}
    for number, module in enumerate(LAYOUT.modules):
        rng = torch.Generator().manual_seed(number)
        a, b = torch.randn(LENGTH, module.in_features, generator=rng), torch.randn(module.out_features, LENGTH, generator=rng)
        pairs[module.name] = (a, b * torch.tensor(profile))
    return LoraAdapter(LAYOUT, Factors(pairs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator of forty profiles, as it lies on the disk."""
    bank = AdapterBank.create(tmp_path_factory.mktemp("profiles") / "bank", dataclasses.replace(BASE, identity="revision:main"))
    bank = bank.add([(f"reader-{n}", [vector_text(_profile(n))], [_adapter(_profile(n))]) for n in range(40)])
    prepared = prepare(bank, VectorEmbedder(LENGTH), rule=SplitRule(validation=0.1), space=SpaceChoice(k=6), quiet=True)
    generator = fit_generator(prepared, method_type("ridge").with_settings({}), quiet_loop(), rank=LENGTH, strength=1.0, origin={})
    return generator.save_pretrained(tmp_path_factory.mktemp("generator"))


def test_a_vector_becomes_an_adapter(folder):
    """Of profiles that the bank lacks; the generator finds its embedder by name, and the text of a vector is the vector."""
    for seed in (100, 101, 102):
        made = generate_lora(vector=_profile(seed), generator=folder)
        wanted, other = _adapter(_profile(seed)), _adapter(_profile(seed + 7))
        assert made.factors.cosine(wanted.factors) > 0.97 > made.factors.cosine(other.factors)
    same = generate_lora(vector_text(_profile(102)), generator=folder)
    assert all(torch.equal(same.delta(name), made.delta(name)) for name in LAYOUT.names)


def test_what_is_not_a_vector_is_refused(folder):
    """A text, another length, values that are not numbers, both, neither."""
    with pytest.raises(DescriptionError, match="vector="):
        generate_lora("summarise legal text", generator=folder)
    for wrong in ([1.0, 2.0], [1.0, float("nan"), 0.0], []):
        with pytest.raises(DescriptionError):
            generate_lora(vector=wrong, generator=folder)
    with pytest.raises(DescriptionError, match="none of them"):
        generate_lora(generator=folder)
    with pytest.raises(DescriptionError, match="both"):
        generate_lora("a", vector=[1.0], generator=folder)


def test_vectors_are_read_as_they_were_written():
    """Six digits of each value; of unit length with a one beside them, so that length counts; the longest fits into a description."""
    values = [0.25, -1e-12, 12345.678]
    (read,) = VectorEmbedder(3).embed([vector_text(values)])
    assert torch.allclose(read.pooled[:3] / read.pooled[3], torch.tensor(values), rtol=1e-5) and read.tokens.shape == (1, 4)
    assert read.pooled.norm().item() == pytest.approx(1.0)
    assert len(vector_text([-1.23456e-100] * 256)) <= 4096
    with pytest.raises(DescriptionError, match="257 values"):
        vector_text([0.0] * 257)


def test_embedders_are_opened_by_name(monkeypatch):
    """`vectors:N`, or a model; an N that is none is refused."""
    assert open_embedder("vectors:8").size == 9 and reads_vectors("vectors:8") and not reads_vectors("models/vectors")
    asked = []
    monkeypatch.setattr(SentenceEmbedder, "from_pretrained", classmethod(lambda cls, *given: asked.append(given) or VectorEmbedder(3)))
    assert open_embedder("models/mini", "cpu").name == "vectors:3" and asked == [("models/mini", "cpu")]
    for wrong in ("vectors:", "vectors:0", "vectors:-3", "vectors:x", "vectors:9999"):
        with pytest.raises(ConfigError, match="vectors"):
            open_embedder(wrong)
