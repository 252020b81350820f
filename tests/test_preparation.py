"""Preparation and attention over experts: groups and splits of tasks, and which experts are masked in training."""

import pytest
import torch
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, quiet_loop, save_base

from lorag.errors import ConfigError
from lorag.methods import method_type
from lorag.networks.experts import ExpertAttention
from lorag.tasks.derived import derive
from lorag.tasks.suite import Example, Task, TaskSuite, connected
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

SMALL = {"kernel_steps": 0, "ensemble": {"count": 0}}
SMALL |= {"functional": {"steps": 6, "tasks": 6, "examples": 2, "learning_rate": 0.02, "validate_every": 3}}


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_models, tokenizer):
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    return make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING[:8])


def _suite(sources=None, shared=()):
    """The bank's tasks; sources by number, and pairs of tasks of which the second also has the first's texts."""
    tasks = list(make_suite(TRAINING[:8]))
    if sources:
        tasks = [Task(t.name, t.suite, t.descriptions, None, t.license, s, t.examples) for t, s in zip(tasks, sources, strict=True)]
    for first, second in shared:
        seen = {example.input for example in tasks[second].examples}
        more = tuple(e for e in tasks[first].split("train")[:2] if e.input not in seen)
        t = tasks[second]
        tasks[second] = Task(t.name, t.suite, t.descriptions, None, t.license, t.source, t.examples + more)
    return TaskSuite(tasks)


def _prepare(bank, suite=None, without_expert=(), **rule):
    return prepare_toy(bank, RunTasks(suite, without_expert), SplitRule(**rule), k=20)


def _fit(prepared, name="house", **settings):
    method = method_type(name).with_settings({**(SMALL if name == "house" else {}), **settings})
    return fit_generator(prepared, method, quiet_loop(), rank=8, strength=1.0, origin={})


def test_connected_groups_share_marks_through_others():
    """a-b and b-c make one group of three; what shares nothing stays alone."""
    assert connected([{"a"}, {"x"}, {"a", "b"}, {"b"}, set()]) == [[0, 2, 3], [1], [4]]


@pytest.mark.slow
def test_groups_are_what_an_unseen_task_would_not_have_beside_it(bank):
    """By task only itself, by texts those that share some, by source all of it."""
    assert _prepare(bank, suite=_suite()).data.groups == list(range(8))
    assert _prepare(bank, suite=_suite(shared=[(0, 3)]), groups="texts").data.groups == [0, 1, 2, 0, 4, 5, 6, 7]
    data = _prepare(bank, suite=_suite(sources="aabbccdd"), groups="source").data
    assert data.groups == [0, 0, 2, 2, 4, 4, 6, 6]
    assert [row.nonzero().flatten().tolist() for row in data.masked([0, 5])] == [[0, 1], [4, 5]]


@pytest.mark.slow
def test_groups_are_held_out_together_within_the_share(bank):
    """Validation never splits a source, and never exceeds its share."""
    for seed in range(5):
        data = _prepare(bank, suite=_suite(sources="aaabbccd"), groups="source", validation=0.4, seed=seed).data
        assert 0 < len(data.validation) <= 3
        for index in data.validation:
            assert set(data.masked([index])[0].nonzero().flatten().tolist()) <= set(data.validation)
        assert set(data.training) | set(data.validation) == set(range(8)) and not set(data.training) & set(data.validation)


def test_groups_need_a_suite_and_a_known_rule(bank):
    """Texts and sources are in the suite; without one there is an error and no guess."""
    with pytest.raises(ConfigError, match="groups"):
        _prepare(bank, groups="texts")
    with pytest.raises(ConfigError, match="groups"):
        _prepare(bank, suite=_suite(), groups="family")


@pytest.mark.slow
def test_tasks_without_an_expert_teach_through_the_base_model_alone(bank, monkeypatch):
    """Functional steps draw them, reconstruction does not; what is held out stays out of both."""
    cells = [*TRAINING[:8], *TRAINING[8:11]]
    more = TaskSuite(list(make_suite(cells))[8:])
    prepared = _prepare(bank, suite=TaskSuite([*_suite(), *more]), without_expert=more)
    data = prepared.data
    assert data.training == list(range(11)) and data.training_experts == list(range(8))
    assert len(data.codes) == len(data.conditioner.names) == 8
    drawn = []
    whole = prepared.runner.losses

    def losses(adapters, tasks, count, seed):
        drawn.extend(data.tasks.index(task) for task in tasks)
        return whole(adapters, tasks, count, seed)

    monkeypatch.setattr(prepared.runner, "losses", losses)
    _fit(prepared, width=16, queries=2, layers=1, heads=2, hidden=16, steps=3)
    assert {8, 9, 10} <= set(drawn) <= set(range(11))
    for method, settings in (("ridge", {}), ("kernel", {"steps": 3}), ("icm_lora", {"steps": 3, "kernel": {"steps": 3}})):
        method_type(method).with_settings(settings).fit(data, quiet_loop())


@pytest.mark.slow
def test_a_task_without_an_expert_is_held_out_with_its_group(bank):
    """Its texts are those of a validation task: it validates too, and teaches nothing."""
    first = next(iter(_suite()))
    twin = Task("twin", first.suite, first.descriptions, None, first.license, first.source, first.examples)
    suite, more = TaskSuite([*_suite(), twin]), TaskSuite([twin])
    seen = set()
    for seed in range(12):
        data = _prepare(bank, suite=suite, without_expert=more, groups="texts", validation=0.2, seed=seed).data
        assert (8 in data.validation) == (0 in data.validation) != (8 in data.training)
        seen.add(0 in data.validation)
    assert seen == {True, False}


def test_attention_gives_hidden_experts_nothing_and_the_rest_all():
    """Weights sum to one over the experts that may be seen; a peaked temperature picks the described one."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(5, 16, generator=rng), dim=-1)
    codes = torch.randn(5, 6, generator=rng)
    torch.manual_seed(0)
    attention = ExpertAttention(keys, codes, torch.zeros(6), [2, 4], width=64, temperature=0.01, offset=False)
    with torch.no_grad():
        assert torch.allclose(attention(keys), codes, atol=1e-3)
        hidden = torch.eye(5, dtype=torch.bool)
        weights = attention.weights(keys, hidden)
        assert torch.equal(weights.diagonal(), torch.zeros(5)) and torch.allclose(weights.sum(1), torch.ones(5))
        attention.strength[1] = torch.tensor(2.0).log()
        assert torch.allclose(attention(keys)[:, 2:], 2 * codes[:, 2:], atol=1e-2)


def test_attention_starts_from_plain_similarity():
    """Before training the weights are a softmax of the descriptions' own cosines, in a view of no more dimensions than experts."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(5, 16, generator=rng), dim=-1)
    codes, zero = torch.randn(5, 6, generator=rng), torch.randn(6, generator=rng)
    torch.manual_seed(0)
    empty = (torch.empty(5, 16), torch.empty(5, 6), torch.empty(6))
    attention = ExpertAttention(*empty, [2, 4], width=5, temperature=0.1, offset=False)
    attention.hold(keys, codes, zero)
    with torch.no_grad():
        expected = (keys @ keys.T / 0.1).softmax(-1)
        assert torch.allclose(attention.weights(keys), expected, atol=1e-5)
        assert torch.allclose(attention(keys), zero + expected @ (codes - zero), atol=1e-4)


@pytest.mark.slow
def test_attention_is_trained_without_a_task_s_own_expert(bank, monkeypatch):
    """While it learns, no task sees an expert of its group or of the validation tasks; at use all are seen."""
    prepared = _prepare(bank, suite=_suite(shared=[(0, 3)]), groups="texts", validation=0.2)
    seen = []
    whole = ExpertAttention.weights

    def weights(self, pooled, masked=None):
        found = whole(self, pooled, masked)
        seen.append((found.detach(), masked))
        return found

    monkeypatch.setattr(ExpertAttention, "weights", weights)
    generator = _fit(prepared, "attention", functional=SMALL["functional"])
    held = list(prepared.data.validation)
    assert len(held) == 1 and len(seen) > 6
    for found, hidden in seen:
        assert hidden is not None and hidden[:, held].all() and not found[hidden].any()
        for row in hidden:
            assert any(torch.equal(row, mask) for mask in prepared.data.masked(range(8), validation=True))
    seen.clear()
    generator.generate("paint the red dog")
    assert [hidden for _, hidden in seen] == [None]
    seen.clear()
    data = prepared.data
    own = data.masked(held)[0]
    generator.method.generate(data.conditioner(data.embeddings[held[0]][0], masked=own), torch.Generator())
    assert len(seen) == 1 and torch.equal(seen[0][1][0], own)


@pytest.mark.slow
def test_attention_is_stored_whole(bank, tmp_path):
    """Opened again, it writes the same ΔW."""
    from lorag.generator.lora_generator import LoraGenerator

    generator = _fit(_prepare(bank, suite=_suite()), "attention", functional=SMALL["functional"])
    generator.save_pretrained(tmp_path / "g")
    opened = LoraGenerator.from_pretrained(tmp_path / "g", embedder=WordEmbedder())
    mine, other = (one.generate("red dog please") for one in (generator, opened))
    for name in mine.layout.names:
        assert torch.equal(mine.delta(name), other.delta(name))


@pytest.mark.slow
def test_derived_suites_keep_together_what_shares_texts_or_a_source(tmp_path):
    """Subsets are on their task's side; by source, all of a source is."""
    labels = [f"label {i}" for i in range(7)]
    tasks = []
    for number in range(8):
        rows = tuple(
            Example(f"text {number} {i}", labels[i % 7], split)
            for split in ("train", "test")
            for i in range(100 * (split == "test"), 200)
            if (i < 100) == (split == "train")
        )
        tasks.append(Task(f"task{number}", "s", (f"tell them apart {number}",), tuple(labels), "MIT", f"source {number % 4}", rows))
    TaskSuite(tasks).save(tmp_path / "in")
    for by in ("source", "texts"):
        derive(tmp_path / "in", tmp_path / by, by=by, subsets=2, held_out=0.4, seed=1)
        train, test = (TaskSuite.from_folder(tmp_path / by, split) for split in ("train", "test"))
        assert len(train) + len(test) == 24 and len(test) > 0
        texts = [{example.input for task in suite for example in task.examples} for suite in (train, test)]
        assert texts[0].isdisjoint(texts[1])
        sources = [{task.source for task in suite} for suite in (train, test)]
        assert sources[0].isdisjoint(sources[1]) == (by == "source")
        derive(tmp_path / "in", tmp_path / "more", by=by, subsets=2, without_expert=3, held_out=0.4, seed=1)
        assert TaskSuite.from_folder(tmp_path / "more", "test").names == test.names
        more = TaskSuite.from_folder(tmp_path / "more", "without_expert")
        assert len(more) > len(train) / 2 and set(more.names).isdisjoint([*train.names, *test.names])
        assert {example.input for task in more for example in task.examples} <= texts[0]
    with pytest.raises(ConfigError, match="by"):
        derive(tmp_path / "in", tmp_path / "out", by="luck")
