"""Tasks: what a suite's files say is what is learned and scored, and a broken file is named with its line."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from lorag.errors import DescriptionError, LoragError, TaskError
from lorag.files.artifacts import write_json
from lorag.tasks.descriptions import MAX_DESCRIPTION, check_description
from lorag.tasks.suite import Example, Task, TaskSuite

REAL = Path(__file__).resolve().parents[2] / "shared" / "tasks"

MOOD = Task(
    "mood",
    "demo",
    ("tell how it feels", "Stimmung: gut oder schlecht?"),
    ("good", "bad"),
    "MIT",
    "by hand",
    (Example("sun", "good", "train"), Example("rain\nand “wind”\u2028", "bad", "train"), Example("fog", "bad", "test")),
)
ECHO = Task("Say it again!", "demo", ("repeat the text",), None, "CC0", "by hand", (Example("a", "a", "train"),))


@pytest.fixture
def folder(tmp_path):
    """A good suite of two tasks, to be spoiled."""
    return TaskSuite([MOOD, ECHO]).save(tmp_path / "demo")


def _lines(folder, name):
    raw = (folder / name).read_bytes()
    return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode().split("\n")[:-1]


def _write(folder, name, lines):
    raw = ("\n".join(lines) + "\n").encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def _change(folder, name, line, change):
    """Replaces one JSON line (counted from 1) by what `change` makes of it."""
    lines = _lines(folder, name)
    changed = change(json.loads(lines[line - 1]))
    lines[line - 1] = changed if isinstance(changed, str) else json.dumps(changed)
    _write(folder, name, lines)


def _refused(folder, *named):
    with pytest.raises(TaskError) as caught:
        TaskSuite.from_folder(folder)
    assert all(text in str(caught.value) for text in named), str(caught.value)


def test_round_trip_keeps_everything_and_every_byte(folder, tmp_path, monkeypatch):
    """Saved, read and saved again: equal tasks, equal bytes, equal fingerprint."""
    suite = TaskSuite.from_folder(folder)
    assert suite.tasks == (MOOD, ECHO)
    assert suite.fingerprint() == TaskSuite([MOOD, ECHO]).fingerprint()
    monkeypatch.setattr("time.time", lambda: 1e9)  # another day: gzip would note it
    again = suite.save(tmp_path / "again")
    for name in ("tasks.jsonl", "examples.jsonl.gz"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_fingerprint_changes_with_any_part():
    """A bank knows its data by the fingerprint."""
    from dataclasses import replace

    changed = [
        [ECHO, MOOD],
        [MOOD],
        [replace(MOOD, descriptions=("tell how it feels",)), ECHO],
        [replace(MOOD, labels=("good", "bad", "ugly")), ECHO],
        [replace(MOOD, examples=MOOD.examples[:2]), ECHO],
        [replace(MOOD, examples=(Example("sun", "bad", "train"), *MOOD.examples[1:])), ECHO],
        [replace(MOOD, examples=(Example("sun", "good", "test"), *MOOD.examples[1:])), ECHO],
    ]
    assert len({TaskSuite(tasks).fingerprint() for tasks in [[MOOD, ECHO], *changed]}) == 1 + len(changed)


def test_lookup_split_and_selection(folder):
    """Names, membership, order, splits and safe keys."""
    suite = TaskSuite.from_folder(folder)
    assert suite.names == ("mood", "Say it again!")
    assert len(suite) == 2 and "mood" in suite and "moody" not in suite
    assert [e.input for e in suite["mood"].split("test")] == ["fog"]
    assert suite.select(["Say it again!"]).names == ("Say it again!",)
    assert suite["mood"].key == "mood" and suite["Say it again!"].key.startswith("say-it-again-")
    with pytest.raises(TaskError, match="moody"):
        suite["moody"]
    with pytest.raises(TaskError, match="twice; got mood"):
        TaskSuite([MOOD, ECHO, MOOD])


def test_a_suite_knows_its_splits(folder):
    """They are read with it; a split that it lacks is named beside those that it has."""
    assert TaskSuite.from_folder(folder).splits == {}
    with pytest.raises(TaskError, match="no split 'test'; expected a splits.json"):
        TaskSuite.from_folder(folder, "test")
    write_json(folder / "splits.json", {"train": ["mood"], "test": ["Say it again!"]})
    suite = TaskSuite.from_folder(folder)
    assert suite.of_split("train").names == ("mood",) and TaskSuite.from_folder(folder, "test").names == ("Say it again!",)
    with pytest.raises(TaskError, match="no split 'hard'; expected test or train"):
        suite.of_split("hard")


def test_folder_of_suites_and_suites_of_descriptions(folder, tmp_path):
    """Suites are read in the order of their folders; examples may be absent."""
    TaskSuite([Task("other", "a", ("do it",), None, "MIT", "x")]).save(tmp_path / "a")
    (tmp_path / "a" / "examples.jsonl.gz").unlink()
    (tmp_path / "empty").mkdir()
    assert TaskSuite.from_folder(tmp_path).names == ("other", "mood", "Say it again!")
    for nothing in (tmp_path / "empty", tmp_path / "no"):
        _refused(nothing, "is not a task suite", str(nothing))


def _without(key):
    return lambda row: {k: v for k, v in row.items() if k != key}


def _with(**values):
    return lambda row: {**row, **values}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "change", "named"),
    [
        ("tasks.jsonl", 2, change, named)
        for change, named in [
            (_without("name"), "'name'"),
            (_without("descriptions"), "'descriptions'"),
            (_with(name="mood"), "mood"),
            (_with(name=3), "'name'"),
            (_with(name=""), "'name'"),
            (_with(name="a\nb"), "'name'"),
            (_with(name="a" * 201), "'name'"),
            (_with(descriptions="one text"), "'descriptions'"),
            (_with(descriptions=[]), "no description"),
            (_with(descriptions=["fine", " "]), "empty"),
            (_with(descriptions=["fine", 3]), "must be text"),
            (_with(labels="yes"), "'labels'"),
            (_with(labels=["yes", 1]), "'labels'"),
            (lambda row: "{", "JSON"),
            (lambda row: '{"name": "a", "name": "b"}', "JSON"),
            (lambda row: "[]", "object"),
        ]
    ]
    + [
        ("examples.jsonl.gz", 3, change, named)  # a test row of mood
        for change, named in [
            (_without("task"), "'task'"),
            (_without("input"), "'input'"),
            (_without("output"), "'output'"),
            (_without("split"), "'split'"),
            (_with(input=None), "'input'"),
            (_with(output=1), "'output'"),
            (_with(output="Good"), "unknown label"),
            (_with(task="moody"), "moody"),
            (_with(split="validation"), "validation"),
            (_with(input="sun"), "train and test"),
            (lambda row: "{", "JSON"),
            (lambda row: '{"task": NaN}', "JSON"),
            (lambda row: "3", "object"),
        ]
    ],
)
def test_broken_lines_are_named(folder, name, line, change, named):
    """One line of one file is broken: file, line and field are in the message."""
    _change(folder, name, line, change)
    _refused(folder, f"{name}, line {line}", named)


def test_same_input_in_two_tasks_is_no_leak(folder):
    """Only within one task do train and test exclude each other."""
    lines = _lines(folder, "examples.jsonl.gz")
    row = {"task": "Say it again!", "split": "test", "input": "sun", "output": "sun"}
    _write(folder, "examples.jsonl.gz", [*lines, "", json.dumps(row)])
    assert len(TaskSuite.from_folder(folder)["Say it again!"].split("test")) == 1


def test_files_that_are_no_text_are_refused(folder):
    """Not gzip, cut short, not UTF-8: TaskError with the file's name."""
    packed, raw = folder / "examples.jsonl.gz", (folder / "examples.jsonl.gz").read_bytes()
    for spoiled in (b"plain text", raw[:-9], raw[:20] + b"\xff" * 20 + raw[40:], gzip.compress(b'{"task": "\xff"}\n')):
        packed.write_bytes(spoiled)
        _refused(folder, "examples.jsonl.gz")
    packed.write_bytes(raw)
    (folder / "tasks.jsonl").write_bytes(b'{"name": "\xff"}\n')
    _refused(folder, "tasks.jsonl")


def test_endless_lines_are_refused(folder):
    """A line has a limit: a million characters."""
    lines = _lines(folder, "examples.jsonl.gz")
    _write(folder, "examples.jsonl.gz", [lines[0] + " " * 1_000_000, *lines[1:]])
    _refused(folder, "line 1 is too long")


@pytest.mark.slow
def test_a_line_that_unpacks_without_end_is_not_held(folder):
    """A gzip bomb: 60 MB in one line of a file of 60 kB are refused after a line's limit, not after they fill the memory."""
    with gzip.open(folder / "examples.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range(15):
            file.write(b" " * 4_000_000)
    assert (folder / "examples.jsonl.gz").stat().st_size < 100_000
    tracemalloc.start()
    try:
        _refused(folder, "examples.jsonl.gz, line 1 is too long")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_descriptions_are_stripped_and_kept():
    """Any language, line breaks and tabs are fine; surrounding space goes."""
    assert check_description("  résumé of\n\tlegal text 法律 🙂 ") == "résumé of\n\tlegal text 法律 🙂"
    assert len(check_description("a" * MAX_DESCRIPTION)) == MAX_DESCRIPTION


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "a" * (MAX_DESCRIPTION + 1),
        "a\0b",
        "a\x1b[31mb",
        "a\x07",
        "a\x7fb",
        "bad \ufffd bytes",
        "half \ud800",
        "raw \udcff",
        None,
        3,
        b"text",
        ["a"],
    ],
    ids=lambda text: repr(text)[:20],
)
def test_descriptions_that_cannot_be_embedded_are_refused(text):
    """Empty, too long, control characters, undecodable bytes, no str: DescriptionError."""
    with pytest.raises(DescriptionError):
        check_description(text)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real suites are not at {REAL}")
def test_real_suites_hold_what_real_json_lists():
    """All 57 tasks of real.json are read, each with labels, train and test examples, and nothing refused."""
    names = json.loads((REAL / "real.json").read_text())
    assert len(names) == len(set(names)) == 57
    homes = {}
    for child in sorted(REAL.iterdir()):
        if (child / "tasks.jsonl").is_file():
            for line in (child / "tasks.jsonl").read_text().splitlines():
                homes[json.loads(line)["name"]] = child
    suites = {home: TaskSuite.from_folder(home) for home in sorted({homes[name] for name in names})}
    for name in names:
        task = suites[homes[name]][name]
        assert len(task.labels) >= 2 and task.split("train") and task.split("test") and task.descriptions
        assert len(task.examples) == len(task.split("train")) + len(task.split("test"))
    assert issubclass(TaskError, LoragError)
