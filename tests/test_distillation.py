"""A trained reader learns odd wordings of its tasks from what it says of them on average, and of new ones as well."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy_world import WordEmbedder, quiet_loop

from lorag.methods.contrast import ContrastSettings, DistillationSettings, distil_reader, train_reader
from lorag.methods.method import collate
from lorag.networks.factor_network import FactorNetwork

EMBEDDER = WordEmbedder()
COLOURS, ANIMALS = (tuple(f"{kind}{number}" for number in range(8)) for kind in ("colour", "animal"))
PLAIN = ("paint the {}", "{} please", "show me some {}", "i need {} now", "{} it is")
ODD = (
    "whatever hues a {} might have had once upon a time",
    "were there a zoo with such {} i would go",
    "think of {} and nothing else at all",
)
UNSEEN = "were i asked for {} at all i would think of a zoo"


@pytest.fixture(scope="module")
def trained():
    """A reader of 64 combinations of two words in plain wordings, and the tasks with odd ones as well."""
    torch.manual_seed(0)
    sizes = {"inputs": 9, "outputs": 4, "rank": 3, "probes": 1, "directions": 4, "features": 32}
    reader = {"width": 32, "queries": 4, "layers": 1, "heads": 2, "dropout": 0.0, "word_dropout": 0.0, "noise": 0.1}
    network = FactorNetwork(EMBEDDER.size, (0, 0), **sizes, **reader)
    pairs = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    plain, every = ([EMBEDDER.embed([text.format(pair) for text in texts]) for pair in pairs] for texts in (PLAIN, PLAIN + ODD))
    data = SimpleNamespace(embeddings=plain, training=list(range(len(pairs))), validation=[])
    train_reader("toy", network, data, quiet_loop(), ContrastSettings(steps=150, learning_rate=3e-3))
    return network.eval(), SimpleNamespace(embeddings=every, training=data.training, validation=[]), pairs


@pytest.fixture
def network(trained):
    """The reader as it was trained, whatever another test did to it."""
    network = trained[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    yield network
    network.load_state_dict(before)


def _read(network, texts):
    network.eval()
    with torch.no_grad():
        return network.features(*collate(EMBEDDER.embed(texts)))


@pytest.mark.slow
def test_wordings_that_nobody_taught_are_read_better(trained, network):
    """They lie nearer to what the reader said of the task in plain words; what it says of those hardly moves."""
    _, data, pairs = trained
    centres = torch.stack([_read(network, [text.format(pair) for text in PLAIN]).mean(0) for pair in pairs])

    def distance(texts):
        return (_read(network, texts) - centres).square().sum(-1).mean().item()

    odd, plain = ([text.format(pair) for pair in pairs] for text in (UNSEEN, PLAIN[0]))
    before = distance(odd), distance(plain)
    best = distil_reader("toy", network, data, quiet_loop(), DistillationSettings(steps=200, learning_rate=2e-3))
    assert math.isfinite(best) and distance(odd) < 0.7 * before[0] and distance(plain) < before[1] + 0.1 * before[0]


@pytest.mark.slow
def test_tasks_with_common_answers_stay_spread(trained, network):
    """Each of their wordings keeps what was said of it, and the others still go to their means."""
    data, pairs, half = trained[1], trained[2], 32
    texts = [PLAIN[0].format(pair) for pair in pairs]
    centres = torch.stack([_read(network, [text.format(pair) for text in PLAIN + ODD]).mean(0) for pair in pairs])
    before = _read(network, texts)

    def moved():
        after = _read(network, texts)
        own, mean = ((after - target).square().sum(-1) for target in (before, centres))
        return [(own[part].mean().item(), mean[part].mean().item()) for part in (slice(half), slice(half, None))]

    settings = DistillationSettings(steps=200, learning_rate=2e-3)
    distil_reader("toy", network, data, quiet_loop(), settings, frozenset(range(half)))
    (stayed, _), (left, reached) = moved()
    assert stayed < 0.5 * left and reached < left


def test_nothing_but_the_reader_moves(trained, network):
    """Neither what writes factors nor the whitening, which what writes them has learned with; in however many shares steps are cut."""
    fixed = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("reading")}
    loop = quiet_loop()
    loop.shares = 2
    distil_reader("toy", network, trained[1], loop, DistillationSettings(steps=2))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in fixed.items())


def test_without_steps_nothing_happens(trained, network):
    """That is the default: a run that goes on keeps its reader."""
    values = [value.clone() for value in network.reading.parameters()]
    assert DistillationSettings().steps == 0 and math.isnan(distil_reader("toy", network, trained[1], quiet_loop(), DistillationSettings()))
    assert all(torch.equal(one, two) for one, two in zip(values, network.reading.parameters(), strict=True))
