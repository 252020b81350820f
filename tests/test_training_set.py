"""What methods learn from: splits over tasks with and without experts, masks, and a bank that has no expert at all."""

import dataclasses

import pytest
import torch
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, quiet_loop, save_base

from lorag.config import load_config
from lorag.errors import ConfigError, GeneratorError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import METHODS, method_type
from lorag.methods.functional import evenly, mean_loss
from lorag.tasks.suite import TaskSuite
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import TrainConfig, fit_generator

EMBEDDER = WordEmbedder()
HOUSE = {"kernel_steps": 0, "steps": 0, "width": 32, "queries": 2, "layers": 1, "hidden": 32, "ensemble": {"count": 1, "steps": 4}}
HOUSE |= {"functional": {"steps": 20, "tasks": 8, "examples": 2, "learning_rate": 3e-3, "validate_every": 10}}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, base):
    return make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING[:8])


@pytest.fixture(scope="module")
def whole(bank):
    """Eight experts and eight more tasks; a quarter of each is held out."""
    suite = make_suite(TRAINING[:16])
    more = TaskSuite(list(suite)[8:])
    return prepare_toy(bank, RunTasks(suite, without_expert=more), SplitRule(validation=0.25), k=12)


@pytest.fixture(scope="module")
def bare(tmp_path_factory, base, whole):
    """No expert at all: a bank that is empty, and a weight space that comes from elsewhere."""
    from lorag.bank.bank import AdapterBank

    suite = make_suite(TRAINING[:8])
    empty = AdapterBank.create(tmp_path_factory.mktemp("empty"), base)
    return prepare_toy(empty, RunTasks(suite, without_expert=suite), SplitRule(validation=0.25), whole.space)


def _fit(prepared, name, **settings):
    method = method_type(name).with_settings(settings)
    return fit_generator(prepared, method, quiet_loop(), rank=4, strength=None, origin={})


def test_tasks_without_an_expert_are_held_out_alike(whole):
    """The same share of both; experts' codes and held-out experts are what they are without further tasks."""
    data = whole.data
    assert sorted([*data.training, *data.validation]) == list(range(16)) and len(data.codes) == 8
    assert len(data.validation_experts) == 2 and len(data.validation) == 4
    assert data.training_experts == [i for i in range(8) if i not in data.validation]
    alone = SplitRule(validation=0.25).split(whole.bank.names, RunTasks())
    assert alone.validation == data.validation_experts


def test_early_stopping_looks_at_tasks_without_an_expert(whole, monkeypatch):
    """Validation draws from all held-out tasks, training from none of them."""
    seen = {"validation": set(), "training": set()}
    losses = whole.runner.losses

    def watched(adapters, tasks, count, seed):
        seen["validation" if seed == "validation" else "training"] |= {whole.data.tasks.index(task) for task in tasks}
        return losses(adapters, tasks, count, seed)

    monkeypatch.setattr(whole.runner, "losses", watched)
    method_type("multitask").with_settings({"steps": 4, "tasks": 16, "batch": 1}).fit(
        whole.data,
        quiet_loop(),
        whole.runner,
    )
    assert seen["validation"] == set(whole.data.validation) and seen["training"] <= set(whole.data.training)
    assert max(seen["training"]) >= 8


def test_masks_name_the_experts_of_a_task_s_group(whole):
    """Its own and those of its group; with `validation` those held out too; a task without an expert masks its group's."""
    data = dataclasses.replace(whole.data, groups=[0, 0, *range(2, 8), 0, *range(9, 16)])
    assert data.masked([0, 3, 8]).tolist() == [[True, True, *[False] * 6], [*[False] * 3, True, *[False] * 4], [True, True, *[False] * 6]]
    held = set(data.validation_experts)
    assert set(data.masked([12], validation=True)[0].nonzero().flatten().tolist()) == held


def test_many_held_out_tasks_are_looked_at_evenly():
    """All of a few, and of many the first and others at even distances."""
    assert evenly([3, 5, 8], 64) == [3, 5, 8] and evenly(range(100), 4) == [0, 25, 50, 75] and evenly([], 4) == []


@pytest.mark.slow
def test_house_learns_without_any_expert(bare, tmp_path):
    """Functional training lowers the loss of held-out tasks; what is stored makes the same adapter."""
    data = bare.data
    assert len(data.codes) == 0 and data.masked([0, 1]).shape == (2, 0)
    generator = _fit(bare, "house", **HOUSE)
    losses = {}
    for name, codes in (("none", data.space.zero.expand(8, -1)), ("house", None)):
        made = codes if codes is not None else torch.cat([generator.method.predict([own[0]]) for own in data.embeddings])
        losses[name] = mean_loss(bare.runner, data, made, range(8), 8, "check")
    assert losses["house"] < losses["none"] - 0.05
    generator.save_pretrained(tmp_path)
    opened = LoraGenerator.from_pretrained(tmp_path, embedder=EMBEDDER)
    mine, other = (one.generate("paint the red cat", on_unknown="ignore") for one in (generator, opened))
    assert all(torch.equal(mine.delta(name), other.delta(name)) for name in mine.layout.names)
    assert mine.info["neighbours"][0][0] in generator.conditioner.names  # training tasks, where there is no expert


@pytest.mark.slow
def test_multitask_and_hypernet_learn_without_any_expert(bare):
    """Whatever learns from examples."""
    _fit(bare, "multitask", steps=2, tasks=4, batch=1)
    few = {"steps": 2, "tasks": 4, "examples": 1}
    assert _fit(bare, "hypernet", width=16, depth=1, module_width=8, functional=few).method.network is not None


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"aligned", "multitask", "house"}))
def test_methods_of_experts_say_that_there_is_none(bare, name):
    """One line with what to do, before any training."""
    with pytest.raises(GeneratorError, match="there is none to learn from"):
        _fit(bare, name)


def test_a_renamed_key_names_the_new_one():
    """`kin` is `groups` now."""
    with pytest.raises(ConfigError, match="groups"):
        load_config(TrainConfig, None, ["kin=texts"])
    assert load_config(TrainConfig, None, ["groups=texts"]).groups == "texts"
