"""Portability: what lorag writes fits PEFT, vLLM and llama.cpp's converter; what does not fit is named, by rules that stand in the docs."""

import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported
from safetensors.torch import load_file, save_file

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.checks import check_config
from lorag.adapters.portability import TARGETS, Facts, check_portability
from lorag.adapters.reading import own_layout, read_facts
from lorag.cli.info import describe_path
from lorag.errors import AdapterError, UnsupportedLoraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READERS = {"PEFT", "transformers", "vLLM", "SGLang", "llama.cpp", "MLX"}
DOCS = Path(__file__).resolve().parent.parent / "docs" / "portability.md"


def _by_target(facts):
    return {verdict.target: verdict for verdict in check_portability(facts)}


def _change(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture
def saved(llama_layout, random_adapter, tmp_path):
    """A folder as lorag writes it, of a base model on the hub."""
    adapter = random_adapter(llama_layout)
    folder = LoraAdapter(llama_layout, adapter.factors, "toys/base-lm", "CAUSAL_LM").save_pretrained(tmp_path / "a")
    return folder


def test_the_portable_profile_fits_everywhere(saved):
    """No finding for an adapter of rank 4 as lorag writes it, wherever PEFT's folder is read; the others say what to write first."""
    lines = {target: verdict.line() for target, verdict in _by_target(read_facts(saved)).items()}
    assert {target for target, line in lines.items() if line == "yes"} == {"PEFT", "transformers", "vLLM", "SGLang", "llama.cpp"}
    assert lines["MLX"].startswith("yes, if exported first") and re.match(r"no: `ollama create` refuses ADAPTER.*--merge", lines["Ollama"])


@pytest.mark.parametrize(
    ("rank", "line"), [(16, "yes"), (17, "--max-lora-rank 32"), (64, "--max-lora-rank 64"), (257, "--max-lora-rank 320")]
)
def test_vllm_is_told_of_a_larger_rank(llama_layout, random_adapter, tmp_path, rank, line):
    """Above 16 the adapter fits with the setting that it needs, the next value that vLLM takes."""
    random_adapter(llama_layout, rank=rank).save_pretrained(tmp_path)
    verdict = _by_target(read_facts(tmp_path))["vLLM"]
    assert verdict.fits and line in verdict.line()


def test_vllm_has_a_largest_rank(saved):
    """Above 512 no setting helps."""
    _change(saved, r=600)
    assert not _by_target(read_facts(saved))["vLLM"].fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "misfits"),
    [
        ({"use_rslora": True}, {"llama.cpp", "SGLang"}),
        ({"alpha_pattern": {"q_proj": 4}}, {"vLLM", "SGLang", "llama.cpp"}),
        ({"rank_pattern": {"q_proj": 4}}, {"vLLM", "SGLang"}),
        ({"bias": "all"}, {"vLLM", "SGLang"}),
        ({"use_dora": True}, {"vLLM", "SGLang"}),
        ({"modules_to_save": ["lm_head"]}, {"vLLM", "SGLang"}),
        ({"init_lora_weights": "pissa_niter_4"}, {"vLLM", "SGLang", "llama.cpp", "MLX"}),
        ({"init_lora_weights": "lora_ga"}, {"vLLM", "SGLang", "llama.cpp", "MLX"}),
        ({"layer_replication": [[0, 2]]}, {"vLLM", "SGLang", "llama.cpp"}),
        ({"fan_in_fan_out": True}, {"vLLM", "llama.cpp"}),
        ({"task_type": "SEQ_2_SEQ_LM"}, {"vLLM"}),
        ({"peft_type": "IA3"}, {"PEFT", "transformers", "vLLM", "SGLang", "llama.cpp", "MLX"}),
        ({"lora_alpha": 0}, {"llama.cpp"}),
        ({"r": 8}, {"PEFT", "transformers"}),
        ({}, set()),
    ],
)
def test_settings_fit_where_they_fit(saved, changes, misfits):
    """A setting keeps an adapter out of just those programs that refuse it or would compute something else."""
    _change(saved, **changes)
    verdicts = _by_target(read_facts(saved))
    assert {target for target, verdict in verdicts.items() if not verdict.fits} == misfits | {"Ollama"}
    for target in misfits:
        assert verdicts[target].line().startswith("no: ")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_what_a_bank_refuses_for_its_start_no_program_is_said_to_take(saved, start):
    """`lorag info` and `lorag bank add` go by one table of starts that change the base model."""
    _change(saved, init_lora_weights=start)
    config = json.loads((saved / "adapter_config.json").read_text())
    with pytest.raises(UnsupportedLoraError, match="init_lora_weights"):
        check_config(config, saved)
    assert not _by_target(read_facts(saved))["vLLM"].fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "misfits", "named"),
    [
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, {"vLLM", "SGLang", "llama.cpp", "MLX"}, "lm_head.weight"),
        (
            lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(2)},
            {"vLLM", "SGLang", "llama.cpp", "MLX"},
            "magnitude",
        ),
        (lambda t: dict(list(t.items())[1:]), _READERS, "has no lora_A"),
        (lambda t: {key.removeprefix("base_model.model."): value for key, value in t.items()}, {"PEFT"}, "prefix"),
        (lambda t: t | {min(t): t[min(t)] * float("nan")}, _READERS, "NaN"),
    ],
)
def test_tensors_fit_where_they_fit(saved, change, misfits, named):
    """The same for tensors: extra ones, half pairs, names without the prefix, values that are not numbers."""
    _spoil(saved, change)
    verdicts = _by_target(read_facts(saved))
    assert {target for target, verdict in verdicts.items() if not verdict.fits} == misfits | {"Ollama"}
    assert all(named in verdicts[target].line() for target in misfits)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_outer_modules_are_a_condition(saved, module):
    """An adapted head or embedding fits where the base model's class allows it, and the line says so."""
    tensors = load_file(saved / WEIGHTS)
    tensors |= {
        f"base_model.model.{module}.lora_A.weight": torch.ones(4, 32),
        f"base_model.model.{module}.lora_B.weight": torch.ones(30, 4),
    }
    save_file(tensors, saved / WEIGHTS)
    verdicts = _by_target(read_facts(saved))
    assert verdicts["vLLM"].fits and module in verdicts["vLLM"].line()
    assert (module == "lm_head") == ("lm_head" in verdicts["llama.cpp"].line())


def test_a_base_model_off_the_hub_is_a_condition(llama_layout, random_adapter, tmp_path):
    """llama.cpp's converter must be told where the base model's config lies."""
    random_adapter(llama_layout).save_pretrained(tmp_path)
    assert "--base-model" in _by_target(read_facts(tmp_path))["llama.cpp"].line()


def test_what_peft_writes_for_plain_lora_fits(tiny_models, tmp_path):
    """No false alarm: a folder that PEFT itself wrote fits all that read PEFT's."""
    model = tiny_models["llama"].build()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="toys/base-lm")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    _change(tmp_path, base_model_name_or_path="toys/base-lm")
    verdicts = _by_target(read_facts(tmp_path))
    assert all(verdicts[target].line() == "yes" for target in _READERS - {"MLX"})


def _spoil(folder, change):
    save_file(change(dict(sorted(load_file(folder / WEIGHTS).items()))), folder / WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {key.removeprefix("base_model.model."): value for key, value in t.items()},
        lambda t: dict(list(t.items())[1:]),
        lambda t: t | {min(t): t[min(t)] * float("nan")},
    ],
    ids=["prefix", "pairs", "finite"],
)
def test_peft_alone_would_not_stop_these(saved, tiny_models, change):
    """Why lorag says no where PEFT loads: without the prefix, without half of a pair, or with NaN it raises nothing."""
    _spoil(saved, change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert peft.PeftModel.from_pretrained(tiny_models["llama"].build(), saved)
    assert not _by_target(read_facts(saved))["PEFT"].fits


def test_rules_take_any_config():
    """A config from anywhere ends in a verdict, never in an error."""
    strange = [None, [], {}, "x", 3, 1e300, [[]], {"a": []}, True]
    keys = (
        "r lora_alpha rank_pattern alpha_pattern bias peft_type init_lora_weights task_type base_model_name_or_path target_modules".split()
    )
    spec = {"x.lora_A.weight": ("F32", ()), "base_model.model.y.lora_B.weight": ("F32", (2,)), "": ("F32", (0, 0))}
    for value in strange:
        for key in keys:
            for verdict in check_portability(Facts({"peft_type": "LORA", "r": 4, key: value}, spec)):
                assert isinstance(verdict.line(), str)


def test_every_rule_stands_in_the_docs_with_a_source():
    """docs/portability.md has one row a rule, each with an address or a file where it was found."""
    text = DOCS.read_text(encoding="utf-8")
    for target, rules in TARGETS.items():
        section = text.split(f"## {target}\n")[1].split("\n## ")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.M))
        assert set(rows) == {rule.name for rule in rules}, target
        assert all("https://" in row or "`peft/" in row for row in rows.values()), target
        for name, row in rows.items():  # what ran the program, or that nothing did
            runs = re.findall(r"run in `(tests/[\w/]+\.py)::(\w+)`", row)
            assert bool(runs) != ("read, not run" in row), f"{target} {name}"
            for file, test in runs:
                assert f"def {test}(" in (DOCS.parent.parent / file).read_text(encoding="utf-8"), test


def test_info_says_where_an_adapter_fits(saved):
    """`lorag info`: one line per program."""
    text = describe_path(saved)
    assert re.search(r"^in PEFT: +yes$", text, re.M) and re.search(r"^in llama.cpp: +yes$", text, re.M)
    _change(saved, use_rslora=True)
    assert re.search(r"^in llama.cpp: +no: its converter ignores use_rslora", describe_path(saved), re.M)


# --- an adapter's own layout --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_layout_is_the_base_model_s(tiny, random_adapter, tmp_path):
    """Without a base model at hand the tensors tell the modules; applied, the adapter does the same in six architectures."""
    layout = tiny.layout()
    adapter = random_adapter(layout)
    back = LoraAdapter.from_pretrained(adapter.save_pretrained(tmp_path))
    assert set(back.layout.modules) == set(layout.modules)
    assert (back.layout.target_modules, back.layout.fan_in_fan_out) == (layout.target_modules, layout.fan_in_fan_out)
    inputs = tiny.inputs(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (one.apply_to(tiny.build())(**inputs)[0] for one in (adapter, back))
    assert torch.equal(ours, theirs)


def test_layers_are_sorted_by_number():
    """Layer 10 comes after layer 9."""
    spec = {f"base_model.model.l.{i}.q.lora_{x}.weight": ("F32", (2, 3) if x == "A" else (3, 2)) for i in (10, 9, 2) for x in "AB"}
    assert own_layout({"target_modules": ["q"]}, spec, Path("x")).names == ("l.2.q", "l.9.q", "l.10.q")


def test_targets_that_say_too_much_are_spelled_out():
    """With layers_to_transform, or an expression, the modules themselves are the targets."""
    spec = {f"base_model.model.l.0.q.lora_{x}.weight": ("F32", (2, 3) if x == "A" else (3, 2)) for x in "AB"}
    for config in ({"target_modules": ["q"], "layers_to_transform": [0]}, {"target_modules": r".*\.q"}, {}):
        assert own_layout(config, spec, Path("x")).target_modules == ("l.0.q",)
    assert own_layout({"target_modules": ["q", "absent"]}, spec, Path("x")).target_modules == ("q",)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"x": ("F32", (2, 2))},
        {"base_model.model.q.lora_A.weight": ("F32", (2, 3))},
        {f"base_model.model.q.lora_{x}.weight": ("F32", (3,)) for x in "AB"},
    ],
)
def test_tensors_that_are_no_adapter(spec):
    """No factors, half of a pair, or vectors: AdapterError."""
    with pytest.raises(AdapterError):
        own_layout({}, spec, Path("x"))


# --- transformers' own way, and wrappers ----------------------------------------------------------------------------------


def test_transformers_loads_it_without_peft_s_model(saved, tiny_models):
    """`load_adapter` computes what PeftModel does, and takes names without the prefix too; half a pair it loads without a word."""
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(tiny_models["llama"].build(), saved)(input_ids=ids).logits
        model = tiny_models["llama"].build()
        model.load_adapter(str(saved))
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    _spoil(saved, lambda t: dict(list(t.items())[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_models["llama"].build().load_adapter(str(saved))
    assert not _by_target(read_facts(saved))["transformers"].fits


def test_an_adapter_of_the_text_class_does_nothing_in_a_wrapper(saved, tmp_path):
    """vLLM: "no" where the base model's own config says that it reads images, a condition where its name does, nothing otherwise."""
    assert _by_target(read_facts(saved))["vLLM"].line() == "yes"
    for name in ("google/gemma-3-4b-it", "Qwen/Qwen2.5-VL-7B-Instruct", "meta-llama/Llama-4-Scout-17B-16E"):
        _change(saved, base_model_name_or_path=name)
        line = _by_target(read_facts(saved))["vLLM"].line()
        assert line.startswith("yes, if") and "text-only class" in line
    for name in ("google/gemma-3-1b-it", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.2-3B", "toys/base"):
        _change(saved, base_model_name_or_path=name)
        assert _by_target(read_facts(saved))["vLLM"].line() == "yes"
    (tmp_path / "wrapper").mkdir()
    _change(saved, base_model_name_or_path=str(tmp_path / "wrapper"))
    (tmp_path / "wrapper" / "config.json").write_text('{"model_type": "gemma3", "vision_config": {}, "text_config": {}}')
    assert re.search("no: .*matches nothing and does nothing", _by_target(read_facts(saved))["vLLM"].line())
    (tmp_path / "wrapper" / "config.json").write_text('{"model_type": "gemma3_text"}')
    assert _by_target(read_facts(saved))["vLLM"].fits
    (tmp_path / "wrapper" / "config.json").write_text("not JSON")
    assert _by_target(read_facts(saved))["vLLM"].fits
