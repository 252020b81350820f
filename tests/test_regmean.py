"""RegMean: which positions count, the regression against its own optimality, that one adapter then serves several tasks; and controls."""

import dataclasses
import logging

import pytest
import torch
from conftest import WORDS, stack_adapters
from toy_world import make_bank, make_suite, name_of, save_base

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.merging import merge
from lorag.base.activations import input_moments
from lorag.base.runner import Runner
from lorag.errors import AdapterError, ConfigError
from lorag.methods.support_examples import few_examples
from lorag.tasks.suite import Example, TaskSuite
from lorag.training import fuse as fusion
from lorag.training.controls import compare_with_fresh
from lorag.training.regmean import regmean

CELLS = (("blue", "cat"), ("green", "horse"), ("red", "bird"))
NAMES = [name_of(*cell) for cell in CELLS]


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_models, tokenizer):
    return make_bank(tmp_path_factory.mktemp("bank"), save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer), CELLS)


@pytest.fixture(scope="module")
def runner(bank):
    return Runner.open(bank.base, "cpu")


@pytest.fixture(scope="module")
def tasks():
    """Texts of each task are of words of its own, and of several lengths."""
    found = []
    for number, task in enumerate(make_suite(CELLS)):
        words, rng = WORDS[12 + 4 * number : 16 + 4 * number], torch.Generator().manual_seed(number)
        texts = [" ".join(words[i] for i in torch.randint(4, (1 + n % 6,), generator=rng).tolist()) for n in range(len(task.examples))]
        rows = tuple(Example(text, e.output, e.split) for text, e in zip(texts, task.examples, strict=True))
        found.append(dataclasses.replace(task, examples=rows))
    return found


@pytest.fixture
def experts(bank):
    return list(bank.adapters(NAMES))


def test_only_what_the_loss_depends_on_counts(runner, tasks):
    """Of the first layer by hand: neither padding nor the token that ends an answer, for nothing follows from it."""
    name = next(name for name in runner.layout.names if ".0." in name and name.endswith("v_proj"))
    found = input_moments(runner, None, tasks[0], 6, "draw", [name])
    assert list(found) == [name]
    (_, batch), *others = runner.objective.sample_parts(tasks[:1], 6, "draw")
    assert not others and (batch.arguments["attention_mask"] == 0).any()
    layer = runner.model.model.layers[0]
    states = layer.input_layernorm(runner.model.model.embed_tokens(batch.arguments["input_ids"]))
    answers = batch.targets.shape[1]
    last = batch.arguments["input_ids"].shape[1] - answers + (batch.targets != -100).sum(1) - 1
    counts = batch.arguments["attention_mask"].bool() & (torch.arange(states.shape[1])[None] < last[:, None])
    x = states[counts].detach()
    assert torch.allclose(found[name], x.T @ x / len(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_the_regression_is_solved(runner, tasks, experts, weights):
    """Σ w (ΔW − ΔW_t) G_t + ρ ΔW = 0 at each module, also where moments are gathered one module at a time; the rank is the sum."""
    merged = regmean(runner, experts, tasks, examples=5, rounds=1, ridge=0.01, weights=weights, at_once=1)
    shares = torch.tensor(weights or [1.0, 1.0, 1.0])
    found = [input_moments(runner, None, few_examples(task, 5, 0), 10, "regmean/0/0") for task in tasks]
    for name in merged.layout.names:
        moments = [w * g[name] for w, g in zip(shares / shares.sum(), found, strict=True)]
        delta, ridge = merged.delta(name), 0.01 * sum(moments).diagonal().mean()
        rest = sum((delta - e.delta(name)) @ g for e, g in zip(experts, moments, strict=True)) + ridge * delta
        whole = sum((e.delta(name) @ g).norm() for e, g in zip(experts, moments, strict=True))
        assert rest.norm() < 1e-3 * whole
    assert merged.rank == sum(e.rank for e in experts) and merged.info["energy"] == 1.0
    assert merged.info["experts"] == NAMES and sorted(p["name"] for p in merged.info["parents"]) == NAMES


def _apart(runner, adapter, experts, tasks):
    """Distance of an adapter's last states from each expert's own on its task's test inputs, as a share of what the expert changes."""
    found = []
    for expert, task in zip(experts, tasks, strict=True):
        inputs = [example.input for example in task.split("test")]
        states = []
        for one in (None, expert, adapter):
            with torch.inference_mode(), runner.use(None if one is None else stack_adapters([one])) as model:
                states.append(runner.objective.hidden(model, inputs))
        found.append(((states[2] - states[1]).norm() / (states[1] - states[0]).norm()).item())
    return sum(found) / len(found)


@pytest.mark.slow
def test_one_adapter_does_what_each_expert_does_on_its_own_inputs(runner, tasks, experts):
    """Nearer to the experts than their sum or mean; moments that are gathered with the merged adapter at work help."""
    rounds = {n: _apart(runner, regmean(runner, experts, tasks, examples=24, rounds=n), experts, tasks) for n in (1, 3)}
    others = [_apart(runner, merge(experts, method), experts, tasks) for method in ("mean", "task_arithmetic", "cat", "ties")]
    assert rounds[1] < 0.9 * min(others) and rounds[3] < rounds[1]


def test_one_expert_alone_keeps_what_it_does(runner, tasks, experts):
    """Where its own inputs are, nothing of it is lost."""
    alone = regmean(runner, experts[:1], tasks[:1], examples=24, rounds=1, ridge=1e-6)
    assert _apart(runner, alone, experts[:1], tasks[:1]) < 0.05 and alone.rank == experts[0].rank


@pytest.mark.slow
def test_by_name_it_needs_the_tasks(bank, tasks, tmp_path, monkeypatch):
    """`fuse` says how to give them; what it returns is saved and read like any adapter, and the same each time."""
    with pytest.raises(ConfigError, match="--tasks"):
        fusion.fuse(NAMES, bank=str(bank.folder), method="regmean")
    monkeypatch.setattr(fusion, "find_tasks", lambda name: TaskSuite(tasks))
    one, other = (fusion.fuse(NAMES, bank=str(bank.folder), method="regmean", tasks="toy", rank=5, device="cpu") for _ in range(2))
    assert one.rank == 5 and 0 < one.info["energy"] < 1
    read = LoraAdapter.from_pretrained(one.save_pretrained(tmp_path / "fused"), one.layout)
    assert all(torch.equal(read.delta(name), other.delta(name)) for name in one.layout.names)


def test_what_cannot_be_merged_so_is_refused(runner, tasks, experts):
    """A task too few, weights of 0, settings out of range."""
    with pytest.raises(AdapterError, match="a task and a positive weight"):
        regmean(runner, experts, tasks[:2])
    with pytest.raises(AdapterError, match="positive weight"):
        regmean(runner, experts, tasks, weights=[1.0, 0.0, 1.0])
    with pytest.raises(AdapterError, match="rank"):
        regmean(runner, experts, tasks, rank=0)
    for wrong in ({"rounds": 0}, {"examples": 0}, {"ridge": 0.0}):
        with pytest.raises(ConfigError, match="regmean"):
            regmean(runner, experts, tasks, **wrong)


# --- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_adapter_that_does_better_is_told_of(bank, runner, tasks, monkeypatch, caplog):
    """Experts that were never trained for these answers are merged in vain: `cat` says so, with both losses on other examples."""
    monkeypatch.setattr(fusion, "find_tasks", lambda name: TaskSuite(tasks))
    with caplog.at_level(logging.WARNING):
        merged = fusion.fuse(NAMES, bank=str(bank.folder), method="cat", tasks="toy", device="cpu")
    losses = merged.info["controls"]
    assert losses["fresh"] < losses["merged"] and "does better than the merge" in caplog.text
    support = [few_examples(task, 8, 0) for task in tasks]
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # one step is not enough to do better
        again = compare_with_fresh(runner, merged, tasks, support, rank=2, steps=1)
    assert again["merged"] == losses["merged"] < again["fresh"] and not caplog.records
    assert compare_with_fresh(runner, merged, tasks, tasks, rank=2, steps=1) is None  # nothing is left to score on
