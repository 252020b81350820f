"""The hypernetwork: one head writes many modules, each module gets its own part, and stored files build it again."""

import dataclasses

import pytest
import torch
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, quiet_loop, save_base

from lorag.errors import GeneratorError
from lorag.methods import method_type
from lorag.methods.functional import mean_loss
from lorag.networks.modules import ModuleNetwork
from lorag.training.preparation import SpaceChoice
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

PARTS = (4, 6, 4, 6, 6)
SMALL = {"width": 96, "depth": 2, "module_width": 16, "dropout": 0.0, "batch": 16, "learning_rate": 2e-3}
EMBEDDER = WordEmbedder()


def _network(parts=PARTS, seed=0):
    """A network whose heads are no longer zero."""
    torch.manual_seed(seed)
    network = ModuleNetwork(8, parts, width=16, depth=2, module_width=4, dropout=0.1).eval()
    for parameter in network.heads.parameters():
        torch.nn.init.normal_(parameter)
    return network.requires_grad_(False)


def _inputs(count):
    pooled = torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    return pooled, pooled[:, None], torch.ones(count, 1, dtype=torch.bool)


def _fit(prepared, **settings):
    method = method_type("hypernet").with_settings({**SMALL, **settings})
    return fit_generator(prepared, method, quiet_loop(), rank=8, strength=1.0, origin={}).method


def _distances(method, data):
    """Relative squared distance of each expert's code, from its first description."""
    codes = torch.cat([method.generate(data.conditioner(own[0]), torch.Generator()) for own in data.embeddings])
    return (codes - data.codes).square().sum(1) / data.codes.square().sum(1)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_models, tokenizer):
    """Six experts."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    return make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING[:6])


# --- the network ------------------------------------------------------------------------------------------------------


def test_training_starts_from_the_mean():
    """A fresh network writes zeros, the bank's mean in every weight space, whatever it is asked."""
    fresh = ModuleNetwork(8, PARTS, width=16, depth=2, module_width=4, dropout=0.0)
    assert torch.equal(fresh(*_inputs(3)), torch.zeros(3, sum(PARTS)))


def test_each_part_belongs_to_its_module():
    """Another embedding of one module changes that module's part of the code and no other value."""
    network, inputs = _network(), _inputs(3)
    before = network(*inputs)
    for module, length in enumerate(PARTS):
        start = sum(PARTS[:module])
        kept = network.module_embeddings[module].clone()
        network.module_embeddings[module] += 1
        changed = (network(*inputs) - before).abs() > 1e-6
        network.module_embeddings[module] = kept
        assert changed[:, start : start + length].all()
        assert changed.sum() == 3 * length


def test_parts_of_one_length_share_a_head():
    """Two heads for five modules; swapping two modules' embeddings swaps their parts, because nothing else is theirs."""
    network, inputs = _network(), _inputs(2)
    assert sorted(network.heads) == ["4", "6"]
    before = torch.split(network(*inputs), PARTS, -1)
    network.module_embeddings[[1, 4]] = network.module_embeddings[[4, 1]].clone()
    after = torch.split(network(*inputs), PARTS, -1)
    assert torch.allclose(after[1], before[4], atol=1e-5) and torch.allclose(after[4], before[1], atol=1e-5)
    assert torch.allclose(after[3], before[3], atol=1e-5) and not torch.allclose(after[1], before[1], atol=1e-2)


def test_more_modules_cost_only_their_embeddings():
    """The point of the design: weights do not grow with the number of modules."""

    def size(count):
        return sum(parameter.numel() for parameter in _network((6,) * count).parameters())

    assert size(40) - size(4) == 36 * 4  # module_width


def test_descriptions_beside_it_do_not_change_a_code():
    """Three descriptions together and each alone."""
    network, inputs = _network(), _inputs(3)
    together = network(*inputs)
    for index in range(3):
        alone = network(*(part[index : index + 1] for part in inputs))
        assert torch.allclose(alone[0], together[index], atol=1e-5)


# --- the generator ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("space", ["shared_subspace", "flat_factors"])
def test_experts_are_learned_by_heart_in_both_weight_spaces(bank, space):
    """Equal parts in a shared subspace, unequal ones in flat factors: either way six experts are told apart and met."""
    prepared = prepare_toy(bank, rule=SplitRule(validation=0.0), space=SpaceChoice(space, k=12))
    method = _fit(prepared, steps=250)
    assert method.shape["parts"] == prepared.space.parts
    assert len(method.network.heads) == len(set(prepared.space.parts)) == (1 if space == "shared_subspace" else 2)
    assert _distances(method, prepared.data).max() < 0.1


@pytest.mark.slow
def test_functional_steps_lower_the_loss_on_the_experts_tasks(bank):
    """With the same reconstruction, steps through the base model reach a lower loss; without examples they are refused."""
    prepared = prepare_toy(bank, RunTasks(make_suite(TRAINING[:6])), SplitRule(validation=0.0), k=12)
    data, losses = prepared.data, []
    for steps in (0, 15):
        functional = {"steps": steps, "tasks": 6, "examples": 2, "learning_rate": 3e-3}
        method = _fit(prepared, steps=10, functional=functional)
        codes = torch.cat([method.generate(data.conditioner(own[0]), torch.Generator()) for own in data.embeddings])
        losses.append(mean_loss(prepared.runner, data, codes, range(len(codes)), 4, "check"))
    assert losses[1] < losses[0] - 0.05
    bare = dataclasses.replace(prepared, data=dataclasses.replace(data, tasks=()), runner=None)
    with pytest.raises(GeneratorError, match="examples"):
        _fit(bare, functional={"steps": 1})


@pytest.mark.slow
@pytest.mark.parametrize("parts", [None, 432, [144, 144], [0] * 6, [-1, 1], [72.0] * 6, [True] * 6, "words", [10**9] * 6], ids=str)
def test_stored_lengths_that_do_not_fit_are_refused(bank, parts):
    """Missing, no list, another sum, empty or negative parts, no integers: GeneratorError, and never a strange network."""
    prepared = prepare_toy(bank, rule=SplitRule(validation=0.0), k=12)
    method = _fit(prepared, steps=1)
    tensors, shape = method.state()
    del shape["parts"]
    with pytest.raises(GeneratorError, match="hypernet"):
        method_type("hypernet").with_settings(SMALL).restore(tensors, shape if parts is None else {**shape, "parts": parts})
