"""What ships: the embedded generator does for unseen tasks, described in words of one's own, what the README says it does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import (
    WORDS,  # noqa: F401 - the conftest sets the offline environment before transformers is imported
    stack_adapters,
)
from peft import PeftModel

from lorag import generate_lora
from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.objectives import make_objective
from lorag.base.row_adapters import RowAdapters
from lorag.files.artifacts import embedded
from lorag.generator.generate import default_generator
from lorag.tasks.finding import find_tasks
from lorag.tasks.unknown import unknown_tasks
from lorag.worlds.sandbox import wordings
from lorag.worlds.sandbox.grid import splits

LEGAL = "legal-summarise-plain"
UNKNOWN = [text for texts in unknown_tasks("test").values() for text in texts]
# Held-out tasks in words that no file of wordings holds.
TYPED = {
    LEGAL: "I need the main point of this rental contract paragraph",
    "sports-date-json": "on which day was this game played? answer in JSON",
    "medical-person-plain": "find the patient's name in the medical report",
    "finance-place-json": "return the city from this banking message as a JSON object",
    "travel-urgency-plain": "how urgent is this trip message?",
}


@pytest.fixture(scope="session")
def embedded_generator():
    return default_generator()


@pytest.fixture(scope="module")
def held_out():
    return find_tasks("sandbox", "test")


@pytest.fixture(scope="module")
def scorer(embedded_generator, held_out):
    """Exact match of one adapter per task on the tasks' first test examples, all of them by default."""
    base = embedded_generator.base
    rows = RowAdapters(base.model.load("cpu"), base.layout)
    objective = make_objective(base.objective, base.model.tokenizer(), base.settings)

    def score(names, adapters, limit=32):
        tasks = [held_out[name] for name in names]
        stacked = None if adapters is None else stack_adapters(adapters)
        return [found["exact_match"] for found in objective.scores(rows, stacked, tasks, limit=limit)]

    return score


@pytest.mark.slow
def test_a_bank_is_named_as_everywhere(embedded_generator):
    """generate_lora(bank="sandbox") takes the bank that comes with the package, and a known task gets its own expert."""
    bank = find_bank("sandbox")
    known = bank.experts[0]
    adapter = generate_lora(known.descriptions[0], bank="sandbox")
    assert adapter.info["gate"]["served"] == "expert"
    assert all(torch.equal(adapter.delta(name), bank.adapter(known.name).delta(name)) for name in adapter.layout.names)
    assert find_bank(bank) is bank


def test_one_call_makes_an_adapter_and_says_how(embedded_generator):
    """generate_lora with nothing but a description; where it came from is in `info`, all of it plain JSON."""
    adapter = generate_lora("summarise legal text")
    info = adapter.info
    wanted = "description method neighbours novelty seed strength generator base_model embedder norm norms versions"
    assert set(wanted.split()) <= set(info)
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert (info["description"], info["method"], info["seed"]) == ("summarise legal text", "house", 0)
    names = set(find_bank("sandbox").names)
    assert len(info["neighbours"]) >= 3
    assert all(name in names and -1 <= score <= 1 for name, score in info["neighbours"])
    scores = [score for _, score in info["neighbours"]]
    assert scores == sorted(scores, reverse=True) and info["novelty"] == info["gate"]["novelty"] < 0.2
    assert info["generator"]["revision"].startswith("sha256:") and info["base_model"]["name"] == "sandbox-lm"
    assert set(info["norms"]) == set(adapter.layout.names)
    assert info["norm"] == pytest.approx(sum(norm**2 for norm in adapter.norms().values()) ** 0.5, rel=1e-4)
    assert info["norm"] > 0


@pytest.mark.slow
def test_it_summarises_legal_texts_in_stock_peft(tmp_path, embedded_generator, held_out):
    """Written, loaded by PEFT and decoded word by word: at least half of 32 unseen legal texts, where base and a wrong description fail."""
    base = embedded_generator.base
    objective = make_objective(base.objective, base.model.tokenizer(), base.settings)
    examples = held_out[LEGAL].split("test")[:32]
    assert len(examples) == 32

    def right(model):
        with torch.inference_mode():
            answers = objective.generate(model, [example.input for example in examples])
        return sum(answer == example.output for answer, example in zip(answers, examples, strict=True)) / 32

    def loaded(description, name):
        generate_lora(description).save_pretrained(tmp_path / name)
        return PeftModel.from_pretrained(base.model.load("cpu"), tmp_path / name).eval()

    matched = right(loaded("summarise legal text", "matched"))
    plain = right(base.model.load("cpu"))
    assert matched >= 0.5 and matched > plain + 0.3
    assert right(loaded("which day was this match played?", "other")) < 0.2


@pytest.mark.slow
def test_descriptions_typed_freely_work(scorer):
    """Five unseen tasks in words of ours: mean exact match of at least 0.4; each task with another's description below 0.2."""
    for text in TYPED.values():
        for factor in ("skills", "domains", "styles"):
            assert all(text not in own["train"] + own["eval"] for own in wordings.read(factor).values())
    adapters = [generate_lora(text) for text in TYPED.values()]
    scores = scorer(list(TYPED), adapters)
    assert sum(scores) / len(scores) >= 0.4, dict(zip(TYPED, scores, strict=True))
    shuffled = scorer(list(TYPED), adapters[1:] + adapters[:1])
    assert sum(shuffled) / len(shuffled) < 0.2


@pytest.mark.slow
def test_oracles_and_base_span_the_ladder(scorer, held_out):
    """The oracles' mean exact match is at least 0.8, the base model's below 0.05, on eight texts of every held-out task."""
    oracles = AdapterBank.from_pretrained(embedded("data/sandbox/oracles"))
    assert len(held_out) == 60
    best = scorer(held_out.names, list(oracles.adapters(held_out.names)), limit=8)
    bare = scorer(held_out.names, None, limit=8)
    assert sum(best) / 60 >= 0.8
    assert sum(bare) / 60 < 0.05


@pytest.mark.slow
def test_nothing_held_out_is_in_the_bank(held_out):
    """No name, no description, no text of a held-out task; and the generator saw the bank and nothing more."""
    bank = find_bank("sandbox")
    hard = find_tasks("sandbox", "hard")
    train = find_tasks("sandbox", "train")
    unseen = {task.name for suite in (held_out, hard) for task in suite}
    assert len(bank) == len(train) == len(splits()["train"]) and len(hard) == len(splits()["hard"])
    assert [set(suite.names) for suite in (held_out, hard)] == [{cell.name for cell in splits()[name]} for name in ("test", "hard")]
    assert set(bank.names) == set(train.names) == set(default_generator().conditioner.names)
    assert not unseen & set(bank.names)
    texts = {text.lower() for expert in bank.experts for text in expert.descriptions}
    for suite in (held_out, hard):
        for task in suite:
            assert not {text.lower() for text in task.descriptions} & texts
            assert not task.split("train") and len(task.split("test")) == 32


@pytest.mark.slow
def test_every_shipped_expert_is_sound():
    """Bank and oracles: every checkpoint is finite and changes something."""
    for folder in ("data/sandbox/bank", "data/sandbox/oracles"):
        assert not [(e.name, problem) for e, problem in AdapterBank.from_pretrained(embedded(folder)).check() if problem]


@pytest.mark.slow
def test_novelty_tells_the_world_from_the_rest(embedded_generator, held_out):
    """Descriptions of held-out tasks are less novel than what no task of the world asks for."""
    inside = [embedded_generator.condition(task.descriptions[0]).distance for task in held_out]
    outside = [embedded_generator.condition(text).distance for text in UNKNOWN]
    pairs = [(a, b) for a in inside for b in outside]
    assert sum(a < b for a, b in pairs) / len(pairs) > 0.75  # area under the curve


@pytest.mark.slow
def test_the_gate_refuses_what_the_world_lacks_and_nothing_else(embedded_generator, held_out):
    """The shipped gate, on every second held-out task and unknown description: AUROC .95, refused at most a tenth and at least .85."""
    assert embedded_generator.gate is not None, "fit one: lorag gate fit checkpoints/house"
    inside = [embedded_generator.judge(task.descriptions[1]) for task in held_out.tasks[::2]]
    outside = [embedded_generator.judge(text) for text in UNKNOWN[::2]]
    pairs = [(a.novelty, b.novelty) for a in inside for b in outside]
    assert sum(a < b for a, b in pairs) / len(pairs) > 0.95
    refused = [sum(v.decision == "refuse" for v in part) / len(part) for part in (inside, outside)]
    assert refused[0] <= 0.1 and refused[1] >= 0.85
    assert all(v.decision != "expert" for v in inside)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    """Same description, same seed, same machine: every file of the adapter."""
    code = "import sys; from lorag import generate_lora; generate_lora(sys.argv[1], seed=3).save_pretrained(sys.argv[2])"
    text = "summarise legal text"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, text, str(tmp_path / "there")], check=True, env=environment, timeout=300)
    generate_lora(text, seed=3).save_pretrained(tmp_path / "here")
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name
