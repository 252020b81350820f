"""Long work is visible: metrics of every run, trackers where they are asked for, bars on terminals and lines elsewhere."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toy_world import TRAINING, make_suite, save_base

from lorag import progress
from lorag.bank.build import BankConfig, build_bank
from lorag.bank.experts import ExpertConfig
from lorag.config import load_config
from lorag.errors import ArtifactError, ConfigError, MissingDependencyError, StorageError
from lorag.files import metrics as metrics_module
from lorag.files.metrics import METRICS, TRACKERS, Metrics, check_trackers, read_metrics
from lorag.methods.training_loop import Batch, LoopSettings, TrainingLoop
from lorag.progress import Lines, progress_bar
from lorag.training.train import TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent


def _events(folder):
    """Numbers that TensorBoard's own reader finds: tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_recorded(tmp_path):
    """In the order of their steps; of a step done twice, as after a resumption, the last counts; NaN is not a number."""
    with Metrics(tmp_path / "run") as metrics:
        metrics.record("b", 20, loss=0.25, validation=None)
        metrics.record("a", 20, loss=2.0)
        metrics.record("b", 10, loss=float("nan"), validation=1.5)
        metrics.record("b", 20, loss=0.125)
    assert read_metrics(tmp_path / "run") == [
        {"stage": "b", "step": 10, "loss": None, "validation": 1.5},
        {"stage": "b", "step": 20, "loss": 0.125},
        {"stage": "a", "step": 20, "loss": 2.0},
    ]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [METRICS]


def test_half_a_line_spoils_no_other(tmp_path):
    """A kill in the middle of a write: the next run's rows are whole, and the torn one is passed over."""
    (tmp_path / METRICS).write_text('{"stage": "fit", "step": 1, "loss": 1.0}\n{"stage": "fit", "st')
    Metrics(tmp_path).record("fit", 2, loss=0.5)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "row", ["[]", '{"stage": 1, "step": 1}', '{"stage": "a", "step": 1.5}', '{"stage": "a", "step": 1, "loss": "<b>"}', '{"step": 1}']
)
def test_rows_of_a_stranger_are_refused(tmp_path, row):
    """What is JSON but no row of numbers names its line; a link is not followed."""
    (tmp_path / METRICS).write_text(f"{row}\n")
    with pytest.raises(ArtifactError, match="line 1"):
        read_metrics(tmp_path)
    (tmp_path / METRICS).unlink()
    (tmp_path / METRICS).symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="link"):
        read_metrics(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    """Only the main process keeps files; a run without a folder keeps none."""
    Metrics(tmp_path / "a", ["tensorboard"], main=False).record("fit", 1, loss=1.0)
    Metrics(None).record("fit", 1, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path):
    """Not a traceback of the system's."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Free space"):
        Metrics(tmp_path / "file").record("fit", 1, loss=1.0)


# --- trackers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "all", "", "os", "tensorboard "])
def test_trackers_are_a_closed_list(name):
    """A name that is none is refused with the ones that there are, also where Accelerate would know it."""
    with pytest.raises(ConfigError, match="tensorboard or trackio"):
        check_trackers([name])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_extra_is_named_before_work_begins(name, monkeypatch, tmp_path):
    """Training and bank build stop before they read a bank or load a model."""
    find = metrics_module.importlib.util.find_spec
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda which: None if which == name else find(which))
    with pytest.raises(MissingDependencyError, match=r"lorag\[trackers\]"):
        train(load_config(TrainConfig, None, [f"trackers=[{name}]", f"out={tmp_path / 'out'}", "bank=nowhere"]))
    with pytest.raises(MissingDependencyError, match=r"lorag\[trackers\]"):
        build_bank(tmp_path / "bank", make_suite(TRAINING[:1]), None, "causal_lm", None, ExpertConfig(), trackers=[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_both_configs_take_trackers():
    """As a list of names; none by default."""
    for schema in (TrainConfig, BankConfig):
        assert load_config(schema).trackers == []
        assert load_config(schema, None, ["trackers=[tensorboard,trackio]"]).trackers == ["tensorboard", "trackio"]


def test_tensorboard_gets_what_the_file_gets(tmp_path):
    """Numbers, steps and settings, each once however often it was named; what was not measured is left out."""
    with Metrics(tmp_path, ["tensorboard", "tensorboard"], {"steps": 3, "experts": {"ranks": [2, 4], "name": None}}) as metrics:
        for step in (1, 2, 3):
            metrics.record("fit", step, loss=1 / step, validation=0.5 if step == 3 else None)
    events = _events(tmp_path / "tensorboard")
    assert events["fit/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in read_metrics(tmp_path)]
    assert [step for step, _ in events["fit/validation"]] == [3]
    settings = next((tmp_path / "tensorboard").rglob("hparams.yml")).read_text()
    assert "experts.ranks: '[2, 4]'" in settings and "steps: 3" in settings


@pytest.mark.slow
def test_trackio_gets_what_the_file_gets(tmp_path):
    """In its own database, without a server or a network; nothing is said on standard output, which is the command's."""
    code = (
        "from pathlib import Path\nfrom lorag.files.metrics import Metrics\n"
        "with Metrics(Path('run'), ['trackio'], {'steps': 2}) as metrics:\n"
        "    for step in (1, 2): metrics.record('fit', step, loss=1 / step)\n"
        "import trackio\n"
        "run = trackio.Api().runs('lorag')[0]\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "rows = SQLiteStorage.get_logs('lorag', run.name)\n"
        "print(run.name, [(row['step'], row['fit/loss']) for row in rows])\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "run [(1, 1.0), (2, 0.5)]"


def _loop(folder, **more):
    return TrainingLoop(folder, torch.Generator().manual_seed(0), True, Accelerator(cpu=True), **more)


def _square(net, step):
    return Batch(1, lambda _: net(torch.ones(1, 2)).square().mean())


def test_a_training_run_tells_its_trackers(tmp_path):
    """Loss and validation of every validated step, in the file and in TensorBoard alike."""
    module = nn.Linear(2, 1)
    loop = _loop(tmp_path, metrics=Metrics(tmp_path, ["tensorboard"]))
    loop.run("fit", module, _square, lambda _: 0.5, LoopSettings(4, validate_every=2))
    loop.finish()
    rows = read_metrics(tmp_path)
    assert [(row["stage"], row["step"], row["validation"]) for row in rows] == [("fit", 2, 0.5), ("fit", 4, 0.5)]
    assert _events(tmp_path / "tensorboard")["fit/loss"] == [(row["step"], pytest.approx(row["loss"], rel=1e-3)) for row in rows]


def test_a_training_run_without_trackers_keeps_metrics(tmp_path):
    """`metrics.jsonl` is always there, and nothing of a tracker is."""
    _loop(tmp_path).run("fit", nn.Linear(2, 1), _square, None, LoopSettings(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [2]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_a_bank_s_build_keeps_metrics(tmp_path, tiny_models, tokenizer, capsys):
    """Losses along the groups' steps, and each group's score; a bank that goes on adds the groups that were left. Quiet is quiet."""
    base = save_base(tmp_path / "base", tiny_models["llama"], tokenizer)
    config = ExpertConfig(steps=12, group=2, batch=2, checkpoints=1, ranks=[2, 3], test_limit=2)
    for count in (2, 4):
        build_bank(
            tmp_path / "bank", make_suite(TRAINING[:count]), base.model, "causal_lm", base.settings, config, device="cpu", quiet=True
        )
    rows = read_metrics(tmp_path / "bank")
    groups = [row for row in rows if row["stage"] == "groups"]
    assert [row["experts"] for row in groups] and all(0 <= row["score"] <= 1 for row in groups)
    steps = [row["step"] for row in rows if row["stage"] == "experts"]
    assert set(steps) >= {10, 12} and all(row["loss"] > 0 for row in rows if row["stage"] == "experts")
    out = capsys.readouterr()
    assert not out.out and "group 1" not in out.err


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: `clock[0]` is the time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_logs_get_lines(clock, capsys):
    """The first after ten seconds, then every thirty: how far, how long, how much longer, and the latest numbers; no carriage return."""
    with progress_bar(desc="experts", total=100) as bar:
        assert isinstance(bar, Lines)
        for second in range(80):
            clock[0] = float(second)
            bar.set_postfix(loss=f"{second / 100:.2f}")
            bar.update()
    err = capsys.readouterr().err
    assert "\r" not in err and "\x1b" not in err
    assert err.splitlines() == [
        "experts: 11 of 100 (11%), 00:10 so far, 01:20 left, loss 0.10",
        "experts: 41 of 100 (41%), 00:40 so far, 00:57 left, loss 0.40",
        "experts: 71 of 100 (71%), 01:10 so far, 00:28 left, loss 0.70",
        "experts: 80 of 100 (80%), 01:19 so far, 00:19 left, loss 0.79",
    ]


def test_what_is_short_says_nothing(clock, capsys):
    """Nor does what shall leave nothing behind, once it is done."""
    assert list(progress_bar(range(3), desc="short")) == [0, 1, 2]
    for one in progress_bar(range(3), desc="embedding", leave=False):
        clock[0] += one
    assert not capsys.readouterr().err


def test_a_resumed_run_counts_only_what_it_did(clock, capsys):
    """The time that is left follows from the steps of this run, not from those done before."""
    with progress_bar(desc="fit", total=100, initial=90) as bar:
        clock[0] = 10.0
        bar.update(5)
    assert "95 of 100 (95%), 00:10 so far, 00:10 left" in capsys.readouterr().err


def test_quiet_shows_nothing(clock, capsys):
    """Neither bar nor line, however long it takes, and what is gone through is the same."""
    for _ in progress_bar(range(5), desc="long", disable=True):
        clock[0] += 100.0
    out = capsys.readouterr()
    assert not out.out and not out.err


def test_terminals_get_a_bar(monkeypatch):
    """With the time that is left."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for _ in progress_bar(range(3), desc="steps"):
        pass
    assert "\r" in screen.getvalue() and "3/3" in screen.getvalue()


def test_no_other_module_draws_bars():
    """All progress goes through one door, so that logs stay free of carriage returns."""
    users = {path.name for path in (ROOT / "lorag").rglob("*.py") if "from tqdm" in path.read_text() or "import tqdm" in path.read_text()}
    assert users == {"progress.py"}


def test_metrics_are_plain_json_lines(tmp_path):
    """One object a line, readable by anything."""
    Metrics(tmp_path).record("fit", 1, loss=0.1234567)
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line) == {"stage": "fit", "step": 1, "loss": 0.123457}
