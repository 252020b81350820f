"""Banks on another base model: copies to close relatives, experts learned from answers elsewhere, and no labels anywhere."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import BOS, EOS, PAD, SIZE, WORDS, word_tokenizer
from toy_world import make_suite, save_base

from lorag.adapters.factors import Factors
from lorag.bank import answers
from lorag.bank.answers import Answer, agreement, answer_inputs, surest
from lorag.bank.bank import AdapterBank
from lorag.bank.build import build_bank
from lorag.bank.experts import ExpertConfig
from lorag.bank.transferring import AnswerConfig, TransferConfig, read_inputs, task_inputs, transfer_bank
from lorag.base.base_model import BaseModel
from lorag.base.relatives import compare_bases
from lorag.base.runner import BankBase, Runner
from lorag.errors import ArtifactError, BankError, BaseModelError, ConfigError
from lorag.tasks.suite import TaskSuite

pytestmark = pytest.mark.slow

CELLS = (("red", "cat"), ("green", "dog"), ("blue", "bird"))
EXPERTS = ExpertConfig(target_modules=None, ranks=[], group=3, steps=60, batch=8, learning_rate=2e-2, checkpoints=1, test_limit=8)
CONFIG = TransferConfig(AnswerConfig(inputs=18, keep=1.0, max_new_tokens=6), EXPERTS)
SHORT = replace(CONFIG, experts=replace(EXPERTS, steps=4))


def _save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseModel(str(folder), "causal_lm")


def _moved(model, by):
    """The same model with every weight moved by a share of its size."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=rng) * by * weight.std() if weight.dim() > 1 else 0.0
    return model


@pytest.fixture(scope="module")
def suite():
    """Three tasks with texts of their own."""
    return make_suite(CELLS)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny_models, tokenizer, suite):
    """Their experts on the tiny Llama, trained."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    config = replace(EXPERTS, target_modules=list(base.layout.target_modules), ranks=[4])
    return build_bank(tmp_path_factory.mktemp("bank") / "bank", suite, base.model, "causal_lm", base.settings, config, quiet=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory, tokenizer):
    """A Llama of another width and depth."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 3}
        ends = {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends, max_position_embeddings=128))
        for weight in model.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.1)
    return _save(model, tokenizer, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def relatives(tmp_path_factory, tiny_models, tokenizer, bank):
    """The bank's base moved a little, and as far as another seed."""
    found = []
    for by in (0.002, 2.0):
        model = bank.base.model.load("cpu")
        found.append(_save(_moved(model, by), tokenizer, tmp_path_factory.mktemp("relative")))
    return found


@pytest.fixture(scope="module")
def learned(bank, other, suite, tmp_path_factory):
    """The bank on the other base, by answers to the tasks' inputs."""
    return transfer_bank(bank, tmp_path_factory.mktemp("new") / "bank", other, inputs=task_inputs(suite, bank.names), config=CONFIG)


def test_experts_of_another_shape_learn_from_answers(learned, bank, other, suite):
    """They solve tasks whose labels nobody gave; names, descriptions, licence and suite stay, rank and modules are as the bank's."""
    new = AdapterBank.from_pretrained(learned.bank.folder)
    assert learned.by == "answers" and not learned.likeness.fits and learned.likeness.similarity is None and learned.moved is None
    assert sorted(new.names) == sorted(bank.names) and new.base.model == other and len(new.base.layout) == 9
    assert new.base.settings == bank.base.settings
    for name in new.names:
        assert (new[name].descriptions, new[name].license, new[name].suite) == (bank[name].descriptions, "MIT", "toy")
        assert new[name].rank == 4 and new[name].examples == 15 and learned.kept[name] == (18, 18)
    runner, tasks = Runner.open(new.base, "cpu"), list(suite)
    stacked = Factors.stack([new.adapter(task.key).factors for task in tasks])
    bare, adapted = ([one["exact_match"] for one in runner.scores(given, tasks, limit=6)] for given in (None, stacked))
    assert max(bare) == 0 and min(adapted) >= 0.5 and sum(adapted) / 3 >= 0.7
    assert learned.agreement >= 0.7 and learned.skipped == ()


def test_labels_are_never_looked_at(bank, other, suite, tmp_path):
    """Wrong labels in the suite give the same experts, byte for byte."""
    wrong = TaskSuite(replace(task, examples=tuple(replace(e, output="sky") for e in task.examples)) for task in suite)
    digests = []
    for number, labelled in enumerate((suite, wrong)):
        new = transfer_bank(bank, tmp_path / str(number), other, inputs=task_inputs(labelled, bank.names), config=SHORT).bank
        digests.append({name: entry["sha256"] for name, entry in new.files.items()})
    assert digests[0] == digests[1]


def test_an_interrupted_transfer_goes_on(bank, other, suite, tmp_path, monkeypatch):
    """Answers that are there are not asked for again; other inputs are; a damaged file is named."""
    asked, real = [], answer_inputs
    monkeypatch.setattr(answers, "answer_inputs", lambda *given, **more: asked.append(len(given[2])) or real(*given, **more))
    inputs, out = task_inputs(suite, bank.names), tmp_path / "bank"
    first = bank.names[0]
    transfer_bank(bank, out, other, inputs=inputs, names=[first], config=SHORT)
    assert asked == [18]
    done = transfer_bank(bank, out, other, inputs=inputs, config=SHORT)
    assert asked == [18] * 3 and sorted(done.bank.names) == sorted(bank.names)
    transfer_bank(bank, out, other, inputs={**inputs, first: inputs[first][:10]}, config=SHORT)
    assert asked == [18] * 3 + [10]
    (out / "answers" / f"{first}.json").write_text('{"answers": []}')
    with pytest.raises(ArtifactError, match="holds no answers"):
        transfer_bank(bank, out, other, inputs=inputs, config=SHORT)


def test_a_close_relative_gets_a_copy(bank, relatives, suite, tmp_path, caplog):
    """The same shards, byte for byte, under the new base's identity and without the old base's scores; no warning."""
    done = transfer_bank(bank, tmp_path / "bank", relatives[0], names=bank.names[:2])
    new = AdapterBank.from_pretrained(tmp_path / "bank")
    assert done.by == "copy" and done.likeness.similarity > 0.999 and done.moved < 0.2 and done.agreement is None
    assert new.names == bank.names[:2] and new.base.identity == relatives[0].identity() != bank.base.identity
    assert all(new[name].score is None for name in new.names)
    for name in new.names:
        old, copied = bank.adapter(name).factors, new.adapter(name).factors
        assert all(torch.equal(x, y) for m in old for x, y in zip(old[m], copied[m], strict=True))
    assert not caplog.records
    tried = transfer_bank(bank, tmp_path / "tried", relatives[0], inputs=task_inputs(suite, bank.names), config=SHORT)
    assert tried.by == "copy" and tried.agreement >= 0.9


def test_a_distant_relative_is_told_from_a_close_one(bank, relatives, suite, tmp_path, caplog):
    """Without inputs a copy comes with a warning that says how far; with inputs copies are tried and learned anew."""
    with caplog.at_level(logging.WARNING):
        done = transfer_bank(bank, tmp_path / "bank", relatives[1])
    assert done.by == "copy" and done.moved > 1 and done.likeness.least[0] <= done.likeness.similarity < 0.6
    assert "times as far" in caplog.text
    learned = transfer_bank(bank, tmp_path / "learned", relatives[1], inputs=task_inputs(suite, bank.names), config=SHORT)
    assert learned.by == "answers" and learned.moved == done.moved and len(learned.bank) == 3
    straight = transfer_bank(bank, tmp_path / "straight", relatives[0], by="answers", inputs=task_inputs(suite, bank.names), config=SHORT)
    assert straight.by == "answers" and straight.likeness.fits and straight.moved is None
    nothing = {name: [] for name in bank.names}
    with pytest.raises(BankError, match="0 of 0"):
        transfer_bank(bank, tmp_path / "nothing", relatives[1], inputs=nothing)


def test_likeness(bank, other, tmp_path):
    """A model is itself; where texts become other tokens nothing is copied."""
    base = bank.base.model
    same = compare_bases(base, base, bank.base.layout, ["the red cat"])
    assert same.fits and same.same_tokens and same.similarity == pytest.approx(1, abs=1e-5) and same.change == 0
    assert not compare_bases(base, other, bank.base.layout, ["the red cat"]).fits
    turned = word_tokenizer()
    turned.add_tokens(["red cat"])
    renamed = _save(base.load("cpu"), turned, tmp_path / "renamed")
    assert not compare_bases(base, renamed, bank.base.layout, ["the red cat"]).same_tokens
    with pytest.raises(BaseModelError, match="other tokens"):
        transfer_bank(bank, tmp_path / "bank", renamed, by="copy")


def test_the_surest_answers_are_kept():
    """Those that ended and say something; of these the share with the highest likelihood, in their order."""
    given = [Answer(f"text {i}", "yes" if i % 2 else "no", i != 3, 0.1 * i) for i in range(8)] + [Answer("text 8", " ", True, 0.99)]
    assert [one.input for one in surest(given, 1.0)] == [f"text {i}" for i in (0, 1, 2, 4, 5, 6, 7)]
    assert [one.input for one in surest(given, 0.5)] == [f"text {i}" for i in (4, 5, 6, 7)]
    assert surest([given[3]], 1.0) == surest([], 0.5) == []


def test_answers_say_how_sure_they_are(bank, suite):
    """In the inputs' order, whatever their length; a cut-off answer did not end; an expert gives its own answers, another does not."""
    runner, task = Runner.open(bank.base, "cpu"), suite.tasks[0]
    texts = [e.input for e in task.split("train")[:5]] + ["the cat", " ".join(WORDS[:12])]
    found = answer_inputs(runner, bank.adapter(task.key), texts, max_new_tokens=6)
    assert [one.input for one in found] == texts and all(0 < one.sure <= 1 for one in found)
    right = [one for one in found if one.output == task.examples[0].output]
    assert len(right) >= 5 and all(one.ended for one in right)
    assert not any(one.ended for one in answer_inputs(runner, bank.adapter(task.key), texts[:2], max_new_tokens=1))
    assert agreement(runner, bank.adapter(task.key), right) == 1
    assert agreement(runner, bank.adapter(suite.tasks[1].key), right) == 0


def _encoders(folder, tiny_models, tokenizer, random_adapter):
    """A bank of a sentence encoder, which writes nothing."""
    model = replace(_save(tiny_models["bert"].build(), tokenizer, folder / "bert"), kind="encoder")
    base = BankBase.of(model, "label_matching", {}, ["query"])
    return AdapterBank.create(folder / "encoders", base).add([("one", ["tell the cat"], [random_adapter(base.layout)])])


def test_what_cannot_be_transferred_is_refused(bank, other, suite, tmp_path, tiny_models, tokenizer, random_adapter):
    """With the cause and what to do; nothing is written."""
    inputs, out = task_inputs(suite, bank.names), tmp_path / "bank"
    with pytest.raises(ConfigError, match="--tasks SUITE or --inputs FILE"):
        transfer_bank(bank, out, other)
    with pytest.raises(BaseModelError, match="--by answers"):
        transfer_bank(bank, out, other, by="copy")
    with pytest.raises(BankError, match="into itself"):
        transfer_bank(bank, bank.folder, other, inputs=inputs)
    with pytest.raises(BankError, match="no such expert"):
        transfer_bank(bank, out, other, inputs=inputs, names=["nobody"])
    with pytest.raises(ConfigError, match="keep above 0"):
        transfer_bank(bank, out, other, inputs=inputs, config=TransferConfig(AnswerConfig(keep=0.0)))
    with pytest.raises(BankError, match="no expert gave enough"):
        transfer_bank(bank, out, other, inputs={name: texts[:5] for name, texts in inputs.items()}, config=CONFIG)
    assert not (out / "bank.json").exists()
    encoders = _encoders(tmp_path, tiny_models, tokenizer, random_adapter)
    with pytest.raises(ConfigError, match="writes no answers"):
        transfer_bank(encoders, out, encoders.base.model, by="answers", inputs={"one": ["a cat"]})


def test_an_expert_with_too_few_answers_is_left_out(bank, other, suite, tmp_path):
    """And named; the others come through."""
    inputs = task_inputs(suite, bank.names)
    first, *others = bank.names
    done = transfer_bank(bank, tmp_path / "bank", other, inputs={**inputs, first: inputs[first][:4]}, config=SHORT)
    assert done.skipped == (first,) and sorted(done.bank.names) == sorted(others) and done.kept[first] == (4, 4)


def test_inputs_from_a_file(tmp_path):
    """A line each, blank ones not; nothing in it is an error."""
    (tmp_path / "texts.txt").write_text("the cat ran\n\n  a dog sat \r\n")
    assert read_inputs(tmp_path / "texts.txt", ["one", "two"]) == {name: ["the cat ran", "a dog sat"] for name in ("one", "two")}
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no inputs"):
        read_inputs(tmp_path / "empty.txt", ["one"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_inputs(tmp_path / "nothing.txt", ["one"])


def test_the_command(bank, other, suite, relatives, tmp_path, lorag):
    """It says what it did, and what the bases have in common."""

    def run(*arguments):
        return lorag("bank", "transfer", bank.folder, *arguments, "--quiet")

    folder = suite.save(tmp_path / "suite")
    settings = ("answers.inputs=18", "answers.max_new_tokens=6", "experts.steps=4", "experts.group=3")
    code, out, err = run("--to", other.name, "--out", tmp_path / "new", "--tasks", folder, *settings)
    assert code == 0 and "3 experts of" in out and "of 54 answers" in out and "% of the cases" in out, err
    assert json.loads((tmp_path / "new/bank.json").read_text())["base"]["model"]["name"] == other.name
    code, out, _ = run("--to", relatives[0].name, "--out", tmp_path / "copy", "--expert", bank.names[0])
    assert code == 0 and "mean cosine" in out and "1 experts, copied" in out
    code, _, err = run("--to", other.name, "--out", tmp_path / "more")
    assert code == 1 and "--inputs FILE" in err
    code, _, err = run("--to", other.name, "--out", tmp_path / "more", "--tasks", folder, "--inputs", folder / "tasks.jsonl")
    assert code == 2
