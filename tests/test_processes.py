"""Training in many processes: the same result as in one, resumed with another number of them, and clear refusals.

Two processes are really launched, by `accelerate launch`, once for all tests; this file is also what they run.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import _TINY, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from toy_world import TRAINING, WordEmbedder, make_bank, make_suite, prepare_toy, save_base

from lorag.bank.bank import AdapterBank
from lorag.config import load_config
from lorag.errors import ConfigError
from lorag.generator.lora_generator import LoraGenerator
from lorag.methods import method_type
from lorag.methods.training_loop import Batch, LoopSettings, Shares, TrainingLoop
from lorag.text.embedding import SentenceEmbedder
from lorag.training.split import RunTasks
from lorag.training.train import TrainConfig, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
HOUSE = {
    "kernel_steps": 0,
    "steps": 12,
    "batch": 9,  # not a multiple of two
    "width": 16,
    "hidden": 16,
    "heads": 2,
    "queries": 2,
    "functional": {"steps": 9, "tasks": 7, "examples": 2, "validate_every": 4},
    "ensemble": {"count": 1, "steps": 5, "batch": 9},
}
QUIET = {"dropout": 0.0, "word_dropout": 0.0, "noise": 0.0}
CELLS = TRAINING[:9]


class Stopped(Exception):
    """What interrupts a run."""


def learn(prepared, folder, *, stop=None, settings=QUIET, method="house", **more):
    """Trains a small generator and returns its parameters, and its codes for two descriptions of each task.

    `stop` interrupts the functional stage before that step.
    """
    chosen = method_type(method).with_settings({**HOUSE, **settings})
    loop = TrainingLoop(folder, torch.Generator().manual_seed(0), True, Accelerator(cpu=True), **more)
    if stop is not None:
        run = loop.run

        def stopping(stage, module, loss, validate, steps):
            def losing(module, step):
                if "functional" in stage and step == stop:
                    raise Stopped
                return loss(module, step)

            return run(stage, module, losing, validate, steps)

        loop.run = stopping
    try:
        chosen.fit(prepared.data, loop, prepared.runner)
    except Stopped:
        return None
    with torch.no_grad():
        codes = chosen.predict([one for own in prepared.data.embeddings for one in own])
    return {**chosen.state().tensors, "codes": codes}


def prepared_in(folder):
    """The toy world that the tests have written."""
    bank = AdapterBank.from_pretrained(folder / "bank")
    return prepare_toy(bank, RunTasks(make_suite(CELLS)), k=6)


RUNS = {"plain": {}, "noisy": {"settings": {}}, "four": {"settings": {}, "shares": 4}, "bf16": {"mixed_precision": "bf16"}}
COMMAND = ["embedder=words", "tasks=null", "validation=0.2", "k=6", "device=cpu", "settings.functional.steps=0", "settings.kernel_steps=6"]
COMMAND += ["settings.dropout=0", "settings.word_dropout=0", "settings.noise=0", "settings.width=16", "settings.hidden=16"]
COMMAND += ["settings.ensemble={count: 1, steps: 6, batch: 9}"]


def words(*_, **__):
    """The toy world's embedder, in place of one that has to be loaded."""
    return WordEmbedder()


def work(folder):
    """What each of the launched processes does; the main one keeps what it learned."""
    torch.set_num_threads(1)
    prepared = prepared_in(folder)
    main = Accelerator(cpu=True).is_main_process
    learn(prepared, folder / "two-then-one", stop=6)
    resumed = {"one-then-two": learn(prepared, folder / "one-then-two")}
    for name, found in (resumed | {name: learn(prepared, folder / name, **run) for name, run in RUNS.items()}).items():
        if main:
            save_file(found, folder / f"{name}.safetensors")
    SentenceEmbedder.from_pretrained = words
    sys.argv = ["train_generator.py", f"bank={folder / 'bank'}", f"out={folder / 'generator'}", *COMMAND]
    runpy.run_path(str(ROOT / "train_generator.py"), run_name="__main__")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Bank and base model, a run that was interrupted in one process, and what two launched processes made of it all."""
    folder = tmp_path_factory.mktemp("processes")
    base = save_base(folder / "base", _TINY["llama"], word_tokenizer())
    make_bank(folder / "bank", base, CELLS)
    prepared = prepared_in(folder)
    assert learn(prepared, folder / "one-then-two", stop=6) is None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    line += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", __file__, str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, prepared=prepared, out=done.stdout)


@pytest.fixture(scope="module")
def right(world):
    """What one process learns without noise."""
    return learn(world.prepared, None)


@pytest.fixture(scope="module")
def noisy(world):
    """What one process learns with noise, each batch in one share."""
    return learn(world.prepared, None, settings={})


def _distance(found, right):
    """Of codes, relative to their norm. Not of parameters: attention's key bias changes nothing, and goes where rounding sends it."""
    return ((found["codes"] - right["codes"]).norm() / right["codes"].norm()).item()


def test_two_processes_learn_what_one_does(world, right):
    """Reconstruction and functional steps, batches of 9 and 7 rows, no noise: the same parameters as in one process, but for
    rounding; another batch gives others."""
    assert _distance(load_file(world.folder / "plain.safetensors"), right) < 1e-4
    assert _distance(learn(world.prepared, None, settings={**QUIET, "batch": 8}), right) > 1e-2


@pytest.mark.parametrize(("name", "shares"), [("noisy", 2), ("four", 4)])
def test_with_noise_the_shares_count_and_not_the_processes(world, noisy, name, shares):
    """Dropout and noise on descriptions: two processes with 1 and with 2 shares each learn what one process with as many learns."""
    shared = learn(world.prepared, None, settings={}, shares=shares)
    assert _distance(load_file(world.folder / f"{name}.safetensors"), shared) < 1e-4
    assert _distance(noisy, shared) > 1e-2


def test_bf16_in_two_processes(world, right):
    """Mixed precision changes what is learned by a little, in two processes as in one, and parameters stay in fp32."""
    found = load_file(world.folder / "bf16.safetensors")
    assert 1e-4 < _distance(found, right) < 0.05
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_a_run_goes_on_in_another_number_of_processes(world, right):
    """Interrupted in the functional stage in one process and resumed in two, and the other way round: as if never cut."""
    assert _distance(load_file(world.folder / "one-then-two.safetensors"), right) < 1e-3
    assert (world.folder / "two-then-one" / "house functional.state.safetensors").is_file()
    assert _distance(learn(world.prepared, world.folder / "two-then-one"), right) < 1e-3


def test_train_generator_in_two_processes_writes_one_generator(world, monkeypatch):
    """The file itself, launched: one line of report, one complete generator, no state left, and what one process makes."""
    assert world.out.count("next: lorag generate") == 1
    monkeypatch.setattr(SentenceEmbedder, "from_pretrained", words)
    made = LoraGenerator.from_pretrained(world.folder / "generator", embedder=WordEmbedder())
    assert not list((world.folder / "generator").glob("*.state.safetensors"))
    rows = [json.loads(line) for line in (world.folder / "generator" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "house kernel"] == [6]
    config = load_config(TrainConfig, None, [f"bank={world.folder / 'bank'}", f"out={world.folder / 'alone'}", *COMMAND])
    alone = train(config, quiet=True)
    assert made.origin == alone.origin
    assert made.strength == pytest.approx(alone.strength)
    texts = [made.condition(text).embedding for text in ("paint the red cat", "blue bird please")]
    with torch.no_grad():
        assert _distance(*({"codes": one.method.predict(texts)} for one in (made, alone))) < 1e-3


def test_the_loss_of_a_step_is_that_of_the_whole_batch():
    """Shares of 7 rows, 3 + 2 + 2 of them: value and gradient are the mean over rows, and `learned` gets every row's loss."""
    module, rows = nn.Linear(2, 1, bias=False), torch.arange(14.0).view(7, 2)
    seen = []
    shares = Shares.of(Accelerator(cpu=True), 3, None)
    batch = Batch(7, lambda part: module(rows[part]).square()[:, 0], seen.append)
    value = shares.backward("test", batch, 0, module.parameters())
    right = module(rows).square()[:, 0]
    assert torch.allclose(value, right.mean()) and torch.allclose(seen[0], right)
    (gradient,) = torch.autograd.grad(right.mean(), module.parameters())
    assert torch.allclose(module.weight.grad, gradient)


def _accelerator(processes, precision="no"):
    return SimpleNamespace(num_processes=processes, mixed_precision=precision)


def test_what_cannot_be_shared_is_refused():
    """Shares that processes cannot deal out, batches smaller than the shares, precisions that need more: before a step is taken."""
    for count in (0, 3, 5):
        with pytest.raises(ConfigError, match="multiple of 2 processes"):
            Shares.of(_accelerator(2), count, None)
    assert Shares.of(_accelerator(2), None, None).count == 2
    with pytest.raises(ConfigError, match="fp16"):
        Shares.of(_accelerator(1, "fp16"), None, None)
    assert Shares.of(_accelerator(1, "bf16"), None, None).bf16 and not Shares.of(_accelerator(1, "bf16"), None, "no").bf16
    loop = TrainingLoop(None, torch.Generator(), True, Accelerator(cpu=True), shares=4)
    module = nn.Linear(2, 1)

    def run(loss, module=module):
        loop.run("a stage", module, loss, None, LoopSettings(2))

    with pytest.raises(ConfigError, match="a stage: a batch is too small.*3 rows, 4 shares"):
        run(lambda m, step: Batch(3, lambda part: m(torch.ones(3, 2)[part]).mean()))
    with pytest.raises(ConfigError, match="normalises over the batch"):
        run(lambda m, step: Batch(4, lambda part: m(torch.ones(4, 2)[part]).mean()), nn.Sequential(module, nn.BatchNorm1d(1)))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
