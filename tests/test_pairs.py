"""Adapters from examples: a reader of (input, output) pairs, alone or beside a description."""

from dataclasses import replace

import pytest
import torch
from conftest import WORDS
from toy_world import HELD_OUT, TRAINING, WordEmbedder, describe, make_bank, make_suite, prepare_toy, quiet_loop, save_base, use_words
from typer.testing import CliRunner

from lorag.cli.main import app
from lorag.errors import ConfigError, DescriptionError, GeneratorError, TaskError
from lorag.files.artifacts import embedded
from lorag.generator.generate import generate_lora
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.training.additions import add_pairs
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

pytestmark = pytest.mark.slow

SMALL = {"kernel_steps": 0, "steps": 120, "width": 32, "queries": 4, "hidden": 32, "learning_rate": 3e-3}
LENGTHS = {"functional": {"steps": 0}, "ensemble": {"count": 0}}
PAIRS = {"steps": 300, "learning_rate": 3e-3, "batch": 32, "examples": 12}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_models, tokenizer):
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)
    return prepare_toy(bank, RunTasks(make_suite(TRAINING)), SplitRule(validation=0.1))


def _fit(prepared, pairs, **origin):
    method = method_type("house").with_settings({**SMALL, **LENGTHS, "pairs": pairs})
    return fit_generator(prepared, method, quiet_loop(), rank=4, strength=1.0, origin=origin)


@pytest.fixture(scope="module")
def generator(prepared):
    return _fit(prepared, PAIRS)


@pytest.fixture(scope="module")
def without(prepared, tmp_path_factory):
    suite = make_suite(TRAINING).save(tmp_path_factory.mktemp("suite") / "suite")
    return _fit(prepared, {}, config={"bank": str(prepared.bank.folder), "tasks": str(suite), "validation": 0.1})


def _examples(cell, count):
    """Examples of one of the toy world's tasks."""
    task = make_suite([cell])["-".join(cell)]
    return [(example.input, example.output) for example in task.split("train")[:count]]


def _code(generator, examples):
    return generator.read_examples(examples).code


def test_examples_alone_say_which_task_is_meant(generator):
    """What examples give is nearer to the code of the own description than of others, also for tasks that no one learned from."""
    described = torch.cat([generator.gather(describe(*cell)[0]).code for cell in TRAINING])
    fresh = torch.cat([_code(generator, _examples(cell, 16)[12:]) for cell in TRAINING])  # it learned from the first twelve
    nearest = torch.cdist(fresh, described).argmin(1)
    assert (nearest == torch.arange(len(TRAINING))).float().mean() > 0.8
    described = torch.cat([generator.gather(describe(*cell)[0]).code for cell in HELD_OUT])
    apart = torch.cdist(torch.cat([_code(generator, _examples(cell, 4)) for cell in HELD_OUT]), described)
    others = (apart.sum(1) - apart.diagonal()) / (len(HELD_OUT) - 1)
    assert (apart.diagonal() < others).all()


def test_the_likelier_adapter_is_taken(generator):
    """Of the description's and the examples' own, the one under which the examples are likelier, for right and wrong descriptions."""
    taken = set()
    for cell in HELD_OUT:
        examples = _examples(cell, 4)
        for other in HELD_OUT:
            alone, both = generator.gather(describe(*other)[0]), generator.gather(describe(*other)[0], examples=examples)
            codes = torch.cat([alone.code, _code(generator, examples)])
            best = int(generator.runner().likelihoods(generator.space.differentiable(codes), 2, examples).argmax())
            assert torch.equal(both.code[0], codes[best]) and both.made_from == ("description", "examples")[best]
            assert both.condition.pairs is None and not alone.made_from
            taken.add(both.made_from)
    assert taken == {"description", "examples"}


def test_without_examples_a_description_is_read_as_before(generator):
    """Without examples the code is the one of the description's own readers, byte for byte."""
    text = describe(*HELD_OUT[0])[0]
    with torch.inference_mode():
        assert torch.equal(generator.gather(text).code, generator.method.predict(generator.embedder.embed([text])))


def test_a_reader_of_pairs_changes_nothing_else(generator, without):
    """All that was learned before it stays as it was, and without steps there is none."""
    before, after = without.method.state().tensors, generator.method.state().tensors
    assert set(after) > set(before) and all(torch.equal(before[name], after[name]) for name in before)
    assert not without.method.reads_pairs and generator.method.reads_pairs
    with pytest.raises(GeneratorError, match="examples alone"):
        without.read_examples(_examples(HELD_OUT[0], 1))


def test_a_method_that_does_not_learn_it_is_refused_at_once():
    """Before anything of its suite is embedded, which for SmolLM2's takes minutes."""
    with pytest.raises(GeneratorError, match="aligned does not learn to read examples"):
        add_pairs(embedded("checkpoints/smollm2"), device="cpu")


def test_a_trained_generator_learns_it_later(without, tmp_path, monkeypatch):
    """`lorag pairs`: what it makes of descriptions keeps its bytes; no other method learns it, and it takes examples."""
    use_words(monkeypatch)
    without.save_pretrained(tmp_path)
    before = LoraGenerator.from_pretrained(tmp_path).gather(describe(*HELD_OUT[0])[0]).code
    result = CliRunner().invoke(app, ["pairs", str(tmp_path), "--steps", "2", "--device", "cpu", "--quiet"])
    assert result.exit_code == 0, result.output
    opened = LoraGenerator.from_pretrained(tmp_path)
    assert opened.method.reads_pairs and _code(opened, _examples(HELD_OUT[0], 2)).isfinite().all()
    assert torch.equal(opened.gather(describe(*HELD_OUT[0])[0]).code, before)
    with pytest.raises(GeneratorError, match="does not learn to read examples"):
        method_type("mlp")().learn_pairs(None, None, None, 1)
    replace(without, origin={}).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="no examples that the generator learned from"):
        add_pairs(tmp_path / "other", device="cpu")


def test_it_is_stored(generator, tmp_path):
    """Opened again, examples give the same adapter; a length of pairs that does not fit the tensors is refused."""
    generator.save_pretrained(tmp_path)
    opened = LoraGenerator.from_pretrained(tmp_path, embedder=WordEmbedder())
    assert torch.equal(_code(opened, _examples(HELD_OUT[1], 2)), _code(generator, _examples(HELD_OUT[1], 2)))
    tensors, shape = generator.method.state()
    for length in (shape["pair"] + 1, -1, None, 2.0):
        with pytest.raises(GeneratorError, match="house"):
            method_type("house").with_settings(generator.method.values()).restore(tensors, {**shape, "pair": length})


def test_more_than_sixteen_examples_are_as_good_as_sixteen(generator):
    """The first sixteen are read."""
    many = _examples(HELD_OUT[2], 24)
    assert torch.equal(_code(generator, many), _code(generator, many[:16]))
    assert not torch.equal(_code(generator, many), _code(generator, many[:8]))


def test_an_adapter_from_examples_says_so(generator):
    """No description, no neighbours, no verdict on what nobody said; and it needs an example."""
    adapter = generate_lora(examples=_examples(HELD_OUT[0], 3), generator=generator)
    assert (adapter.info["description"], adapter.info["examples"], adapter.info["neighbours"]) == ("", 3, [])
    assert adapter.info["gate"]["decision"] == "generate" and adapter.info["made_from"] == "examples" and adapter.info["norm"] > 0
    with pytest.raises(DescriptionError, match="none of them"):
        generate_lora(generator=generator)
    with pytest.raises(TaskError, match="no example"):
        generator.read_examples([])


def test_padding_does_not_change_what_is_read_of_a_pair(generator):
    """Pairs that are read together, the prompt being padded on the left and the answer on the right, are read as if alone."""
    runner = generator.runner()
    pairs = [(WORDS[0], WORDS[1]), (" ".join(WORDS[2:8]), WORDS[1]), (WORDS[3], " ".join(WORDS[4:9]))]
    together = runner.read_pairs(pairs)
    assert together.shape == (3, 2 * runner.model.config.hidden_size)
    for pair, vector in zip(pairs, together, strict=True):
        assert torch.allclose(runner.read_pairs([pair])[0], vector, atol=1e-4)


def test_objectives_without_answers_read_no_pairs(generator):
    """What an encoder would read is not defined."""
    from lorag.base.objectives.base import Objective

    with pytest.raises(ConfigError, match="does not read pairs"):
        Objective.read_pairs(generator.runner().objective, None, [("a", "b")])


def test_from_the_command_line(generator, tmp_path, monkeypatch):
    """`lorag generate --examples FILE`, with no description."""
    generator.save_pretrained(tmp_path / "made")
    monkeypatch.setattr("lorag.generator.generate.open_generator", lambda name, **_: generator)
    lines = "\n".join(f'{{"input": "{text}", "output": "{answer}"}}' for text, answer in _examples(HELD_OUT[3], 2))
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    common = ["generate", "--generator", str(tmp_path / "made"), "--out", str(tmp_path / "adapter")]
    result = CliRunner().invoke(app, [*common, "--examples", str(tmp_path / "pairs.jsonl")])
    assert result.exit_code == 0, result.output
    assert "not compared without a description" in result.output and (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert CliRunner().invoke(app, common).exit_code == 2
