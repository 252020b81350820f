"""Generators: every registered method, from a bank to the bytes of an adapter, on a world whose right answers are known."""

import dataclasses
import inspect

import pytest
import torch
from toy_world import (
    HELD_OUT,
    TRAINING,
    WordEmbedder,
    describe,
    interruptible_loop,
    make_bank,
    make_suite,
    name_of,
    other_form,
    prepare_toy,
    quiet_loop,
    save_base,
    true_adapter,
)

from lorag import progress
from lorag.adapters.adapter import WEIGHTS
from lorag.bank.bank import AdapterBank
from lorag.base.objectives import make_objective
from lorag.base.runner import Runner
from lorag.errors import ConfigError, FormatVersionError, GeneratorError, LoragError
from lorag.files.artifacts import read_json, write_json
from lorag.generator.generate import generate_lora, generate_loras
from lorag.generator.lora_generator import LoraGenerator
from lorag.generator.settings import GenerateSettings
from lorag.methods import METHODS, TrainingSet, method_type
from lorag.methods.functional import mean_loss
from lorag.methods.method import _distance
from lorag.methods.regression import _left_out_error
from lorag.methods.training_loop import Batch, LoopSettings
from lorag.text.conditioning import Conditioner, mixture
from lorag.training.calibrate import tune_strength
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

KERNEL = {"steps": 30, "width": 32, "queries": 4, "features": 24, "groups": 3, "learning_rate": 3e-3, "dropout": 0.0}
QUICK = {
    "kernel": {**KERNEL, "steps": 60},
    "mlp": {"steps": 150, "width": 128, "learning_rate": 3e-3, "dropout": 0.0},
    "hypernet": {"steps": 20, "width": 32, "depth": 1, "module_width": 16, "batch": 16},
    "icm_fusion": {"steps": 60, "meta_steps": 2, "sets": {"steps": 0}, "tasks": 4, "examples": 1, "width": 32, "latent": 16},
    "icm_lora": {
        "steps": 60,
        "width": 32,
        "queries": 4,
        "hidden": 64,
        "latent": 8,
        "learning_rate": 3e-3,
        "dropout": 0.0,
        "kernel": KERNEL,
    },
    "sg_lora": {"steps": 60, "width": 64, "latent": 8, "reading": 32, "queries": 4, "features": 64},
    "house": {
        "functional": {"steps": 0},
        "ensemble": {"count": 0},
        "kernel_steps": 80,
        "width": 64,
        "queries": 4,
        "layers": 1,
        "hidden": 96,
        "learning_rate": 3e-3,
        "dropout": 0.0,
        "word_dropout": 0.0,
        "noise": 0.0,
    },
    "attention": {"functional": {"steps": 2, "tasks": 4, "examples": 1}},
    "multitask": {"steps": 10, "tasks": 8, "batch": 2},
}
SHORT = {  # steps enough to see what is the same and what is not
    "mlp": {"steps": 10},
    "kernel": {"steps": 10},
    "house": {"kernel_steps": 10},
    "icm_lora": {"steps": 10, "kernel": {**KERNEL, "steps": 6}},
    "sg_lora": {"steps": 10},
}
LEARNED = ("ridge", "mlp", "kernel", "house")
VAES = ("icm_lora", "sg_lora")
GAUGE_FREE = ("mean", "nearest", "top_k", *LEARNED, *VAES)
BANK_METHODS = sorted(set(METHODS) - {"aligned"})  # which has a file of its own, for it takes another weight space
EACH_METHOD = [pytest.param(name, marks=() if name in ("nearest", "ridge", "sg_mixture") else pytest.mark.slow) for name in BANK_METHODS]
EMBEDDER = WordEmbedder()


def _fit(prepared, name, seed=0, **settings):
    method = method_type(name).with_settings({**QUICK.get(name, {}), **settings})
    return fit_generator(prepared, method, quiet_loop(seed=seed), rank=8, strength=1.0, origin={})


def _prepare(bank, suite=None, **rule):
    return prepare_toy(bank, RunTasks(suite), SplitRule(**rule), k=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base):
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)
    return _prepare(bank, suite=make_suite(TRAINING), validation=0.1)


@pytest.fixture(scope="module")
def fitted(prepared):
    """Every registered generator, fitted once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = _fit(prepared, name)
        return made[name]

    return get


def _bytes(adapter, folder):
    adapter.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _error(adapter, cell):
    """Relative distance of ΔW to the right one, over all modules."""
    right = true_adapter(adapter.layout, *cell)
    pairs = [(adapter.delta(n), right.delta(n)) for n in adapter.layout.names]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH_METHOD)
def test_codes_have_the_space_s_shape_and_are_finite(fitted, prepared, name):
    """`count` codes of length c; methods that do not sample repeat one code, those that do obey their rng."""
    generator = fitted(name)
    condition = generator.condition("paint the red dog")
    codes = generator.method.generate(condition, torch.Generator().manual_seed(1), 3)
    assert codes.shape == (3, prepared.space.size)
    assert codes.isfinite().all()
    assert torch.equal(codes, generator.method.generate(condition, torch.Generator().manual_seed(1), 3))
    sampled = name in ("random", "sg_mixture", *VAES)
    assert torch.equal(codes, codes[:1].expand(3, -1)) != sampled
    assert generator.method.size() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BANK_METHODS)
def test_saved_and_opened_it_writes_the_same_bytes(fitted, tmp_path, name):
    """Every file of the adapter, made with the fitted generator, with the opened one, and with it saved once more."""
    generator = fitted(name)
    generator.save_pretrained(tmp_path / "g")
    opened = LoraGenerator.from_pretrained(tmp_path / "g", embedder=EMBEDDER)
    opened.save_pretrained(tmp_path / "again")
    assert (tmp_path / "g/generator.safetensors").read_bytes() == (tmp_path / "again/generator.safetensors").read_bytes()
    texts = ["paint the red dog", "blue fish please", "something else entirely"]
    for number, text in enumerate(texts):
        first = _bytes(generator.generate(text, seed=number), tmp_path / f"a{number}")
        assert first == _bytes(opened.generate(text, seed=number), tmp_path / f"b{number}")
    assert opened.origin == generator.origin and opened.revision == generator.revision != "unsaved"


@pytest.mark.slow
@pytest.mark.parametrize("name", BANK_METHODS)
def test_an_adapter_does_not_depend_on_those_made_beside_it(fitted, tmp_path, name):
    """generate_loras of three descriptions of different lengths equals each alone, byte for byte, in any order."""
    texts = ["red dog", "would you please paint the blue fish for me today", "pink cat please"]
    together = generate_loras(texts, generator=fitted(name), seed=5)
    turned = generate_loras(texts[::-1], generator=fitted(name), seed=5)[::-1]
    for number, text in enumerate(texts):
        alone = _bytes(generate_loras([text], generator=fitted(name), seed=5)[0], tmp_path / f"alone{number}")
        assert alone == _bytes(together[number], tmp_path / f"together{number}") == _bytes(turned[number], tmp_path / f"turned{number}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LEARNED, *VAES, "multitask"])
def test_fitting_twice_gives_the_same_tensors(prepared, fitted, name):
    """One seed, one result: dropout included; and another seed another one, where there is anything to draw."""
    settings = SHORT.get(name, {}) | ({} if name in ("ridge", "multitask", "sg_lora") else {"dropout": 0.2})
    runs = []
    for _ in range(2):
        torch.rand(3)  # the global stream moves on between runs and must not matter
        runs.append(_fit(prepared, name, **settings).method.state().tensors)
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    if name != "ridge":
        other = _fit(prepared, name, seed=1, **settings).method.state().tensors
        assert any(not torch.equal(runs[0][key], other[key]) for key in other)


def test_unknown_methods_and_settings_are_named():
    """ConfigError with the name, whatever is unknown or of the wrong type."""
    with pytest.raises(ConfigError, match="oracle_of_delphi"):
        method_type("oracle_of_delphi")
    with pytest.raises(ConfigError, match="stepps"):
        method_type("mlp").with_settings({"stepps": 3})
    with pytest.raises(ConfigError, match="steps"):
        method_type("mlp").with_settings({"steps": "many"})


@pytest.mark.slow
def test_stored_tensors_that_do_not_fit_are_refused(fitted):
    """GeneratorError on a missing tensor, for every method."""
    for name in BANK_METHODS:
        tensors, shape = fitted(name).method.state()
        lost = {key: tensors[key] for key in sorted(tensors)[1:]}
        with pytest.raises(GeneratorError, match=name):
            method_type(name).with_settings(fitted(name).method.values()).restore(lost, shape)


def test_another_embedder_is_refused(fitted, tmp_path):
    """A generator knows the embedder that it was fitted with."""
    fitted("ridge").save_pretrained(tmp_path)
    other = WordEmbedder()
    other.name = "other words"
    with pytest.raises(GeneratorError, match="other words"):
        LoraGenerator.from_pretrained(tmp_path, embedder=other)


def test_a_manifest_of_other_things_is_refused(fitted, tmp_path):
    """Each part of generator.json left out or replaced by something else: a named error, or a part that may be so."""
    folder = fitted("ridge").save_pretrained(tmp_path)
    sound, optional = read_json(folder / "generator.json"), {"licenses", "origin", "words", "lorag"}
    harmless = (("gate", None), ("strength", 0), ("strength", -1.5), ("settings", {}), ("shape", {"a": 1}))
    for key in sound:
        for odd in ("left out", None, 0, -1.5, "x", [], {}, [1], {"a": 1}, [["x"]], True):
            if odd == sound[key]:
                continue
            changed = {**sound, key: odd} if odd != "left out" else {name: one for name, one in sound.items() if name != key}
            write_json(folder / "generator.json", changed)
            try:
                LoraGenerator.from_pretrained(folder, embedder=EMBEDDER)
            except LoragError as error:
                assert key not in optional or odd != "left out", error
                continue
            assert key in optional or (key, odd) in harmless, f"{key}: {odd!r} was taken"
    with pytest.raises(GeneratorError, match=r"generator\.json cannot be read; got no rank"):
        write_json(folder / "generator.json", {name: one for name, one in sound.items() if name != "rank"})
        LoraGenerator.from_pretrained(folder, embedder=EMBEDDER)


@pytest.mark.slow
def test_generators_that_read_tokens_otherwise_are_refused(fitted, tmp_path):
    """Format 1 was fitted on the embedder's last layer alone: opened with today's vectors it would be worse, and silently so."""
    fitted("house").save_pretrained(tmp_path)
    manifest = read_json(tmp_path / "generator.json")
    write_json(tmp_path / "generator.json", {**manifest, "format": 1})
    with pytest.raises(FormatVersionError, match="format 1.*format 3.*rebuild"):
        LoraGenerator.from_pretrained(tmp_path, embedder=EMBEDDER)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("mlp", {}), ("house", {"kernel_steps": 0})])
def test_four_experts_are_learned_by_heart(tmp_path, base, name, settings):
    """Overfitting: relative error of the codes below 0.1, so nothing between description and code is in the way.

    A regression over experts shrinks toward their mean by its noise, so it is not what is asked here.
    """
    four = _prepare(make_bank(tmp_path / "bank", base, TRAINING[:4]), validation=0.0)
    method = _fit(four, name, steps=100, **settings).method
    for index in range(4):
        made = method.generate(four.data.conditioner(four.data.embeddings[index][0]), torch.Generator())
        assert (made[0] - four.data.codes[index]).norm() < 0.1 * four.data.codes[index].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_learned_generators_beat_the_mean_and_the_wrong_description(fitted, name):
    """On combinations that no expert has: nearer to the right ΔW than the bank's mean, any expert, or another description's."""
    for place, cell in enumerate(HELD_OUT):
        text = describe(*cell)[0]
        wrong = describe(*HELD_OUT[(place + 1) % len(HELD_OUT)])[0]
        matched = _error(fitted(name).generate(text), cell)
        assert matched < 0.8 * _error(fitted("mean").generate(text), cell)
        assert matched < 0.8 * _error(fitted("nearest").generate(text), cell)
        assert matched < 0.7 * _error(fitted(name).generate(wrong), cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", GAUGE_FREE)
def test_gauge_and_rank_of_the_experts_do_not_matter(base, prepared, fitted, tmp_path_factory, name):
    """The same experts in another gauge, rank 6 instead of 4 and another alpha: the same ΔW within 1e-3."""
    folder = tmp_path_factory.getbasetemp() / "turned-bank"
    if not folder.exists():
        make_bank(folder, base, TRAINING, lambda adapter, number: other_form(adapter, 100 + number))
    turned = _prepare(AdapterBank.from_pretrained(folder), validation=0.1)
    plain, other = (_fit(one, name, **SHORT.get(name, {})).generate("paint the red dog") for one in (prepared, turned))
    for module in base.layout.names:
        assert (plain.delta(module) - other.delta(module)).norm() < 1e-3 * plain.delta(module).norm()


@pytest.mark.slow
def test_functional_steps_lower_the_base_model_s_loss(prepared):
    """House with functional steps, and multitask, reach a lower loss on the experts' own tasks than they started with."""
    data, runner = prepared.data, prepared.runner
    start = mean_loss(runner, data, data.codes.mean(0).expand(len(data.codes), -1), range(len(data.codes)), 4, "check")
    one = _fit(prepared, "multitask", steps=20, learning_rate=0.2).method.code
    assert mean_loss(runner, data, one.expand(len(data.codes), -1), range(len(data.codes)), 4, "check") < start - 0.05
    before, after = (
        _fit(prepared, "house", steps=20, functional={"steps": n, "tasks": 8, "examples": 2, "learning_rate": 3e-3}).method for n in (0, 20)
    )
    losses = []
    for method in (before, after):
        codes = torch.cat([method.generate(data.conditioner(own[0]), torch.Generator()) for own in data.embeddings])
        losses.append(mean_loss(runner, data, codes, range(len(codes)), 4, "check"))
    assert losses[1] < losses[0] - 0.05


@pytest.mark.parametrize(("name", "settings"), [("multitask", {}), ("house", {"functional": {"steps": 2}})])
def test_methods_that_run_the_base_model_ask_for_examples(prepared, name, settings):
    """Without a suite they are refused before any training, and the message names the missing setting."""
    bare = dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, tasks=()), runner=None)
    with pytest.raises(GeneratorError, match="tasks=PATH"):
        _fit(bare, name, **settings)


def test_a_loss_of_a_broadcast_shape_is_refused():
    """(b, c) against (c,) or (1, c) would pull all codes to their mean; it raises instead."""
    with pytest.raises(AssertionError, match="against"):
        _distance(torch.zeros(3, 5), torch.zeros(5))
    with pytest.raises(AssertionError, match="against"):
        _distance(torch.zeros(3, 5), torch.zeros(1, 5))


@pytest.mark.slow
def test_strength_is_found_on_held_out_experts(prepared):
    """A generator whose codes give a third of the right ΔW gets a factor above 1; without examples the factor is 1."""
    data = prepared.data
    space = prepared.space

    class Third(method_type("nearest")):
        def generate(self, condition, rng, count=1):
            index = next(i for i, own in enumerate(data.embeddings) for one in own if one is condition.embedding)
            return space.standardise(space.restore(self.codes[index]) / 3)[None]

    # Labels that the right adapters themselves give, so that the right strength is 3 by construction.
    suite = make_suite(TRAINING)
    model = prepared.bank.base.model.load("cpu")
    objective = make_objective("causal_lm", prepared.bank.base.model.tokenizer(), prepared.bank.base.settings)
    batch = objective.encode([[(e.input, e.output) for e in task.split("train")[:4]] for task in suite])
    runner = Runner(model, space.layout, objective)
    with torch.no_grad(), runner.use(space.differentiable(data.codes)) as adapted:
        right = objective._logits(adapted, batch).softmax(-1)

    class Distance(Runner):
        def losses(self, adapters, tasks, count, seed):
            indices = [suite.tasks.index(task) for task in tasks]
            with self.use(adapters) as adapted:
                part = objective.encode([[(e.input, e.output) for e in task.split("train")[:4]] for task in tasks])
                guessed = objective._logits(adapted, part).softmax(-1)
            each = guessed.shape[0] // len(indices)
            wanted = torch.cat([right[i * each : (i + 1) * each, : guessed.shape[1]] for i in indices])
            return (guessed - wanted).square().flatten(1).mean(1).view(len(indices), -1).mean(1)

    method = Third()
    method.fit(data, quiet_loop())
    assert tune_strength(method, data, Distance(model, space.layout, objective), torch.Generator()) == 3.0
    assert tune_strength(method, data, None, torch.Generator()) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("held, draws", [(1, 64), (5, 12), (40, 1), (100, 1)])
def test_few_held_out_tasks_are_asked_more_often(prepared, held, draws, capsys, monkeypatch):
    """A strength chosen on few tasks is chosen on other examples of them each time, and it says how far it is."""

    class Counting:
        device, seeds = "cpu", set()

        def losses(self, adapters, tasks, count, seed):
            self.seeds.add((float(sum(core.abs().sum() for core in adapters.values.values())), seed))
            return sum(core.flatten(1).norm(dim=1) for core in adapters.values.values())

    runner = Counting()
    rows = [i % len(prepared.data.codes) for i in range(held)]
    data = dataclasses.replace(prepared.data, validation=rows)
    method = method_type("top_k")()
    method.fit(prepared.data, quiet_loop())
    assert tune_strength(method, data, runner, torch.Generator()) == 0.5
    assert len({seed for _, seed in runner.seeds}) == draws
    capsys.readouterr()
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    tune_strength(method, data, runner, torch.Generator(), quiet=False)
    assert f"strength of top_k: 1 of {8 * draws}" in capsys.readouterr().err


# --- splits and conditions --------------------------------------------------------------------------------------------


def test_validation_experts_are_not_learned_from(prepared):
    """Training and validation indices share nothing, cover the bank, and know no task but the bank's."""
    data: TrainingSet = prepared.data
    assert set(data.training).isdisjoint(data.validation)
    assert sorted([*data.training, *data.validation]) == list(range(len(TRAINING)))
    assert len(data.validation) == int(0.1 * len(TRAINING)) > 0
    held = {name_of(*cell) for cell in HELD_OUT}
    assert held.isdisjoint(data.conditioner.names) and held.isdisjoint(task.name for task in data.tasks)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LEARNED, *VAES, "multitask"])
def test_poisoned_validation_experts_change_no_gradient(prepared, name):
    """Codes of validation experts enter no step of training: with another choice made impossible, results agree."""
    data = prepared.data
    codes = data.codes.clone()
    codes[list(data.validation)] = 1e3
    # Without validation nothing is chosen by it, so any difference would come from training.
    runs = []
    for values in (data.codes, codes):
        own = dataclasses.replace(data, codes=values, validation=())
        runs.append(_fit(dataclasses.replace(prepared, data=own), name, **SHORT.get(name, {})).method.state().tensors)
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_ridge_without_validation_leaves_experts_out(prepared):
    """The closed form is a refit without each expert's wordings; where descriptions explain nothing it shrinks the weights."""
    rng = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])
    x, y = torch.randn(8, 5, generator=rng, dtype=torch.float64), torch.randn(4, 7, generator=rng, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    for penalty in (0.01, 1.0):
        errors = []
        for expert in range(4):
            rest = target != expert
            weight = torch.linalg.solve(x[rest].T @ x[rest] + penalty * eye, x[rest].T @ y[target[rest]])
            errors.append((x[~rest].mean(0) @ weight - y[expert]).square().mean().item())
        assert _left_out_error(x, y, target, x.T @ x, x.T @ y[target], penalty) == pytest.approx(sum(errors) / 4, rel=1e-9)
    data = prepared.data
    noise = torch.randn(data.codes.shape, generator=rng)  # codes that no description explains
    norms = []
    for codes in (data.codes, noise):
        bare = dataclasses.replace(prepared, data=dataclasses.replace(data, codes=codes, validation=(), training=range(len(codes))))
        norms.append((_fit(bare, "ridge").method.weight.norm() / codes.norm()).item())
    assert norms[1] < norms[0] / 3


def test_mixture_is_the_law_of_total_variance():
    """Mean and variance of a mixture of Gaussians, by hand, over the two nearest of three experts."""
    codes = torch.tensor([[1.0, 0.0], [3.0, 4.0], [100.0, 100.0]])
    deviations = torch.tensor([[0.5, 0.0], [1.0, 2.0], [9.0, 9.0]])
    similarities = torch.tensor([0.9, 0.8, 0.1])
    a = 1 / (1 + torch.tensor(-0.1 / 0.05).exp())
    mean = a * codes[0] + (1 - a) * codes[1]
    within = a * deviations[0] ** 2 + (1 - a) * deviations[1] ** 2
    between = a * (codes[0] - mean) ** 2 + (1 - a) * (codes[1] - mean) ** 2
    found = mixture(similarities, codes, deviations, top=2, temperature=0.05)
    assert torch.allclose(found.mean, mean, atol=1e-5)
    assert torch.allclose(found.variance, within + between, atol=1e-5)
    assert torch.allclose(mixture(similarities, codes, None, top=2, temperature=0.05).variance, between, atol=1e-5)


def test_sg_mixture_samples_have_that_mean_and_variance(fitted):
    """4,000 samples, within the error of their number."""
    method = fitted("sg_mixture").method
    condition = fitted("sg_mixture").condition("paint the red dog")
    wanted = mixture(
        condition.similarities, method.codes, method.deviations, top=method.settings.top, temperature=method.settings.temperature
    )
    drawn = method.generate(condition, torch.Generator().manual_seed(0), 4000)
    deviation = wanted.variance.sqrt()
    assert (drawn.mean(0) - wanted.mean).norm() < 0.05 * deviation.norm()
    assert (drawn.std(0) - deviation).norm() < 0.05 * deviation.norm()


def test_an_excluded_expert_is_not_seen(prepared, fitted):
    """Leaving one out: it is not a neighbour, however few there are, and a lookup finds another."""
    conditioner, embeddings = prepared.data.conditioner, prepared.data.embeddings
    method = fitted("nearest").method
    for index in (0, 7):
        own = torch.arange(len(embeddings)) == index
        seen, unseen = conditioner(embeddings[index][0]), conditioner(embeddings[index][0], masked=own, keep=100)
        own = conditioner.names[index]
        assert seen.neighbours[0][0] == own
        assert own not in dict(unseen.neighbours) and len(unseen.neighbours) == len(TRAINING) - 1
        assert unseen.distance > seen.distance
        codes = [method.generate(condition, torch.Generator())[0] for condition in (seen, unseen)]
        assert torch.equal(codes[0], method.codes[index]) and not torch.equal(codes[1], method.codes[index])


def test_novelty_is_zero_for_what_is_stored_and_grows_with_distance():
    """Zero for the description of an expert, more for one of which it shares a word, most for one that shares none."""
    texts = ["red dog", "blue cat", "green bird"]
    conditioner = Conditioner.fit(["a", "b", "c"], [EMBEDDER.embed([text]) for text in texts])
    stored = [conditioner(EMBEDDER.embed([text])[0]).distance for text in texts]
    near, far = (conditioner(EMBEDDER.embed([text])[0]).distance for text in ("red bird", "compute logarithms"))
    assert all(value < 1e-5 for value in stored)
    assert 0.05 < near < far


# --- interruption -----------------------------------------------------------------------------------------------------


def _fit_house(prepared, folder, stage, at=None):
    """Tensors of a small house with all of its stages but one: the kernel takes the place of reconstruction."""
    settings = {
        "kernel_steps": 14 if stage == "house kernel" else 0,
        "steps": 18,
        "functional": {"steps": 14, "tasks": 4, "examples": 1},
        "ensemble": {"count": 2, "steps": 12},
        "dropout": 0.1,
        "queries": 2,
        "width": 32,
        "hidden": 32,
    }
    method, loop = method_type("house").with_settings({**QUICK["house"], **settings}), interruptible_loop(folder, at, stage)
    method.fit(prepared.data, loop, prepared.runner)
    loop.finish()
    return method.state().tensors


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """A run without interruption, with a kernel or with reconstruction; each run once."""
    runs = {}

    def get(stage):
        kind = stage if stage == "house kernel" else "house reconstruction"
        if kind not in runs:
            runs[kind] = _fit_house(prepared, tmp_path_factory.mktemp("whole"), kind)
        return runs[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "at"), [("house kernel", 12), ("house reconstruction", 13), ("house functional", 12), ("house member 2", 8)]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(prepared, whole, tmp_path, caplog, stage, at):
    """The same weights to the bit, dropout included, whichever of the stages was cut, and no state is left behind."""
    with pytest.raises(KeyboardInterrupt):
        _fit_house(prepared, tmp_path, stage, at)
    assert list(tmp_path.glob("*.state.safetensors"))
    torch.rand(5)
    caplog.set_level("INFO", "lorag")
    resumed, right = _fit_house(prepared, tmp_path, stage), whole(stage)
    assert f"{stage}: going on at step {at // 5 * 5}" in caplog.text
    assert all(torch.equal(right[key], resumed[key]) for key in right)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_stage_that_stopped_early_is_not_trained_further(tmp_path):
    """Resuming after a stage's early stop, as when a later stage was cut, keeps its result and its random stream."""
    steps = LoopSettings(100, 1e-2, validate_every=10, patience=2)
    values = {0: 1.0, 1: 0.5, 2: 0.9, 3: 0.8}

    def run(folder):
        seen = []
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 1)
        loop = quiet_loop(folder)

        def validate(_):
            seen.append(None)
            return values.get(len(seen) - 1, 0.0)

        def loss(module, step):
            drawn = torch.randn(4, 2, generator=loop.rng)
            return Batch(1, lambda _: module(drawn).square().mean())

        loop.run("stage", module, loss, validate, steps)
        return module.weight.clone(), loop.rng.get_state(), len(seen)

    first, stream, validations = run(tmp_path)
    assert validations == 4  # the third and fourth were no better than the second
    values.update({0: 0.0})  # whatever a further validation would find
    again, stream_again, validations = run(tmp_path)
    assert torch.equal(first, again) and torch.equal(stream, stream_again) and validations == 0


def test_weights_are_read_as_written_by_peft_name(fitted, tmp_path):
    """A generated folder holds PEFT's file names, where it came from, a card, and nothing else."""
    fitted("ridge").generate("red dog").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["README.md", "adapter_config.json", WEIGHTS, "lorag.json"])


def test_settings_of_generating_are_listed_once():
    """`generate_lora` and `LoraGenerator.generate` take the same settings, with the same defaults."""
    front, inner = (inspect.signature(one).parameters for one in (generate_lora, LoraGenerator.generate_each))
    settings = set(GenerateSettings.__annotations__)
    assert set(front) - {"description", "vector", "generator"} == set(inner) - {"self", "descriptions"} == settings
    assert all(front[name].default == inner[name].default for name in settings)
