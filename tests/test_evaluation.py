"""The ladder: scores of known adapters come out as known, controls are what they claim, and mismatches are errors."""

import dataclasses
import json

import pytest
import torch
from conftest import gauge
from toy_world import ANIMALS, COLOURS, LookedUp, WordEmbedder, describe, make_suite, quiet_loop, save_base

import lorag.evaluation.folders as folders
from lorag.bank.bank import AdapterBank
from lorag.bank.experts import ExpertConfig, train_group
from lorag.base.runner import Runner
from lorag.errors import ArtifactError, BankError, BaseModelError, ConfigError, LoragError
from lorag.evaluation.folders import find_oracles, open_ladder
from lorag.evaluation.ladder import JUNK, _junk, _shuffled, evaluate
from lorag.evaluation.oracles import OracleScores
from lorag.evaluation.reproduction import bank_bytes, delta_error, generator_bytes
from lorag.evaluation.statistics import bootstrap
from lorag.evaluation.tables import format_table
from lorag.files.artifacts import write_json
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods.baselines import Mean, Nearest, RandomExpert
from lorag.tasks.suite import TaskSuite
from lorag.training.preparation import SpaceChoice, prepare
from lorag.training.train import fit_generator

pytestmark = pytest.mark.slow

CELLS = tuple(zip(COLOURS, ANIMALS, strict=True))  # five tasks that share no word and no answer
EMBEDDER = WordEmbedder()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_models, tokenizer):
    """Base, suite and a bank of trained experts whose answers are right."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    suite = make_suite(CELLS)
    # Known scores, not generalisation, are the point: experts learn the test examples as well.
    seen = [dataclasses.replace(t, examples=tuple(dataclasses.replace(e, split="train") for e in t.examples)) for t in suite]
    late = train_group(Runner.open(base, "cpu"), seen, 4, ExpertConfig(steps=150, batch=12, learning_rate=1e-2, checkpoints=1))
    folder = tmp_path_factory.mktemp("oracles")
    bank = AdapterBank.create(folder, base).add([(t.key, t.descriptions, own) for t, own in zip(suite, late, strict=True)])
    return base, suite, bank


def _generator(bank, method, embedder=EMBEDDER):
    prepared = prepare(bank, embedder, space=SpaceChoice(k=24), quiet=True)
    return fit_generator(prepared, method(), quiet_loop(), rank=24, strength=1.0, origin={})


@pytest.fixture(scope="module")
def generators(world):
    """A generator that looks the description up, and that the ladder takes for a learned one; and the mean."""
    _, _, bank = world
    return {"mean": [_generator(bank, Mean)], "looked_up": [_generator(bank, LookedUp)]}


@pytest.fixture(scope="module")
def report(world, generators):
    _, suite, bank = world
    return evaluate(suite, generators, oracles=bank, seeds=2, limit=6, device="cpu", quiet=True)


def test_the_report_has_its_documented_keys(report):
    """Suite, seeds, tasks, and four keys for each method; all of it plain JSON."""
    assert set(report) == {"suite", "metric", "examples", "seeds", "tasks", "methods", "differences"}
    assert (report["suite"], report["seeds"], report["examples"], report["metric"]) == ("toy", 2, 6, "exact_match")
    assert report["tasks"] == [f"{c}-{a}" for c, a in CELLS]
    for row in report["methods"].values():
        assert set(row) - {"per_seed"} == {"score", "ci95", "gap_closed", "per_task", "prompt_tokens"}
        assert list(row["per_task"]) == report["tasks"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_known_adapters_get_the_known_scores(report):
    """Oracle 1, base 0, a lookup of the right expert 1, of another's 0; the gap is closed accordingly."""
    methods = report["methods"]
    assert list(methods) == [
        "base", "base_prompted", "few_shot", "random_init", "mean",
        "looked_up", "looked_up_shuffled", "looked_up_junk", "looked_up_prompted", "oracle",
    ]  # fmt: skip
    assert methods["oracle"]["score"] == 1 and methods["oracle"]["gap_closed"] == 1
    assert methods["base"]["score"] == 0 and methods["base"]["gap_closed"] == 0
    assert methods["looked_up"]["score"] > 0.9 and methods["looked_up"]["gap_closed"] > 0.9
    assert methods["looked_up_shuffled"]["score"] < 0.1
    assert methods["mean"]["score"] < 0.6 and methods["looked_up_junk"]["score"] < 0.6
    difference = report["differences"]["looked_up - looked_up_shuffled"]
    assert difference["difference"] == pytest.approx(methods["looked_up"]["score"] - methods["looked_up_shuffled"]["score"], abs=1e-3)


def test_intervals_hold_their_mean(report):
    """For every method; and a wider spread over tasks gives a wider interval."""
    for row in report["methods"].values():
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
        assert row["score"] == pytest.approx(sum(row["per_task"].values()) / len(row["per_task"]), abs=1e-3)
    rng = torch.Generator().manual_seed(0)
    values = torch.rand(60, generator=rng)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    expected = 2 * 1.96 * values.std() / 60**0.5
    assert (high - low) == pytest.approx(expected.item(), rel=0.15)
    assert bootstrap(values * 0 + 0.5) == [0.5, 0.5]


def test_shuffled_gives_no_task_its_own_description_and_junk_none_at_all(world):
    """For any number of tasks and any seed: a permutation without a fixed point."""
    for count in (2, 3, 7, 60):
        texts = [f"task {i}" for i in range(count)]
        for seed in range(5):
            moved = _shuffled(texts, seed)
            assert sorted(moved) == sorted(texts)
            assert all(a != b for a, b in zip(moved, texts, strict=True))
    assert set(_junk(texts, 3)) == set(JUNK) and not set(JUNK) & set(texts)


def test_a_single_task_has_no_shuffled_control(world, generators):
    """There is no other description to give it."""
    _, suite, bank = world
    alone = evaluate(suite.select(suite.names[:1]), generators, oracles=bank, seeds=1, limit=2, device="cpu", quiet=True)
    assert "looked_up" in alone["methods"] and "looked_up_shuffled" not in alone["methods"]


def test_methods_can_be_chosen_and_unknown_ones_are_named(world, generators):
    """The gap needs base and oracle, which are then scored too but not reported."""
    _, suite, bank = world
    some = evaluate(suite, generators, oracles=bank, methods=["looked_up"], seeds=1, limit=2, device="cpu", quiet=True)
    assert list(some["methods"]) == ["looked_up"] and some["methods"]["looked_up"]["gap_closed"] > 0.9
    bare = evaluate(suite, generators, methods=["looked_up"], seeds=1, limit=2, device="cpu", quiet=True)
    assert bare["methods"]["looked_up"]["gap_closed"] is None
    with pytest.raises(ConfigError, match="clairvoyance"):
        evaluate(suite, generators, oracles=bank, methods=["looked_up", "clairvoyance"], device="cpu", quiet=True)


def test_seeds_show_other_descriptions(world, monkeypatch):
    """Each seed shows a task another of its descriptions, and generators of other seeds in turn."""
    _, suite, bank = world
    shown = []
    first, second = _generator(bank, Mean), _generator(bank, Mean)
    for number, one in enumerate((first, second)):
        original = one.generate_many
        monkeypatch.setattr(
            one,
            "generate_many",
            lambda texts, *, seed, n=number, o=original, **more: shown.extend((n, t, seed) for t in texts) or o(texts, seed=seed, **more),
        )
    evaluate(suite, {"mean": [first, second]}, methods=["mean"], seeds=3, limit=1, device="cpu", quiet=True)
    cell = CELLS[0]
    assert [entry for entry in shown if entry[1] in describe(*cell)] == [
        (0, describe(*cell)[0], 0),
        (1, describe(*cell)[1], 1),
        (0, describe(*cell)[0], 2),
    ]


def test_mismatches_are_errors(world, generators):
    """Another base under a generator or the oracles, a task without an oracle, and a base that has changed."""
    base, suite, bank = world
    other = dataclasses.replace(base, identity="sha256:another")
    strange = dataclasses.replace(generators["mean"][0], base=other)
    with pytest.raises(ConfigError, match="share one base"):
        evaluate(suite, {**generators, "strange": [strange]}, device="cpu", quiet=True)
    with pytest.raises(BaseModelError, match="has changed"):
        evaluate(suite, {"strange": [strange]}, device="cpu", quiet=True)
    with pytest.raises(BankError, match="base"):
        evaluate(suite, generators, oracles=AdapterBank(bank.folder, other, bank.experts), device="cpu", quiet=True)
    with pytest.raises(BankError, match="lacks tasks"):
        evaluate(make_suite([("red", "horse"), ("blue", "cat")]), generators, oracles=bank, device="cpu", quiet=True)
    with pytest.raises(ConfigError):
        evaluate(suite, {}, device="cpu", quiet=True)


def test_the_table_names_every_method(report):
    """With score, interval and gap; and without an oracle as well."""
    table = format_table(report)
    for name, row in report["methods"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ") and " - " not in line]
        assert f"{row['score']:.3f}" in line and f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}" in line
    bare = {**report, "methods": {name: {**row, "gap_closed": None} for name, row in report["methods"].items()}}
    assert "looked_up" in format_table(bare)


def test_the_random_baseline_differs_between_tasks(world):
    """One seed serves all tasks of a ladder; were it one expert for all of them, the baseline would be one draw, not many."""
    _, _, bank = world
    random = _generator(bank, RandomExpert)
    texts = [describe(c, a)[0] for c in COLOURS for a in ANIMALS]
    drawn = [random.method.generate(random.condition(text), torch.Generator().manual_seed(0))[0] for text in texts]
    counts = [sum(torch.equal(code, expert) for code in drawn) for expert in random.method.codes]
    assert sum(counts) == len(texts) and max(counts) < len(texts) / 2 and min(counts) > 0
    again = random.method.generate(random.condition(texts[3]), torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, drawn[3])


# --- rivals -----------------------------------------------------------------------------------------------------------


def test_rivals_are_rows_with_the_tokens_that_they_cost(report):
    """Examples in the prompt cost more tokens than a description, an adapter none; each difference has its interval."""
    tokens = {name: row["prompt_tokens"] for name, row in report["methods"].items()}
    assert tokens["base"] == tokens["looked_up"] == tokens["oracle"] < tokens["base_prompted"] == tokens["looked_up_prompted"]
    assert tokens["few_shot"] > 2 * tokens["base_prompted"]
    assert report["methods"]["random_init"]["score"] < 0.2
    rivals = ("looked_up_shuffled", "looked_up_junk", "looked_up_prompted", "base_prompted", "few_shot", "random_init", "mean", "oracle")
    assert list(report["differences"]) == [f"looked_up - {name}" for name in rivals]
    for name in rivals:
        row = report["differences"][f"looked_up - {name}"]
        apart = report["methods"]["looked_up"]["score"] - report["methods"][name]["score"]
        assert row["difference"] == pytest.approx(apart, abs=1e-3) and row["ci95"][0] <= row["difference"] <= row["ci95"][1]


def test_an_adapter_trained_on_a_few_examples_is_scored_by_name(world, generators):
    """fresh_K learns a constant answer from K examples; K of few_shot shows in the tokens; a number is due."""
    _, suite, _ = world
    values = {"seeds": 1, "limit": 2, "device": "cpu", "quiet": True}
    names = ["base", "fresh_6", "few_shot_2", "few_shot_6"]
    found = evaluate(suite.select(suite.names[:2]), generators, methods=names, **values)["methods"]
    assert found["fresh_6"]["score"] > found["base"]["score"] + 0.4
    assert found["fresh_6"]["prompt_tokens"] == found["base"]["prompt_tokens"]
    assert found["few_shot_2"]["prompt_tokens"] < found["few_shot_6"]["prompt_tokens"]
    with pytest.raises(ConfigError, match="fresh_K"):
        evaluate(suite, generators, methods=["fresh_many"], **values)


def test_scores_stand_for_oracles(world, generators, report, tmp_path):
    """What a run wrote of `oracle`, or of `fresh_K` with most examples, of one split or several; anything else is refused in a line."""
    _, suite, bank = world
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(report))
    values = {"methods": ["looked_up"], "seeds": 1, "limit": 4, "device": "cpu", "quiet": True}
    by_scores = evaluate(suite, generators, oracles=find_oracles(str(path), "toy"), **values)
    assert by_scores["methods"] == evaluate(suite, generators, oracles=bank, **values)["methods"]
    fresh = {"metric": "exact_match", "methods": {f"fresh_{k}": {"per_task": {suite.names[0]: k / 64}} for k in (4, 32)}}
    path.write_text(json.dumps({"splits": {"one": fresh}}))
    assert OracleScores.read(path) == OracleScores("exact_match", {suite.names[0]: 0.5})
    other = OracleScores("accuracy", {suite.names[0]: 1.0})
    with pytest.raises(BankError, match="another metric"):
        evaluate(suite, generators, oracles=other, **values)
    with pytest.raises(BankError, match="lack tasks"):
        evaluate(suite, generators, oracles=OracleScores("exact_match", {"strange": 1.0}), **values)
    for wrong, message in (
        ('{"metric": 3}', "is not what lorag evaluate"),
        ('{"metric": "exact_match", "methods": {}}', "no scores of oracles"),
    ):
        path.write_text(wrong)
        with pytest.raises(ArtifactError, match=message):
            find_oracles(str(path), "toy")


def test_oracles_of_some_tasks_close_the_gap_over_those(world, generators):
    """A task without an expert counts for every score, and for no gap."""
    _, suite, bank = world
    more = TaskSuite([*suite.select(suite.names[:2]), *make_suite([("red", "horse")])])
    found = evaluate(more, generators, oracles=bank, methods=["looked_up", "oracle"], seeds=1, limit=4, device="cpu", quiet=True)["methods"]
    assert found["oracle"]["tasks"] == 2 and list(found["oracle"]["per_task"]) == list(suite.names[:2])
    assert len(found["looked_up"]["per_task"]) == 3 and found["looked_up"]["score"] < 0.8 < found["looked_up"]["gap_closed"]
    assert "tasks" not in found["looked_up"]


def test_a_ladder_needs_no_bank(world, generators, tmp_path, monkeypatch):
    """Without one there are no baselines from it; another suite of the base does, in several splits over one loaded model."""
    _, suite, bank = world
    generators["looked_up"][0].save_pretrained(tmp_path / "g")
    suite.save(tmp_path / "suite")
    write_json(tmp_path / "suite" / "splits.json", {"train": [suite.names[4]], "one": list(suite.names[:2]), "two": list(suite.names[2:4])})
    opened, loads = LoraGenerator.from_pretrained, []
    monkeypatch.setattr(LoraGenerator, "from_pretrained", lambda path, **more: opened(path, **{**more, "embedder": EMBEDDER}))
    run = Runner.open
    monkeypatch.setattr(Runner, "open", lambda *given: loads.append(given[1:]) or run(*given))
    values = {"tasks": str(tmp_path / "suite"), "split": ["one", "two"], "device": "cpu", "quiet": True}
    ladder = open_ladder([str(tmp_path / "g")], dtype="bfloat16", **values)
    found = {name: one.evaluate(seeds=1, limit=2, quiet=True) for name, one in ladder.each()}
    assert [report["tasks"] for report in found.values()] == [list(suite.names[:2]), list(suite.names[2:4])]
    assert {"base", "few_shot", "nearest"} <= set(found["one"]["methods"]) and "mean" not in found["one"]["methods"]
    assert loads == [("cpu", "bfloat16")]
    # A bank whose tasks the suite does not hold still gives baselines, whose strength is then not tuned.
    banked = open_ladder([str(tmp_path / "g")], bank=str(bank.folder), methods=["mean"], **values)
    assert list(banked.evaluate(seeds=1, limit=2, quiet=True)["methods"]) == ["mean"]
    with pytest.raises(ConfigError, match="--tasks"):
        open_ladder([str(tmp_path / "g")], quiet=True)


# --- reproduction -----------------------------------------------------------------------------------------------------


def test_delta_error_is_that_of_the_dense_matrices(world, random_adapter):
    """Gram matrices give what ‖ΔW − ΔW'‖ / ‖ΔW'‖ gives, over ranks and scalings; 0 for another gauge; and it stays finite."""
    base, _, _ = world
    one, other = random_adapter(base.layout, rank=3, alpha=5.0, seed=1), random_adapter(base.layout, rank=6, alpha=2.0, seed=2)
    apart = sum((one.delta(name) - other.delta(name)).square().sum() for name in base.layout.names)
    whole = sum(other.delta(name).square().sum() for name in base.layout.names)
    assert delta_error(one, other) == pytest.approx((apart / whole).sqrt().item(), rel=1e-5)
    assert delta_error(gauge(one, 3), one) < 1e-5
    assert delta_error(one.scaled(0), one) == pytest.approx(1)
    assert delta_error(one, one.scaled(0)) == 1 and delta_error(one.scaled(0), one.scaled(0)) == 0


def test_reproduction_is_reported_for_known_tasks_only(world, generators, report):
    """A lookup gives the bank back whole, the mean does not; without the flag, or oracles, there is no such part."""
    _, suite, bank = world
    known = evaluate(suite, generators, oracles=bank, reproduce=True, seeds=2, limit=6, device="cpu", quiet=True)
    assert "reproduction" not in report
    assert {key: value for key, value in known.items() if key != "reproduction"} == report  # nothing else changes
    found = known["reproduction"]
    assert set(found) == {"mean", "looked_up"}  # neither controls nor the experts themselves
    assert all(set(row) == {"score_kept", "delta_error", "bytes", "bank_bytes"} for row in found.values())
    assert found["looked_up"]["score_kept"] > 0.9 > found["mean"]["score_kept"]
    assert found["looked_up"]["delta_error"] < 0.15 < 0.5 < found["mean"]["delta_error"]
    for line in ("looked_up", "mean"):
        assert any(row.startswith(line) and f"{found[line]['delta_error']:.3f}" in row for row in format_table(known).splitlines()[-2:])


def test_weights_are_compared_with_one_adapter_a_task(world, generators, tmp_path):
    """The generator weighs what its file will weigh, and is not changed by it; late checkpoints do not count for the bank."""
    base, _, bank = world
    generator = generators["looked_up"][0]
    codes, revision = generator.method.codes.clone(), generator.revision
    weight = generator_bytes(generator)
    assert generator.revision == revision and torch.equal(generator.method.codes, codes)
    assert weight == (_generator(bank, Nearest).save_pretrained(tmp_path / "g") / "generator.safetensors").stat().st_size
    late = [[bank.adapter(name)] * 5 for name in bank.names]
    parts = [(name, bank[name].descriptions, own) for name, own in zip(bank.names, late, strict=True)]
    often = AdapterBank.create(tmp_path / "often", base).add(parts[:2]).add(parts[2:])
    single, fivefold = bank_bytes(bank, bank.names), bank_bytes(often, bank.names)
    assert single == pytest.approx(len(bank) * base.layout.values(4) * 4, rel=0.05)  # rank 4 in fp32
    assert fivefold == pytest.approx(single, rel=0.05)
    assert bank_bytes(often, bank.names[:1]) == pytest.approx(single / len(bank), rel=0.05)


def test_the_training_split_needs_no_oracles(world, generators, tmp_path, monkeypatch):
    """`--split train`: the bank itself is the oracle, and the ladder says how it is given back; other splits do not."""
    _, suite, bank = world
    generators["looked_up"][0].save_pretrained(tmp_path / "g")
    suite.save(tmp_path / "suite")
    write_json(tmp_path / "suite" / "splits.json", {"train": list(suite.names), "test": list(suite.names[:2])})
    opened = LoraGenerator.from_pretrained
    monkeypatch.setattr(LoraGenerator, "from_pretrained", lambda path, **more: opened(path, **{**more, "embedder": EMBEDDER}))
    values = {"bank": str(bank.folder), "tasks": str(tmp_path / "suite"), "device": "cpu", "quiet": True}
    found = open_ladder([str(tmp_path / "g")], split="train", **values).evaluate(seeds=1, limit=2, quiet=True)
    assert found["methods"]["oracle"]["score"] == 1
    assert {"mean", "nearest", "ridge"} <= set(found["reproduction"])
    assert found["reproduction"]["nearest"]["delta_error"] < 0.15
    other = open_ladder([str(tmp_path / "g")], split="test", oracles=str(bank.folder), methods=["nearest"], **values)
    report = other.evaluate(seeds=1, limit=2, quiet=True)
    assert "reproduction" not in report and list(report["methods"]) == ["nearest"]


def test_a_ladder_from_folders(world, generators, tmp_path, monkeypatch):
    """What the command line runs: baselines fitted on the bank stand beside the generator; a foreign bank is refused."""
    base, suite, bank = world
    generators["looked_up"][0].save_pretrained(tmp_path / "g")
    suite.save(tmp_path / "suite")
    opened = LoraGenerator.from_pretrained
    monkeypatch.setattr(LoraGenerator, "from_pretrained", lambda path, **more: opened(path, **{**more, "embedder": EMBEDDER}))
    values = {"tasks": str(tmp_path / "suite"), "split": "all", "device": "cpu", "quiet": True}
    ladder = open_ladder([str(tmp_path / "g")], bank=str(bank.folder), oracles=str(bank.folder), **values)
    report = ladder.evaluate(seeds=1, limit=2, quiet=True)
    found = report["methods"]
    assert {"base", "random", "mean", "nearest", "top_k", "ridge", "oracle"} <= set(found)
    assert found["nearest"]["score"] > 0.9 > found["random"]["score"]
    foreign = dataclasses.replace(base, identity="sha256:another")
    AdapterBank.create(tmp_path / "foreign", foreign).add([("a", ["task"], [bank.adapter(bank.names[0])])])
    with pytest.raises(LoragError, match="base"):
        open_ladder([str(tmp_path / "g")], bank=str(tmp_path / "foreign"), **values)


def test_a_folder_s_name_does_not_decide_what_is_evaluated(world, generators, tmp_path, monkeypatch):
    """A generator in a folder whose path contains "multitask" stands beside the shipped multitask baseline, as any other does."""
    generators["looked_up"][0].save_pretrained(tmp_path / "no-multitask" / "g")
    opened, names = LoraGenerator.from_pretrained, []

    def from_pretrained(path, **more):
        names.append(path.name)
        generator = opened(tmp_path / "no-multitask" / "g", **{**more, "embedder": EMBEDDER})
        generator.method.name = "multitask" if path.name == "multitask" else generator.method.name
        return generator

    monkeypatch.setattr(LoraGenerator, "from_pretrained", from_pretrained)
    monkeypatch.setattr(folders, "find_bank", lambda name: world[2])
    monkeypatch.setattr(folders, "find_tasks", lambda name: TaskSuite(world[1], {"test": world[1].names}))
    open_ladder([str(tmp_path / "no-multitask" / "g")], bank="sandbox", methods=["base"], oracles=str(world[2].folder), quiet=True)
    assert names == ["g", "multitask"]
