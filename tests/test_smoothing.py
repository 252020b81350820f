"""Features of a description are drawn towards those of tasks near it that give the same answers, where held-out tasks gain by it."""

from types import SimpleNamespace

import pytest
import torch
from toy_world import WordEmbedder, quiet_loop

from lorag.methods.method import collate
from lorag.methods.smoothing import SmoothingSettings, go_on_smoothing, smooth_features
from lorag.networks.factor_network import FactorNetwork
from lorag.networks.smoothing import FeatureSmoothing

EMBEDDER = WordEmbedder()
DETECTORS = [f"topic{number}" for number in range(40)]
COPIERS = [f"field{number}" for number in range(20)]


@pytest.fixture
def smoothing():
    """Two sets of answers, told apart by the first value, and texts of neither, by the second."""
    module = FeatureSmoothing(3, (3, 2))
    module.weights.copy_(torch.tensor([[50.0, 0, 0], [-50, 0, 0], [0, 100, 0]]))
    module.centres.copy_(torch.tensor([[1.0, 0, 0], [1, 0, 1], [1, 0, -1], [-1, 0, 5], [-1, 0, 7]]))
    module.width.fill_(1.0)
    return module


def test_features_move_to_the_mean_of_what_is_near_in_their_set(smoothing):
    near = smoothing(torch.tensor([[1.0, 0, 0.2], [-1, 0, 5.0], [0, 2, 3]]))
    weights = torch.exp(-torch.tensor([0.2, 0.8, 1.2]).square() / 2)
    assert torch.allclose(near[0], torch.tensor([1.0, 0, (weights[1] - weights[2]) / weights.sum()]), atol=1e-5)
    assert torch.allclose(near[1], torch.tensor([-1.0, 0, 5 + 2 / (1 + torch.tensor(2.0).exp())]), atol=1e-4)
    assert torch.allclose(near[2], torch.tensor([0.0, 2, 3]), atol=1e-5), "of no set: as it was"


def test_a_narrow_kernel_takes_the_nearest_task(smoothing):
    smoothing.width.fill_(1e-3)
    assert torch.allclose(smoothing(torch.tensor([[1.0, 0, 0.6]])), torch.tensor([[1.0, 0, 1.0]]))


def test_what_stands_beside_a_description_changes_nothing():
    torch.manual_seed(0)
    module = FeatureSmoothing(16, (40, 9))
    for buffer in (module.weights, module.bias, module.centres):
        buffer.copy_(torch.randn_like(buffer))
    features = torch.randn(64, 16)
    assert torch.allclose(module(features), torch.cat([module(one) for one in features.split(1)]), atol=1e-6)


def test_without_sets_nothing_changes():
    features = torch.randn(2, 16)
    assert FeatureSmoothing(16)(features) is features


@pytest.fixture
def network():
    """A network whose codes depend on its features."""
    torch.manual_seed(0)
    sizes = {"inputs": 9, "outputs": 4, "rank": 3, "probes": 1, "directions": 4, "features": 32}
    reader = {"width": 32, "queries": 4, "layers": 1, "heads": 2, "dropout": 0.0, "word_dropout": 0.0, "noise": 0.0}
    network = FactorNetwork(EMBEDDER.size, (0, 0), **sizes, **reader)
    torch.nn.init.normal_(network.column_weights)
    return network.eval()


@pytest.fixture
def data():
    """Thirty detectors that answer yes or no and sixteen tasks with answers of their own to learn from, and fourteen that are held out."""
    texts = [[f"say yes if {name}", f"{name} or not", f"detect {name}"] for name in DETECTORS]
    texts += [[f"copy the {name}", f"extract {name} please", f"give me {name}"] for name in COPIERS]
    answers = [["yes", "no"]] * len(DETECTORS) + [[f"{name} a", f"{name} b"] for name in COPIERS]
    tasks = [SimpleNamespace(split=lambda _, own=own: [SimpleNamespace(output=one) for one in own]) for own in answers]
    return SimpleNamespace(
        embeddings=[EMBEDDER.embed(some) for some in texts],
        training=[*range(30), *range(40, 56)],
        validation=[*range(30, 40), *range(56, 60)],
        tasks=tasks,
        space=SimpleNamespace(differentiable=lambda codes: codes),
    )


def _runner(targets, data):
    """A base model whose loss is the distance between a task's code and the code that it needs."""
    number = {id(task): i for i, task in enumerate(data.tasks)}

    def losses(codes, tasks, count, seed):
        return torch.stack([(code - targets[number[id(task)]]).square().mean() for code, task in zip(codes, tasks, strict=True)])

    return SimpleNamespace(losses=losses)


def _codes(network, data):
    with torch.no_grad():
        return [network(*collate(some)).mean(0) for some in data.embeddings]


SETTINGS = SmoothingSettings(least=16, widths=[0.1, 0.3])


@pytest.mark.slow
def test_detectors_that_need_one_code_are_smoothed_and_other_tasks_are_not(network, data):
    targets = _codes(network, data)
    shared = torch.stack(targets[:30]).mean(0)
    targets = [shared] * len(DETECTORS) + targets[len(DETECTORS) :]
    before = torch.stack(_codes(network, data))
    counts = smooth_features(network, data, _runner(targets, data), quiet_loop(), SETTINGS)
    after = torch.stack(_codes(network, data))
    assert counts == network.smoothing.counts == (30,)
    held, others = list(range(30, 40)), list(range(56, 60))
    assert (after - shared)[held].square().mean() < 0.5 * (before - shared)[held].square().mean()
    assert (after - before)[others].square().mean() < 0.3 * (after - before)[held].square().mean()


@pytest.mark.slow
def test_nothing_is_smoothed_where_held_out_tasks_lose_by_it(network, data):
    targets = _codes(network, data)
    before = torch.stack(targets)
    assert smooth_features(network, data, _runner(targets, data), quiet_loop(), SETTINGS) == ()
    assert torch.equal(torch.stack(_codes(network, data)), before)


@pytest.mark.parametrize("settings", [SmoothingSettings(least=31), SmoothingSettings(widths=[])])
def test_too_few_tasks_or_no_width_leave_it_out(network, data, settings):
    assert smooth_features(network, data, None, quiet_loop(), settings) == () and network.smoothing.counts == ()


def test_a_suite_of_detectors_alone_needs_no_classifier(network, data):
    """All descriptions are of the one set then."""
    targets = _codes(network, data)
    shared = torch.stack(targets[:30]).mean(0)
    alone = SimpleNamespace(**{**vars(data), "training": list(range(30)), "validation": list(range(30, 40))})
    assert smooth_features(network, alone, _runner([shared] * 60, data), quiet_loop(), SETTINGS) == (30,)
    assert torch.equal(network.smoothing.weights, torch.zeros(2, 32)) and network.smoothing.bias[0] == 0


def test_a_task_that_learns_is_smoothed_by_the_others(smoothing):
    """Without its own centre: as if there were no such task; −1 leaves all centres."""
    features = torch.tensor([[1.0, 0, 0.9], [1, 0, 0.9], [-1, 0, 5]])
    without = smoothing(features, torch.tensor([1, -1, 4]))
    weights = torch.exp(-torch.tensor([0.9, 1.9]).square() / 2)
    assert torch.allclose(without[0], torch.tensor([1.0, 0, -weights[1] / weights.sum()]), atol=1e-5)
    assert torch.equal(without[1], smoothing(features)[1])
    assert torch.allclose(without[2], torch.tensor([-1.0, 0, 5]), atol=1e-4)


def test_a_run_that_goes_on_smooths_among_its_own_tasks(network, data):
    """As wide as before; each detector's centre has its number, other tasks and held-out ones have none; too few leave it out."""
    network.smoothing = FeatureSmoothing(32, (2,))
    network.smoothing.width.fill_(0.25)
    numbers = go_on_smoothing(network, data, SETTINGS)
    assert network.smoothing.counts == (30,) and network.smoothing.width == 0.25
    assert numbers.tolist() == [*range(30), *[-1] * 30]
    centre = network.features(*collate(data.embeddings[7])).mean(0)
    assert torch.allclose(network.smoothing.centres[7], centre, atol=1e-6)
    single = go_on_smoothing(network, data, SmoothingSettings(least=1))
    assert len(network.smoothing.counts) == 17 and (single >= 0).sum() == 30, "sets of one task keep their centre"
    assert not (go_on_smoothing(network, data, SmoothingSettings(least=31)) >= 0).any() and network.smoothing.counts == ()
