"""Probes learn which half of a task's texts its description is about, and what they learned holds for words that no task had."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy_world import WordEmbedder, interruptible_loop, quiet_loop

from lorag.methods.method import collate
from lorag.methods.probing import ProbeSettings, train_probes
from lorag.networks.factor_network import Probes
from lorag.spaces.activation_bases import ReadTexts
from lorag.tasks.suite import Example, Task

WORDS = [f"thing{number}" for number in range(80)]
DIRECTIONS, GROUPS = 24, 2
EMBEDDER = WordEmbedder()


def _task(number, answers=("no", "yes")):
    """Half of its texts are about its word; the other half about the three next ones."""
    about = [f"{WORDS[number]} text {copy}" for copy in range(12)]
    other = [f"{WORDS[(number + 1 + copy % 3) % len(WORDS)]} text {copy}" for copy in range(12)]
    examples = tuple(Example(text, answers[text in about], "train") for text in (*about, *other))
    descriptions = tuple(f"{start} {WORDS[number]}" for start in ("say yes if", "flag every", "watch out for"))
    return Task(WORDS[number], "toy", descriptions, answers, "MIT", "toy", examples)


@pytest.fixture
def world():
    """Tasks, the texts as a base model might place them, and a map that half knows where words lie."""
    rng = torch.Generator().manual_seed(0)
    tasks = [_task(number, ("no", "yes") if number % 3 else ("a", "b")) for number in range(len(WORDS))]
    texts = sorted({one.input for task in tasks for one in task.examples})
    right = torch.randn(GROUPS, EMBEDDER.size, DIRECTIONS, generator=rng)
    vectors = torch.stack([EMBEDDER.embed([text.split()[0]])[0].pooled for text in texts])
    noise = 0.5 * torch.randn(GROUPS, len(texts), DIRECTIONS, generator=rng)
    coordinates = torch.einsum("ne,gek->gnk", vectors, right) + noise
    embeddings = [EMBEDDER.embed(list(task.descriptions)) for task in tasks]
    data = SimpleNamespace(tasks=tasks, embeddings=embeddings, training=list(range(60)), validation=list(range(62, 70)))
    wrong = right + 1.2 * torch.randn(right.shape, generator=rng)
    return data, ReadTexts(texts, tuple(coordinates)), wrong


def _aligned(data, start):
    torch.manual_seed(0)
    probes = Probes(EMBEDDER.size, GROUPS, 1, DIRECTIONS)
    _, tokens, mask = collate([one[0] for one in data.embeddings[:60]])
    probes.align(start, tokens, mask)
    return probes


def _separation(probes, data, read, numbers):
    """Mean share of pairs of texts in the right order, over tasks."""
    coordinates, place = torch.stack(list(read.coordinates), 1), {text: i for i, text in enumerate(read.texts)}
    shares = []
    with torch.no_grad():
        for number in numbers:
            rows = probes(*collate(data.embeddings[number])[1:]).mean((0, 2))
            scores = torch.einsum("gk,ngk->n", rows, coordinates[[place[one.input] for one in data.tasks[number].examples]])
            shares.append((scores[:12, None] > scores[None, 12:]).float().mean())
    return torch.stack(shares).mean().item()


@pytest.mark.slow
def test_words_that_no_task_had_are_told_apart_better(world):
    """Trained on 60 tasks, probes separate the texts of ten others better than the alignment did alone."""
    data, read, start = world
    probes = _aligned(data, start)
    before = _separation(probes, data, read, range(70, 80))
    best = train_probes("toy", probes, data, read, quiet_loop(), ProbeSettings(steps=200, learning_rate=5e-3, tasks=16))
    after = _separation(probes, data, read, range(70, 80))
    assert math.isfinite(best) and after > before + 0.03 and after > 0.8


def test_nothing_to_learn_from_leaves_them_as_they_are(world):
    """Without steps, and where no description is about one of two answers, nothing moves."""
    data, read, start = world
    probes = _aligned(data, start)
    untouched = {name: value.clone() for name, value in probes.state_dict().items()}
    random = SimpleNamespace(**{**vars(data), "training": [0, 1, 2]})
    assert math.isnan(train_probes("toy", probes, data, read, quiet_loop(), ProbeSettings(steps=0)))
    assert math.isnan(train_probes("toy", probes, random, read, quiet_loop(), ProbeSettings(steps=5, separation=1.01)))
    assert all(torch.equal(value, untouched[name]) for name, value in probes.state_dict().items())


@pytest.mark.slow
def test_an_interrupted_stage_goes_on(world, tmp_path, caplog):
    """Stopped after half of the steps' validations and begun again, it ends where it would have ended."""
    data, read, start = world
    settings = ProbeSettings(steps=16, learning_rate=5e-3, tasks=8)
    whole = _aligned(data, start)
    train_probes("toy", whole, data, read, interruptible_loop(), settings)
    with pytest.raises(KeyboardInterrupt):
        train_probes("toy", _aligned(data, start), data, read, interruptible_loop(tmp_path, 12), settings)
    again = _aligned(data, start)
    caplog.set_level("INFO", "lorag")
    train_probes("toy", again, data, read, interruptible_loop(tmp_path), settings)
    assert "going on at step 10" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
