"""docs/extending.md: its examples are registered as the page says, and work."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from toy_world import (
    HELD_OUT,
    TRAINING,
    LookedUp,
    WordEmbedder,
    make_bank,
    make_suite,
    name_of,
    prepare_toy,
    quiet_loop,
    save_base,
    true_adapter,
)

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.formats import FORMATS
from lorag.base.base_model import BaseModel, kind_of
from lorag.base.kinds import KINDS
from lorag.base.objectives import OBJECTIVES, make_objective, objectives_of
from lorag.base.runner import BankBase, Runner
from lorag.errors import AdapterError, TaskError
from lorag.evaluation import folders
from lorag.evaluation.ladder import evaluate
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import METHODS, method_type
from lorag.spaces import SPACES, SpaceInputs, fit_space, open_space
from lorag.spaces.weight_space import AdapterStream
from lorag.tasks.suite import Task
from lorag.training.preparation import SpaceChoice
from lorag.training.split import SplitRule
from lorag.training.train import fit_generator

PAGE = Path(__file__).resolve().parent.parent / "docs/extending.md"


def _example(heading, *names):
    """What a block under a heading defines by these names."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for block in re.findall(r"^```python\n(.*?)^```", section, re.S | re.M):
        scope = {"__name__": "example"}
        exec(compile(block, str(PAGE), "exec"), scope)
        if set(names) <= set(scope):
            return scope[names[0]] if len(names) == 1 else tuple(scope[name] for name in names)
    raise AssertionError(f"no example under {heading!r} defines {names}")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


def test_a_method_and_a_weight_space_by_one_line_each(tmp_path, base, monkeypatch):
    """Both examples together: trained by name, saved, read again, and of the median's very ΔW."""
    median, updates = _example("A method", "Median"), _example("A weight space", "FullUpdates")
    monkeypatch.setitem(METHODS, median.name, median)
    monkeypatch.setitem(SPACES, updates.kind, updates)
    bank = make_bank(tmp_path / "bank", base, TRAINING[:5])
    prepared = prepare_toy(bank, rule=SplitRule(validation=0.0), space=SpaceChoice("full_updates"))
    generator = fit_generator(prepared, method_type("median").with_settings({}), quiet_loop(), rank=16, strength=1.0, origin={})
    generator.save_pretrained(tmp_path / "generator")
    read = LoraGenerator.from_pretrained(tmp_path / "generator", embedder=WordEmbedder())
    adapter = read.generate("paint the red cat", on_unknown="ignore")
    module = base.layout.names[0]
    deltas = torch.stack([true_adapter(base.layout, *cell).factors.delta(module) for cell in TRAINING[:5]])
    expected = deltas.median(0).values
    left, values, right = torch.linalg.svd(expected, full_matrices=False)
    nearest = left[:, :16] @ torch.diag(values[:16]) @ right[:16]
    assert (adapter.factors.delta(module) - nearest).norm() < 0.02 * expected.norm()


def test_a_new_baseline_owes_no_controls(tmp_path, base, monkeypatch):
    """Beside a learned method: it is a row and a rival, has none of the controls, and `evaluate` would fit it on a bank by itself."""
    median = _example("A method", "Median")
    monkeypatch.setitem(METHODS, median.name, median)
    prepared = prepare_toy(make_bank(tmp_path / "bank", base, TRAINING[:3]), rule=SplitRule(validation=0.0))
    made = {
        name: [fit_generator(prepared, method, quiet_loop(), rank=4, strength=1.0, origin={})]
        for name, method in (("median", median()), ("looked_up", LookedUp()))
    }
    assert "median" in [method.name for method in folders.bank_baselines()]
    report = evaluate(make_suite(HELD_OUT[:2]), made, seeds=1, limit=1, device="cpu", quiet=True)
    rows = [name for name in report["methods"] if name.startswith(("median", "looked_up"))]
    assert rows == ["median", "looked_up", "looked_up_shuffled", "looked_up_junk", "looked_up_prompted"]
    assert "looked_up - median" in report["differences"] and not any(name.startswith("median") for name in report["differences"])


def test_a_weight_space_gives_adapters_back(base, monkeypatch):
    """Encoding, storing, reading and decoding lose nothing but rounding."""
    updates = _example("A weight space", "FullUpdates")
    monkeypatch.setitem(SPACES, updates.kind, updates)
    adapter = true_adapter(base.layout, "red", "cat")
    space = fit_space("full_updates", SpaceInputs(base.layout, AdapterStream(lambda: [adapter])))
    again = open_space(*space.tensors())
    decoded = again.decode(again.encode(adapter.factors)[None], adapter.rank)[0]
    for name in base.layout.names:
        assert torch.allclose(decoded.delta(name), adapter.factors.delta(name), atol=1e-5)


def test_an_objective_by_one_line(base, monkeypatch):
    """It is made by name, gives losses, and refuses what it cannot learn from."""
    writing = _example("An objective", "LabelWriting")
    monkeypatch.setitem(OBJECTIVES, writing.name, writing)
    objective = make_objective("label_writing", base.model.tokenizer(), dict(base.settings))
    runner = Runner(base.model.load("cpu"), base.layout, objective)
    suite = make_suite(TRAINING[:1])
    task = suite[name_of(*TRAINING[0])]
    assert runner.losses(None, [task], 2, "0").isfinite().all() and objective.closed_labels
    with pytest.raises(TaskError, match="too few labels"):
        objective.check_examples(task)
    other = make_suite(TRAINING[1:2])[name_of(*TRAINING[1])].examples
    objective.check_examples(Task(task.name, "toy", task.descriptions, None, "MIT", "made", (*task.examples, *other)))


def test_a_base_model_from_a_folder(base):
    """A folder in the format of transformers needs no registration."""
    model, layout = _example("A base model", "open_base")(base.model.name)
    assert model.identity() == base.identity
    assert {name.split(".")[-1] for name in layout.names} == {"q_proj", "v_proj"}


def test_a_kind_of_base_model_by_one_line(tmp_path, tiny_models, tokenizer, monkeypatch):
    """The encoder of a T5: known by its config, loaded without a decoder, run by its objective, and a bank takes that one by itself."""
    kind, matching = _example("A base model", "HALF", "HalfMatching")
    monkeypatch.setitem(KINDS, kind.name, kind)
    monkeypatch.setitem(OBJECTIVES, matching.name, matching)
    transformers.T5EncoderModel(tiny_models["t5"].build().config).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    model = BaseModel(str(tmp_path / "half"), kind_of(str(tmp_path / "half")))
    assert model.kind == "half" and objectives_of("half") == ["half_matching"]
    assert kind_of(str(tmp_path / "half"), None, "SEQ_2_SEQ_LM") == "seq2seq_lm"  # what an adapter states comes first
    runner = Runner.open(BankBase.of(model, "half_matching", target_modules=["q", "v"]), "cpu")
    assert [choice for choice, _ in runner.choose(["red", "blue"], ["blue", "red"])] == ["red", "blue"]


def test_an_adapter_format_by_one_line(tmp_path, base, monkeypatch, lorag):
    """Written from the command line by its name, which help and errors list; recognised by content and read; a spoiled line is refused."""
    lines = _example("An adapter format", "Lines")()
    monkeypatch.setenv("LORAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(FORMATS, lines.name, lines)
    adapter = true_adapter(base.layout, "red", "cat")
    adapter.save_pretrained(tmp_path / "a")
    code, out, err = lorag("export", tmp_path / "a", "--format", "lines", "--out", tmp_path / "out" / "a.lora.jsonl")
    assert code == 0 and out.endswith(f"next: lorag info {tmp_path / 'out' / 'a.lora.jsonl'}\n"), err
    assert "lines of JSON" in lorag("info", tmp_path / "out")[1]
    words = set(re.findall(r"\w+", lorag("export", "--help")[1]))
    assert {"gguf", "mlx", "lines"} <= words
    code, out, err = lorag("export", tmp_path / "a", "--format", "paper", "--out", tmp_path / "b")
    assert code == 1 and len(err.splitlines()) == 1 and all(name in err for name in ("'paper'", "gguf", "mlx", "lines"))
    assert lorag("export", tmp_path / "a", "--format", "lines", "--gguf", "--out", tmp_path / "b")[0] == 2
    for place in (tmp_path / "out", tmp_path / "out" / "a.lora.jsonl"):
        again = LoraAdapter.from_pretrained(place)
        assert all(torch.allclose(again.delta(name), adapter.delta(name), atol=1e-6) for name in base.layout.names)
    (tmp_path / "out" / "a.lora.jsonl").write_text('{"module": "x"}\n')
    with pytest.raises(AdapterError, match="a line of"):
        LoraAdapter.from_pretrained(tmp_path / "out")
