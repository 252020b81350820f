"""Runner: what n adapters do at once is what each does alone, in losses, scores and written answers."""

import pytest
import torch
from conftest import WORDS, stack_adapters
from toy_world import make_suite, save_base, true_adapter

from lorag.base.objectives import make_objective, take
from lorag.base.runner import Runner
from lorag.errors import BaseModelError, ConfigError, LayoutError

CELLS = (("red", "cat"), ("blue", "fish"), ("pink", "dog"))
TEXTS = ["the cat sat", "a dog ran on the log", "home", "sky and red mat", "early bird flew", "late"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_models, tokenizer):
    """A runner opened from what a bank states, three tasks, and an adapter for each."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    adapters = [true_adapter(base.layout, *cell) for cell in CELLS]
    return Runner.open(base, "cpu"), make_suite(CELLS).tasks, adapters


def test_open_loads_what_a_bank_states(world, tmp_path, tiny_models, tokenizer):
    """Layout, objective and its settings are the stated ones, on the device and in the precision asked for."""
    base = save_base(tmp_path, tiny_models["llama"], tokenizer)
    runner = Runner.open(base, "cpu", "bfloat16")
    assert runner.layout == base.layout and runner.device == torch.device("cpu") and runner.model.dtype == torch.bfloat16
    assert (runner.objective.name, runner.objective.settings()) == (base.objective, base.settings)
    with pytest.raises(BaseModelError, match="does not fit the layout"):
        Runner(runner.model, tiny_models["gpt2"].layout(), runner.objective)


def test_open_warns_where_bf16_is_slow(tmp_path, tiny_models, tokenizer, monkeypatch):
    """On a CPU without instructions for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.warns(UserWarning, match="slower in bfloat16"):
        Runner.open(save_base(tmp_path, tiny_models["llama"], tokenizer), "cpu", "bfloat16")


def test_losses_are_each_adapter_s_own_and_differentiable(world):
    """Adapter i on task i: as alone; no gradient reaches another; None is the bare base, as adapters of zero are."""
    runner, tasks, adapters = world
    stacked = {name: tuple(x.clone().requires_grad_() for x in pair) for name, pair in stack_adapters(adapters).items()}
    together = runner.losses(stacked, tasks, 4, "7")
    alone = torch.cat([runner.losses(take(stacked, i, i + 1), [task], 4, "7") for i, task in enumerate(tasks)])
    assert together.shape == (3,) and torch.allclose(together, alone, atol=1e-4)
    together[1].backward()
    sizes = sum(x.grad.flatten(1).norm(dim=1) for pair in stacked.values() for x in pair)
    assert sizes[1] > 0 and sizes[0] == sizes[2] == 0
    zero = {name: (a.detach(), b.detach() * 0) for name, (a, b) in stacked.items()}
    assert torch.allclose(runner.losses(zero, tasks, 4, "7"), runner.losses(None, tasks, 4, "7"), atol=1e-5)


def test_scores_are_each_adapter_s_own(world):
    """As each alone; the adapter changes them; the objective's metric is among them."""
    runner, tasks, adapters = world
    stacked = stack_adapters(adapters)
    together = runner.scores(stacked, tasks, limit=6)
    alone = [runner.scores(take(stacked, i, i + 1), [task], limit=6)[0] for i, task in enumerate(tasks)]
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in zip(together, alone, strict=True))
    assert all(runner.objective.metric in one for one in together)
    assert together != runner.scores(None, tasks, limit=6)


@pytest.mark.slow
def test_written_answers_are_those_of_peft(world):
    """Six texts, two for each of three adapters, at once: what stock PEFT writes with each adapter, one text at a time."""
    runner, _, adapters = world
    together = runner.generate(TEXTS, stack_adapters(adapters), max_new_tokens=9)
    alone = []
    for number, adapter in enumerate(adapters):
        wrapped = adapter.apply_to(runner.model)
        alone += [runner.objective.generate(wrapped, [text], max_new_tokens=9)[0] for text in TEXTS[2 * number : 2 * number + 2]]
        wrapped.unload()
    assert together == alone
    bare = runner.generate(TEXTS, max_new_tokens=9)
    assert bare != together and bare == [runner.generate([text], max_new_tokens=9)[0] for text in TEXTS]
    assert any(len(answer.split()) > 3 for answer in together)
    assert all(len(answer.split()) <= 3 for answer in runner.generate(TEXTS, max_new_tokens=3))
    with pytest.raises(LayoutError, match="5 rows"):
        runner.generate(TEXTS[:5], stack_adapters(adapters[:2]))


def test_encoders_choose_and_do_not_write(tiny_models, tokenizer, random_adapter):
    """The candidate nearest by cosine, with an adapter or without; asking for written answers is an error that says so."""
    tiny = tiny_models["bert"]
    runner = Runner(tiny.build(), tiny.layout(), make_objective("label_matching", tokenizer))
    vectors = torch.nn.functional.normalize(runner.hidden([TEXTS[0], *WORDS[:4]]), dim=1)
    cosines = vectors[1:] @ vectors[0]
    assert runner.choose([TEXTS[0]], WORDS[:4]) == [(WORDS[cosines.argmax()], pytest.approx(cosines.max().item(), abs=1e-6))]
    adapted = runner.choose(TEXTS, WORDS[:4], stack_adapters([random_adapter(runner.layout)]))
    assert adapted != runner.choose(TEXTS, WORDS[:4])
    assert not runner.objective.generates
    with pytest.raises(ConfigError, match="label_matching writes no answers"):
        runner.generate(TEXTS)


def test_objectives_say_how_they_behave(tokenizer):
    """Callers ask these, and compare no names."""
    said = {}
    for name in ("causal_lm", "label_matching", "prototypes"):
        objective = make_objective(name, tokenizer)
        said[name] = (objective.generates, objective.closed_labels, objective.draws_when_scoring, objective.word_for_word)
    assert said["causal_lm"] == (True, False, False, True)
    assert said["label_matching"] == (False, True, False, False)
    assert said["prototypes"] == (False, True, True, False)
    assert not make_objective("causal_lm", tokenizer, {"metric": "log_likelihood"}).word_for_word
