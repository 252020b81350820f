"""What a generator is compared with, piece by piece: prompts, untrained adapters, statistics over tasks, tables."""

import copy
import dataclasses
import math

import pytest
import torch
from toy_world import make_suite, true_adapter

from lorag.base.objectives.prompts import draw_shots, with_description, with_shots
from lorag.base.objectives.text_metrics import balanced_accuracy
from lorag.errors import TaskError
from lorag.evaluation.rivals import random_like
from lorag.evaluation.statistics import Scores, differences, summarise
from lorag.evaluation.tables import format_table
from lorag.tasks.suite import Example, Task


def _task(name="t", outputs=("yes", "no", "no", "no"), **more):
    rows = [Example(f"text {i}", output, "train") for i, output in enumerate(outputs)] + [Example("new", "yes", "test")]
    return Task(name, "toy", ("a description",), None, "MIT", "made", tuple(rows), **more)


def test_a_description_stands_before_every_input():
    """Several take turns; an image has no place for words."""
    told = with_description(_task(), ["one", "two"])
    assert [e.input for e in told.examples][:3] == ["one\n\ntext 0", "two\n\ntext 1", "one\n\ntext 2"]
    assert [e.output for e in told.examples] == [e.output for e in _task().examples]
    with pytest.raises(TaskError, match="image"):
        with_description(_task(inputs="image"), ["one"])


def test_shots_show_every_answer_and_never_a_test_example():
    """Of one yes among many, two shots hold it; the same seed draws the same, in the prompt and for training."""
    for seed in range(5):
        assert {shot.output for shot in draw_shots(_task(), 2, seed)} == {"yes", "no"}
        assert all(shot.split == "train" for shot in draw_shots(_task(), 9, seed))
    assert len(draw_shots(_task(), 9, 0)) == 4
    (asked,) = with_shots(_task(), "do it", 2, 1).examples
    shots = draw_shots(_task(), 2, 1)
    expected = ["do it", *(f"Input: {s.input}\nOutput: {s.output}" for s in shots), "Input: new\nOutput:"]
    assert asked.input == "\n\n".join(expected) and asked.output == "yes"
    assert asked.input.turns == [f"do it\n\n{shots[0].input}", shots[0].output, shots[1].input, shots[1].output, "new"]
    assert copy.deepcopy(asked.input).turns == asked.input.turns
    assert asked.input.shorter().turns == [f"do it\n\n{shots[1].input}", shots[1].output, "new"]
    assert asked.input.shorter().shorter() == "do it\n\nnew"
    with pytest.raises(TaskError, match="no training examples"):
        draw_shots(_task(outputs=()), 2, 0)


def test_an_untrained_adapter_is_as_large_as_a_generated_one(tiny_models):
    """Module by module, of the same rank, and another for another seed."""
    made = true_adapter(tiny_models["llama"].layout(tiny_models["llama"].build()), "red", "cat")
    drawn = random_like(made, 0)
    assert drawn.rank == made.rank and drawn.layout == made.layout
    assert drawn.factors.norms() == pytest.approx(made.factors.norms(), rel=1e-4)
    assert abs(drawn.factors.cosine(made.factors)) < 0.1
    assert drawn.factors.cosine(random_like(made, 1).factors) < 0.1


def test_balanced_accuracy_does_not_reward_one_answer():
    """Always yes has a half, however rare no is; with one label it is the share that is right."""
    labels = ["yes"] * 9 + ["no"]
    assert balanced_accuracy([label == "yes" for label in labels], labels) == 0.5
    assert balanced_accuracy([True, False, False, True], ["yes", "yes", "yes", "no"]) == pytest.approx(2 / 3)
    assert balanced_accuracy([True, False], ["yes", "yes"]) == 0.5


def _scores():
    tasks = tuple(
        dataclasses.replace(task, name=name) for task, name in zip(make_suite([("red", "cat")] * 1).tasks * 3, "abc", strict=True)
    )
    scores = Scores(tasks, "exact_match")
    scores.add("base", {name: {"exact_match": 0.0} for name in "abc"})
    for shift in (0.0, 0.2):  # two seeds
        scores.add("house", {name: {"exact_match": value + shift} for name, value in zip("abc", (0.2, 0.4, 0.6), strict=True)})
    scores.rows["house"][0]["a"]["rouge_l"] = scores.rows["house"][1]["a"]["rouge_l"] = 0.7
    scores.add("oracle", {name: {"exact_match": 0.8} for name in "ab"})
    scores.prompt_tokens |= {"base": 10.0, "house": 10.0, "oracle": None}
    return scores


def test_a_summary_counts_what_each_row_has():
    """Means over seeds, then tasks; the gap over tasks with an oracle; a measure over the tasks that have it."""
    scores = _scores()
    row = summarise(scores, "house")
    assert row["score"] == pytest.approx(0.5) and row["per_seed"] == [0.4, 0.6]
    assert row["per_task"] == pytest.approx({"a": 0.3, "b": 0.5, "c": 0.7})
    assert row["gap_closed"] == pytest.approx((0.3 + 0.5) / 2 / 0.8)
    assert row["measures"] == {"rouge_l": {"score": 0.7, "ci95": [0.7, 0.7], "tasks": 1}}
    assert row["prompt_tokens"] == 10.0 and "prompt_tokens" not in summarise(scores, "oracle")
    assert summarise(scores, "oracle") | {"gap_closed": 1.0} == summarise(scores, "oracle") and summarise(scores, "oracle")["tasks"] == 2
    apart = differences(scores, {"house": ["oracle", "base"]})
    assert apart["house - oracle"]["difference"] == pytest.approx(-0.4) and apart["house - oracle"]["tasks"] == 2
    assert apart["house - base"]["difference"] == pytest.approx(0.5)
    assert "measures" not in apart["house - base"]  # only one of the two has it


def test_a_row_without_values_is_not_a_number_nowhere():
    """No NaN reaches a report."""
    scores = _scores()
    for name in scores.rows:
        for value in summarise(scores, name).values():
            assert not isinstance(value, float) or math.isfinite(value)
    assert torch.isnan(scores.per_task("oracle")[2])


def test_the_plain_table_is_aligned_and_complete():
    """Columns for what some row has; a row that lacks it leaves it blank."""
    scores = _scores()
    report = {
        "suite": "toy", "metric": "exact_match", "examples": 4, "seeds": 2, "tasks": list("abc"),
        "methods": {name: summarise(scores, name) for name in scores.rows}, "differences": differences(scores, {"house": ["base"]}),
    }  # fmt: skip
    lines = format_table(report).splitlines()
    header = next(line for line in lines if line.startswith("method"))
    assert "ROUGE-L" in header and "gap closed" in header and header.endswith("prompt tokens")
    house = next(line for line in lines if line.startswith("house "))
    assert "0.500" in house and "0.700" in house and house.endswith("10")
    base = next(line for line in lines if line.startswith("base "))
    assert len(base) == len(house) == len(header) and "nan" not in "".join(lines)
    assert any(line.startswith("house - base") and "+0.500" in line for line in lines)
