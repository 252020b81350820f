"""A run that goes on learns new tasks through the base model and says of kept ones what was said before."""

import copy
from types import SimpleNamespace

import pytest
import torch
from toy_world import quiet_loop

from lorag.methods.functional import FunctionalSettings, train_functionally
from lorag.methods.keeping import KeptTasks

TASKS, KEPT = 12, range(4)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5)


@pytest.fixture
def data():
    """Tasks with two descriptions each, vectors here; a code is what it is in training."""
    rng = torch.Generator().manual_seed(1)
    tasks = [SimpleNamespace(source="all", number=i) for i in range(TASKS)]
    embeddings = [list(torch.randn(2, 6, generator=rng)) for _ in tasks]
    space = SimpleNamespace(differentiable=lambda codes: codes)
    return SimpleNamespace(tasks=tasks, embeddings=embeddings, training=range(TASKS), validation=(), space=space)


class Pulling:
    """A base model that wants ones everywhere, and notes the tasks that it sees."""

    def __init__(self):
        self.seen = set()

    def losses(self, codes, tasks, count, seed):
        self.seen |= {task.number for task in tasks}
        return (codes - 1).square().mean(1)


def _predict(network):
    return lambda rows, embeddings: network(torch.stack(list(embeddings)))


def _trained(network, data, weight):
    """How far kept tasks and the others moved, and which the base model saw."""
    before, runner = copy.deepcopy(network), Pulling()
    kept = KeptTasks.of(data, KEPT, _predict(before), weight) if weight else None
    settings = FunctionalSettings(steps=150, learning_rate=2e-2, tasks=4, focus=0.0)
    loop = quiet_loop()
    loop.shares = 2
    train_functionally("toy", network, _predict(network), data, loop, settings, runner, kept)
    texts = torch.stack([one for some in data.embeddings for one in some])
    with torch.no_grad():
        moved = (network(texts) - before(texts)).square().sum(1)
    return moved[: 2 * len(KEPT)].mean().item(), moved[2 * len(KEPT) :].mean().item(), runner.seen


def test_kept_tasks_stay_while_others_learn(network, data):
    """No pass of the base model goes to them; without a weight they learn like all others."""
    free = copy.deepcopy(network)
    stayed, learned, seen = _trained(network, data, 8.0)
    moved, _, every = _trained(free, data, 0.0)
    assert seen == set(range(TASKS)) - set(KEPT) and every == set(range(TASKS))
    assert stayed < 0.25 * learned and stayed < 0.25 * moved


def test_the_loss_is_in_units_of_their_spread(network, data):
    """Zero for what was said before, and the weight for codes that lie as far away as those of kept tasks lie from their mean."""
    kept = KeptTasks.of(data, KEPT, _predict(network), 3.0)
    drawn = kept.draw(5, quiet_loop())
    assert len(drawn) == 5 and {i for some in drawn for i, _ in some} <= set(KEPT)
    assert kept.losses(_predict(network), drawn).abs().max() == 0
    far = torch.zeros(5)
    far[0] = kept.spread**0.5
    with torch.no_grad():
        first = torch.stack([data.embeddings[i][0] for i in KEPT])
        codes = network(first)
        assert kept.spread == pytest.approx((codes - codes.mean(0)).square().sum(1).mean().item())
    losses = kept.losses(lambda rows, embeddings: _predict(network)(rows, embeddings) + far, drawn)
    assert torch.allclose(losses, torch.full((5,), 3.0), rtol=1e-4)


def test_more_tasks_than_are_left_are_not_drawn(network, data):
    """A step takes all that are left."""
    kept, runner = KeptTasks.of(data, range(10), _predict(copy.deepcopy(network)), 1.0), Pulling()
    settings = FunctionalSettings(steps=3, learning_rate=1e-3, tasks=8)
    train_functionally("toy", network, _predict(network), data, quiet_loop(), settings, runner, kept)
    assert runner.seen == {10, 11}
