"""Training without experts: packed rows, bases from the base model's activations, and the method that learns in them."""

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import stack_adapters
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, quiet_loop, save_base, use_words

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.base.activations import input_statistics
from lorag.base.objectives import make_objective
from lorag.base.objectives.packing import fitting, pack, shared_start
from lorag.base.runner import Runner
from lorag.errors import ConfigError, GeneratorError, TaskError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import aligned, method_type
from lorag.methods.functional import FunctionalSettings, train_functionally
from lorag.networks.memory import TaskMemory
from lorag.networks.smoothing import FeatureSmoothing
from lorag.spaces import SpaceInputs, fit_space, open_space
from lorag.tasks.suite import TaskSuite
from lorag.training import calibrate_gate
from lorag.training.additions import add_gate
from lorag.training.preparation import SpaceChoice
from lorag.training.split import RunTasks
from lorag.training.train import TrainConfig, fit_generator, train

SMALL = {"width": 16, "heads": 2, "queries": 2, "features": 24, "probes": 1, "directions": 8, "noise": 0.0, "dropout": 0.0}
SMALL |= {"contrast": {"steps": 30}}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.fixture(scope="module")
def runner(base):
    return Runner.open(base, "cpu")


@pytest.fixture(scope="module")
def space(runner):
    return fit_space("activation_bases", SpaceInputs(runner.layout, None, 12, 3, runner, list(make_suite(TRAINING[:8]))))


# --- packed rows ------------------------------------------------------------------------------------------------------


def test_packed_rows_lose_what_rows_of_their_own_lose(base, runner, random_adapter):
    """Examples in one row see the shared beginning and themselves alone, at their own positions: each task's loss is the same."""
    tasks = list(make_suite(TRAINING[:3]))
    adapters = stack_adapters([random_adapter(runner.layout, seed=i) for i in range(3)])
    packed = Runner(runner.model, runner.layout, make_objective("causal_lm", runner.objective.tokenizer, {**base.settings, "pack": 4096}))
    with torch.no_grad():
        alone, together = (one.losses(adapters, tasks, 5, "seed") for one in (runner, packed))
    assert torch.allclose(alone, together, atol=1e-5)
    seen = []
    handle = runner.model.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
    with torch.no_grad():  # a head that something listens to gets whole rows, and no fewer
        assert torch.allclose(packed.losses(adapters, tasks, 5, "seed"), alone, atol=1e-5)
    handle.remove()
    assert [shape[0] for shape in seen] == [3]
    assert packed.objective.settings()["pack"] == 4096 and "pack" not in runner.objective.settings()


def test_a_row_takes_the_examples_that_fit_and_at_least_one():
    """The shared beginning counts once."""
    examples = [([1, 2, 3, 4], [9]), ([1, 2, 5, 6], [9]), ([1, 2, 7, 7], [9])]
    assert shared_start([prompt for prompt, _ in examples]) == 2
    assert [len(fitting(examples, most)) for most in (1, 8, 10, 11)] == [1, 2, 2, 3]
    rows = pack([examples[:2], examples[2:]], 0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 7, 7, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3, 2, 3]
    assert [(int(r), int(c), int(t)) for r, c, t in zip(rows.rows, rows.columns, rows.targets, strict=True)] == [
        (0, 3, 9),
        (0, 5, 9),
        (1, 3, 9),
    ]
    assert not rows.seen[0, 0, 4, 2] and rows.seen[0, 0, 4, 0]


# --- bases ------------------------------------------------------------------------------------------------------------


def test_input_directions_are_white_and_the_last_one_is_a_bias(runner, space):
    """Averaged inputs of the training texts have unit variance and no mean along each direction; along the bias they are 1."""
    texts = sorted({example.input for task in make_suite(TRAINING[:8]) for example in task.split("train")})
    means = [torch.cat(parts) for parts in zip(*(part.means for part in input_statistics(runner, texts)), strict=True)]
    for mean, basis in zip(means, space.bases_in, strict=True):
        along = mean @ basis.float()
        assert torch.allclose(along[:, :-1].var(0), torch.ones(along.shape[1] - 1), atol=0.2)  # but for what the bias takes
        assert along[:, :-1].mean(0).abs().max() < 0.05
        assert torch.allclose(along[:, -1].mean(), torch.tensor(1.0), atol=0.02)


def test_modules_that_read_one_input_share_a_basis(runner, space):
    """q and v of a layer do."""
    entries = dict(zip(runner.layout.names, space.entry, strict=True))
    shared = {entries[name] for name in entries if "layers.0" in name and name.endswith(("q_proj", "v_proj"))}
    assert len(shared) == 1 and len(space.bases_in) < len(runner.layout)


def test_codes_of_what_the_bases_hold_come_back(runner, space):
    """Decoding an encoded adapter of the space gives it again; strength scales ΔW; zero changes nothing."""
    codes = torch.randn(2, space.size, generator=torch.Generator().manual_seed(0))
    made = space.decode(codes, 3)
    for code, factors in zip(codes, made, strict=True):
        adapter = LoraAdapter(runner.layout, factors)
        again = space.decode(space.encode(adapter.factors)[None], 3)[0]
        assert again.cosine(factors) > 0.999 and space.energy(adapter.factors) > 0.999
        assert space.decode(space.scaled(code[None], 0.5), 3)[0].norm() == pytest.approx(0.5 * factors.norm(), rel=1e-4)
    assert space.decode(space.zero[None], 3)[0].norm() == 0
    assert space.decode(codes, 2)[0].rank == 2 and space.best_rank(16) == 3
    tensors, values = space.tensors()
    opened = open_space(tensors, values)
    assert torch.equal(opened.decode(codes, 3)[0].delta(runner.layout.names[0]), made[0].delta(runner.layout.names[0]))


def test_bases_need_tasks_and_enough_texts(runner):
    """Each lack has its own words."""
    with pytest.raises(GeneratorError, match="needs tasks"):
        fit_space("activation_bases", SpaceInputs(runner.layout, None, 12, 3, runner, []))
    with pytest.raises(GeneratorError, match="more texts than directions"):
        fit_space("activation_bases", SpaceInputs(runner.layout, None, 12, 3, runner, list(make_suite(TRAINING[:1], train=8))))


def test_a_stored_space_that_does_not_fit_is_refused(space):
    """A basis of another size, or entries that name none."""
    tensors, values = space.tensors()
    with pytest.raises(GeneratorError, match="does not fit its layout"):
        open_space({**tensors, "bases_out.0": torch.zeros(3, 3)}, values)
    with pytest.raises(GeneratorError, match="cannot be read"):
        open_space(tensors, {**values, "entry": [5] * len(values["entry"])})


# --- the method -------------------------------------------------------------------------------------------------------


def _fitted(base, steps):
    empty = AdapterBank.without_experts(base)
    prepared = prepare_toy(
        empty,
        RunTasks(make_suite(TRAINING), without_expert=make_suite(TRAINING[:14]), held_out=make_suite(TRAINING[14:])),
        space=SpaceChoice("activation_bases", k=12, rank=3),
    )
    functional = {"steps": steps, "tasks": 8, "examples": 2, "learning_rate": 0.01, "validate_every": 20}
    method = method_type("aligned").with_settings({**SMALL, "functional": functional})
    return prepared, fit_generator(prepared, method, quiet_loop(), rank=3, strength=1.0, origin={})


@pytest.mark.slow
def test_it_learns_from_examples_alone(base, runner):
    """Without any expert, generated adapters lose less on held-out tasks than the bare base; another task's description loses more."""
    prepared, generator = _fitted(base, 60)
    assert len(prepared.data.codes) == 0 and prepared.data.validation == list(range(14, len(TRAINING)))
    assert generator.conditioner.names == tuple(task.key for task in list(make_suite(TRAINING))[:14])
    tasks = [prepared.data.tasks[i] for i in range(14)]
    made = [generator.generate(task.descriptions[0]) for task in tasks]
    with torch.no_grad():
        bare = runner.losses(None, tasks, 8, "check").mean()
        own = runner.losses(Factors.stack([one.factors for one in made]), tasks, 8, "check").mean()
        other = runner.losses(Factors.stack([one.factors for one in [*made[5:], *made[:5]]]), tasks, 8, "check").mean()
    assert own < bare - 0.2 and own < other - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 0])
def test_a_saved_generator_writes_the_same_adapter(base, tmp_path, steps):
    """Space, network and probes come back to the bit; also where no step went through the base model."""
    _, generator = _fitted(base, steps)
    generator.save_pretrained(tmp_path / "g")
    opened = LoraGenerator.from_pretrained(tmp_path / "g", embedder=WordEmbedder())
    first, second = (one.generate("paint the red dog") for one in (generator, opened))
    for name in first.layout.names:
        assert torch.equal(first.factors[name][0], second.factors[name][0]) and torch.equal(first.factors[name][1], second.factors[name][1])


@pytest.mark.slow
def test_smoothing_is_kept_and_a_run_that_goes_on_begins_with_it(base, tmp_path):
    """Its numbers come back to the bit; its counts are checked like all that is stored."""
    _, generator = _fitted(base, 2)
    plain, method = generator.generate("paint the red dog"), generator.method
    rng = torch.Generator().manual_seed(0)
    method.network.smoothing = FeatureSmoothing(24, (5, 3))
    for buffer in method.network.smoothing.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=rng))
    method.shape["smoothed"] = [5, 3]
    generator.save_pretrained(tmp_path / "g")
    opened = LoraGenerator.from_pretrained(tmp_path / "g", embedder=WordEmbedder())
    first, second = (one.generate("paint the red dog") for one in (generator, opened))
    assert all(torch.equal(first.factors[name][1], second.factors[name][1]) for name in first.layout.names)
    assert not all(torch.equal(first.factors[name][1], plain.factors[name][1]) for name in first.layout.names)
    after = method_type("aligned").with_settings(SMALL)
    after.go_on_from(opened.method)
    assert after.network.smoothing.counts == (5, 3)
    for counts in ([5], [5, 2], [8, "x"], [-1], [2**40], 3):
        with pytest.raises(GeneratorError):
            method_type("aligned").with_settings(SMALL).restore(*_state(generator, smoothed=counts))
    for names in (3, ["red-dog"], [f"task{number}" for number in range(10**6)]):
        with pytest.raises(GeneratorError):
            method_type("aligned").with_settings(SMALL).restore(*_state(generator, remembered=names))


def _state(generator, **shape):
    state = generator.method.state()
    return dict(state.tensors), {**state.shape, **shape}


@pytest.mark.slow
@pytest.mark.parametrize("balance, share", [(0.0, 2 / 14), (1.0, 1 / 2)])
def test_balance_draws_small_sources_as_often_as_large_ones(base, balance, share):
    """Two of fourteen training tasks have a source of their own: drawn like all others, or as often as the twelve together."""
    prepared, _ = _fitted(base, 0)
    tasks = [replace(task, source="small" if i < 2 else "large") for i, task in enumerate(prepared.data.tasks)]
    drawn: Counter[str] = Counter()

    class Counting:
        def losses(self, factors, rows, count, seed):
            drawn.update(task.source for task in rows)
            return sum(one.flatten(1).mean(1) for pair in factors.values() for one in pair)

    network = torch.nn.Linear(1, prepared.data.space.size)
    loop = quiet_loop()
    data = replace(prepared.data, tasks=tasks, validation=())
    settings = FunctionalSettings(steps=300, tasks=1, examples=1, focus=0.0, balance=balance)
    train_functionally("counted", network, lambda rows, _: network(torch.ones(len(rows), 1)), data, loop, settings, Counting())
    assert drawn.total() == 300 and abs(drawn["small"] / 300 - share) < 0.07


def test_it_says_what_it_needs(base, tmp_path):
    """Another space, or a bank beside a base, is refused before time is spent."""
    bank = make_bank(tmp_path / "bank", base, TRAINING[:8])
    prepared = prepare_toy(bank, RunTasks(make_suite(TRAINING[:8])), k=12)
    with pytest.raises(GeneratorError, match="needs bases of activations"):
        method_type("aligned").with_settings(SMALL).fit(prepared.data, quiet_loop(), prepared.runner)
    with pytest.raises(ConfigError, match="bank and base cannot both"):
        train(TrainConfig(bank=str(bank.folder), base="sandbox-lm", out=str(tmp_path / "out")), quiet=True)


def _config(base, tmp_path, monkeypatch):
    """A run of two steps on a suite in a folder, with words instead of an embedder and two invented tasks as the unknown."""
    use_words(monkeypatch)
    unknown = {"robots": ["weld the left arm", "calibrate the gripper motor"], "gibberish": ["zzq wrt plm", "kkk lll mmm nnn"]}
    monkeypatch.setattr(calibrate_gate, "unknown_tasks", lambda part: unknown)
    keys = [task.key for task in make_suite(TRAINING)]
    folder = make_suite(TRAINING).save(tmp_path / "suite")
    (folder / "splits.json").write_text(json.dumps({"train": keys[:14], "validation": keys[14:]}))
    return TrainConfig(
        base=base.model.name,
        objective_settings=dict(base.settings),
        out=str(tmp_path / "g"),
        tasks=str(tmp_path / "suite"),
        method="aligned",
        settings={**SMALL, "functional": {"steps": 2, "tasks": 4, "examples": 2}},
        space="activation_bases",
        k=12,
        rank=3,
        strength=1.0,
        device="cpu",
    )


@pytest.mark.slow
def test_a_gate_from_the_suite_alone(base, tmp_path, monkeypatch):
    """`train` without a bank ends with a gate; fitted again on the finished folder, from the suite that it names, it is the same."""
    made = train(_config(base, tmp_path, monkeypatch), quiet=True)
    assert made.gate is not None and made.gate.fitted["held_out_tasks"] == len(TRAINING) - 14
    made.gate = None
    made.save_pretrained(tmp_path / "g")
    with pytest.raises(ConfigError, match="tasks: the generator learned from others"):
        add_gate(tmp_path / "g", tasks="sandbox")
    again = add_gate(tmp_path / "g", tasks=str(tmp_path / "suite"))
    assert again.gate is not None and again.gate.fitted["held_out_tasks"] == len(TRAINING) - 14
    assert LoraGenerator.from_pretrained(tmp_path / "g", embedder=WordEmbedder()).gate is not None


@pytest.mark.slow
def test_a_run_goes_on_from_a_trained_generator(base, tmp_path, monkeypatch):
    """Given where to start and tasks, all else is the first run's; what it fixed stays, the rest learns, licences add up."""
    config = _config(base, tmp_path, monkeypatch)
    first = train(config, quiet=True)
    suite = make_suite(TRAINING[4:])
    more = [replace(task, license="MIT") for task in suite]
    folder = TaskSuite(more).save(tmp_path / "more")
    keys = [task.key for task in more]
    (folder / "splits.json").write_text(json.dumps({"train": keys[:-2], "validation": keys[-2:]}))
    then = TrainConfig(start=config.out, tasks=str(folder), out=str(tmp_path / "then"), device="cpu", settings={"functional": {"steps": 3}})
    made = train(then, quiet=True)
    old, new = first.method.network.state_dict(), made.method.network.state_dict()
    remembered = [name for name in old if name.startswith("memory.")]
    moved = {name.split(".")[0] for name in old.keys() - remembered if not torch.allclose(old[name], new[name], atol=1e-6)}
    assert moved == {"row_start", "row_weights", "column_start", "column_weights"}
    assert made.method.shape["remembered"] == [task.name for task in make_suite(TRAINING[:14])] + [task.name for task in more[10:-2]]
    assert torch.equal(new["memory.keys"][:14], old["memory.keys"]) and torch.equal(new["memory.projection"], old["memory.projection"])
    assert made.base == first.base and made.strength == first.strength and made.method.settings.functional.tasks == 4
    assert set(made.conditioner.names) == set(keys[:-2]) and set(made.licenses) == set(first.licenses) | set(keys[:-2])
    assert made.licenses[keys[0]] == "MIT" and made.origin["config"]["start"] == "g" and made.gate is not None
    (folder / "splits.json").unlink()  # then all tasks count, and a share of them is held out
    alone = train(replace(then, out=str(tmp_path / "alone"), validation=0.25), quiet=True)
    assert len(alone.conditioner.names) == len(keys) - len(keys) // 4
    (folder / "splits.json").write_text(json.dumps({"test": keys}))
    with pytest.raises(TaskError, match="no split 'train' to learn from"):
        train(replace(then, out=str(tmp_path / "other")), quiet=True)
    with pytest.raises(ConfigError, match="rank is not that of start"):
        train(replace(then, rank=4, out=str(tmp_path / "other")), quiet=True)
    with pytest.raises(ConfigError, match="a network of another size"):
        train(replace(then, settings={"features": 12}, out=str(tmp_path / "other")), quiet=True)
    with pytest.raises(GeneratorError, match="house cannot go on from a trained generator"):
        method_type("house").with_settings({}).go_on_from(first.method)


@pytest.mark.slow
@pytest.mark.parametrize("settings, kept", [({"steps": 1}, [0, 1, 2]), ({"steps": 1, "kept": 0.0}, None), ({"steps": 0}, None)])
def test_known_tasks_with_common_answers_are_kept(base, monkeypatch, settings, kept):
    """A run that learns new wordings hands them to the steps that follow, with what was said before; a new one of them learns."""
    prepared, generator = _fitted(base, 2)
    before = copy.deepcopy(generator.method)
    method = method_type("aligned").with_settings({**SMALL, "distillation": settings, "smoothing": {"least": 2}})
    method.go_on_from(generator.method)

    def answered(task):
        return replace(task, examples=tuple(replace(one, output=("no", "yes")[i % 2]) for i, one in enumerate(task.examples)))

    tasks = [answered(task) if i < 4 else task for i, task in enumerate(prepared.data.tasks)]
    method.shape["remembered"] = [task.name for i, task in enumerate(tasks[:14]) if i != 3]
    method.network.memory = before.network.memory = TaskMemory(WordEmbedder().size, 24)  # nothing is recalled
    handed = []
    monkeypatch.setattr(aligned, "train_functionally", lambda *given: handed.append(given[-1]))
    method.fit(replace(prepared.data, tasks=tasks), quiet_loop(), prepared.runner)
    if kept is None:
        assert handed == [None]
    else:
        texts = [prepared.data.embeddings[i][0] for i in kept]
        assert handed[0].tasks == kept and torch.allclose(handed[0].before(kept, texts), before.predict(texts), atol=1e-5)
