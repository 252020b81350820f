"""Adapters: what lorag writes means the same to PEFT and back, and what is not plain, whole and finite LoRA is refused."""

import dataclasses
import json
import math
import struct
import warnings

import peft
import pytest
import torch
from conftest import output_of
from safetensors.torch import load_file, save_file

from lorag.adapters.adapter import CONFIG, PROVENANCE, WEIGHTS, LoraAdapter
from lorag.adapters.factors import Factors
from lorag.errors import AdapterError, ArtifactError, BaseModelError, LayoutError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- to PEFT ----------------------------------------------------------------------------------------------------------


def _check_against_stock_peft(tiny, adapter, folder, dtype):
    rng = torch.Generator().manual_seed(1)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs(3, rng).items()}
    with torch.no_grad():
        bare = output_of(tiny.build().to(dtype), inputs)
        adapter.save_pretrained(folder)
        stock = output_of(peft.PeftModel.from_pretrained(tiny.build().to(dtype), folder), inputs)
        ours = output_of(adapter.apply_to(tiny.build().to(dtype)), inputs)
    assert (stock - bare).abs().max() > 0.1
    assert torch.equal(ours, stock)


@pytest.mark.slow
def test_saved_adapter_in_stock_peft_equals_apply_to(tiny, random_adapter, tmp_path):
    """PEFT alone, given the folder, computes what apply_to computes; in six architectures."""
    _check_against_stock_peft(tiny, dataclasses.replace(random_adapter(tiny.layout()), task_type=tiny.task_type), tmp_path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_every_precision_loads_in_stock_peft(tiny_models, random_adapter, tmp_path, weights, base):
    """fp32, bf16 and fp16 factors on fp32, bf16 and fp16 base models."""
    tiny = tiny_models["llama"]
    _check_against_stock_peft(tiny, random_adapter(tiny.layout(), dtype=weights), tmp_path, base)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {weights}


@pytest.mark.slow
def test_all_linear_and_expression_layouts_load_in_stock_peft(tiny_models, random_adapter, tmp_path):
    """Layouts that were asked for by "all-linear" or by an expression are saved with names that PEFT matches."""
    tiny = tiny_models["llama"]
    for number, targets in enumerate(["all-linear", r".*\.1\..*(q|v)_proj"]):
        layout = type(tiny.layout()).from_model(tiny.build(), targets)
        _check_against_stock_peft(tiny, random_adapter(layout), tmp_path / str(number), torch.float32)


@pytest.mark.slow
def test_delta_is_what_peft_adds(tiny, random_adapter):
    """delta(module) is PEFT's own delta weight, which GPT-2 stores transposed."""
    adapter = random_adapter(tiny.layout(), rank=3, alpha=5.0)
    modules = dict(adapter.apply_to(tiny.build()).get_base_model().named_modules())
    for name in adapter.layout.names:
        theirs = modules[name].get_delta_weight("default")
        theirs = theirs.T if adapter.layout.fan_in_fan_out else theirs
        assert torch.allclose(adapter.delta(name), theirs, atol=1e-6)


def test_saving_twice_gives_the_same_bytes(llama_layout, random_adapter, tmp_path):
    """Same adapter, same bytes, in every file."""
    adapter = random_adapter(llama_layout)
    first, second = adapter.save_pretrained(tmp_path / "a"), adapter.save_pretrained(tmp_path / "b")
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(["README.md", CONFIG, PROVENANCE, WEIGHTS])
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_portable_profile(tiny_models, random_adapter, tmp_path):
    """One r, one lora_alpha, no bias, no DoRA, no rsLoRA, sorted targets, sorted keys, provenance beside it."""
    for name in ("llama", "gpt2"):
        layout = tiny_models[name].layout()
        folder = random_adapter(layout, rank=3, alpha=6.0).save_pretrained(tmp_path / name)
        config = json.loads((folder / CONFIG).read_text())
        assert list(config) == sorted(config)
        expected = {
            "peft_type": "LORA",
            "r": 3,
            "lora_alpha": 6,
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": None,
            "inference_mode": True,
            "fan_in_fan_out": name == "gpt2",
            "target_modules": sorted(layout.target_modules),
            "base_model_name_or_path": "tiny-base",
        }
        assert {key: config[key] for key in expected} == expected
        assert list(load_file(folder / WEIGHTS)) == sorted(load_file(folder / WEIGHTS))
        assert json.loads((folder / PROVENANCE).read_text())["kind"] == "adapter"


@pytest.mark.slow
def test_round_trip(tiny, random_adapter, tmp_path):
    """What was saved is read back exactly: factors, alpha, base model, task type and provenance."""
    layout = tiny.layout()
    adapter = dataclasses.replace(random_adapter(layout, rank=3, alpha=4.5), task_type=tiny.task_type)
    back = LoraAdapter.from_pretrained(adapter.save_pretrained(tmp_path), layout)
    assert (back.alpha, back.rank, back.base_model, back.task_type, back.layout) == (4.5, 3, "tiny-base", tiny.task_type, layout)
    assert back.info["seed"] == 0
    for name in layout.names:
        assert all(torch.equal(a, b) for a, b in zip(back.factors[name], adapter.factors[name], strict=True))


# --- from PEFT --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": -3},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 11}},
        {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3, "^layers.0.self_attn.q_proj": 64}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"down_proj": 1, "v_proj": 40}},
    ],
    ids=str,
)
def test_peft_adapters_are_read_as_peft_means_them(tiny_models, tmp_path, settings):
    """rsLoRA, rank_pattern and alpha_pattern fold into one rank and alpha; each ΔW equals PEFT's own."""
    tiny = tiny_models["llama"]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": list(tiny.targets), "init_lora_weights": False, **settings})
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(tiny.build(), config)
    wrapped.save_pretrained(tmp_path)
    adapter = LoraAdapter.from_pretrained(tmp_path, tiny.layout())
    modules = dict(wrapped.get_base_model().named_modules())
    for name in adapter.layout.names:
        theirs = modules[name].get_delta_weight("default").detach()
        assert torch.allclose(adapter.delta(name), theirs, atol=1e-5 * theirs.abs().max().item()), name
    again = LoraAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "again"), tiny.layout())
    assert all(torch.equal(again.delta(name), adapter.delta(name)) for name in again.layout.names)


def test_adapter_of_fewer_modules_needs_leave(tiny_models, tmp_path):
    """Modules without tensors are refused by default; allow_missing counts them as unchanged."""
    tiny = tiny_models["llama"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny.build(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="missing"):
        LoraAdapter.from_pretrained(tmp_path, tiny.layout())
    norms = LoraAdapter.from_pretrained(tmp_path, tiny.layout(), allow_missing=True).norms()
    assert all((norm > 0) == name.endswith("q_proj") for name, norm in norms.items())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(llama_layout, random_adapter, tmp_path):
    """A good adapter folder, to be spoiled."""
    return random_adapter(llama_layout).save_pretrained(tmp_path / "adapter")


def _refused(folder, layout, *named):
    with pytest.raises((AdapterError, ArtifactError)) as caught:
        LoraAdapter.from_pretrained(folder, layout)
    assert all(text in str(caught.value) for text in named), str(caught.value)


def _config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _rename(tensors):
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_rename, "prefix"),
        (lambda t: {k: v for k, v in t.items() if k != FIRST}, FIRST),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(2)}, "base_model.model.lm_head.weight"),
        (lambda t: {**t, FIRST.replace("lora_A", "lora_magnitude_vector"): torch.zeros(2)}, "lora_magnitude_vector"),
        (lambda t: {**t, FIRST: t[FIRST].T.contiguous()}, FIRST),
        (lambda t: {**t, FIRST: t[FIRST][:2].clone()}, FIRST),
        (lambda t: {**t, FIRST: t[FIRST].to(torch.int8)}, FIRST),
        (lambda t: {**t, FIRST: t[FIRST] * math.nan}, "model.layers.0.self_attn.q_proj"),
        (lambda t: {**t, FIRST: t[FIRST] / 0}, "model.layers.0.self_attn.q_proj"),
        (lambda t: {}, ""),
    ],
    ids=["prefix", "missing", "extra", "dora-vector", "transposed", "short", "integers", "nan", "inf", "empty"],
)
def test_spoiled_tensors_are_refused(saved, llama_layout, spoil, named):
    """PEFT warns at most of any of these; lorag refuses each and names the tensor, module or file."""
    save_file(spoil(load_file(saved / WEIGHTS)), saved / WEIGHTS)
    _refused(saved, llama_layout, named)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 1e30},
        {"lora_alpha": 0},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": None},
        {"r": 200_000},
        {"r": 0},
        {"r": 4.0},
        {"r": 5},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["experts.weight"]},
        {"trainable_token_indices": [1]},
        {"use_qalora": True},
        {"kasa_config": {"beta": 1.0}},
        {"monteclora_config": {}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"rank_pattern": [4]},
        {"rank_pattern": {"q_proj": 200_000}},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(((a{100}){100}){100})": 4}},
        {"alpha_pattern": {"q_proj": 1e30}},
    ],
    ids=str,
)
def test_spoiled_configs_are_refused(saved, llama_layout, changes):
    """Numbers that poison or exhaust, and settings under which the weights mean something else; the key is named."""
    _config(saved, **changes)
    # NaN and infinity are not JSON: there the file is refused before the key is known.
    outside_json = [v for v in changes.values() if isinstance(v, float) and not math.isfinite(v)]
    _refused(saved, llama_layout, CONFIG if outside_json else WEIGHTS if changes == {"r": 5} else next(iter(changes)))


def test_infinity_spelled_as_a_number_is_refused(saved, llama_layout):
    """1e999 is valid JSON and infinity in Python."""
    text = (saved / CONFIG).read_text()
    (saved / CONFIG).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 1e999'))
    assert "1e999" in (saved / CONFIG).read_text()
    _refused(saved, llama_layout, CONFIG)


def test_key_given_twice_is_refused(saved, llama_layout):
    """Of two values for r, none is the right one."""
    (saved / CONFIG).write_text((saved / CONFIG).read_text().replace("{", '{"r": 2,', 1))
    _refused(saved, llama_layout, CONFIG)


def test_lying_header_is_refused_before_allocation(saved, llama_layout):
    """A header that promises 4 TB is judged by the file's size."""
    raw = (saved / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header[FIRST]["shape"] = [2**20, 2**20]
    text = json.dumps(header).encode()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    _refused(saved, llama_layout, WEIGHTS)


def test_pickled_weights_are_never_read(saved, llama_layout):
    """A folder with adapter_model.bin alone is refused, and so is a pickle under the safetensors name."""
    tensors = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    _refused(saved, llama_layout, WEIGHTS)
    (saved / "adapter_model.bin").rename(saved / WEIGHTS)
    _refused(saved, llama_layout, WEIGHTS)


def test_folder_without_config_is_refused(saved, llama_layout):
    """No config, no adapter."""
    (saved / CONFIG).unlink()
    _refused(saved, llama_layout, CONFIG, str(saved))


def test_poisonous_adapters_go_nowhere(llama_layout, random_adapter, tiny_models, tmp_path):
    """The same rules hold on writing and applying: no NaN, no value beyond use, no odd alpha, no mixed ranks, no rank 0."""
    good = random_adapter(llama_layout)
    tensors = good.factors.tensors
    first = llama_layout.names[0]
    rows, columns = tensors[first]
    for alpha in (math.nan, math.inf, 0.0, 1e30, -1e30):
        with pytest.raises(AdapterError, match="lora_alpha"):
            Factors.with_alpha(tensors, alpha)
        with pytest.raises(AdapterError, match="lora_alpha"):
            dataclasses.replace(good, factors=Factors(tensors, alpha)).save_pretrained(tmp_path)
    for spoiled in (rows * math.nan, rows / 0, rows * 1e12):
        bad = dataclasses.replace(good, factors=Factors({**tensors, first: (spoiled, columns)}))
        with pytest.raises(AdapterError, match=first):
            bad.save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match=first):
            bad.apply_to(tiny_models["llama"].build())
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="one rank"):
        dataclasses.replace(good, factors=Factors({**tensors, first: (rows[:2], columns[:, :2])}))
    with pytest.raises(AdapterError, match="rank"):
        dataclasses.replace(good, factors=Factors({n: (a[:0], b[:, :0]) for n, (a, b) in tensors.items()}))
    with pytest.raises(LayoutError, match=first):
        dataclasses.replace(good, factors=Factors({n: pair for n, pair in tensors.items() if n != first}))


# --- use --------------------------------------------------------------------------------------------------------------


def test_other_base_models_are_refused_and_stay_bare(tiny_models, random_adapter):
    """Other modules, other sizes or more layers: BaseModelError, and the model is not left half adapted."""
    adapter = random_adapter(tiny_models["llama"].layout())
    for model in (
        tiny_models["gpt2"].build(),
        tiny_models["bert"].build(),
        tiny_models["llama"].build(layers=1),
        tiny_models["llama"].build(layers=3),
        tiny_models["qwen2"].build(),  # same names, narrower v
    ):
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(BaseModelError):
            adapter.apply_to(model)
        assert [name for name, _ in model.named_modules()] == before, type(model)


@pytest.mark.slow
def test_wrapped_model_takes_a_second_adapter_or_a_replacement(tiny_models, random_adapter):
    """Applied to a PeftModel, an adapter replaces the one of its name, or joins it under another name."""
    tiny = tiny_models["llama"]
    layout = tiny.layout()
    one, two, three = (random_adapter(layout, rank=rank, seed=seed) for rank, seed in ((4, 1), (4, 2), (6, 3)))
    inputs = tiny.inputs(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [output_of(adapter.apply_to(tiny.build()), inputs) for adapter in (one, two, three)]
        model = one.apply_to(tiny.build())
        assert two.apply_to(model, name="second") is model
        assert sorted(model.peft_config) == ["default", "second"]
        assert torch.equal(output_of(model, inputs), alone[1])
        model.set_adapter("default")
        assert torch.equal(output_of(model, inputs), alone[0])
        three.apply_to(model)
        assert sorted(model.peft_config) == ["default", "second"]
        assert model.peft_config["default"].r == 6
        assert torch.equal(output_of(model, inputs), alone[2])
        model.set_adapter("second")
        assert torch.equal(output_of(model, inputs), alone[1])
        only = two.apply_to(one.apply_to(tiny.build()))
        assert sorted(only.peft_config) == ["default"]
        assert torch.equal(output_of(only, inputs), alone[1])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in only.parameters())


@pytest.mark.slow
def test_applying_is_silent(tiny, random_adapter):
    """PEFT has nothing to warn of in what apply_to asks of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        random_adapter(tiny.layout()).apply_to(tiny.build())


def test_names_may_be_numbers(tiny_models, llama_layout, random_adapter):
    """An adapter that is called as a layer is, such as 1, can be added beside another one."""
    wrapped = random_adapter(llama_layout).apply_to(tiny_models["llama"].build(), name="0")
    assert set(random_adapter(llama_layout, seed=1).apply_to(wrapped, name="1").peft_config) == {"0", "1"}


def test_without_a_base_model_apply_to_asks_for_one(llama_layout, random_adapter):
    """An adapter that names no base model needs one passed."""
    with pytest.raises(BaseModelError, match="names no base model"):
        dataclasses.replace(random_adapter(llama_layout), base_model=None).apply_to()


def test_norms_are_frobenius_norms(tiny, random_adapter):
    """norms() never forms ΔW, and equals its Frobenius norm."""
    adapter = random_adapter(tiny.layout(), rank=5, alpha=-3.0)
    for name, norm in adapter.norms().items():
        assert norm == pytest.approx(torch.linalg.norm(adapter.delta(name).double()).item(), rel=1e-5)


def test_scaled_multiplies_delta(llama_layout, random_adapter):
    """scaled(s) multiplies every ΔW by s; a strength that is not a number from 0 to 100 is refused."""
    adapter = random_adapter(llama_layout)
    for strength in (0.0, 0.5, 3.0):
        scaled = adapter.scaled(strength)
        for name in llama_layout.names:
            assert torch.allclose(scaled.delta(name), strength * adapter.delta(name), atol=1e-5)
        assert (scaled.rank, scaled.alpha, scaled.info) == (adapter.rank, adapter.alpha, adapter.info)
    for strength in (-1, 101, math.nan, math.inf):
        with pytest.raises(AdapterError, match="strength"):
            adapter.scaled(strength)
