"""The gate: what is known, what is close, what is within reach and what is not, and that its numbers can be trusted."""

import dataclasses
import functools
import html
import json
import warnings

import pytest
import torch
from toy_world import (
    COLOURS,
    HELD_OUT,
    TRAINING,
    WordEmbedder,
    describe,
    make_bank,
    make_suite,
    name_of,
    prepare_toy,
    quiet_loop,
    save_base,
    use_words,
)
from typer.testing import CliRunner

import lorag.generator.generate as generation_module
import lorag.training.calibrate_gate as calibrate_gate
from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.bank.bank import AdapterBank
from lorag.cli.main import app
from lorag.errors import ArtifactError, BankError, ConfigError, GeneratorError, UnknownTaskError, UnknownTaskWarning
from lorag.evaluation.gate import format_gate, measure_gate
from lorag.generator.calibration import Logistic, auroc, calibration_error, cross_fitted, residual_interval, risk_coverage
from lorag.generator.evidence import FEATURES, gather, rewordings
from lorag.generator.files import find_generator
from lorag.generator.gate import _BY, _PHRASES, Gate
from lorag.generator.generate import generate_lora, open_generator
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.tasks.unknown import read_unknown, unknown_tasks
from lorag.text.conditioning import mixture_weights
from lorag.training.additions import add_gate
from lorag.training.calibrate import gap_closed_by
from lorag.training.calibrate_gate import GateSettings, fit_gate
from lorag.training.split import RunTasks, Split, SplitRule
from lorag.training.train import TrainConfig, fit_generator, train
from lorag.web.drawings import draw_verdict
from lorag.web.session import Session

EMBEDDER = WordEmbedder()
FAR = ("drive my robot arm forward", "asdf qwer zxcv", "thank you so much", "fasse den wetterbericht zusammen")
UNKNOWN = {kind: [text for text in texts if "the" not in text.split()] for kind, texts in unknown_tasks("fit").items()}
FEW = GateSettings(wordings=2, limit=2)


def _close(codes):
    """A stand-in for measured gains: half of the gap for every code."""
    return torch.full((len(codes),), 0.5, dtype=torch.float64)


def _measured(generator, codes, *_, **__):
    return _close(codes)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_models, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, base):
    return make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)


@pytest.fixture(scope="module")
def prepared(bank):
    return prepare_toy(bank, rule=SplitRule(validation=0.3), k=16)


@pytest.fixture(scope="module")
def bare(prepared):
    """A ridge generator without a gate."""
    return fit_generator(prepared, method_type("ridge")(), quiet_loop(), rank=8, strength=1.0, origin={})


@pytest.fixture(scope="module")
def gate(bare, bank, prepared):
    return fit_gate(bare, bank, RunTasks(), prepared.split, unknown=UNKNOWN, settings=FEW)


@pytest.fixture
def gated(bare, gate):
    return dataclasses.replace(bare, gate=gate)


# --- the maths --------------------------------------------------------------------------------------------------------


def test_a_logistic_model_finds_the_probabilities():
    """Shares of a known model come back exactly, drawn ones within .03 on average, whatever the features' scale and offset."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 2, generator=rng, dtype=torch.float64)
    right = torch.sigmoid(1.5 * rows[:, 0] - 0.5)
    drawn = (torch.rand(4000, generator=rng, dtype=torch.float64) < right).double()
    moved = rows * torch.tensor([100.0, 0.01]) + 7
    assert (Logistic.fit(moved, right, penalty=0.01)(moved) - right).abs().max() < 1e-3
    fitted = Logistic.fit(moved, drawn)
    assert (fitted(moved) - right).abs().mean() < 0.03
    again = Logistic(**json.loads(json.dumps(fitted.to_dict())))
    assert torch.allclose(again(rows), fitted(rows), atol=1e-4)


def test_weights_stand_for_repetitions_and_one_class_stays_finite():
    """A row of weight 3 counts as three rows; a fit on a single class gives finite, confident numbers."""
    rows, labels = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 1.0, 0.0])
    weighted = Logistic.fit(rows, labels, weights=torch.tensor([1.0, 3.0, 1.0]), penalty=0.0)
    repeated = Logistic.fit(rows[[0, 1, 1, 1, 2]], labels[[0, 1, 1, 1, 2]], penalty=0.0)
    assert torch.allclose(weighted(rows), repeated(rows), atol=1e-2)
    alone = Logistic.fit(rows, torch.ones(3))(rows)
    assert alone.isfinite().all() and alone.min() > 0.9


def test_auroc_is_the_share_of_pairs_in_order():
    """Worked by hand: 1 apart, 0 reversed, half for ties, 3 of 4 pairs in between."""
    assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.8, 0.9])) == 1
    assert auroc(torch.tensor([0.8, 0.9]), torch.tensor([0.1, 0.2])) == 0
    assert auroc(torch.zeros(3), torch.zeros(5)) == 0.5
    assert auroc(torch.tensor([0.1, 0.6]), torch.tensor([0.5, 0.9])) == 0.75


def test_risk_coverage_is_as_worked_by_hand():
    """Risks 0, 1, 0, 1 in order of confidence give 0, 1/2, 1/3, 1/2; the best order gives 0, 0, 1/3, 1/2."""
    curve = risk_coverage(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert curve.coverage == (0.25, 0.5, 0.75, 1.0)
    assert curve.risk == pytest.approx((0, 1 / 2, 1 / 3, 1 / 2))
    assert curve.area == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4) and curve.best == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert curve.at(0.5) == pytest.approx(0.5) and curve.at(0.0) == 0 and curve.at(1.0) == 0.5


def test_ties_in_confidence_do_not_depend_on_the_order_of_rows():
    """A confidence that knows nothing has the full risk at every coverage, in whatever order rows come."""
    risk = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        assert risk_coverage(torch.ones(4), risk[order]).risk == pytest.approx((0.5,) * 4)


def test_calibration_error_is_the_distance_of_means():
    """Zero where bins hold what they promise, .3 where everything promises .3 too much."""
    actual = torch.tensor([0.0, 1.0] * 20)
    assert calibration_error(torch.full((40,), 0.5), actual, bins=1) == pytest.approx(0)
    assert calibration_error(torch.full((40,), 0.8), actual, bins=1) == pytest.approx(0.3)
    assert calibration_error(torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1]), bins=2) == pytest.approx(0.8)


def test_intervals_cover_what_they_promise():
    """90 % intervals from 99 residuals hold 87 to 93 % of 20,000 fresh ones, also of a skewed distribution."""
    rng = torch.Generator().manual_seed(1)
    held = []
    for _ in range(40):
        draws = torch.empty(599, dtype=torch.float64).exponential_(generator=rng)
        low, high = residual_interval(torch.zeros(99), draws[:99])
        held.append(((draws[99:] >= low) & (draws[99:] <= high)).double().mean().item())
    assert 0.87 < sum(held) / len(held) < 0.93


def test_cross_fitted_numbers_never_saw_their_own_group():
    """Turning a group's own targets around changes the predictions of the others and none of its own."""
    rng = torch.Generator().manual_seed(2)
    rows, groups = torch.randn(30, 2, generator=rng), [i % 3 for i in range(30)]
    targets = (rows[:, 0] > 0).double()
    turned = torch.where(torch.tensor(groups) == 0, 1 - targets, targets)
    first, second = cross_fitted(rows, targets, groups), cross_fitted(rows, turned, groups)
    own = torch.tensor(groups) == 0
    assert torch.equal(first[own], second[own]) and (first[~own] - second[~own]).abs().max() > 0.01


# --- what it goes by --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evidence_leaves_out_the_task_s_own_expert(gated, gate):
    """A task that plays an unknown one is as far from the bank as its nearest other expert, and rewordings do not see it either."""
    text = gated.conditioner.names and describe(*TRAINING[0])[0]
    embedded = EMBEDDER.embed([text])[0]
    whole = gather(gated, text, gated.conditioner(embedded), reference=gate.reference).row()
    unseen = functools.partial(gated.conditioner, masked=torch.arange(len(TRAINING)) == 0)
    hidden = gather(gated, text, unseen(embedded), reference=gate.reference, condition_of=unseen).row()
    place = FEATURES.index("nearest")
    others = gated.conditioner.centroids[1:] @ embedded.pooled
    assert hidden[place] == pytest.approx(others.max().item(), abs=1e-6) and hidden[place] < whole[place]
    assert hidden.isfinite().all() and len(hidden) == len(FEATURES)


def test_evidence_tells_more_than_the_nearest_expert(gated, gate):
    """Of strange descriptions more lies outside of the bank's directions, and rewording changes the code more."""
    rows = {}
    for key, texts in (("known", [describe(*cell)[0] for cell in HELD_OUT]), ("far", FAR)):
        found = [gather(gated, text, gated.condition(text), reference=gate.reference).row() for text in texts]
        rows[key] = dict(zip(FEATURES, torch.stack(found).mean(0).tolist(), strict=True))
    assert rows["far"]["outside"] > rows["known"]["outside"] + 0.1
    assert rows["far"]["rewording"] > rows["known"]["rewording"]
    assert rows["far"]["nearest"] < rows["known"]["nearest"]


def test_samples_that_disagree_are_evidence(bare, prepared, gate):
    """A method that samples shows how far its samples lie apart; a deterministic one shows none."""
    drawn = fit_generator(prepared, method_type("sg_mixture")(), quiet_loop(), rank=8, strength=1.0, origin={})
    for generator, disagrees in ((drawn, True), (bare, False)):
        condition = generator.condition("paint the red dog")
        found = gather(generator, "paint the red dog", condition, reference=gate.reference)
        assert (found.features["sampling"] > 1e-6) == disagrees


def test_rewordings_keep_the_words():
    """Every rewording says what the description says, and none is empty."""
    for other in rewordings("Paint the red dog!"):
        assert {"paint", "the", "red", "dog"} <= {word.strip("!,.").lower() for word in other.split()}
    assert all(other.strip() for other in rewordings("???"))  # nothing but marks is still a text


# --- the ladder in one call -------------------------------------------------------------------------------------------


def test_what_is_within_reach_is_generated_and_what_is_far_is_refused(gated):
    """Unseen combinations of known words pass; robots, gibberish, praise and another language do not; info says which and why."""
    for cell in HELD_OUT:
        info = gated.generate(describe(*cell)[0], on_unknown="raise").info["gate"]
        assert info["decision"] == "generate" and info["served"] == "generated" and info["novelty"] < 0.5
    for text in FAR:
        with pytest.warns(UnknownTaskWarning, match="do not expect"):
            info = gated.generate(text).info["gate"]
        assert info["decision"] == "refuse" and info["novelty"] > 0.5
        assert all(name in info["reason"] for name, _ in info["nearest"]) and len(info["nearest"]) == 3


def test_refusing_names_the_nearest_tasks(gated):
    """on_unknown="raise": an UnknownTaskError with novelty, nearest tasks and what to do, and no adapter."""
    with pytest.raises(UnknownTaskError) as caught:
        gated.generate(FAR[0], on_unknown="raise")
    nearest = gated.condition(FAR[0]).neighbours[0][0]
    assert nearest in str(caught.value) and "novelty" in str(caught.value) and "fallback" in str(caught.value)


def test_the_fallback_changes_nothing(gated, tmp_path):
    """on_unknown="fallback": every ΔW is zero, the folder loads again, no expert counts as its parent; known tasks are unaffected."""
    with pytest.warns(UnknownTaskWarning, match="changes nothing"):
        adapter = gated.generate(FAR[1], on_unknown="fallback")
    assert all(norm == 0 for norm in adapter.norms().values())
    assert adapter.info["gate"]["served"] == adapter.info["method"] == "fallback" and not adapter.info["parents"]
    adapter.save_pretrained(tmp_path / "nothing")
    text = describe(*HELD_OUT[0])[0]
    plain, guarded = (gated.generate(text, on_unknown=choice) for choice in ("warn", "fallback"))
    assert all(torch.equal(plain.factors[n][0], guarded.factors[n][0]) for n in plain.factors)


def test_a_known_task_gets_its_expert(gated, bank, tmp_path):
    """Any stored wording, whatever its case and spaces, and the task's name: the bank's very expert, or without the bank what is
    generated for it, and both say so."""
    for text in ("Paint the  RED cat.", "red cat please", "red-cat"):
        adapter = gated.generate(text, bank=bank, on_unknown="raise")
        expert = bank.adapter("red-cat")
        assert adapter.info["gate"]["decision"] == adapter.info["gate"]["served"] == adapter.info["method"] == "expert"
        assert [p["name"] for p in adapter.info["parents"]] == ["red-cat"]
        assert all((adapter.delta(n) - expert.delta(n)).abs().max() == 0 for n in expert.layout.names)
    again = gated.generate("paint the red cat")
    assert again.info["gate"]["decision"] == "expert" and again.info["gate"]["served"] == "reconstruction"
    adapter.save_pretrained(tmp_path / "a")


def test_a_held_out_task_is_never_taken_for_a_known_one(gated):
    """Whatever names a known task, no wording of an unseen combination does."""
    for cell in HELD_OUT:
        for text in describe(*cell):
            assert gated.judge(text).decision != "expert"


def test_close_tasks_are_fused_if_fusing_did_as_well(gated, bank):
    """Above the fitted cosine and with the bank at hand: decoded softmax mixture of the nearest experts' codes, as its parents say."""
    text = describe(*HELD_OUT[0])[0]
    close = dataclasses.replace(gated, gate=dataclasses.replace(gated.gate, fuse_above=0.1))
    fused = close.generate(text, bank=bank)
    assert fused.info["gate"]["decision"] == "fuse" and fused.info["gate"]["served"] == "fusion"
    shares = mixture_weights(close.condition(text).similarities, 4, 0.05)
    code = sum(share * close.space.encode(bank.adapter(name).factors) for name, share in zip(bank.names, shares, strict=True) if share)
    assert (
        torch.allclose(close.space.restore(close.space.encode(fused.factors)), close.space.restore(code), atol=1e-4)
        or fused.rank < close.space.k
    )
    assert len(fused.info["parents"]) == 4 and sum(p["weight"] for p in fused.info["parents"]) == pytest.approx(1, abs=1e-4)
    assert close.generate(text).info["gate"]["served"] == "generated"  # without the bank there is nothing to fuse
    assert gated.generate(text, bank=bank).info["gate"]["decision"] == "generate"


def test_another_bank_is_refused(gated, tmp_path, base):
    """Experts of a bank that lacks the generator's would be others than those that the gate names."""
    with pytest.raises(BankError, match="learned from"):
        gated.generate("paint the red cat", bank=make_bank(tmp_path / "b", base, TRAINING[:3]))


def test_without_a_gate_it_says_so(bare):
    """No novelty, no gain, no refusal, and a reason that names the command; nothing is guessed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = bare.generate(FAR[0], on_unknown="raise").info["gate"]
    assert info["decision"] == "generate" and "no gate" in info["reason"] and "lorag gate fit" in info["reason"]
    assert info["novelty"] is info["expected_gap_closed"] is info["expected_gap_closed_interval"] is None


def test_the_gate_changes_no_weight(gated, bare):
    """What is generated is the same with a gate, without, and with the gate not asked."""
    text = describe(*HELD_OUT[1])[0]
    adapters = [bare.generate(text), gated.generate(text), gated.generate(text, on_unknown="ignore")]
    for adapter in adapters[1:]:
        assert all(torch.equal(adapters[0].factors[n][1], adapter.factors[n][1]) for n in adapter.factors)
    assert adapters[2].info["gate"]["novelty"] is None


def test_an_unknown_choice_is_named(gated):
    """ConfigError that lists the choices."""
    with pytest.raises(ConfigError, match="warn or raise or fallback or ignore"):
        gated.generate("paint the red dog", on_unknown="explode")


def test_generate_lora_passes_the_choice_on(gated, bank):
    """The one call: on_unknown and a bank's folder reach the generator."""
    with pytest.raises(UnknownTaskError):
        generate_lora(FAR[2], generator=gated, on_unknown="raise")
    assert generate_lora("red cat please", generator=gated, bank=bank.folder).info["gate"]["served"] == "expert"


def test_the_command_line_refuses_and_warns(gated, tmp_path, monkeypatch):
    """--on-unknown raise makes no folder; the default writes it and says on stderr that it will not work."""
    monkeypatch.setattr(generation_module, "default_generator", lambda: gated)
    refused = CliRunner().invoke(app, ["generate", FAR[0], "--out", str(tmp_path / "no"), "--on-unknown", "raise"])
    assert isinstance(refused.exception, UnknownTaskError) and not (tmp_path / "no").exists()
    warned = CliRunner().invoke(app, ["generate", FAR[0], "--out", str(tmp_path / "yes")])
    assert warned.exit_code == 0 and "do not expect" in warned.stderr and (tmp_path / "yes/adapter_config.json").exists()


def test_a_verdict_names_the_evidence_that_decided(gated):
    """Refused: what spoke against it, in words, in `info["gate"]` and with the measured values; a known wording: that it is one."""
    with pytest.warns(UserWarning):
        info = gated.generate(FAR[0]).info["gate"]
    assert info["decided_by"] and set(info["decided_by"]) <= set(FEATURES) and set(info["evidence"]) <= set(FEATURES)
    against = gated.gate.novelty.contributions(gated.gather(FAR[0]).row())
    assert FEATURES[int(against.argmax())] == info["decided_by"][0]
    assert "because" in info["reason"] and f"{info['evidence']['nearest']:.2f}" in info["reason"] or "nearest" not in info["decided_by"]
    known = gated.judge("red cat please")
    assert known.decided_by == ("wording",) and gated.judge("red-cat").decided_by == ("name",)


@pytest.mark.parametrize("text", [FAR[0], describe(*HELD_OUT[0])[0], "red cat please", "red-cat"])
def test_the_page_says_which_evidence_decided(gated, text):
    """Each feature in words and with its value, or that it is the bank's own wording or name; of a refusal before anything is made."""
    verdict = Session({"toy": gated}).preview(text, "toy").verdict
    shown = html.unescape(draw_verdict(verdict, 0.5))
    against = 0 if verdict["decision"] == "refuse" else 1
    assert verdict["decided_by"]
    for name in verdict["decided_by"]:
        said = f"by its {_BY[name]}" if name in ("wording", "name") else _PHRASES[name][against].format(verdict["evidence"][name])
        assert said in shown, name


def test_deciding_computes_nothing(gated, monkeypatch):
    """`Gate.decide` asks no model: evidence that was gathered gives the same verdict when embedder and method are gone."""
    evidence = [gated.gather(text) for text in (*FAR, "red cat please", describe(*HELD_OUT[0])[0])]
    verdicts = [gated.judge(one.text) for one in evidence]
    monkeypatch.setattr(type(gated.method), "generate", None)
    monkeypatch.setattr(WordEmbedder, "embed", None)
    assert [gated.gate.decide(one) for one in evidence] == verdicts


def test_a_description_is_generated_once(gated, monkeypatch):
    """One code for the description itself, one for each rewording that the gate needs, none of them where it is not asked."""
    asked, generate = [], type(gated.method).generate

    def count(self, condition, rng, count=1):
        asked.append(count)
        return generate(self, condition, rng, count)

    monkeypatch.setattr(type(gated.method), "generate", count)
    text = describe(*HELD_OUT[0])[0]
    gated.generate(text, on_unknown="ignore")
    assert asked == [1]
    gated.generate(text)
    assert asked == [1, 1, *[1] * len(rewordings(text))]


def test_the_warning_points_at_the_caller(gated):
    """Whichever call refuses, the warning names the line in which the user called lorag."""
    for call in (
        lambda: gated.generate(FAR[0]),
        lambda: generate_lora(FAR[0], generator=gated),
        lambda: next(gated.generate_many([FAR[0]])),
    ):
        with pytest.warns(UnknownTaskWarning) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_the_rank_of_an_adapter_can_be_chosen(gated, bank):
    """A smaller rank keeps the largest singular values; an expert is cut or padded; a rank that the space lacks is named."""
    text = describe(*HELD_OUT[0])[0]
    whole, small = gated.generate(text), generate_lora(text, generator=gated, rank=2)
    assert (whole.rank, small.rank, small.info["rank"]) == (8, 2, 2)
    name = whole.layout.names[0]
    expected = torch.linalg.svdvals(whole.delta(name))[:2]
    assert torch.allclose(torch.linalg.svdvals(small.delta(name))[:2], expected, rtol=1e-3)
    assert [gated.generate("red-cat", bank=bank, rank=rank).rank for rank in (1, 4, 9)] == [1, 4, 9]
    expert = gated.generate("red-cat", bank=bank, rank=9)
    assert torch.allclose(expert.delta(name), bank.adapter("red-cat").delta(name), atol=1e-6)
    for rank in (0, 17, 2.5, True):
        with pytest.raises(GeneratorError, match="rank"):
            gated.generate(text, rank=rank)


def test_the_command_line_takes_a_rank(gated, tmp_path, monkeypatch):
    """--rank is the rank of what is written and what lorag.json says; one that there is not makes no folder."""
    monkeypatch.setattr(generation_module, "default_generator", lambda: gated)
    text = describe(*HELD_OUT[0])[0]

    def generate(rank, out):
        return CliRunner().invoke(app, ["generate", text, "--rank", str(rank), "--out", str(tmp_path / out)])

    made = generate(2, "small")
    assert made.exit_code == 0 and "rank 2 adapter" in made.stdout
    small, same = LoraAdapter.from_pretrained(tmp_path / "small"), gated.generate(text, rank=2)
    assert small.rank == json.loads((tmp_path / "small/adapter_config.json").read_text())["r"] == 2
    assert json.loads((tmp_path / "small/lorag.json").read_text())["rank"] == 2
    assert all(torch.equal(small.factors[name][1], same.factors[name][1]) for name in same.factors)
    refused = generate(17, "large")
    assert isinstance(refused.exception, GeneratorError) and "rank" in str(refused.exception) and not (tmp_path / "large").exists()
    assert generate(0, "none").exit_code == 2


def test_a_generator_is_opened_once_for_its_content(gated, tmp_path, monkeypatch):
    """By path: the same object for the same files, wherever they lie, and another one when they have changed."""
    use_words(monkeypatch)
    gated.save_pretrained(tmp_path / "a")
    gated.save_pretrained(tmp_path / "b")
    first = open_generator(str(tmp_path / "a"))
    assert open_generator(tmp_path / "a") is first and open_generator(tmp_path / "b") is first
    dataclasses.replace(gated, strength=2.0).save_pretrained(tmp_path / "a")
    assert open_generator(tmp_path / "a").strength == 2.0 and open_generator(tmp_path / "b") is first


def test_shipped_generators_have_names(tmp_path, monkeypatch):
    """ "sandbox" and "house" are one; a folder of that name wins; a name of nothing lists what there is."""
    assert find_generator("sandbox") == find_generator("house") and (find_generator("sandbox") / "generator.json").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "house").mkdir()
    assert find_generator("house").resolve() == (tmp_path / "house").resolve()
    with pytest.raises(ArtifactError, match="sandbox.*user/name"):
        find_generator("no-such-generator")


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_expected_gap_closed_follows_what_was_measured(bare, bank, prepared):
    """Where near tasks gained .8 and far ones .2, a near description is promised more, and intervals hold the truth."""
    seen = []

    def gains(generator, codes, names, *_, **__):
        found = [0.8 if name.split("-")[0] in COLOURS[:3] else 0.2 for name in names]
        seen.extend(names)
        return torch.tensor(found, dtype=torch.float64)

    made = fit_gate(bare, bank, RunTasks(make_suite(TRAINING)), prepared.split, unknown=UNKNOWN, settings=FEW, measure=gains)
    gated = dataclasses.replace(bare, gate=made)
    promised = {}
    for (colour, animal), truth in zip(HELD_OUT, (0.8, 0.8, 0.2, 0.2), strict=True):
        verdict = gated.judge(f"paint the {colour} {animal}")
        promised.setdefault(truth, []).append(verdict.expected_gap_closed / (1 - verdict.novelty))
        assert verdict.interval[0] <= verdict.expected_gap_closed <= verdict.interval[1]
        assert verdict.interval[0] - 0.1 <= truth <= verdict.interval[1] + 0.1
    assert sum(promised[0.8]) / 2 > sum(promised[0.2]) / 2 + 0.1
    assert set(seen) <= set(bank.names) and made.fitted["gap_closed"] == pytest.approx(0.5, abs=0.3)


@pytest.mark.slow
def test_what_the_bank_lacks_is_promised_nothing(bare, bank, prepared):
    """The expected gap closed shrinks with novelty: far descriptions are promised less than a tenth."""
    made = fit_gate(bare, bank, RunTasks(make_suite(TRAINING)), prepared.split, unknown=UNKNOWN, settings=FEW, measure=_measured)
    gated = dataclasses.replace(bare, gate=made)
    assert all(gated.judge(text).expected_gap_closed < 0.1 for text in FAR)
    assert all(gated.judge(describe(*cell)[0]).expected_gap_closed > 0.35 for cell in HELD_OUT)


@pytest.mark.slow
def test_fusion_is_served_only_where_it_held_its_own(bare, bank, prepared):
    """Fused experts that gained more than generated codes are served from some cosine on; those that gained less never do."""
    data = prepared.data
    for fused, generated, opens in ((0.9, 0.6, True), (0.1, 0.6, False), (0.3, 0.2, False)):

        def gains(generator, codes, *_, values=(generated, fused), **__):
            own = torch.full((len(codes),), values[0], dtype=torch.float64)
            own[-len(data.validation) :] = values[1]
            return own

        made = fit_gate(bare, bank, RunTasks(make_suite(TRAINING)), prepared.split, unknown=UNKNOWN, settings=FEW, measure=gains)
        assert (made.fuse_above is not None) == opens


@pytest.mark.slow
def test_fitting_looks_at_no_task_of_the_test_split(bare, bank, prepared):
    """With the held-out combinations in the suite or without: the same gate, and none of their names was asked for."""
    asked = []

    def gains(generator, codes, names, bank, tasks, *_, **__):
        asked.extend(names)
        return _close(codes)

    made = [
        fit_gate(bare, bank, RunTasks(make_suite(cells)), prepared.split, unknown=UNKNOWN, settings=FEW, measure=gains).to_dict()
        for cells in (TRAINING, (*TRAINING, *HELD_OUT))
    ]
    assert made[0] == made[1] and not {name_of(*cell) for cell in HELD_OUT} & set(asked)


def test_descriptions_that_the_bank_serves_are_no_unknown_ones(bare, bank, prepared):
    """A listed description that is nearer to an expert than half of the held-out tasks is left out of what is refused."""
    listed = {"kinds": ["write some python code", "paint the red cat", "green bird please", "good morning everyone"]}
    made = fit_gate(bare, bank, RunTasks(), prepared.split, unknown=listed, settings=FEW)
    assert made.fitted["unknown"] == 2


@pytest.mark.slow
def test_tasks_without_experts_calibrate_too(bare, bank, prepared):
    """Held-out tasks without an expert count as known ones; with no expert at all, the training tasks are what is compared with."""
    others, groups = make_suite(HELD_OUT).tasks, [*range(len(bank) + len(HELD_OUT))]
    held = [*prepared.data.validation, *range(len(bank), len(groups))]
    both = fit_gate(
        bare, bank, RunTasks(make_suite(TRAINING), others), Split(groups, [], held), unknown=UNKNOWN, settings=FEW, measure=_measured
    )
    assert both.fitted["held_out_tasks"] == len(held) and both.gap_closed is not None
    empty = AdapterBank.without_experts(bank.base)
    numbers = list(range(len(others)))
    alone = fit_gate(
        bare, empty, RunTasks(make_suite(HELD_OUT), others), Split(numbers, [], numbers), unknown=UNKNOWN, settings=FEW, measure=_measured
    )
    assert alone.gap_closed is None and not len(alone.wordings) and alone.fitted["held_out_tasks"] == len(HELD_OUT)
    gated = dataclasses.replace(bare, gate=alone)
    assert all(gated.judge(text).decision == "refuse" for text in FAR)
    assert all(gated.judge(describe(*cell)[0]).decision == "generate" for cell in HELD_OUT)


def test_nothing_to_fit_on_is_an_error(bare, bank, prepared):
    """Without held-out training tasks there is no honest number; the remedy names the setting."""
    with pytest.raises(GeneratorError, match="validation"):
        fit_gate(bare, bank, RunTasks(), Split(prepared.split.groups, prepared.split.training, []))


def test_gains_are_shares_of_the_gap(gated, bank, monkeypatch):
    """(score - base) / (expert - base), each name's base and expert scored once, and NaN where the expert gains nothing."""
    scored = []

    class Runner:
        device, objective = "cpu", type("Objective", (), {"metric": "score"})

        def scores(self, adapters, tasks, *, limit, seed=0):
            scored.append(len(tasks))
            kind = 0.2 if adapters is None else 0.8 if adapters == "experts" else 0.5
            return [{"score": 0.2 if task.name == TASKS[0].name else kind} for task in tasks]

    TASKS = make_suite(TRAINING[:3]).tasks
    monkeypatch.setattr(LoraGenerator, "runner", lambda self: Runner())
    monkeypatch.setattr(Factors, "stack", staticmethod(lambda parts, _: "experts" if parts[0].rank == 4 else "made"))
    names = [task.key for task in TASKS] + [TASKS[1].key]
    found = gap_closed_by(gated, torch.zeros(4, gated.space.size), names, bank, {task.key: task for task in TASKS}, 2)
    assert torch.isnan(found[0]) and found[1:].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert scored == [3, 3, 4]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_gate_is_stored_with_its_generator(gated, tmp_path):
    """Saved, opened and saved again: the same bytes, the same verdicts; the JSON part is small and made of plain numbers."""
    gated.save_pretrained(tmp_path / "a")
    opened = LoraGenerator.from_pretrained(tmp_path / "a", embedder=EMBEDDER)
    opened.save_pretrained(tmp_path / "b")
    for name in ("generator.json", "generator.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for text in (*FAR, *(describe(*cell)[0] for cell in HELD_OUT), "red cat please"):
        first, second = gated.judge(text), opened.judge(text)
        assert first.decision == second.decision and first.novelty == pytest.approx(second.novelty, abs=2e-3)
    assert len(json.dumps(opened.gate.to_dict())) < 8000


@pytest.mark.parametrize(
    "broken",
    [
        {"features": ["nearest"]},
        {"refuse_above": float("inf")},
        {"size": [1.0]},
        {"deviation": [0.0] * 6},
        {"offsets": "ab"},
        {"fuse_above": "near"},
        {"novelty": None},
        {"fitted": 3},
    ],
)
def test_a_stored_gate_that_does_not_fit_is_refused(gate, broken):
    """GeneratorError for another set of features, no numbers, too few numbers or text, when it is opened and not when it judges."""
    stored = json.loads(json.dumps(gate.to_dict()))
    Gate.from_dict(stored, gate.wordings, gate.owners, modules=6, experts=len(TRAINING))
    with pytest.raises(GeneratorError):
        Gate.from_dict(stored | broken, gate.wordings, gate.owners, modules=6, experts=len(TRAINING))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"bias": float("nan")}, r"bias: nan.*finite"),
        ({"scale": [0.0]}, r"scale\.0: 0\.0.*greater than 0"),
        ({"weights": [1.0, 2.0]}, "other features"),
        ({"mean": "x"}, r"mean: x"),
        ({"mean": ["1.0"]}, r"mean\.0: 1\.0.*number"),
    ],
)
@pytest.mark.parametrize("part", ["novelty", "gap_closed"])
def test_a_broken_calibration_is_refused(gate, part, broken, said):
    """NaN, a scale of zero, another number of features, or text: GeneratorError that names the value, before anything is judged with it."""
    stored = json.loads(json.dumps(gate.to_dict()))
    stored[part] = stored["novelty"] | broken
    with pytest.raises(GeneratorError, match=said):
        Gate.from_dict(stored, gate.wordings, gate.owners, modules=6, experts=len(TRAINING))


def test_wordings_of_experts_that_there_are_not_are_refused(gate):
    """An owner beyond the experts would be an IndexError at a user's first known task."""
    stored = json.loads(json.dumps(gate.to_dict()))
    for wordings, owners in ((gate.wordings, gate.owners + 1000), (gate.wordings[:1], gate.owners), (gate.wordings.float(), gate.owners)):
        with pytest.raises(GeneratorError):
            Gate.from_dict(stored, wordings, owners, modules=6, experts=len(TRAINING))


@pytest.mark.slow
def test_training_ends_with_a_gate_and_a_gate_can_be_fitted_later(bank, tmp_path, monkeypatch):
    """`train` writes one; taken away and fitted again on the finished folder it is the same, and the weights stay as they were."""
    use_words(monkeypatch)
    monkeypatch.setattr(calibrate_gate, "unknown_tasks", lambda part: UNKNOWN)
    out = tmp_path / "g"
    config = TrainConfig(bank=str(bank.folder), out=str(out), method="ridge", tasks=None, k=16, rank=8, validation=0.3, device="cpu")
    made = train(config, quiet=True)
    assert made.gate is not None and made.gate.fitted["held_out_tasks"] == 6
    stored = json.loads((out / "generator.json").read_text())["gate"]
    made.gate = None
    made.save_pretrained(out)
    assert "gate" not in json.loads((out / "generator.json").read_text())
    again = add_gate(out, bank=str(bank.folder))
    refit = json.loads((out / "generator.json").read_text())["gate"]
    assert refit["fitted"] == stored["fitted"] and refit["refuse_above"] == pytest.approx(stored["refuse_above"], abs=1e-3)
    assert all(torch.equal(again.method.state().tensors[k], v) for k, v in made.method.state().tensors.items())


def test_the_same_tasks_are_held_out_again(bank, prepared):
    """The settings of a run lead to the groups and the split that it was trained with."""
    split = SplitRule.stated({"groups": "task", "validation": 0.3, "seed": 0}).split(bank.names, RunTasks())
    assert split == prepared.split and split.validation == list(prepared.data.validation) and split.groups == list(prepared.data.groups)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_intervals_follow_novelty(gated):
    """The surely known may gain up to the whole upper end; what may be unknown may gain nothing, and what surely is gains none."""
    gate = dataclasses.replace(gated.gate, offsets=(-0.2, 0.3), gap_range=(0.0, 1.0))
    assert gate._interval(0.01, 0.8, 0.79) == (0.6, 1.0)
    assert gate._interval(0.3, 0.8, 0.56) == (0.0, 1.0)
    assert gate._interval(0.99, 0.8, 0.008) == (0.0, 0.008)


def test_measuring_tells_what_was_refused_and_what_was_gained(gated, bank, monkeypatch):
    """AUROC and refusals by kind on descriptions that it was not fitted on; gains, intervals and both curves with oracles."""
    unknown = {"robots": [FAR[0]], "gibberish": [FAR[1]], "known after all": [describe(*HELD_OUT[2])[0]]}
    report = measure_gate(gated, make_suite(HELD_OUT), None, unknown=unknown)
    assert report["novelty"]["refused_by_kind"] == {"robots": 1.0, "gibberish": 1.0, "known after all": 0.0}
    assert report["novelty"]["not_refused"] == [describe(*HELD_OUT[2])[0]] and "gap_closed" not in report
    assert 2 / 3 < report["novelty"]["auroc"] < 1
    gain = Logistic((0.0,) * len(FEATURES), (1.0,) * len(FEATURES), (0.0,) * len(FEATURES), 0.0)
    measured = dataclasses.replace(gated, gate=dataclasses.replace(gated.gate, gap_closed=gain, offsets=(-0.5, 0.5)))
    monkeypatch.setattr("lorag.evaluation.gate.gap_closed_by", _measured)
    report = measure_gate(measured, make_suite(HELD_OUT), bank, unknown={"robots": list(FAR)})
    assert report["gap_closed"]["realised"] == pytest.approx(0.5) and report["gap_closed"]["expected"] == pytest.approx(0.5, abs=0.1)
    assert report["gap_closed"]["interval_held"] == 1 and report["selective"]["held_out"]["risk"] == pytest.approx(0.5)
    mixed = report["selective"]["with_unknown"]
    assert mixed["risk"] == pytest.approx((8 * 0.5 + 4) / 12, abs=1e-3) and mixed["risk_at_half"] == pytest.approx(0.5)
    assert "AUROC" in format_gate(report) and "AURC" in format_gate(report)


def test_a_generator_without_a_gate_cannot_be_measured(bare):
    """GeneratorError with the command that fits one."""
    with pytest.raises(GeneratorError, match="lorag gate fit"):
        measure_gate(bare, make_suite(HELD_OUT), None)


# --- descriptions that nothing serves ---------------------------------------------------------------------------------


def test_fitting_and_testing_share_no_description():
    """Every kind has both parts, at least seven of each, and no text occurs twice, not even in another case."""
    fit, test = unknown_tasks("fit"), unknown_tasks("test")
    assert set(fit) == set(test) == {"robots", "gibberish", "empty", "languages", "other_tasks", "neighbours"}
    assert min(len(texts) for part in (fit, test) for texts in part.values()) >= 7
    everything = [text.casefold() for part in (fit, test) for texts in part.values() for text in texts]
    assert len(everything) == len(set(everything))


def test_a_list_of_one_s_own_is_checked(tmp_path):
    """Both parts of each kind are asked for, nothing may be in both, and errors name the kind."""
    path = tmp_path / "own.yaml"
    path.write_text("space: {fit: [fly to the moon], test: [land on mars]}")
    assert read_unknown(path, "fit") == {"space": ["fly to the moon"]}
    for text in ("space: {fit: [a]}", "space: {fit: [a], test: [a]}", "space: [a]", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_unknown(path, "fit")
    with pytest.raises(ConfigError, match="no such file"):
        read_unknown(tmp_path / "missing.yaml", "fit")
