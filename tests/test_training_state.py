"""Training states: a loop goes on as if it had not stopped, and a file that does not fit changes nothing."""

import json

import pytest
import torch
from torch import nn

from lorag.errors import ArtifactError
from lorag.files.tensors import load_tensors, read_header, save_tensors
from lorag.files.training_state import load_training_state, save_training_state


class _Run:
    """A small training run: a network with a buffer, two optimizers, its own stream of noise."""

    def __init__(self, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.rng))
        first, *_, last = self.module
        self.optimizers = [
            torch.optim.AdamW(first.parameters(), lr=0.1),
            torch.optim.SGD(last.parameters(), lr=0.1, momentum=0.9),
        ]

    def steps(self, count):
        for _ in range(count):
            loss = self.module(torch.randn(8, 3, generator=self.rng)).square().mean()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return self

    def save(self, path, counters):
        save_training_state(path, self.module, self.optimizers, self.rng, counters)

    def load(self, path):
        return load_training_state(path, self.module, self.optimizers, self.rng)

    def values(self):
        moments = [s[key] for o in self.optimizers for s in o.state_dict()["state"].values() for key in sorted(s)]
        return [*map(torch.clone, self.module.state_dict().values()), *map(torch.as_tensor, moments), self.rng.get_state()]


def _same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def path(tmp_path):
    """State after three steps."""
    path = tmp_path / "run.state.safetensors"
    _Run().steps(3).save(path, {"step": 3, "best": None})
    return path


def _rewrite(path, change=lambda tensors: tensors, counters='{"step": 3}'):
    metadata = {} if counters is None else {"counters": counters}
    save_tensors(path, change(load_tensors(path)), metadata)


def test_a_resumed_run_ends_as_one_that_was_never_cut(path):
    """Parameters, buffers, both optimizers' moments and the random stream, to the bit; and the counters come back."""
    other = _Run(seed=7).steps(1)
    assert other.load(path) == {"step": 3, "best": None}
    assert _same(other.steps(4).values(), _Run().steps(7).values())


def test_a_state_before_the_first_step_has_no_moments(path, tmp_path):
    """Loading it into a run with moments forgets them."""
    _Run().save(tmp_path / "fresh", {})
    other = _Run().steps(2)
    assert other.load(tmp_path / "fresh") == {}
    assert _same(other.steps(2).values(), _Run().steps(2).values())


def test_named_tensors_can_stand_for_a_module(tmp_path):
    """What is trained may be a mapping of tensors; they are filled in place."""
    values, rng = {"code": torch.arange(3.0)}, torch.Generator()
    save_training_state(tmp_path / "s", values, [], rng, {"step": 1})
    empty = {"code": torch.zeros(3)}
    load_training_state(tmp_path / "s", empty, [], rng)
    assert torch.equal(empty["code"], values["code"])


def _without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _with(**more):
    return lambda tensors: {**tensors, **{key.replace("__", "."): value for key, value in more.items()}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "counters", "named"),
    [
        (_without("rng"), "{}", "rng"),
        (_without("parameter.0.weight"), "{}", "another model"),
        (_with(parameter__9__weight=torch.zeros(1)), "{}", "another model"),
        (_with(parameter__0__weight=torch.zeros(4, 4)), "{}", "another model"),
        (_without("optimizer.0.0.exp_avg"), "{}", "lacks exp_avg"),
        (lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("exp_avg_sq")}, "{}", "lacks exp_avg_sq"),
        (_with(optimizer__0__0__exp_avg=torch.zeros(())), "{}", "exp_avg"),
        (_with(optimizer__0__0__step=torch.zeros(4, 3)), "{}", "step"),
        (_with(optimizer__0__0__other=torch.zeros(())), "{}", "other"),
        (_with(parameter__0__weight=torch.zeros(4, 3, dtype=torch.int64)), "{}", "another model"),
        (_with(optimizer__0__7__exp_avg=torch.zeros(1)), "{}", "optimizer.0.7"),
        (_with(optimizer__0__x__exp_avg=torch.zeros(1)), "{}", "x"),
        (_with(optimizer__0__0__exp_avg=torch.zeros(2)), "{}", "exp_avg"),
        (_with(rng=torch.zeros(3, dtype=torch.uint8)), "{}", "complete"),
        (lambda tensors: tensors, None, "counters"),
        (lambda tensors: tensors, "{", "complete"),
        (lambda tensors: tensors, "[]", "counters"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(path, change, counters, named):
    """ArtifactError with the file's name, what is wrong, and the remedy; module, moments and stream stay as they were."""
    _rewrite(path, change, counters)
    run = _Run(seed=3).steps(2)
    before = run.values()
    with pytest.raises(ArtifactError) as caught:
        run.load(path)
    assert all(text in str(caught.value) for text in (str(path), named, "Delete it")), str(caught.value)
    assert _same(run.values(), before)


def test_a_cut_file_is_refused(path):
    """An interruption cannot leave one, a full disk of another program can."""
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="cut short"):
        _Run().load(path)


def test_counters_are_readable_without_loading(path):
    """They lie in the header as JSON, for people and tools."""
    assert json.loads(read_header(path)[1]["counters"]) == {"step": 3, "best": None}
