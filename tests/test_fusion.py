"""Fusion: the F-VAE of icm_fusion, the three rules that fuse in its latents, what a few examples teach, and the command."""

import dataclasses
import logging

import pytest
import torch
from conftest import WORDS, gauge, stack_adapters
from toy_world import (
    COLOURS,
    TRAINING,
    WordEmbedder,
    describe,
    make_bank,
    make_suite,
    name_of,
    prepare_toy,
    quiet_loop,
    save_base,
    true_adapter,
)

from lorag.adapters.adapter import LoraAdapter
from lorag.bank.bank import AdapterBank
from lorag.base.runner import Runner
from lorag.cli import main as cli
from lorag.errors import AdapterError, BankError, ConfigError, GeneratorError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.methods.functional import code_losses
from lorag.methods.fusion_stages import adapt, codes_of, draw_set
from lorag.methods.support_examples import few_examples, learn_weights, shared_inputs, told_apart, warn_of_shared_inputs
from lorag.methods.vae import negative_elbo
from lorag.networks.vae import FusionVae, added_directions, mean_direction, resolve_conflicts
from lorag.tasks.suite import Example, TaskSuite
from lorag.training import fuse as fusion
from lorag.training.fuse import RULES, fuse, fuse_experts
from lorag.training.split import RunTasks, SplitRule
from lorag.training.train import fit_generator

PLAIN = {"steps": 300, "meta_steps": 0, "sets": {"steps": 0}, "width": 48, "latent": 20, "batch": 16, "learning_rate": 3e-3}
SHORT = {**PLAIN, "steps": 5, "meta_steps": 2, "tasks": 3, "examples": 1}
SET = [name_of(*cell) for cell in (("blue", "cat"), ("green", "horse"), ("red", "bird"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


def _suite():
    """The toy tasks with texts of their own: each is about one colour's words, so that inputs tell colours apart."""
    tasks = []
    for task in make_suite(TRAINING):
        mark = WORDS[10 + COLOURS.index(task.name.split("-")[0])]
        tasks.append(
            dataclasses.replace(task, examples=tuple(Example(f"{mark} {mark} {e.input}", e.output, e.split) for e in task.examples))
        )
    return TaskSuite(tasks)


@pytest.fixture(scope="module")
def suite():
    return _suite()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base, suite):
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)
    return prepare_toy(bank, RunTasks(suite), SplitRule(validation=0.1), k=20)


def _fit(prepared, seed=0, **settings):
    method = method_type("icm_fusion").with_settings({**PLAIN, **settings})
    return fit_generator(prepared, method, quiet_loop(seed=seed), rank=12, strength=1.0, origin={})


@pytest.fixture(scope="module")
def fitted(prepared):
    """A plain F-VAE that has learned its bank."""
    return _fit(prepared)


def _distance(one, other):
    names = one.layout.names
    return max(((one.delta(n) - other.delta(n)).norm() / other.delta(n).norm()).item() for n in names)


# --- the network and its loss -----------------------------------------------------------------------------------------


def test_the_loss_is_squared_error_and_divergence_from_the_standard_normal():
    """By hand, against torch's own KL divergence, with weights that are no longer zero; a broadcast shape is refused."""
    torch.manual_seed(0)
    network = FusionVae(5, 4, latent=2, width=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, v, noise = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 2)
    made = network(x, v, noise)
    deviation = (0.5 * made.posterior.log_variance).exp()
    assert torch.allclose(made.x, network.decode(made.posterior.mean + deviation * noise, v))
    normal = torch.distributions.Normal(made.posterior.mean, deviation)
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    found = negative_elbo(made, x, 0.3, each=True)
    assert found.item() == pytest.approx((((x - made.x) ** 2).mean() + 0.3 * wanted).item(), rel=1e-5)
    for wrong in (x[:, None], x[0], x[:1]):
        with pytest.raises(AssertionError, match="against"):
            negative_elbo(made, wrong, 0.3, each=True)


def test_the_untrained_decoder_gives_the_mean_whatever_it_reads():
    """Training starts from the mean code, which is zero in coordinates, and from a posterior of unit variance."""
    network = FusionVae(7, 4, latent=3, width=8)
    assert not network.decode(torch.randn(5, 3), torch.randn(5, 4)).any()
    assert not network.encode(torch.randn(5, 7), torch.randn(5, 4)).log_variance.any()


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bank_is_learned(fitted, prepared):
    """Training experts come back through their latents: a small part of their distance to the mean is lost."""
    data, method = prepared.data, fitted.method
    rows = list(data.training)
    decoded = method.decode(method.latents, method.vectors)
    lost = (decoded - data.codes)[rows].square().sum() / (data.codes[rows] - data.codes[rows].mean(0)).square().sum()
    assert lost < 0.05
    assert method.diagnostics.active > 5 and method.diagnostics.kl.sum() > 1 and method.diagnostics.diversity > 0.1


@pytest.mark.slow
def test_a_description_mixes_the_nearest_experts(fitted, prepared):
    """An expert's own description gives nearly its own adapter; sampling starts only with a temperature, and obeys its rng."""
    index = prepared.data.training[0]
    method, data = fitted.method, prepared.data
    condition = data.conditioner(data.embeddings[index][0])
    made = method.generate(condition, torch.Generator())
    assert (made[0] - data.codes[index]).norm() < 0.6 * (data.codes[index] - data.codes.mean(0)).norm()
    warm = method_type("icm_fusion").with_settings({**method.values(), "spread": 1.0})
    warm.restore(*method.state())
    drawn = [warm.generate(condition, torch.Generator().manual_seed(s), 3) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1]) and drawn[0].shape == (3, prepared.space.size)


@pytest.mark.slow
def test_the_inner_steps_descend(fitted, prepared):
    """K gradient steps lower each task's own loss on the examples that they saw; K = 0 changes nothing."""
    data, method = prepared.data, fitted.method
    start = torch.zeros(3, method.coordinates.size, requires_grad=True)
    given = (method.coordinates, start, [0, 5, 9], data, prepared.runner, "check")
    adapted = adapt(*given, steps=2, rate=3.0, examples=8)
    with torch.no_grad():
        codes = (codes_of(method.coordinates, x) for x in (start, adapted))
        before, after = (code_losses(prepared.runner, data, c, [0, 5, 9], 8, "check/0") for c in codes)
    assert (after < before).all()
    (gradient,) = torch.autograd.grad(adapted.sum(), start)  # first order: a shift, whose derivative is one
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(adapt(*given, steps=0, rate=3.0, examples=8), start)


def test_meta_training_needs_tasks_and_a_plain_vae_does_not(prepared):
    """Without a suite it is refused before any training with the setting that does without; so is an unknown condition."""
    bare = dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, tasks=()), runner=None)
    with pytest.raises(GeneratorError, match="meta_steps=0"):
        _fit(bare, **SHORT)
    with pytest.raises(GeneratorError, match="condition=description"):
        _fit(bare, condition="examples")
    assert _fit(bare, steps=2).method.latents.shape == (len(TRAINING), PLAIN["latent"])
    with pytest.raises(ConfigError, match="description or examples"):
        _fit(prepared, condition="weather")


@pytest.mark.slow
def test_task_vectors_of_examples_are_conditions_too(prepared):
    """Fitted on them, a condition with a task vector is decoded beside it, and one without takes the neighbours' own."""
    generator = _fit(prepared, condition="examples", steps=60)
    text, pairs = "paint the red dog", [(" ".join(WORDS[:5]), "x"), (" ".join(WORDS[5:9]), "x")]
    blind, seen = (generator.method.generate(generator.condition(text, shown), torch.Generator()) for shown in ((), pairs))
    assert generator.method.vectors.shape[1] == 32 and not torch.allclose(blind, seen)
    alone = fuse_experts(generator, prepared.bank, SET[:1])
    assert _distance(alone, _decoded(generator, SET[0])) < 1e-4


def test_held_out_experts_are_not_learned_from(prepared):
    """Codes of validation experts, made absurd, change no parameter, no coordinate and no other expert's latent."""
    data = prepared.data
    codes = data.codes.clone()
    codes[list(data.validation)] *= 100
    runs = []
    for values in (data.codes, codes):
        own = dataclasses.replace(data, codes=values)
        runs.append(_fit(dataclasses.replace(prepared, data=dataclasses.replace(own, validation=())), steps=5).method)
    for key, value in runs[0].state().tensors.items():
        if key not in ("latents", "spreads") and "diagnostics" not in key:
            assert torch.equal(value, runs[1].state().tensors[key]), key
    assert torch.allclose(runs[0].latents[list(data.training)], runs[1].latents[list(data.training)], atol=1e-5)


# --- sets -------------------------------------------------------------------------------------------------------------

SETS = {"steps": 300, "sets": {"steps": 40, "tasks": 12, "members": 2, "learning_rate": 3e-3, "validate_every": 20}}


@pytest.fixture(scope="module")
def taught(prepared):
    """A plain F-VAE that was trained on sets."""
    return _fit(prepared, **SETS)


def test_sets_hold_tasks_that_are_told_apart(prepared, runtime):
    """No two of a set share their inputs; where there are no more such tasks, the set is smaller."""
    apart = told_apart(runtime, prepared.data.tasks)
    colours = [name.split("-")[0] for name in prepared.bank.names]
    assert [[a != b for b in colours] for a in colours] == apart.tolist()
    rng = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 99):
        found = draw_set(prepared.data.training, apart, size, rng)
        assert len({colours[row] for row in found}) == len(found) == min(size, len(set(colours)))


@pytest.mark.slow
def test_sets_teach_one_adapter_to_serve_all_tasks(fitted, taught, prepared, suite):
    """Fused by `uniform`, without any example, the tasks' losses are lower than before, of trained sets and of others."""
    for names in (SET[:2], SET):
        before, after = (_loss(g, fuse_experts(g, prepared.bank, names), suite, names).mean() for g in (fitted, taught))
        assert after < before - 0.1


@pytest.mark.slow
def test_a_generator_of_sets_is_stored_whole(taught, prepared, tmp_path):
    """Directions and all; the fused adapter is the same, and one expert alone is what it decodes to."""
    taught.save_pretrained(tmp_path)
    back = LoraGenerator.from_pretrained(tmp_path, embedder=WordEmbedder())
    assert back.method.network.directions is not None
    assert _distance(fuse_experts(back, prepared.bank, SET), fuse_experts(taught, prepared.bank, SET)) < 0.01
    assert _distance(fuse_experts(taught, prepared.bank, SET[:1]), _decoded(taught, SET[0])) < 1e-4


@pytest.mark.slow
def test_held_out_tasks_are_in_no_set(prepared, monkeypatch):
    """Neither their codes nor their examples reach a gradient."""
    held, seen = set(prepared.data.validation), []
    losses = prepared.runner.losses

    def watched(adapters, tasks, count, seed):
        seen.extend([] if seed == "validation" else [prepared.data.tasks.index(task) for task in tasks])
        return losses(adapters, tasks, count, seed)

    monkeypatch.setattr(prepared.runner, "losses", watched)
    _fit(prepared, steps=2, sets={**SETS["sets"], "steps": 6})
    assert held and seen and not held & set(seen)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_the_mean_direction_keeps_the_mean_norm():
    """Unit vectors are averaged, so that a long one does not outshout a short one; opposite ones cancel to zero."""
    vectors = torch.tensor([[6.0, 0.0], [0.0, 2.0]])
    assert torch.allclose(mean_direction(vectors, torch.tensor([0.5, 0.5])), torch.tensor([4.0, 4.0]) / 2**0.5)
    assert torch.allclose(mean_direction(vectors, torch.tensor([1.0, 0.0])), vectors[0])
    assert not mean_direction(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.5, 0.5])).any()


def test_added_directions_are_as_long_as_their_sum():
    """At right angles that of a sum; one alone, whatever weight the others have lost, stays what it is."""
    vectors = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    assert torch.allclose(added_directions(vectors, torch.full((3,), 1 / 3)), torch.full((3,), 3.0))
    assert torch.allclose(added_directions(vectors, torch.tensor([1.0, 0.0, 0.0])), vectors[0])


def test_conflicts_are_resolved_symmetrically():
    """Against the originals: two come out at right angles to what the other was, in any order; friends are left alone."""
    vectors = torch.tensor([[1.0, 0.2, 0.0], [-1.0, 0.5, 0.0], [0.0, 0.3, 2.0]])
    found = resolve_conflicts(vectors)
    assert abs(found[0] @ vectors[1]) < 1e-6 and abs(found[1] @ vectors[0]) < 1e-6
    assert torch.equal(found[2], vectors[2])
    order = [2, 0, 1]
    assert torch.allclose(resolve_conflicts(vectors[order]), found[order], atol=1e-6)
    friends = vectors.abs()
    assert torch.equal(resolve_conflicts(friends), friends)


# --- fusing -----------------------------------------------------------------------------------------------------------


def _decoded(generator, name):
    index = generator.conditioner.names.index(name)
    code = generator.method.decode(generator.method.latents[index][None], generator.method.vectors[index][None])
    (factors,) = generator.space.decode(code, generator.rank)
    return LoraAdapter(generator.base.layout, factors)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_fusing_one_task_gives_it_back(fitted, prepared, suite, rule):
    """Its decoded adapter, which is near the expert itself, by every rule (`learned` without steps)."""
    alone = fuse_experts(fitted, prepared.bank, SET[:1], rule=rule, suite=suite if rule == "learned" else None, steps=0)
    assert _distance(alone, _decoded(fitted, SET[0])) < 1e-4
    assert _distance(alone, prepared.bank.adapter(SET[0])) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_order_does_not_matter(fitted, prepared, suite, rule):
    """The same bytes, whatever order the names are given in; weights belong to names."""
    more = {"rule": rule, "steps": 3, "examples": 2, "suite": suite if rule == "learned" else None}
    weights = dict(zip(SET, (1.0, 2.0, 3.0), strict=True))
    one, other = (fuse_experts(fitted, prepared.bank, names, weights=weights, **more) for names in (SET, SET[::-1]))
    assert all(torch.equal(a, b) for n in one.layout.names for a, b in zip(one.factors[n], other.factors[n], strict=True))
    assert _distance(one, fuse_experts(fitted, prepared.bank, SET, **more)) > 1e-3
    assert one.info["experts"] == sorted(SET) and one.info["settings"]["rule"] == rule


def _loss(generator, adapter, suite, names, seed="fresh"):
    tasks = [suite[name] for name in names]
    with torch.no_grad():
        return generator.runner().losses(stack_adapters([adapter] * len(tasks)), tasks, 8, seed)


@pytest.mark.slow
def test_learned_weights_lower_the_support_loss(fitted, prepared, suite):
    """On the few examples and on others of the same tasks; lowering the worst leaves a better worst than it started with."""
    start = fuse_experts(fitted, prepared.bank, SET)
    learned = fuse_experts(fitted, prepared.bank, SET, rule="learned", suite=suite, steps=40, examples=6)
    before, after = learned.info["settings"]["support_loss"]
    assert after < before - 0.05
    assert _loss(fitted, learned, suite, SET).mean() < _loss(fitted, start, suite, SET).mean() - 0.02
    worst = fuse_experts(fitted, prepared.bank, SET, rule="learned", reduction="worst", suite=suite, steps=40, examples=6)
    before, after = worst.info["settings"]["support_loss"]
    assert after < before - 0.02 and before > learned.info["settings"]["support_loss"][0]


@pytest.mark.slow
def test_refinement_goes_on_from_the_fused_adapter(fitted, prepared, suite):
    """K steps on the tasks' mixed examples lower their loss; without examples they are refused."""
    start = fuse_experts(fitted, prepared.bank, SET)
    refined = fuse_experts(fitted, prepared.bank, SET, suite=suite, refine_steps=15)
    assert _loss(fitted, refined, suite, SET).mean() < _loss(fitted, start, suite, SET).mean() - 0.05
    with pytest.raises(ConfigError, match="tasks=PATH"):
        fuse_experts(fitted, prepared.bank, SET, refine_steps=5)
    with pytest.raises(ConfigError, match="tasks=PATH"):
        fuse_experts(fitted, prepared.bank, SET, rule="learned")


@pytest.mark.slow
def test_weights_that_make_no_mixture_are_refused(fitted, prepared):
    """Zero, and what is not a number."""
    for weight in (0.0, float("nan")):
        with pytest.raises(ConfigError, match="positive"):
            fuse_experts(fitted, prepared.bank, SET, weights={**dict.fromkeys(SET, 1.0), SET[0]: weight})


@pytest.mark.slow
def test_experts_that_the_generator_has_not_seen_are_encoded(fitted, prepared, base, tmp_path):
    """From their weights and descriptions: a known one under a new name gives nearly the same adapter, in any gauge."""
    cell = ("green", "horse")
    stranger = gauge(true_adapter(base.layout, *cell), 50)
    bank = AdapterBank.create(tmp_path, base).add([("stranger", describe(*cell), [stranger])])
    assert _distance(fuse_experts(fitted, bank, ["stranger"]), fuse_experts(fitted, prepared.bank, [name_of(*cell)])) < 0.02
    swapped = fuse_experts(fitted, prepared.bank, SET[:1], adapters={SET[0]: prepared.bank.adapter(SET[2])})
    assert _distance(swapped, fuse_experts(fitted, prepared.bank, SET[:1])) > 0.1


@pytest.mark.slow
def test_a_fused_adapter_is_portable(fitted, prepared, tmp_path):
    """Saved, it knows its origin; its rank can be chosen; it is made of a saved generator as of the fitted one."""
    fitted.save_pretrained(tmp_path / "g")
    opened = LoraGenerator.from_pretrained(tmp_path / "g", embedder=WordEmbedder())
    one, other = (fuse_experts(generator, prepared.bank, SET, rank=5) for generator in (fitted, opened))
    assert one.rank == 5 and _distance(one, other) == 0
    read = LoraAdapter.from_pretrained(one.save_pretrained(tmp_path / "a"), one.layout)
    assert read.info["method"] == "icm_fusion" and read.info["experts"] == sorted(SET)


@pytest.mark.slow
def test_what_cannot_be_fused_is_refused(fitted, prepared, suite):
    """Another method's generator, an unknown rule, names that are missing, unknown, or given twice."""
    ridge = dataclasses.replace(fitted, method=method_type("ridge")())
    with pytest.raises(ConfigError, match="icm_fusion"):
        fuse_experts(ridge, prepared.bank, SET)
    with pytest.raises(ConfigError, match="uniform, conflict, learned"):
        fuse_experts(fitted, prepared.bank, SET, rule="orientation")
    with pytest.raises(ConfigError, match="named once"):
        fuse_experts(fitted, prepared.bank, [])
    with pytest.raises(ConfigError, match="named once"):
        fuse_experts(fitted, prepared.bank, [*SET, SET[0]])
    with pytest.raises(BankError, match="no such expert"):
        fuse_experts(fitted, prepared.bank, ["purple-cow"])
    with pytest.raises(ConfigError, match="lacks tasks"):
        fuse_experts(fitted, prepared.bank, SET, suite=suite.select(SET[:1]))


# --- a few examples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime(base):
    return Runner.open(base, "cpu")


def test_tasks_that_share_inputs_are_found(runtime, suite, caplog):
    """The same texts, and other texts of the same kind; tasks whose texts differ in kind are not, and nothing is said."""
    red, also_red, blue = (suite[name] for name in ("red-cat", "red-horse", "blue-dog"))
    texts = {example.input for example in red.examples}
    assert texts.isdisjoint(example.input for example in also_red.examples)
    assert shared_inputs(runtime, [red, blue, also_red]) == [("red-cat", "red-horse")]
    copied = dataclasses.replace(blue, examples=(*blue.examples, red.examples[0]))
    assert shared_inputs(runtime, [red, copied]) == [("red-cat", "blue-dog")]
    with caplog.at_level(logging.WARNING, "lorag"):
        warn_of_shared_inputs(runtime, [red, blue])
        assert not caplog.records
        warn_of_shared_inputs(runtime, [red, also_red])
    assert "red-cat and red-horse" in caplog.text


def test_few_examples_are_few_and_of_the_training_split(suite):
    """No test example is ever among them, and the seed decides which."""
    task = suite[SET[0]]
    few = few_examples(task, 5, 0)
    assert len(few.examples) == 5 and set(few.examples) <= set(task.split("train"))
    assert few == few_examples(task, 5, 0) != few_examples(task, 5, 1)
    assert len(few_examples(task, 500, 0).examples) == len(task.split("train"))


@pytest.mark.slow
@pytest.mark.parametrize("per_module", [True, False])
def test_learned_sums_are_better_than_the_mean(runtime, prepared, suite, per_module):
    """CAT: learned weights lower the tasks' loss on examples that were not used, and are one per module only if asked for."""
    adapters, tasks = list(prepared.bank.adapters(SET)), [suite[name] for name in SET]
    weights = learn_weights(runtime, adapters, [few_examples(task, 8, 0) for task in tasks], per_module=per_module, steps=30)
    assert weights.shape == (3, len(runtime.layout)) and (weights.std(1).max() > 1e-4) == per_module
    losses = []
    for one in (prepared.bank.fuse(SET, "mean"), prepared.bank.fuse(SET, "cat", weights=weights)):
        with torch.no_grad():
            losses.append(runtime.losses(stack_adapters([one] * 3), tasks, 8, "fresh").mean())
    assert losses[1] < losses[0] - 0.05


# --- by name ----------------------------------------------------------------------------------------------------------


def test_a_bank_fuses_by_name(prepared):
    """The mean of what the bank holds, and `info` says of which experts, by which rule, with which settings."""
    bank = prepared.bank
    fused = bank.fuse(SET, "task_arithmetic", coefficient=0.5)
    name = fused.layout.names[0]
    assert torch.allclose(fused.delta(name), 0.5 * sum(bank.adapter(one).delta(name) for one in SET), atol=1e-4)
    assert fused.info["experts"] == SET and fused.info["settings"] == {"coefficient": 0.5}
    assert fused.base_model == bank.base.model.name and fused.task_type == "CAUSAL_LM"
    with pytest.raises(AdapterError, match="mean, task_arithmetic"):
        bank.fuse(SET, "soup")
    with pytest.raises(BankError, match="no such expert"):
        bank.fuse(["purple-cow"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, fitted, prepared, suite):
    """Generator, bank and suite on disk."""
    root = tmp_path_factory.mktemp("folders")
    fitted.save_pretrained(root / "generator")
    suite.save(root / "tasks")
    return {"bank": str(prepared.bank.folder), "generator": str(root / "generator"), "tasks": str(root / "tasks")}


def _run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return (stopped.value.code or 0, *capsys.readouterr())


@pytest.mark.slow
def test_the_command_writes_an_adapter(capsys, folders, tmp_path, prepared, monkeypatch, caplog):
    """Closed-form rules, CAT with learned weights and a warning of shared inputs, and a generator's rule."""
    opened = LoraGenerator.from_pretrained
    monkeypatch.setattr(fusion.LoraGenerator, "from_pretrained", lambda path, device: opened(path, embedder=WordEmbedder()))
    code, out, _ = _run(capsys, "fuse", *SET, "--bank", folders["bank"], "--out", tmp_path / "a", "--rank", 6, "--method", "ties")
    assert code == 0 and "rank 6" in out and "energy" in out
    read = LoraAdapter.from_pretrained(tmp_path / "a", prepared.bank.base.layout)
    assert _distance(read, prepared.bank.fuse(SET, "ties", rank=6)) < 1e-6
    same = ("red-cat", "red-bird")
    with caplog.at_level(logging.WARNING, "lorag"):
        code, _, _ = _run(
            capsys, "fuse", *same, "--bank", folders["bank"], "--out", tmp_path / "b", "--method", "cat", "--tasks", folders["tasks"]
        )
    assert code == 0 and "share their inputs" in caplog.text
    assert "weights" in LoraAdapter.from_pretrained(tmp_path / "b", read.layout).info["settings"]
    more = ("--method", "icm_fusion", "--generator", folders["generator"], "--rule", "conflict")
    code, out, _ = _run(capsys, "fuse", *SET, "--bank", folders["bank"], "--out", tmp_path / "c", *more)
    assert code == 0 and "3 experts by icm_fusion" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--method", "soup"), "mean, task_arithmetic, ties, dare_ties, cat, lego, tsv, regmean, icm_fusion"),
        (("--method", "icm_fusion"), "lorag train method=icm_fusion"),
        (("--generator", "somewhere"), "belong together"),
        (("purple-cow",), "purple-cow"),
        (("--bank", "no/such"), "no/such"),
        (("--tasks", "no/such"), "no/such"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(capsys, folders, tmp_path, more, said):
    """Exit code 1, one line with what there is or what to do, and nothing written."""
    code, _, err = _run(capsys, "fuse", SET[0], "--bank", folders["bank"], "--out", tmp_path / "out", *more)
    assert code == 1 and len(err.splitlines()) == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_one_name_is_enough_and_twice_is_too_many(prepared):
    """`fuse` refuses a name given twice, before anything is opened."""
    with pytest.raises(ConfigError, match="named once"):
        fuse([SET[0], SET[0]], bank="no/such/bank")
    assert _distance(fuse([SET[0]], bank=str(prepared.bank.folder)), prepared.bank.adapter(SET[0])) < 1e-4
