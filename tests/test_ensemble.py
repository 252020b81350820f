"""Readers beside the first one: what they learn from, what they leave alone, and how they are stored."""

import pytest
import torch
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, quiet_loop, save_base

from lorag.errors import ConfigError, GeneratorError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type, students
from lorag.methods.method import collate
from lorag.networks.experts import KernelHead
from lorag.networks.readers import Augmentation
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

SMALL = {"functional": {"steps": 0}, "kernel_steps": 0, "steps": 60, "width": 32, "queries": 2, "hidden": 32, "learning_rate": 3e-3}
TAUGHT = {"count": 2, "steps": 60, "learning_rate": 3e-3, "batch": 32}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_models, tokenizer):
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)
    return prepare_toy(bank, RunTasks(make_suite(TRAINING)), SplitRule(validation=0.15))


def _fit(prepared, count, **settings):
    method = method_type("house").with_settings({**SMALL, "ensemble": {**TAUGHT, "count": count}, **settings})
    return fit_generator(prepared, method, quiet_loop(), rank=4, strength=1.0, origin={})


@pytest.fixture(scope="module")
def alone(prepared):
    return _fit(prepared, 0)


@pytest.fixture(scope="module")
def three(prepared):
    return _fit(prepared, 2)


def _inputs(prepared, rows):
    return collate([prepared.data.embeddings[i][0] for i in rows])


@pytest.mark.slow
def test_the_first_reader_and_the_head_stay_as_they_are(alone, three):
    """Teaching more readers changes no value that was learned before it."""
    before, after = alone.method.state().tensors, three.method.state().tensors
    assert len(after) > len(before) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_students_read_as_their_teacher_does_on_tasks_that_no_one_learned_from(prepared, three):
    """On held-out tasks each student's codes lie nearer to the teacher's than the codes of other tasks do."""
    network = three.method.network.eval()
    inputs = _inputs(prepared, prepared.data.validation)
    with torch.no_grad():
        first = network.head(network.readers[0](*inputs))
        far = torch.cdist(first, first).sum() / (len(first) * (len(first) - 1))
        for student in network.readers[1:]:
            made = network.head(student(*inputs))
            assert (made - first).norm(dim=1).mean() < 0.6 * far


@pytest.mark.slow
def test_readers_start_apart_and_their_mean_makes_the_code(prepared, three):
    """No two readers are the same, and the code is the head's of the mean of what all read."""
    network = three.method.network
    inputs = _inputs(prepared, range(4))
    with torch.no_grad():
        each = [reader(*inputs) for reader in network.readers]
        assert len(each) == 3 and all((a - b).norm() > 1e-3 for a, b in zip(each, each[1:], strict=False))
        assert torch.allclose(network(*inputs), network.head(torch.stack(each).mean(0)), atol=1e-6)


def _kernel_head():
    head = KernelHead(7, 6, 2, 40)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize(
    "head", [torch.nn.Linear(6, 40), _kernel_head(), torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 40))]
)
def test_what_is_compared_are_codes(head):
    """The distance of features is that of the codes which the head makes of them, whether or not it has to make them."""
    one, other = torch.randn(2, 5, 6).unbind()
    expected = (head(one) - head(other)).square().mean()
    assert torch.allclose(students.distance_of_codes(head)(one, other), expected, rtol=1e-4)


@pytest.mark.slow
def test_no_ensemble_costs_nothing(prepared, monkeypatch):
    """With none asked for, no description is read for them."""
    monkeypatch.setattr(students, "mean_features", lambda *_: pytest.fail("read"))
    _fit(prepared, 0)


@pytest.mark.slow
def test_students_learn_from_no_held_out_task(prepared, monkeypatch):
    """Descriptions of validation tasks are read for early stopping alone."""
    seen = set()
    draw = students.draw

    def watched(data, rows, loop):
        seen.update(rows)
        return draw(data, rows, loop)

    monkeypatch.setattr(students, "draw", watched)
    _fit(prepared, 1, steps=2, ensemble={"count": 1, "steps": 10})
    assert seen and not seen & set(prepared.data.validation)


@pytest.mark.slow
def test_all_readers_are_stored_and_what_is_stored_decides(prepared, three, alone, tmp_path):
    """Opened again the codes are the same, and a file with another number of readers than its settings say keeps its own."""
    three.save_pretrained(tmp_path)
    opened = LoraGenerator.from_pretrained(tmp_path, embedder=WordEmbedder())
    embeddings = [prepared.data.embeddings[0][0]]
    with torch.no_grad():
        assert torch.equal(opened.method.predict(embeddings), three.method.predict(embeddings))
    other = method_type("house").with_settings(three.method.values())
    other.restore(*alone.method.state())
    assert len(other.network.readers) == 1
    tensors, shape = three.method.state()
    for members in (2, 4, 10**9, -1, 3.0, None):
        with pytest.raises(GeneratorError, match="house"):
            method_type("house").with_settings(three.method.values()).restore(tensors, {**shape, "members": members})


def test_numbers_of_readers_that_cannot_be_used():
    """A negative or very large number is refused before anything is trained."""
    for count in (-1, 1000):
        with pytest.raises(ConfigError, match="ensemble"):
            method_type("house").with_settings({"ensemble": {"count": count}})


def test_augmentation_is_for_training_alone():
    """In training tokens are masked and vectors moved by about the given share of their size; at use nothing changes."""
    augmentation = Augmentation(0.25, 0.2)
    pooled, tokens, mask = torch.randn(64, 8), torch.randn(64, 16, 8), torch.ones(64, 16, dtype=torch.bool)
    torch.manual_seed(0)
    _, moved, kept = augmentation.train()(pooled, tokens, mask)
    assert 0.7 < kept.float().mean() < 0.8
    assert 0.18 < ((moved - tokens).norm() / tokens.norm()).item() < 0.22
    assert all(torch.equal(a, b) for a, b in zip(augmentation.eval()(pooled, tokens, mask), (pooled, tokens, mask), strict=True))


def test_the_old_name_of_the_setting_names_the_new_one():
    """`colleagues` is `ensemble` now, and `source=experts` a method of its own."""
    with pytest.raises(ConfigError, match=r"settings\.ensemble"):
        method_type("house").with_settings({"colleagues": {"count": 1}})
    with pytest.raises(ConfigError, match="method=attention"):
        method_type("house").with_settings({"source": "experts"})
    with pytest.raises(ConfigError, match="method=attention"):
        method_type("house").with_settings({"view": 32})
