"""A few examples: they improve an adapter, one of them does no harm, and examples that cannot be used are named."""

from dataclasses import replace

import pytest
import torch
from conftest import stack_adapters
from toy_world import describe, make_bank, make_suite, prepare_toy, quiet_loop, save_base

from lorag.adapters.factors import Factors
from lorag.bank.experts import ExpertConfig, train_group
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner
from lorag.errors import TaskError
from lorag.evaluation.reproduction import delta_error
from lorag.generator.refine import check_examples, refine, refine_tasks
from lorag.methods import method_type
from lorag.tasks.suite import Example, Task
from lorag.training.split import SplitRule
from lorag.training.train import fit_generator

pytestmark = pytest.mark.slow

CELLS = (("red", "cat"), ("blue", "fish"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_models, tokenizer):
    """Base, its runner, two tasks, and an adapter that solves each."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    runner = Runner(base.model.load("cpu"), base.layout, make_objective("causal_lm", tokenizer, base.settings))
    tasks = make_suite(CELLS, train=96).tasks
    config = ExpertConfig(steps=120, batch=16, learning_rate=1e-2, checkpoints=1)
    late = train_group(runner, tasks, 4, config)
    return base, runner, tasks, [one[-1] for one in late]


def _likelihood(runner, adapter, task):
    """Mean log-likelihood of an answer's token on the test texts."""
    return runner.scores(stack_adapters([adapter]), [task], limit=99)[0]["log_likelihood"]


def _pairs(task, count):
    return [(example.input, example.output) for example in task.split("train")[:count]]


def _sorted_pairs(runner, adapter, task):
    """Training examples that the adapter answers word for word, and those that it does not."""
    found = {True: [], False: []}
    for example in task.split("train"):
        alone = Task("one", "s", ("x",), None, "MIT", "here", (Example(example.input, example.output, "test"),))
        score = runner.scores(stack_adapters([adapter]), [alone], limit=1)[0]["exact_match"]
        found[score == 1].append((example.input, example.output))
    return found[True], found[False]


def test_examples_that_are_answered_already_change_nothing(world):
    """They teach nothing, and a few steps on them would forget the description: the very same adapter comes back."""
    _, runner, tasks, adapters = world
    right = _sorted_pairs(runner, adapters[0], tasks[0])[0][:4]
    assert refine(runner, adapters[0], right, 20) is adapters[0]
    wrong = [(right[0][0], f"not {right[0][1]}"), *right[1:]]
    assert delta_error(refine(runner, adapters[0], wrong, 20), adapters[0]) > 0.01


def test_one_example_does_not_destroy_a_good_adapter(world):
    """However many steps are taken on it, one example moves ΔW by less than half and leaves most of what was right."""
    _, runner, tasks, adapters = world
    bare, before = _likelihood(runner, adapters[0].scaled(0), tasks[0]), _likelihood(runner, adapters[0], tasks[0])
    assert before > bare + 2  # it was good
    missed = _sorted_pairs(runner, adapters[0], tasks[0])[1][:1] or [(_pairs(tasks[0], 1)[0][0], "something else")]
    for steps in (5, 60):
        refined = refine(runner, adapters[0], missed, steps)
        assert 0.01 < delta_error(refined, adapters[0]) < 0.5
        assert _likelihood(runner, refined, tasks[0]) > before - 0.2 * (before - bare)


def test_examples_improve_an_adapter_that_is_only_partly_right(world):
    """From a quarter of the right ΔW, sixteen examples raise the likelihood of answers to other texts, and more than one does."""
    _, runner, tasks, adapters = world
    start = adapters[0].scaled(0.25)
    missed = _sorted_pairs(runner, start, tasks[0])[1]
    assert len(missed) >= 16
    found = [_likelihood(runner, start, tasks[0])]
    found += [_likelihood(runner, refine(runner, start, missed[:count], 30), tasks[0]) for count in (1, 16)]
    assert found[0] < found[1] < found[2]
    assert found[2] > found[0] + 0.2


def test_the_rate_follows_the_size_of_the_factors(world):
    """The same ΔW as (10·B)(A/10), or in a base model of other units: a step is a share of the factors, not an absolute."""
    _, runner, tasks, adapters = world
    changes = []
    pairs = [(text, f"not {answer}") for text, answer in _pairs(tasks[0], 4)]  # that it does not answer already
    for scale in (1.0, 0.1):  # factors of a tenth: ΔW of a hundredth
        factors = {name: (a * scale, b * scale) for name, (a, b) in adapters[0].factors.items()}
        start = replace(adapters[0], factors=Factors(factors))
        changes.append(delta_error(refine(runner, start, pairs, 5), start))
    assert 0.3 < changes[1] / changes[0] < 3
    given = refine(runner, adapters[0], pairs, 5, learning_rate=1e-6)
    assert delta_error(given, adapters[0]) < changes[0] / 10


def test_the_same_seed_gives_the_same_bytes(world):
    """Sampling is all that is random; another seed draws other batches; an example given twice is one example."""
    _, runner, tasks, adapters = world
    pairs = _pairs(tasks[0], 12)

    def run(examples, seed):
        return list(refine(runner, adapters[0], examples, 3, seed).state_dict().values())

    first = run(pairs, 1)
    assert all(map(torch.equal, first, run(pairs, 1)))
    assert all(map(torch.equal, first, run([*pairs, *pairs[:5]], 1)))
    assert not all(map(torch.equal, first, run(pairs, 2)))


def test_adapters_refined_together_are_those_refined_alone(world):
    """At one rate, neighbours in the batch change an adapter by rounding only; each starts from its own."""
    _, runner, tasks, adapters = world
    together = refine_tasks(runner, adapters, tasks, 3, learning_rate=1e-3)
    for index in range(2):
        (alone,) = refine_tasks(runner, adapters[index : index + 1], tasks[index : index + 1], 3, learning_rate=1e-3)
        assert delta_error(together[index], alone) < 1e-3
        assert together[index].rank == adapters[index].rank and together[index].layout == adapters[index].layout
    assert delta_error(together[0], together[1]) > 0.1


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_models, tokenizer, random_adapter):
    """The tiny BERT and an adapter of it."""
    tiny = tiny_models["bert"]
    model, layout = tiny.build(), tiny.layout()
    return random_adapter(layout), lambda name: Runner(model, layout, make_objective(name, tokenizer))


LABELLED = [("red cat sat", "bird"), ("blue cat ran", "bird"), ("the log", "home"), ("a mat", "home"), ("good sky", "late")]


@pytest.mark.parametrize("name", ["label_matching", "prototypes"])
def test_encoders_learn_from_the_labels_among_the_examples(encoder, name):
    """The loss on the examples falls; labels are those that occur, and a class with one text does no harm."""
    adapter, make = encoder
    runner = make(name)
    labels = tuple(dict.fromkeys(label for _, label in LABELLED))
    task = Task("t", "s", ("d",), labels, "", "", tuple(Example(text, label, "train") for text, label in LABELLED))

    def loss(one):
        with torch.no_grad():
            return sum(runner.losses(stack_adapters([one]), [task], 2, str(seed)).item() for seed in range(5))

    assert loss(refine(runner, adapter, LABELLED, 15)) < loss(adapter)


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("label_matching", LABELLED[:2]),
        ("prototypes", LABELLED[:3]),
        ("prototypes", LABELLED[:2]),
        ("prototypes", [*LABELLED[:3], LABELLED[2]]),  # the same text twice is one text
    ],
)
def test_too_few_classes_are_named(encoder, name, examples):
    """Label matching needs two labels, prototypes two classes of two texts: TaskError that says so and what to do."""
    adapter, make = encoder
    with pytest.raises(TaskError, match=f"too few for {name}.*refine_steps=0"):
        refine(make(name), adapter, examples, 3)


# --- what users give --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "steps", "named"),
    [
        ([("a", "b")], -1, "negative"),
        ([], 3, "needs examples"),
        ("a text", 0, "list of"),
        ([("a", "b"), ("a",)], 0, r"examples\[1\]"),
        ([("a", "b", "c")], 0, r"examples\[0\]"),
        (["ab"], 0, r"examples\[0\]"),
        ([("a", 3)], 0, r"examples\[0\]"),
        ([("a", " ")], 0, r"examples\[0\]"),
        ([{"input": "a", "output": "b"}], 0, r"examples\[0\]"),
    ],
)
def test_examples_that_cannot_be_used_are_named(examples, steps, named):
    """TaskError with the example's number, before a model is loaded."""
    with pytest.raises(TaskError, match=named):
        check_examples(examples, steps)


def test_lists_from_json_are_pairs_too():
    """Examples often come from a file, where a pair is a list."""
    assert check_examples([["a", "b"], ("c", "d")], 2) == [("a", "b"), ("c", "d")]
    assert check_examples([], 0) == []


def test_a_generator_refines_what_it_generates(world, tmp_path):
    """generate(examples=..., refine_steps=K): the answer gets likelier, and the adapter says how it came about."""
    base, runner, tasks, _ = world
    bank = make_bank(tmp_path / "bank", base, CELLS)
    prepared = prepare_toy(bank, rule=SplitRule(validation=0.0), k=12)
    generator = fit_generator(prepared, method_type("mean")(), quiet_loop(), rank=6, strength=1.0, origin={})
    text, pairs = describe(*CELLS[0])[0], _pairs(tasks[0], 16)
    plain, given, refined = (
        generator.generate(text, **more) for more in ({}, {"examples": pairs}, {"examples": pairs, "refine_steps": 20})
    )
    assert all(torch.equal(plain.state_dict()[key], given.state_dict()[key]) for key in plain.state_dict())
    likelihoods = [_likelihood(runner, one, tasks[0]) for one in (plain, refined)]
    assert likelihoods[1] > likelihoods[0] + 0.2
    assert (refined.info["examples"], refined.info["refine_steps"]) == (16, 20)
    assert refined.info["norm"] == pytest.approx(sum(norm**2 for norm in refined.norms().values()) ** 0.5, abs=1e-4)
