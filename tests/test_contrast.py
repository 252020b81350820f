"""A reader that learned from wordings alone knows a task again, among tasks that it never saw, by words that it never saw it in."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy_world import WordEmbedder, quiet_loop

from lorag.methods.contrast import ContrastSettings, train_reader
from lorag.methods.method import collate
from lorag.networks.factor_network import FactorNetwork

EMBEDDER = WordEmbedder()
COLOURS, ANIMALS = (tuple(f"{kind}{number}" for number in range(10)) for kind in ("colour", "animal"))
FILLERS = ("paint the {}", "{} please", "show me some {}", "i need {} now", "{} it is")


@pytest.fixture
def data():
    """A hundred combinations of two words, of which thirty were held out, each in five wordings."""
    pairs = [(colour, animal) for colour in COLOURS for animal in ANIMALS]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    embeddings = [EMBEDDER.embed([filler.format(f"{a} {b}") for filler in FILLERS]) for a, b in pairs]
    return SimpleNamespace(embeddings=embeddings, training=order[:70], validation=order[70:])


@pytest.fixture
def network():
    torch.manual_seed(0)
    sizes = {"inputs": 9, "outputs": 4, "rank": 3, "probes": 1, "directions": 4, "features": 32}
    reader = {"width": 32, "queries": 4, "layers": 1, "heads": 2, "dropout": 0.0, "word_dropout": 0.0, "noise": 0.1}
    return FactorNetwork(EMBEDDER.size, (0, 0), **sizes, **reader)


def _known_again(network, data):
    """Share of held-out tasks whose third wording lies nearest, among all of theirs, to their first."""
    network.eval()
    with torch.no_grad():
        first, other = (network.read(*collate([data.embeddings[i][k] for i in data.validation])) for k in (0, 2))
    first, other = (torch.nn.functional.normalize(one - network.middle, dim=-1) for one in (first, other))
    return ((first @ other.T).argmax(1) == torch.arange(len(first))).float().mean().item()


@pytest.mark.slow
def test_unseen_tasks_are_known_again(data, network):
    """Better than by an untrained reader, and in most cases."""
    train_reader("toy", network, data, quiet_loop(), ContrastSettings(steps=0))
    before = _known_again(network, data)
    best = train_reader("toy", network, data, quiet_loop(), ContrastSettings(steps=200, learning_rate=3e-3))
    after = _known_again(network, data)
    assert math.isfinite(best) and after > before + 0.1 and after > 0.8


def test_features_are_white_over_typical_descriptions(data, network):
    """The map is set with and without steps: mean 0, and no direction far from variance 1 or below."""
    assert math.isnan(train_reader("toy", network, data, quiet_loop(), ContrastSettings(steps=0)))
    network.eval()
    with torch.no_grad():
        features = network.features(*collate([data.embeddings[i][0] for i in data.training]))
    values = torch.linalg.eigvalsh(torch.cov(features.T))
    assert features.mean(0).abs().max() < 1e-3 and 0.5 < values.max() * len(values) < 1.01


def test_nothing_but_the_reader_moves(data, network):
    """What writes factors is not asked, and stays as it was."""
    fixed = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith(("reading", "middle", "spread"))}
    train_reader("toy", network, data, quiet_loop(), ContrastSettings(steps=3))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in fixed.items())
    assert network.training  # augmentation and dropout work on, as before


def test_shares_of_the_loop_change_nothing(data, network):
    """They bound the memory of steps through a base model; one process learns from wordings in one share."""
    whole, cut = (quiet_loop() for _ in range(2))
    cut.shares = 2
    first = {name: value.clone() for name, value in network.state_dict().items()}
    train_reader("toy", network, data, whole, ContrastSettings(steps=2))
    once = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(first)
    train_reader("toy", network, data, cut, ContrastSettings(steps=2))
    assert all(torch.equal(once[name], value) for name, value in network.state_dict().items())
