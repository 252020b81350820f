"""VAEs: published sizes, losses against their definitions, what they learn, and whether a collapse is noticed."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from torch import nn
from toy_world import HELD_OUT, TRAINING, WordEmbedder, describe, interruptible_loop, name_of, quiet_loop

from benchmarks.sg_controls import SgRescaled, SgRidge
from lorag.cli.info import describe_path
from lorag.errors import ConfigError, GeneratorError
from lorag.files.tensors import save_tensors
from lorag.methods import TrainingSet, method_type
from lorag.methods.method import collate
from lorag.methods.sg_lora import ExpertMixture
from lorag.methods.vae import Diagnostics, gaussian_kl, negative_elbo, squared_error
from lorag.networks.conv_vae import ConvVae
from lorag.networks.vae import Gaussian, LearnedPriorVae, Reconstruction, standard_normal
from lorag.spaces.principal_codes import PrincipalCodes, StandardCodes
from lorag.tasks.suite import Example, Task
from lorag.text.conditioning import Condition, Conditioner

EMBEDDER = WordEmbedder()
LENGTH, MODULES = 90, (60, 30)
CLEAR = {"dropout": 0.0, "word_dropout": 0.0, "noise": 0.0}  # descriptions as they are
ICM = {"width": 32, "queries": 4, "layers": 1, "hidden": 64, "latent": 8, "learning_rate": 3e-3, "steps": 200}
ICM |= {"kernel": {"steps": 0}}  # the VAE alone; with a regression under it: test_expert_regression.py
ICM |= CLEAR
SG = {"condition": "merge", "width": 64, "latent": 8, "steps": 200, "learning_rate": 3e-3}
BOTH = {"condition": "both", "reading": 32, "queries": 4, "features": 64, **CLEAR}
KERNEL = {"width": 16, "queries": 2, "heads": 2, "features": 12, "groups": 3}
CONV = {"stack": "conv", "latent": 8, "steps": 4, "batch": 3}


def _code(cell):
    """Sum of what two words stand for, not centred."""
    seeds = [sum(word.encode()) for word in cell]
    return 0.5 + sum(torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds)


class _Vectors:
    """Stands for the base model: the task vector of an expert is a fixed map of its code, with one constant element."""

    def __init__(self, codes):
        self.codes = codes

    def hidden(self, inputs):
        return _vector(self.codes[[int(text) for text in inputs]])


def _tasks(count):
    """Tasks whose only input is their number."""
    return [Task(str(i), "toy", ("a task",), None, "MIT", "made", (Example(str(i), "x", "train"),)) for i in range(count)]


class _Space(SimpleNamespace):
    """Of a weight space what methods ask for."""

    def __init__(self):
        super().__init__(zero=torch.full((LENGTH,), -0.2), parts=list(MODULES), size=LENGTH, layout=SimpleNamespace(places=()))


def _vector(codes):
    mixed = codes @ torch.randn(LENGTH, 12, generator=torch.Generator().manual_seed(7)) * 5.0
    return torch.cat([mixed, torch.full((len(codes), 1), 3.0)], 1)


def _data(cells, held=0, **changes):
    codes = torch.stack([_code(cell) for cell in cells])
    embeddings = [EMBEDDER.embed(describe(*cell)) for cell in cells]
    values = {
        "codes": codes,
        "deviations": torch.full_like(codes, 0.01),
        "embeddings": embeddings,
        "conditioner": Conditioner.fit([name_of(*cell) for cell in cells], embeddings),
        "training": list(range(held, len(cells))),
        "validation": list(range(held)),
        "groups": list(range(len(cells))),
        "space": _Space(),
        "tasks": _tasks(len(cells)),
    }
    return TrainingSet(**{**values, **changes})


def _fit(name, data, runner=None, **settings):
    method = method_type(name).with_settings({**(ICM if name == "icm_lora" else SG), **settings})
    method.fit(data, quiet_loop(), runner or _Vectors(data.codes))
    return method


def _condition(data, cell, vector=None):
    condition = data.conditioner(EMBEDDER.embed([describe(*cell)[0]])[0])
    return condition if vector is None else dataclasses.replace(condition, task_vector=vector)


def _made(method, condition, count=1, seed=0):
    return method.generate(condition, torch.Generator().manual_seed(seed), count)


@pytest.fixture(scope="module")
def world():
    return _data(TRAINING, held=2)


@pytest.fixture(scope="module")
def icm(world):
    return _fit("icm_lora", world)


@pytest.fixture(scope="module")
def sg(world):
    return _fit("sg_lora", world)


# --- networks and losses ----------------------------------------------------------------------------------------------


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_network_has_the_published_number_of_parameters():
    """7,508,369 for 1,929,928 values and a condition of 768 (arXiv 2501.17635)."""
    with torch.device("meta"):
        assert _count(ConvVae(1_929_928, 768)) == 7_508_369


@pytest.mark.parametrize("name", ["icm_lora", "sg_lora"])
def test_generators_at_the_sandbox_s_size_stay_below_ten_million_parameters(name):
    """227 experts and embeddings of 384, default settings: the coordinates are a base and not counted."""
    shapes = {
        "icm_lora": {condition: {"embedding": 384, "vector": 128, "elements": 226} for condition in ("description", "both")},
        "sg_lora": {condition: {"merge": 452, "embedding": e, "elements": 226} for condition, e in (("merge", 0), ("both", 384))},
    }
    with torch.device("meta"):
        for condition, own in shapes[name].items():
            assert _count(method_type(name).with_settings({"condition": condition}).build(own)) < 10_000_000


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 4096, 4097])
def test_the_published_network_takes_any_length(length):
    """Padded inside and cut again: outputs have the input's shape, and one row alone passes once training is over."""
    network = ConvVae(length, 5, latent=3)
    x, h = torch.randn(2, length), torch.randn(2, 5)
    assert network.decode(network.encode(x, h).mean, h).shape == x.shape
    network.eval()
    alone = network.decode(network.encode(x[:1], h[:1]).mean, h[:1])
    assert alone.shape == (1, length) and alone.isfinite().all()


def test_a_loss_of_a_broadcast_shape_is_refused():
    """(b, c) against (b, 1, c), the fault of the released code, and against (1, c), raise instead of broadcasting."""
    for wrong in (torch.zeros(3, 1, 5), torch.zeros(1, 5), torch.zeros(5)):
        with pytest.raises(AssertionError, match="against"):
            squared_error(torch.zeros(3, 5), wrong)
    unit = standard_normal(torch.zeros(3, 2), 2)
    with pytest.raises(AssertionError, match="against"):
        negative_elbo(Reconstruction(torch.zeros(3, 5), unit, unit), torch.zeros(3, 1, 5), 1.0, each=True)


def test_divergences_agree_with_monte_carlo():
    """The closed form against the mean of log q - log p over 200,000 samples of q, latent by latent; 0 for equal ones."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(3, 4, generator=rng)  # noqa: E731
    posterior, prior = Gaussian(draw(), draw()), Gaussian(draw(), draw())
    noise = torch.randn(200_000, 3, 4, generator=rng)
    z = posterior.sample(noise)
    q, p = (torch.distributions.Normal(one.mean, (0.5 * one.log_variance).exp()) for one in (posterior, prior))
    for right, distribution in ((prior, p), (standard_normal(torch.zeros(3, 1), 4), torch.distributions.Normal(0.0, 1.0))):
        found = (q.log_prob(z) - distribution.log_prob(z)).mean(0)
        assert torch.allclose(gaussian_kl(posterior, right), found, rtol=0.02, atol=0.02)
    assert gaussian_kl(prior, prior).abs().max() < 1e-6


def test_the_two_losses_weigh_the_divergence_as_published():
    """By hand: ICM-LoRA averages the error over elements, SG-LoRA sums it; both sum the KL over latents, mean over rows."""
    posterior = Gaussian(torch.full((2, 3), 2.0), torch.zeros(2, 3))  # KL to N(0, I): 2 a latent, 6 a row
    made = Reconstruction(torch.zeros(2, 4), posterior, standard_normal(torch.zeros(2, 1), 3))
    right = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    assert negative_elbo(made, right, 0.1, each=True).item() == pytest.approx((4 + 9) / 8 + 0.6)
    assert negative_elbo(made, right, 0.1, each=False).item() == pytest.approx((4 + 9) / 2 + 0.6)


# --- coordinates ------------------------------------------------------------------------------------------------------


def test_principal_codes_are_an_isometry_of_the_experts_span():
    """Orthonormal, exact both ways on the experts, unit mean square; a code outside the span comes back projected."""
    codes = torch.stack([_code(cell) for cell in TRAINING])
    found = PrincipalCodes.fit(codes)
    assert found.size == 8  # four degrees of freedom of the colour, four of the animal: rounding gives no direction
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(8), atol=1e-5)
    coordinates = found.to_coordinates(codes)
    assert coordinates.square().mean().item() == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(found.to_codes(coordinates), codes, atol=1e-4)
    outside = torch.randn(LENGTH, generator=torch.Generator().manual_seed(1))
    left = outside - found.to_codes(found.to_coordinates(outside))
    assert left.norm() > 1 and (found.basis @ left).abs().max() < 1e-4


def test_principal_codes_keep_the_leading_directions():
    """With fewer of them the error on the experts is that of the best such basis: the singular values left over."""
    codes = torch.stack([_code(cell) for cell in TRAINING])
    found = PrincipalCodes.fit(codes, 3)
    values = torch.linalg.svdvals(codes - codes.mean(0))
    error = (found.to_codes(found.to_coordinates(codes)) - codes).norm()
    assert found.size == 3 and error.item() == pytest.approx(values[3:].square().sum().sqrt().item(), rel=1e-4)


def test_deviations_in_coordinates_are_those_of_samples():
    """Standard deviations of 20,000 noisy codes, seen in coordinates, within the error of their number."""
    codes = torch.stack([_code(cell) for cell in TRAINING])
    found = PrincipalCodes.fit(codes)
    deviations = torch.rand(LENGTH, generator=torch.Generator().manual_seed(2))
    noisy = codes[0] + deviations * torch.randn(20_000, LENGTH, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(found.to_coordinates(noisy).std(0), found.project_deviations(deviations), rtol=0.03)


def test_experts_that_do_not_differ_have_no_directions():
    """GeneratorError for one expert, and for equal ones, instead of a division by zero."""
    for codes in (torch.randn(1, 5), torch.ones(4, 5) / 3):
        with pytest.raises(GeneratorError, match="differ"):
            PrincipalCodes.fit(codes)


@pytest.mark.slow
@pytest.mark.parametrize("constant", ["module", "all late checkpoints", "task vectors"])
def test_near_constant_tensors_give_no_nan(constant):
    """A module that all experts share, deviations of 0, and a task vector that is the same for all: all finite."""
    data, runner = _data(TRAINING[:6]), None
    if constant == "module":
        data.codes[:, MODULES[0] :] = 0.1
    if constant == "all late checkpoints":
        data = dataclasses.replace(data, deviations=torch.zeros_like(data.codes))
    if constant == "task vectors":
        runner = _Vectors(torch.ones_like(data.codes))
    condition = _condition(data, TRAINING[0], _vector(data.codes[:1])[0])
    for name, settings in (
        ("icm_lora", {"condition": "both"}),
        ("icm_lora", {**CONV, "condition": "both"}),
        ("sg_lora", {}),
        ("sg_lora", BOTH),
    ):
        method = _fit(name, data, runner, **{**settings, "steps": 3})
        assert all(value.isfinite().all() for value in method.state().tensors.values())
        assert _made(method, condition, 2).isfinite().all()


@pytest.mark.slow
def test_the_normaliser_of_the_published_form_is_the_training_experts_own():
    """Mean 0 and one deviation a module over training experts; a validation expert's code moves nothing."""
    data = _data(TRAINING, held=2)
    found = StandardCodes.fit(data.codes[data.training], MODULES)
    seen = found.to_coordinates(data.codes[data.training])
    assert seen.mean(0).abs().max() < 1e-5
    assert all(part.square().mean().item() == pytest.approx(1.0, abs=1e-3) for part in seen.split(MODULES, 1))
    method = _fit("icm_lora", data, **CONV)
    data.codes[data.validation] = 1e3
    other = _fit("icm_lora", dataclasses.replace(data, validation=()), **CONV)
    assert torch.equal(method.coordinates.mean, other.coordinates.mean)
    assert torch.equal(method.coordinates.deviations, other.coordinates.deviations)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"condition": "examples"}, {"condition": "both"}])
def test_four_experts_are_learned_by_heart(settings):
    """ICM-LoRA over codes, from descriptions, task vectors or both: relative error of z = 0 below 0.1."""
    data = _data(TRAINING[:4])
    method = _fit("icm_lora", data, **settings, temperature=0.0, steps=70)
    for index, cell in enumerate(TRAINING[:4]):
        made = _made(method, _condition(data, cell, _vector(data.codes)[index]))[0]
        assert (made - data.codes[index]).norm() < 0.1 * data.codes[index].norm()


@pytest.mark.slow
def test_sg_lora_reconstructs_four_experts():
    """From their own latents, though each condition lacks the expert itself: relative error below 0.1."""
    data = _data(TRAINING[:4])
    method = _fit("sg_lora", data, beta=0.01, steps=120)
    known = ExpertMixture.of(data, range(4), method.coordinates, 4, 0.05)
    h = torch.stack([own[0] for own in known.leave_group_out(data, range(4))])
    with torch.no_grad():
        made = method.coordinates.to_codes(method.network.decode(method.network.encode(known.means, h).mean, h))
    assert ((made - data.codes).norm(dim=1) < 0.1 * data.codes.norm(dim=1)).all()


@pytest.mark.slow
def test_the_published_stack_learns():
    """Fifty steps over four experts lower its loss in training to three quarters of the mean's squared error."""
    data = _data(TRAINING[:4])
    torch.manual_seed(0)
    network, x = ConvVae(LENGTH, 4, latent=8), StandardCodes.fit(data.codes, MODULES).to_coordinates(data.codes)
    h, optimizer = torch.eye(4), torch.optim.Adam(network.parameters(), 3e-3)
    empty = x.new_zeros(4, 0)
    for _ in range(50):
        loss = negative_elbo(network(x, torch.randn(4, 8), empty, empty, empty, h), x, 0.005, each=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.75 * x.square().mean().item()


@pytest.mark.slow
def test_the_right_description_beats_another(icm, world):
    """Samples on combinations that no expert has: nearer to the right code than the mean, and than another's samples."""
    mean = world.codes[world.training].mean(0)
    for place, cell in enumerate(HELD_OUT):
        right, wrong = _code(cell), _condition(world, HELD_OUT[(place + 1) % len(HELD_OUT)])
        matched = (_made(icm, _condition(world, cell), 8) - right).norm(dim=1).mean()
        assert matched < 0.8 * (mean - right).norm()
        assert matched < 0.7 * (_made(icm, wrong, 8) - right).norm(dim=1).mean()


def test_sg_ridge_maps_the_merge_without_the_expert_itself():
    """Each expert's one neighbour has the opposite code, so the map is -1, up to the penalty; a merge is wholly wrong."""
    halves = torch.randn(12, LENGTH, generator=torch.Generator().manual_seed(5))
    codes = torch.stack([halves, -halves], 1).flatten(0, 1)
    embeddings = [EMBEDDER.embed([f"word{index // 2}"]) for index in range(24)]
    conditioner = Conditioner.fit([f"expert{index}" for index in range(24)], embeddings)
    cells = [("red", "dog")] * 24
    data = _data(cells, codes=codes, embeddings=embeddings, conditioner=conditioner)
    ridge, merge = (method.with_settings({"top": 1}) for method in (SgRidge, method_type("top_k")))
    for method in (ridge, merge):
        method.fit(data, quiet_loop())
    for index in (0, 7, 23):
        alone = conditioner(embeddings[index][0], masked=torch.arange(len(embeddings)) == index)
        assert (_made(ridge, alone)[0] - codes[index]).norm() < 0.3 * codes[index].norm()
        assert (_made(merge, alone)[0] - codes[index]).norm() > 1.9 * codes[index].norm()


def test_a_rescaled_merge_has_the_experts_length(world):
    """Its distance from the adapter that changes nothing is the experts' mean one, in the direction of the merge."""
    rescaled, merge = SgRescaled(), method_type("top_k")()
    for method in (rescaled, merge):
        method.fit(world, quiet_loop())
    made, merged = (_made(method, _condition(world, HELD_OUT[0]))[0] - world.space.zero for method in (rescaled, merge))
    assert made.norm().item() == pytest.approx((world.codes - world.space.zero).norm(dim=1).mean().item(), rel=1e-4)
    assert nn.functional.cosine_similarity(made, merged, dim=0) > 0.9999 and made.norm() > 1.05 * merged.norm()


# --- conditions -------------------------------------------------------------------------------------------------------


def test_an_expert_is_no_part_of_its_own_condition(world):
    """Another code for expert 5 moves every condition near it but none of its own; the same for its group."""
    coordinates = PrincipalCodes.fit(world.codes)
    groups = [5 if i == 6 else i for i in range(len(TRAINING))]
    for own in (5, 6):
        before, after = [], []
        for codes, found in ((world.codes, before), (world.codes.clone(), after)):
            codes[own] += 50.0 * (found is after)
            data = dataclasses.replace(world, codes=codes, groups=groups)
            found += ExpertMixture.of(data, data.training, coordinates, 30, 1.0).leave_group_out(data, range(len(TRAINING)))
        assert torch.equal(before[5], after[5])
        assert all(not torch.equal(before[i], after[i]) for i in data.training if i not in (5, 6))


@pytest.mark.parametrize("settings", [{}, BOTH])
def test_validation_experts_are_neighbours_at_use_only(settings, world, monkeypatch):
    """No mixture is made with them while SG-LoRA trains, description beside it or not; the fitted one knows the whole bank."""
    seen = []
    found = ExpertMixture.leave_group_out
    monkeypatch.setattr(ExpertMixture, "leave_group_out", lambda own, *rest: seen.append(own.indices.tolist()) or found(own, *rest))
    method = _fit("sg_lora", world, **settings, steps=1)
    assert seen == [world.training, world.training]
    assert method.experts.indices.tolist() == list(range(len(TRAINING)))


def test_training_pairs_a_description_with_its_own_merge(world, monkeypatch):
    """With condition=both the network reads, beside each merge, the very wording that the merge was made for."""
    data = dataclasses.replace(world, validation=())
    coordinates = PrincipalCodes.fit(data.codes[data.training])
    merges = ExpertMixture.of(data, data.training, coordinates, 4, 0.05).leave_group_out(data, data.training)
    right = {
        tuple(one.pooled.tolist()): merge
        for own, i in zip(merges, data.training, strict=True)
        for merge, one in zip(own, data.embeddings[i], strict=True)
    }
    seen, read = [], LearnedPriorVae.read
    monkeypatch.setattr(LearnedPriorVae, "read", lambda own, *known: seen.append(known[:2]) or read(own, *known))
    _fit("sg_lora", data, **BOTH, steps=2, batch=16)
    pairs = [pair for merge, pooled in seen for pair in zip(merge, pooled, strict=True)]
    assert len(pairs) == 2 * 16 + len(data.training)
    assert all(torch.allclose(merge, right[tuple(pooled.tolist())], atol=1e-5) for merge, pooled in pairs)


@pytest.mark.slow
def test_descriptions_decide_where_the_merge_does_not(world):
    """Two descriptions with one merge: condition=both gives two codes, and the published condition one."""
    first, second = (_condition(world, cell) for cell in HELD_OUT[:2])
    second = dataclasses.replace(second, similarities=first.similarities)
    for settings, differ in (({}, False), (BOTH, True)):
        method = _fit("sg_lora", world, **settings, decode="prior_mean", steps=60)
        assert ((_made(method, first) - _made(method, second)).norm().item() > 0.1) == differ


@pytest.mark.slow
def test_the_merge_is_part_of_the_condition_beside_the_description(world):
    """Two merges with one description give two codes with condition=both."""
    method = _fit("sg_lora", world, **BOTH, decode="prior_mean", steps=60)
    condition = _condition(world, HELD_OUT[0])
    other = dataclasses.replace(condition, similarities=_condition(world, HELD_OUT[1]).similarities)
    assert (_made(method, condition) - _made(method, other)).norm() > 0.01


@pytest.mark.slow
def test_reading_the_description_beats_the_merge_alone(world):
    """On combinations that no expert has, mean over four: error of condition=both below 0.7 of the published condition's."""
    errors = []
    for settings in ({}, BOTH):
        method = _fit("sg_lora", world, **settings, decode="prior_mean", steps=70)
        errors.append(sum((_made(method, _condition(world, cell))[0] - _code(cell)).norm() for cell in HELD_OUT))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(("name", "settings"), [("icm_lora", {}), ("sg_lora", BOTH)])
def test_augmentation_is_for_training_only(name, settings, world):
    """Masked words and noise change what is learned and nothing in use; without both, training is not random but by its dropout."""
    method = _fit(name, world, **{**settings, "word_dropout": 0.5, "noise": 0.5, "steps": 2})
    reader = method.network.condition if name == "icm_lora" else method.network.reader
    pooled, tokens = torch.randn(2, 48), torch.randn(2, 3, 48)
    known = pooled, tokens, torch.ones(2, 3, dtype=torch.bool), None
    assert torch.equal(reader(*known), reader(*known))
    reader.train()
    assert not torch.equal(reader(*known), reader(*known))
    reader.augmentation.word_dropout = reader.augmentation.noise = 0.0
    assert torch.equal(reader(*known), reader(*known))


def test_a_bank_of_one_source_cannot_leave_groups_out(world):
    """GeneratorError where no expert is left that is of another group."""
    data = dataclasses.replace(world, groups=[0] * len(TRAINING))
    with pytest.raises(GeneratorError, match="neighbours"):
        _fit("sg_lora", data)


@pytest.mark.parametrize("condition", ["examples", "both"])
def test_a_missing_task_vector_is_named(condition):
    """At use the message names `examples=`; in training, where the suite is missing, `tasks=`; a wrong length is refused."""
    data = _data(TRAINING[:5])
    method = _fit("icm_lora", data, condition=condition, steps=1)
    with pytest.raises(GeneratorError, match="examples="):
        _made(method, _condition(data, TRAINING[0]))
    with pytest.raises(GeneratorError, match="13"):
        _made(method, _condition(data, TRAINING[0], torch.zeros(4)))
    with pytest.raises(GeneratorError, match="tasks="):
        _fit("icm_lora", dataclasses.replace(data, tasks=()), condition=condition)


def test_task_vectors_decide_and_descriptions_do_not(world):
    """With condition=examples another vector gives another code, and another description the same one."""
    method = _fit("icm_lora", world, condition="examples", steps=30, temperature=0.0)
    vectors = _vector(torch.stack([_code(cell) for cell in HELD_OUT]))
    first = _made(method, _condition(world, HELD_OUT[0], vectors[0]))
    assert torch.equal(first, _made(method, _condition(world, HELD_OUT[1], vectors[0])))
    assert (first - _made(method, _condition(world, HELD_OUT[0], vectors[1]))).norm() > 0.1


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_obey_their_rng_and_temperature(icm, world):
    """One seed, the same samples; another, others; temperature 0 gives one code, and half the noise about half the spread."""
    condition = _condition(world, HELD_OUT[0])
    first = _made(icm, condition, 3)
    assert torch.equal(first, _made(icm, condition, 3)) and not torch.equal(first, _made(icm, condition, 3, seed=1))
    assert torch.pdist(first).min() > 0
    spread = {}
    for temperature in (0.0, 0.5, 1.0):
        other = method_type("icm_lora").with_settings({**icm.values(), "temperature": temperature})
        other.restore(*icm.state())
        codes = _made(other, condition, 64)
        spread[temperature] = torch.pdist(codes).mean().item()
    assert spread[0.0] == 0.0 and 0.3 < spread[0.5] / spread[1.0] < 0.7


@pytest.mark.slow
def test_controls_of_sg_lora_do_not_sample(sg, world):
    """decode=prior_mean and decode=zero repeat one code whatever the seed; samples are spread around the prior's mean."""
    condition, made = _condition(world, HELD_OUT[0]), {}
    for decode in ("sample", "prior_mean", "zero"):
        other = method_type("sg_lora").with_settings({**sg.values(), "decode": decode})
        other.restore(*sg.state())
        made[decode] = _made(other, condition, 64)
        repeats = torch.equal(made[decode], _made(other, condition, 64, seed=9)) and torch.pdist(made[decode]).max() == 0
        assert repeats == (decode != "sample")
    with torch.no_grad():
        h = sg.network.read(sg.experts(condition.similarities)[None], *collate([condition.embedding]))
        z = sg.network.prior(h).mean
        right = sg.coordinates.to_codes(sg.network.decode(z, h)), sg.coordinates.to_codes(sg.network.decode(0 * z, h))
    assert torch.allclose(made["prior_mean"][:1], right[0], atol=1e-5) and torch.allclose(made["zero"][:1], right[1], atol=1e-5)
    assert not torch.allclose(*right, atol=1e-3)


# --- diagnostics ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["icm_lora", "sg_lora"])
def test_a_collapsed_posterior_is_noticed(name, world):
    """With a huge beta no unit is active and the KL is about 0; with a small one units are active and samples differ."""
    # One description for all, so that only latents can tell the experts apart.
    data = dataclasses.replace(world, embeddings=[EMBEDDER.embed(["paint it"])] * len(TRAINING))
    collapsed, alive = (_fit(name, data, beta=beta, steps=60).diagnostics for beta in (1e4, 1e-4))
    assert collapsed.active == 0 and collapsed.kl.sum() < 0.05
    assert alive.active > 0 and alive.kl.sum() > 1
    assert alive.diversity > 5 * collapsed.diversity


def test_diagnostics_count_what_they_say():
    """Active units by a hand-made encoder: a latent whose mean varies by more than 0.01, whatever a learned prior does."""

    class Known(nn.Module):
        latent = 3

        def prior(self, h):
            return Gaussian(torch.cat([h, 5 * h, 0 * h], 1), torch.zeros(len(h), 3))

        def encode(self, x, h):  # the first follows the prior, the second strays from it, the third varies too little
            return Gaussian(self.prior(h).mean + torch.cat([0 * x, x, 0.05 * x], 1), torch.zeros(len(x), 3))

        def decode(self, z, h):
            return torch.cat([torch.ones(len(z), 1), z[:, :1] * 0], 1)

    method = method_type("sg_lora")()
    method.network, method.coordinates = Known(), StandardCodes(torch.zeros(2), torch.ones(1), torch.tensor([2]))
    x = torch.tensor([[1.0], [-1.0]])
    found = method.diagnose(x, x, torch.zeros(2))
    assert found.active == 1 and found.diversity == 0.0
    assert torch.allclose(found.kl, torch.tensor([0.0, 0.5, 0.00125]), atol=1e-6)
    assert torch.allclose(found.variance, torch.tensor([0.0, 1.0, 0.0025]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["icm_lora", "conv", "sg_lora", "sg_lora both"])
def test_a_stored_vae_is_the_same_and_its_card_shows_its_health(name, world, tmp_path):
    """Restored: the same codes. `lorag info` prints active units, KL and diversity, and lists coordinates with the space."""
    forms = {"conv": ("icm_lora", CONV), "sg_lora": ("sg_lora", {}), "sg_lora both": ("sg_lora", BOTH)}
    kind, settings = forms.get(name, (name, {}))
    method = _fit(kind, world, **{"steps": 5, **settings})
    tensors = {key: value.clone() for key, value in method.state().tensors.items()}
    again = method_type(method.name).with_settings(method.values())
    again.restore(tensors, method.state().shape)
    condition = _condition(world, HELD_OUT[0])
    assert torch.equal(_made(method, condition, 2), _made(again, condition, 2))
    assert all(torch.equal(value, again.state().tensors[key]) for key, value in tensors.items())
    assert method.size() == _count(method.network) < sum(value.numel() for value in tensors.values())
    save_tensors(tmp_path / "generator.safetensors", {f"method.{key}": value for key, value in tensors.items()})
    base = '{"model": {"name": "toy"}, "identity": "sha256:0", "layout": {"modules": [], "target_modules": []}}'
    text = f'{{"method": "{method.name}", "base": {base}, "space": {{"kind": "shared_subspace"}}, "rank": 4, "strength": 1.0, '
    text += '"experts": [], "embedder": "words", "settings": {}}'
    (tmp_path / "generator.json").write_text(text)
    card = describe_path(tmp_path)
    assert f"{method.diagnostics.active} of {len(method.diagnostics.kl)}" in card
    assert f"{method.diagnostics.kl.sum():.3f} nats" in card and f"{method.diagnostics.diversity:.3f}" in card
    inside = sum(value.numel() for key, value in tensors.items() if key.startswith("coordinates."))
    assert f"{inside:,} in the weight space" in card


@pytest.mark.slow
def test_sg_lora_stored_before_it_could_read_still_opens(sg, world):
    """Files whose settings name no condition hold the published form: they give the codes that they gave."""
    values = {key: value for key, value in sg.values().items() if key != "condition"}
    again = method_type("sg_lora").with_settings(values)
    again.restore(*sg.state())
    condition = _condition(world, HELD_OUT[0])
    assert again.settings.condition == "both" and torch.equal(_made(again, condition, 2), _made(sg, condition, 2))


def test_diagnostics_that_do_not_fit_are_refused():
    """Named, for a file that lacks one, is empty, or has other shapes."""
    good = Diagnostics(torch.zeros(3), torch.zeros(3), 0.0).tensors()
    for wrong in ({"kl": torch.zeros(4)}, {"kl": torch.zeros(0), "variance": torch.zeros(0)}, {"diversity": torch.zeros(2)}):
        with pytest.raises(ValueError, match="diagnostics"):
            Diagnostics.from_tensors({**good, **wrong})
    with pytest.raises(KeyError, match="variance"):
        Diagnostics.from_tensors({key: value for key, value in good.items() if key != "variance"})


# --- settings and interruption ----------------------------------------------------------------------------------------


def test_settings_are_checked_before_training():
    """ConfigError naming the setting; and null takes the stack's own value, as published for conv."""
    wrong = [("icm_lora", {"stack": "linear"}, "stack"), ("icm_lora", {"condition": "dreams"}, "condition")]
    wrong += [("icm_lora", {"temperature": -1.0}, "temperature"), ("icm_lora", {"stack": "conv", "batch": 1}, "batch")]
    for name, settings, key in [*wrong, ("sg_lora", {"decode": "guess"}, "decode"), ("sg_lora", {"condition": "c"}, "condition")]:
        with pytest.raises(ConfigError, match=key):
            method_type(name).with_settings(settings)
    conv, codes = (method_type("icm_lora").with_settings({"stack": stack}) for stack in ("conv", "codes"))
    assert (conv.latent, conv.batch, conv.learning_rate) == (256, 2, 2e-4)
    assert (codes.latent, codes.learning_rate) == (64, 1e-3)
    assert method_type("icm_lora").with_settings({"stack": "conv", "latent": 5}).latent == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("icm_lora", {"dropout": 0.1, "noise": 0.1}),
        ("icm_lora", {"kernel": {**KERNEL, "steps": 16}}),  # interrupted while the kernel is learned
        ("icm_lora", {"kernel": {**KERNEL, "steps": 8}}),  # and after that
        ("sg_lora", {}),
        ("sg_lora", BOTH),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(name, settings, world, tmp_path, caplog):
    """The same tensors to the bit, diagnostics included; the state is kept every five steps, and the run is cut at the thirteenth."""
    method = method_type(name).with_settings({**(ICM if name == "icm_lora" else SG), **settings, "steps": 16})

    def fit(folder, stop=None):
        fresh = method_type(name).with_settings(method.values())
        fresh.fit(world, interruptible_loop(folder, stop))
        return fresh.state().tensors

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", 12)
    caplog.set_level("INFO", "lorag")
    resumed = fit(tmp_path / "cut")
    assert "going on at step 10" in caplog.text
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_unfitted_vae_says_so():
    """GeneratorError on use and on storing."""
    method = method_type("icm_lora")()
    condition = Condition(EMBEDDER.embed(["red dog"])[0], torch.zeros(1), (), 0.0)
    for call in (lambda: _made(method, condition), method.state, method.size):
        with pytest.raises(GeneratorError, match="not fitted"):
            call()
