"""Regression over experts with a learned kernel: its algebra, what it must not see, what it learns, and the VAE on top of it."""

import dataclasses

import pytest
import torch
from test_vae import CLEAR, EMBEDDER, ICM, _condition, _data
from toy_world import HELD_OUT, TRAINING, describe, quiet_loop

from lorag.errors import ConfigError, GeneratorError
from lorag.methods import kernel as kernel_module
from lorag.methods import method_type
from lorag.methods.kernel import ExpertRegression, KernelSettings
from lorag.networks.experts import ExpertKernel
from lorag.spaces.principal_codes import PrincipalCodes

SMALL = {"width": 32, "queries": 4, "features": 24, "groups": 3, "learning_rate": 3e-3, "steps": 150, **CLEAR}


def _fit(data, **settings):
    method = method_type("kernel").with_settings({**SMALL, **settings})
    method.fit(data, quiet_loop())
    return method


def _made(method, condition):
    return method.generate(condition, torch.Generator().manual_seed(0))[0]


def _kernel(features=12, groups=3):
    torch.manual_seed(0)
    kernel = KernelSettings(width=16, queries=2, heads=2, features=features, groups=groups).kernel(24).eval()
    for parameter in (kernel.similarity.alone, kernel.similarity.together, kernel.noise):
        torch.nn.init.normal_(parameter)
    return kernel.requires_grad_(False)


@pytest.fixture(scope="module")
def world():
    return _data(TRAINING, held=2)


@pytest.fixture(scope="module")
def learned(world):
    return _fit(world)


def test_the_kernel_is_the_sum_of_its_groups_and_of_their_pairs():
    """Value by value against its definition, symmetric and positive definite."""
    kernel = _kernel()
    a, b = torch.randn(4, 12), torch.randn(5, 12)
    near = torch.stack([(-(x[:, None] - y[None]).square().mean(-1)).exp() for x, y in zip(a.split(4, 1), b.split(4, 1), strict=True)])
    right = sum(kernel.similarity.alone[g].exp() * near[g] for g in range(3))
    right = right + sum(kernel.similarity.together[g, h].exp() * near[g] * near[h] for g in range(3) for h in range(g + 1, 3))
    assert torch.allclose(kernel.similarity(a, b), right, atol=1e-5)
    system = kernel.system(a)
    assert torch.allclose(system, system.T, atol=1e-6) and torch.linalg.eigvalsh(system).min() > 0


def test_an_expert_asked_for_alone_is_shrunk_by_the_noise():
    """One expert known: the weight is k / (k + noise)."""
    kernel, known = _kernel(), torch.randn(1, 12)
    own = kernel.similarity(known, known)
    assert torch.allclose(kernel.weights(known, known), own / kernel.system(known).float(), atol=1e-6)


def test_the_system_is_solved_in_full_precision_under_autocast():
    """Losses in bf16 must not reach a matrix that is to be decomposed."""
    kernel, asked, known = _kernel(), torch.randn(3, 12), torch.randn(40, 12)
    with torch.autocast("cpu", torch.bfloat16):
        weights = kernel.weights(asked, known)
    assert torch.equal(weights, kernel.weights(asked, known))


def test_equal_descriptions_can_be_solved():
    """Experts that nothing tells apart share the weight."""
    kernel, known = _kernel(), torch.randn(1, 12).expand(300, 12)
    kernel.noise.fill_(-20.0)
    kernel.similarity.alone.fill_(5.0)
    weights = kernel.weights(known[:1], known)
    assert torch.allclose(weights, torch.full((1, 300), 1 / 300), atol=1e-4)


@pytest.mark.parametrize("group", [[0], [2, 5], [0, 1, 2, 3, 4, 5, 6], [40]])
def test_leaving_experts_out_in_closed_form_is_solving_without_them(group):
    """Against a regression that never had them; places are the bank's, which need not be the regression's."""
    kernel = _kernel()
    indices = torch.tensor([0, 1, 2, 3, 4, 5, 6, 9])
    regression = ExpertRegression(kernel, indices, torch.randn(8, 12), torch.randn(8, 3))
    asked = EMBEDDER.embed(["paint the green cat"])
    asked = [dataclasses.replace(one, pooled=torch.randn(24), tokens=torch.randn(4, 24)) for one in asked]
    keep = ~torch.isin(indices, torch.tensor(group))
    without = ExpertRegression(kernel, indices[keep], regression.features[keep], regression.values[keep])
    masked = torch.isin(torch.arange(50), torch.tensor(group))
    assert torch.allclose(regression.leave_group_out(asked, masked[None]), without(asked), atol=1e-4)
    assert torch.allclose(regression(asked, masked), without(asked), atol=1e-4)


def test_with_all_experts_hidden_nothing_is_known():
    """Zero, which is the experts' mean."""
    regression = ExpertRegression(_kernel(), torch.arange(3), torch.randn(3, 12), torch.randn(3, 5))
    one = dataclasses.replace(EMBEDDER.embed(["x"])[0], pooled=torch.randn(24), tokens=torch.randn(4, 24))
    assert torch.equal(regression([one], torch.ones(3, dtype=torch.bool)), torch.zeros(1, 5))


@pytest.mark.slow
def test_unseen_combinations_are_predicted(world, learned):
    """Held-out combinations of known words: far nearer than the mean, and another task's description does not give them."""
    right = _data(HELD_OUT).codes
    guessed = torch.stack([_made(learned, _condition(world, cell)) for cell in HELD_OUT])
    shuffled = guessed.roll(1, 0)
    scale = (right - world.codes.mean(0)).square().mean()
    assert (guessed - right).square().mean() < 0.35 * scale
    assert (shuffled - right).square().mean() > (guessed - right).square().mean() * 2


@pytest.mark.slow
def test_an_expert_that_is_left_out_does_not_count(world, learned):
    """A condition that excludes a task's own expert gives the code of a regression without it."""
    text = EMBEDDER.embed([describe(*TRAINING[3])[0]])[0]
    known, unseen = world.conditioner(text), world.conditioner(text, masked=torch.arange(len(TRAINING)) == 3)
    own = world.codes[3]
    assert (_made(learned, known) - own).norm() < (_made(learned, unseen) - own).norm()
    assert learned.regression.indices.tolist() == list(range(len(TRAINING)))  # tasks held out from learning are experts at use


def test_no_step_sees_an_expert_and_its_group_at_once(world, monkeypatch):
    """What is asked for is never known, nor is any of its group."""
    world = dataclasses.replace(world, groups=[i // 2 for i in range(len(TRAINING))])
    steps = []
    real = ExpertKernel.weights

    def spy(self, asked, known):
        steps.append((len(asked), len(known)))
        return real(self, asked, known)

    drawn = []
    draw = kernel_module.draw
    monkeypatch.setattr(kernel_module, "draw", lambda data, rows, loop: drawn.append(list(rows)) or draw(data, rows, loop))
    monkeypatch.setattr(ExpertKernel, "weights", spy)
    _fit(world, steps=5)
    assert len(drawn) == 5
    for rows, (asked, known) in zip(drawn, steps, strict=True):
        told, questions = rows[:known], rows[known:]
        assert len(questions) == asked and not world.masked(questions)[:, told].any()
        assert not set(rows) & set(world.validation)


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2]])
def test_each_group_in_turn_is_predicted_from_all_others(groups):
    """The closed form is a regression solved without the group, whose gradient reaches the features."""
    kernel, features, values = _kernel(), torch.randn(6, 12, requires_grad=True), torch.randn(6, 3)
    together = torch.tensor(groups)[:, None] == torch.tensor(groups)[None]
    differences = kernel.residuals(features, values, together)
    for row in range(6):
        others = ~together[row]
        predicted = kernel.weights(features[row][None], features[others]) @ values[others]
        assert torch.allclose(values[row] - predicted[0], differences[row], atol=1e-4)
    differences.square().mean().backward()
    assert features.grad.abs().min() > 0


@pytest.mark.slow
def test_leaving_out_each_in_turn_learns_the_kernel_too(world):
    """Held-out combinations are predicted as well as where a quarter is taken out."""
    method, right = _fit(world, asked=0.0, batch=24), _data(HELD_OUT).codes
    guessed = torch.stack([_made(method, _condition(world, cell)) for cell in HELD_OUT])
    assert (guessed - right).square().mean() < 0.35 * (right - world.codes.mean(0)).square().mean()


@pytest.mark.parametrize("asked", [0.0, 0.25])
def test_experts_without_others_are_refused(world, asked):
    """If all are of one group, there is nobody to learn from."""
    with pytest.raises(GeneratorError, match="no others"):
        _fit(dataclasses.replace(world, groups=[0] * len(TRAINING)), steps=1, asked=asked)


def test_of_a_large_bank_some_experts_take_part(world):
    """`experts` bounds what is stored, where held-out experts come on top, and `batch` a step."""
    method = _fit(world, steps=2, experts=5, batch=4)
    assert len(method.regression.indices) == 5 + len(world.validation)


@pytest.mark.parametrize(
    "settings", [{"groups": 5}, {"groups": 0}, {"asked": -0.1}, {"asked": 1.0}, {"experts": 1}, {"layers": 10**9}, {"batch": 1}]
)
def test_settings_that_cannot_be_used(world, settings):
    """Named before time is spent."""
    (key,) = settings
    with pytest.raises(ConfigError, match=rf"^settings\.{key} "):
        _fit(world, **settings)


@pytest.mark.slow
def test_it_comes_back_from_its_tensors(world, learned):
    """Codes are the same but for fp16, and tensors that do not fit are refused."""
    tensors, shape = learned.state()
    back = method_type("kernel").with_settings(learned.values())
    back.restore(tensors, shape)
    condition = _condition(world, HELD_OUT[0])
    assert torch.allclose(_made(back, condition), _made(learned, condition), atol=0.02)
    for broken in (
        {name: value for name, value in tensors.items() if name != "features"},
        {**tensors, "indices": tensors["indices"][:-1]},
        {**tensors, "indices": -tensors["indices"] - 1},
        {**tensors, "values": tensors["values"][0]},
        {**tensors, "network.similarity.alone": torch.zeros(7)},
        {**tensors, "mean": tensors["mean"][:-1]},
    ):
        with pytest.raises(GeneratorError):
            back.restore(broken, shape)
            back.try_out(condition, world.space.size, lambda codes: codes)


# --- the VAE on top -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(world):
    method = method_type("icm_lora").with_settings({**ICM, "kernel": SMALL, "temperature": 0.0})
    method.fit(world, quiet_loop())
    return method


@pytest.mark.slow
def test_the_vae_adds_to_the_regression(world, both):
    """What is made is the regression's code plus what the VAE decodes at z = 0, and both are learned from training experts alone."""
    condition = _condition(world, HELD_OUT[0])
    start = both.regression([condition.embedding])
    h = both.network.read(*both.inputs([condition.embedding], None, torch.device("cpu")))
    decoded = both.network.decode(h.new_zeros(1, both.latent), h)
    assert torch.allclose(_made(both, condition), both.coordinates.to_codes(start + decoded)[0], atol=1e-4)
    assert isinstance(both.coordinates, PrincipalCodes)


@pytest.mark.slow
def test_the_vae_on_a_regression_predicts_unseen_combinations(world, both):
    """Not worse than the VAE alone."""
    alone = method_type("icm_lora").with_settings({**ICM, "temperature": 0.0})
    alone.fit(world, quiet_loop())
    right = _data(HELD_OUT).codes

    def error(method):
        return (torch.stack([_made(method, _condition(world, cell)) for cell in HELD_OUT]) - right).square().mean()

    assert error(both) < 1.1 * error(alone)


@pytest.mark.slow
def test_a_stored_vae_keeps_its_regression(world, both):
    """With or without it: what is stored decides, and a regression that does not fit is refused."""
    tensors, shape = both.state()
    back = method_type("icm_lora").with_settings(both.values())
    back.restore(tensors, shape)
    condition = _condition(world, HELD_OUT[1])
    assert torch.allclose(_made(back, condition), _made(both, condition), atol=1e-5)
    back.restore({name: value for name, value in tensors.items() if not name.startswith("regression.")}, shape)
    assert back.regression is None
    with pytest.raises(GeneratorError):
        back.restore({**tensors, "regression.values": tensors["regression.values"][:, :3]}, shape)
    with pytest.raises(ConfigError, match=r"^settings\.kernel\.layers "):
        method_type("icm_lora").with_settings({**both.values(), "kernel": {**SMALL, "layers": 10**9}})


def test_examples_alone_have_no_regression(world):
    """Only a description can be compared with the experts'."""
    made = {"stack": "conv", "latent": 8, "steps": 1, "batch": 3}
    for settings in ({"condition": "examples"}, made):
        assert not method_type("icm_lora").with_settings({**settings, "kernel": SMALL}).regresses


# --- house on top -------------------------------------------------------------------------------------------------------

HOUSE = {"kernel_steps": 150, "hidden": 96, "width": 32, "queries": 4, "learning_rate": 3e-3, **CLEAR}
HOUSE |= {"functional": {"steps": 0}, "ensemble": {"count": 0}}


def _house(data, **settings):
    method = method_type("house").with_settings({**HOUSE, **settings})
    method.fit(data, quiet_loop())
    return method


@pytest.fixture(scope="module")
def house(world):
    return _house(world, kernel_steps=30, ensemble={"count": 1, "steps": 10})


@pytest.mark.slow
def test_house_starts_from_what_the_regression_predicts(world):
    """Without further steps its codes are those of the regression on the training experts, and no step of reconstruction is taken."""
    alone = _house(world, kernel_steps=30)
    settings = KernelSettings(
        **{name: HOUSE[name] for name in ("width", "queries", "learning_rate", *CLEAR)}, features=96, groups=3, steps=30
    )
    regression, mean = kernel_module.regress_codes("house", settings, world, quiet_loop(), held=False)
    assert regression.indices.tolist() == list(world.training)
    for cell in HELD_OUT:
        condition = _condition(world, cell)
        assert torch.allclose(_made(alone, condition), regression([condition.embedding])[0] + mean, atol=1e-3)


@pytest.mark.slow
def test_house_with_a_kernel_is_stored_whole(world, house):
    """Readers, experts and shares come back; what is stored decides what is built."""
    back = method_type("house").with_settings(house.values())
    back.restore(*house.state())
    condition = _condition(world, HELD_OUT[0])
    assert torch.equal(_made(back, condition), _made(house, condition))
    assert back.shape["experts"] == len(world.training) and len(back.network.readers) == 2


@pytest.mark.parametrize(("hidden", "groups"), [(192, 6), (96, 3), (24, 3), (16, 1), (21, 21)])
def test_any_number_of_features_falls_into_groups(world, hidden, groups):
    """Of 32 features, or of as many as divide both."""
    assert _house(world, hidden=hidden, kernel_steps=1).network.head.similarity.groups == groups


def test_house_keeps_no_more_experts_than_it_may(world):
    """Of a large bank some are drawn, since each costs a code's length of numbers."""
    assert len(_house(world, kernel_steps=2, experts=5).network.head.experts) == 5


def test_house_starts_from_reconstruction_where_no_kernel_can_be_learned(world):
    """If all experts are of one group, or the same, or asked for without steps of a kernel."""
    family = dataclasses.replace(world, groups=[0] * len(world.codes))
    same = dataclasses.replace(world, codes=world.codes[:1].expand_as(world.codes).clone())
    for data, steps in ((family, 150), (same, 150), (world, 0)):
        method = _house(data, kernel_steps=steps, steps=3)
        assert isinstance(method.network.head, torch.nn.Linear) and "experts" not in method.shape


def test_experts_of_a_few_large_families(world):
    """Where the first quarter is of all groups, one alone is asked for."""
    method = _house(dataclasses.replace(world, groups=[row % 2 for row in range(len(world.codes))]), kernel_steps=5)
    assert method.shape["experts"] == len(world.training)
