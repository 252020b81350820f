"""The task suite of the world smollm2: held-out tasks stay held out, evaluation's wordings too, and the numbers are as promised."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from test_smollm2_labels import _content

from benchmarks.hand_typed import TYPED
from lorag.files.artifacts import embedded, read_json
from lorag.tasks.suite import Example, Task, TaskSuite
from lorag.worlds.smollm2.build import SPLITS, build_tasks
from lorag.worlds.smollm2.detectors import detector
from lorag.worlds.smollm2.files import read, read_glosses
from lorag.worlds.smollm2.formats import CASES, WRAPS, Format
from lorag.worlds.smollm2.label_pools import Label
from lorag.worlds.smollm2.made import ANSWERS, mentions
from lorag.worlds.smollm2.passages import OPERATIONS
from lorag.worlds.smollm2.sources import sample, size
from lorag.worlds.smollm2.wordings import Phrases, describe

FOLDER = embedded("data/smollm2/tasks")
SOURCES = Path(__file__).resolve().parents[2] / "shared/tasks"
HELD = ("validation", "unseen_label", "unseen_task")  # whose texts and words are new; those of unseen_format are known
NOT_PERMISSIVE = re.compile(r"-SA|SA \d|-NC|-ND|ODbL|evaluation\)|\bGPL", re.I)


@pytest.fixture(scope="module")
def suite():
    return TaskSuite.from_folder(FOLDER)


@pytest.fixture(scope="module")
def splits(suite):
    names = read_json(FOLDER / "splits.json")
    return {split: [suite[name] for name in found] for split, found in names.items()}


@pytest.fixture(scope="module")
def trained_inputs(splits):
    return {example.input for task in splits["train"] for example in task.examples}


def _is_detector(task):
    return "_is_" in task.name


def _plain(text):
    return re.sub(r"\W+", " ", text.lower()).strip()


# --- what ships -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_task_is_in_one_split(suite, splits):
    """Five splits, and no task on two sides."""
    assert set(splits) == set(SPLITS)
    assert sorted(task.name for tasks in splits.values() for task in tasks) == sorted(suite.names)


@pytest.mark.slow
def test_counts_are_as_promised(splits):
    """1,200 training tasks and more, several hundred detectors; dozens of each kind to choose by and to be judged by."""
    assert len(splits["train"]) >= 1200
    assert sum(_is_detector(task) and "+" not in task.name for task in splits["train"]) >= 200
    assert sum("+" not in task.name and not _is_detector(task) for task in splits["train"]) >= 200
    assert len(splits["unseen_format"]) >= 40 and len(splits["unseen_label"]) >= 40
    assert len(splits["unseen_task"]) >= 30
    assert len({task.source for task in splits["unseen_task"]}) >= 8
    assert sum(_is_detector(task) for task in splits["validation"]) >= 20
    assert sum("+" in task.name for task in splits["validation"]) >= 20


@pytest.mark.slow
def test_unseen_tasks_are_of_all_kinds(splits):
    """Detectors, classification, free text, extraction: none makes up the split."""
    tasks = splits["unseen_task"]
    counts = Counter("detector" if _is_detector(t) else "labels" if t.labels else "free text" if t.free_text else "text" for t in tasks)
    assert set(counts) == {"detector", "labels", "free text", "text"}
    assert min(counts.values()) >= 4 and max(counts.values()) <= 0.6 * len(tasks)


@pytest.mark.slow
def test_summarising_legal_text_is_held_out(suite, splits):
    """It is described as users would, and marked as free text."""
    task = suite["legal_plain_summary"]
    assert task in splits["unseen_task"] and task.free_text and "summarise legal text" in task.descriptions


@pytest.mark.slow
def test_it_is_small(suite):
    """A few MB, and rows that a small model reads at once."""
    assert (FOLDER / "examples.jsonl.gz").stat().st_size <= 6e6
    assert (FOLDER / "tasks.jsonl").stat().st_size <= 10e6
    for task in suite:
        for example in task.examples:
            assert size(example.input) <= 200 and size(example.output) <= 52, task.name


@pytest.mark.slow
def test_licences_are_permissive_and_attributed(suite):
    """No share-alike, no restriction to evaluation; NOTICE names every source."""
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for task in suite:
        assert not NOT_PERMISSIVE.search(task.license), task.license
        assert task.source in notice or task.source.startswith("made by lorag"), task.source


# --- nothing of a held-out task is in training ---------------------------------------------------------------------------


@pytest.mark.slow
def test_no_text_of_a_held_out_source_is_in_training(splits, trained_inputs):
    """Whole sources are held out, whatever the task."""
    for task in (*splits["unseen_task"], *splits["validation"]):
        if "+" not in task.name and not (_is_detector(task) and task in splits["validation"]):
            assert not trained_inputs & {example.input for example in task.examples}, task.name


@pytest.mark.slow
def test_no_source_is_on_two_sides(splits):
    """Sources of unseen tasks are not those of training tasks."""
    trained = {task.source for task in splits["train"]}
    assert not trained & {task.source for task in splits["unseen_task"]}


@pytest.mark.slow
def test_no_text_of_a_held_out_label_is_in_training(splits, trained_inputs):
    """Neither to detect it, nor among the negatives of another, nor in a classification task."""
    for task in (*splits["unseen_label"], *splits["validation"]):
        if task.labels == ("no", "yes") and "+" not in task.name:
            assert not trained_inputs & {example.input for example in task.examples if example.output == "yes"}, task.name


@pytest.mark.slow
def test_test_texts_are_never_trained_on(splits):
    """Nor are the negatives that held-out tasks are scored on."""
    trained = {example.input for task in splits["train"] for example in task.split("train")}
    for split in (*HELD, "unseen_format"):
        for task in splits[split]:
            assert not trained & {example.input for example in task.split("test")}, task.name


@pytest.mark.slow
def test_held_out_labels_are_no_classes_of_training(splits):
    """No classification task of training knows them, whatever it calls them."""
    names = read("sources")["labels"]
    families = {name: family for family, about in read("sources")["families"].items() for name in about["tasks"]}
    held = {(family, label) for side in read("held_out").values() for family, labels in side.items() for label in labels}
    for task in splits["train"]:
        source = re.sub(r"_subset\d+$", "", task.name)
        if source in families and task.labels:
            forbidden = {label for family, label in held if family == families[source]}
            renamed = names.get(families[source], {}) | names.get(source, {})
            assert not {renamed.get(label, label) for label in forbidden} & set(task.labels), task.name


@pytest.mark.slow
def test_held_out_concepts_are_no_concepts_of_training(splits):
    """A label of another set that means the same is held out as well."""
    families = {name: (family, about["side"]) for family, about in read("sources")["families"].items() for name in about["tasks"]}
    held = {(family, label): side for side, found in read("held_out").items() for family, labels in found.items() for label in labels}
    aliases = read("sources")["aliases"]
    sides = {}
    for task, about in read_glosses().items():
        if task in families:
            family, side = families[task]
            for label, entry in about["labels"].items():
                name = task if label.lower() == "yes" else aliases.get(task, {}).get(label, label)
                sides.setdefault(entry["concept"], set()).add(held.get((family, name), side))
    assert not [concept for concept, found in sides.items() if "unseen_label" in found and len(found) > 1]
    assert not [concept for concept, found in sides.items() if "validation_label" in found and len(found) > 1]


@pytest.mark.slow
def test_unseen_formats_are_new_combinations_of_known_parts(suite, splits):
    """The task is trained, the form's parts are trained, the two together are not."""
    trained = {task.name for task in splits["train"]}
    parts = {part for name in trained for part in name.split("+")[1:]}
    for task in splits["unseen_format"]:
        name, *form = task.name.split("+")
        assert form and name in trained and set(form) <= parts and task.name not in trained
        assert sum(other.startswith(f"{name}+") for other in trained) >= 1


# --- wordings --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wordings_are_many_and_do_not_start_alike(splits):
    """At least 12 for each training task and 4 that are kept for evaluation; of a task's, most begin with another word."""
    first = Counter()
    for task in splits["train"]:
        assert len(set(task.descriptions)) == len(task.descriptions) >= 12 and len(set(task.eval_descriptions)) >= 4
        first.update(text.split()[0].lower() for text in task.descriptions)
    for split in (*HELD, "unseen_format"):
        assert all(len(set(task.descriptions)) >= 4 for task in splits[split])
    assert first.most_common(1)[0][1] <= 0.15 * sum(first.values())


@pytest.mark.slow
def test_wordings_for_evaluation_never_occur_in_training(splits):
    """Neither those that training tasks keep, nor those of held-out tasks."""
    trained = {_plain(text) for task in splits["train"] for text in task.descriptions}
    kept = {_plain(text) for task in splits["train"] for text in task.eval_descriptions}
    others = {_plain(text) for split in (*HELD, "unseen_format") for task in splits[split] for text in task.descriptions}
    assert not trained & (kept | others)


@pytest.mark.parametrize("kind", read("wordings/frames"))
def test_frames_of_evaluation_are_its_own(kind):
    """Training, validation and evaluation share no frame."""
    frames = {part: {_plain(text) for text in texts} for part, texts in read("wordings/frames")[kind].items()}
    assert set(frames) == {"train", "validation", "eval"}
    assert not frames["train"] & (frames["validation"] | frames["eval"]) and not frames["validation"] & frames["eval"]


def _words_of_tasks():
    yield from read("wordings/tasks").items()
    for group in read("wordings/made").values():
        yield from group.items()
    yield from read("wordings/topics").items()
    yield from read("wordings/passages")["operations"].items()


@pytest.mark.slow
def test_words_of_evaluation_are_their_own():
    """Of every task, and of every form of answers."""
    for name, words in _words_of_tasks():
        pools = {key: {_plain(text) for text in texts} for key, texts in words.items() if key != "words"}
        trained = set().union(*(texts for key, texts in pools.items() if not key.startswith("eval_")))
        kept = set().union(*(texts for key, texts in pools.items() if key.startswith("eval_") and key != "eval_first"))
        assert not trained & kept, name
    for factor in read("wordings/formats").values():
        for name, words in factor.items():
            assert not {_plain(t) for t in words["train"]} & {_plain(t) for t in words.get("eval", ())}, name


@pytest.mark.slow
def test_words_of_evaluation_are_worded_anew():
    """Hardly a phrase of training has more than three fifths of the content words of one that is kept for evaluation of its task."""
    near = every = 0
    for _, words in _words_of_tasks():
        kept = [_content(text) for key, texts in words.items() if key.startswith("eval_") and key != "eval_first" for text in texts]
        trained = [text for key, texts in words.items() if not key.startswith("eval_") and key != "words" for text in texts]
        near += sum(any(len(one & _content(text)) > 0.6 * len(one) for one in kept) for text in trained)
        every += len(trained)
    assert every > 10_000 and near <= 0.005 * every


def test_words_for_evaluation_are_not_used_in_training():
    """A description of a known task takes those kept for evaluation in evaluation alone; of a new task, all are new."""
    import random

    phrases = Phrases("word", {"do": ["sing the word"]}, {"do": ["hum it", "whistle it"]})
    trained = describe(phrases, Format(), "train", 12, random.Random(0), known=True)
    kept = describe(phrases, Format(), "eval", 6, random.Random(0), known=True)
    new = describe(phrases, Format(), "eval", 12, random.Random(0), known=False)
    assert all("sing" in text.lower() for text in trained) and not any("sing" in text.lower() for text in kept)
    assert any("sing" in text.lower() for text in new)


@pytest.mark.slow
def test_descriptions_say_the_form(suite):
    """Of tasks in another form, every description differs from those of the plain task by words of the form."""
    for name in ("clinc_is_balance", "fv_antonym"):
        plain = set(suite[name].descriptions)
        for task in suite:
            if task.name.startswith(f"{name}+"):
                assert not plain & set(task.descriptions)
    for task in suite:
        if task.name.endswith("+json"):
            assert all(re.search(r"json|\{", text, re.I) for text in (*task.descriptions, *task.eval_descriptions)), task.name


# --- detectors, formats, answers that code gives ------------------------------------------------------------------------


@pytest.mark.slow
def test_detectors_are_balanced(suite):
    """As many positives as negatives, in both splits."""
    for task in suite:
        if _is_detector(task) and "+" not in task.name:
            for split in ("train", "test"):
                outputs = Counter(example.output for example in task.split(split))
                assert set(outputs) == {"yes", "no"} and outputs["yes"] == outputs["no"], (task.name, split, outputs)


def _label(family, name, concept):
    texts = {split: [f"{family} {name} {split} {i}" for i in range(40)] for split in ("train", "test")}
    return Label(family, family, name, "train", Phrases("text", {}, {}), concept, "MIT", "here", texts)


def test_negatives_are_half_siblings_half_strangers():
    """And never of a label that may mean the same, in this set or another."""
    own = _label("bank", "cancel card", "cancel a card")
    others = [own, _label("bank", "balance", "see the balance"), _label("bank", "card cancellation", "cancel a card")]
    others += [_label("home", "alarm", "set an alarm"), _label("home", "stop card", "block a card")]
    rows = detector(own, others, 64, 32).examples
    negatives = [row.input for row in rows if row.output == "no" and row.split == "train"]
    assert Counter(text.rsplit(" ", 2)[0] for text in negatives) == {"bank balance": 16, "home alarm": 16}
    assert sum(row.output == "yes" for row in rows if row.split == "train") == 32


@pytest.mark.parametrize(
    ("form", "output", "expected"),
    [
        (Format(), "yes", "yes"),
        (Format("true_false", "upper", "brackets"), "no", "[FALSE]"),
        (Format("one_zero"), "yes", "1"),
        (Format("match", "title", "stop"), "no", "No match."),
        (Format("initial", "upper"), "lost card", "L"),
        (Format(wrap="json"), 'say "é"', '{"answer": "say \\"é\\""}'),
        (Format(wrap="label"), "Oslo", "Answer: Oslo"),
    ],
)
def test_formats_apply_words_case_and_wrap_in_turn(form, output, expected):
    """Expected values are written out by hand."""
    assert form.apply(output) == expected


def test_every_form_has_words():
    """Each case and wrap can be asked for."""
    formats = read("wordings/formats")
    assert set(formats["case"]) == set(CASES) - {"plain"} and set(formats["wrap"]) == set(WRAPS) - {"plain"}
    for factor in formats.values():
        assert all(len(words["train"]) >= 5 and len(words["eval"]) >= 2 for words in factor.values())


@pytest.mark.parametrize(
    ("kind", "name", "text", "expected"),
    [
        ("sentence", "camel_case", "Don't stop, now!", "dontStopNow"),
        ("sentence", "longest_word", "a bb cc", None),
        ("sentence", "says_not", "I can't see", "yes"),
        ("noun", "plural", "berry", "berries"),
        ("noun", "plural", "box", "boxes"),
        ("verb", "ing_form", "make", "making"),
        ("verb", "ing_form", "run", "running"),
        ("verb", "ing_form", "see", "seeing"),
        ("verb", "ing_form", "play", "playing"),
        ("number", "in_words", "113", "one hundred and thirteen"),
        ("number", "roman", "94", "XCIV"),
        ("number", "ordinal", "112", "112th"),
        ("number", "ordinal", "23", "23rd"),
        ("number", "rounded_ten", "45", None),
        ("time", "twelve_hours", "00:05", "12:05 am"),
        ("time", "twelve_hours", "12:30", "12:30 pm"),
        ("date", "date_long", "2021-05-03", "3 May 2021"),
        ("log", "log_component", "2024-05-01 12:00:00 [db] ERROR: disk full", "db"),
        ("record", "json_to_pairs", '{"name": "Ada", "age": 36}', "name=Ada, age=36"),
        ("link", "host_of", "see https://example.com/a for more", "example.com"),
        ("path", "stem_of", "/home/src/cat.txt", "cat"),
    ],
)
def test_code_answers_rightly(kind, name, text, expected):
    """Expected values are written out by hand; None where there is no clear answer."""
    assert ANSWERS[kind][name](text) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("summary", "It was cold. The parser reads the parser twice (or so). Nobody knew.", "The parser reads the parser twice."),
        ("summary", f"We may end this at any time, for a fee, {'without notice ' * 9}to you.", "We may end this at any time, for a fee."),
        ("summary", "There is nothing to leave out here.", None),
        ("plain", "Prior to this we shall commence.", "Before this we must start."),
        ("plain", "Easy words alone.", None),
        ("opening", "a b c d e f g h i j", "a b c d e f g h"),
        ("ending", "a b c d e f g h", "c d e f g h"),
        ("names", "Yesterday the Bank of England met Ada Lovelace.", "Bank of England, Ada Lovelace"),
        ("numbers", "From 1,000 to 2.5 in 2020.", "1,000, 2.5, 2020"),
        ("key_words", "short responsibility agreement notwithstanding of it", "notwithstanding, responsibility, agreement"),
        ("to_comma", "If you like it, keep it.", "If you like it"),
        ("to_comma", "Well, keep it.", None),
        ("no_brackets", "The card (black) is lost.", "The card is lost."),
        ("question", "I lost it. What now?", "What now?"),
        ("question", "What now?", None),
        ("last_sentence", "One thing. Another thing.", "Another thing."),
    ],
)  # fmt: skip
def test_operations_on_longer_texts(name, text, expected):
    """Expected values are written out by hand; None where there is no clear answer."""
    assert OPERATIONS[name](text) == expected


@pytest.mark.slow
def test_operations_meet_every_kind_of_text_but_those_held_out(splits):
    """So that "summarise" and "legal text" are known each by itself, and only together new."""
    words = read("wordings/passages")
    trained = {task.name: task for task in splits["train"]}
    for operation in words["operations"]:
        assert sum(f"{kind}_{operation}" in trained for kind in words["kinds"]) >= 2, operation
    for kind in words["kinds"]:
        made = [trained[f"{kind}_{operation}"] for operation in words["operations"] if f"{kind}_{operation}" in trained]
        assert len(made) >= 6 and all(task.free_text for task in made)
        if kind in words["held"]:
            assert not {task.name for task in made} & {f"{kind}_{operation}" for operation in words["held"][kind]}
            held = re.compile(r"summar|tl;dr|gist|simplif|plain|simpler|easy", re.I)
            assert not [text for task in made for text in task.descriptions if held.search(text)]


def test_words_are_whole_words():
    """A topic is mentioned by a word, not by a part of one."""
    assert mentions(("red",))("a Red car") == "yes" and mentions(("red",))("a hundred") == "no"


@pytest.mark.slow
def test_every_made_task_has_words_and_ships(suite):
    """No program without words, no words without a program."""
    programs = {name for group in ANSWERS.values() for name in group}
    assert programs == {name for group in read("wordings/made").values() for name in group}
    assert programs <= set(suite.names)


def test_samples_are_even():
    """Of a closed set each output comes as often; what is drawn depends on the task's name alone."""
    rows = [Example(f"{output}{i}", output, "train") for output in "aab" for i in range(30)]
    drawn = sample(rows, 20, 5, "name")
    assert Counter(row.output for row in drawn) == {"a": 10, "b": 10} and drawn == sample(reversed(rows[::-1]), 20, 5, "name")


@pytest.mark.slow
def test_descriptions_by_hand_are_of_training_tasks_and_new(suite, splits):
    """The benchmark of hand-typed descriptions asks what it says: training tasks, in words that no task of the suite holds."""
    assert set(TYPED) <= {task.name for task in splits["train"]}
    words = {re.sub(r"\W+", " ", text.lower()).strip() for task in suite for text in (*task.descriptions, *task.eval_descriptions)}
    assert not {re.sub(r"\W+", " ", text.lower()).strip() for text in TYPED.values()} & words


# --- the suite's format and the command ---------------------------------------------------------------------------------


def test_marks_and_kept_wordings_survive_saving(tmp_path):
    """free_text and eval_descriptions are written where they say something."""
    rows = (Example("a", "b", "train"),)
    task = Task("t", "s", ("say",), None, "MIT", "here", rows, free_text=True, eval_descriptions=("tell",))
    bare = Task("u", "s", ("say",), None, "MIT", "here", rows)
    TaskSuite([task, bare]).save(tmp_path)
    assert TaskSuite.from_folder(tmp_path).tasks == (task, bare)
    written = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert written[0]["free_text"] is True and not {"free_text", "eval_descriptions"} & set(written[1])


@pytest.mark.slow
@pytest.mark.skipif(not SOURCES.is_dir(), reason="the source suites are not part of the package")
def test_the_command_rebuilds_what_ships(tmp_path):
    """The same sources give the same bytes."""
    counts = build_tasks(SOURCES, tmp_path)
    assert counts == {split: len(names) for split, names in read_json(FOLDER / "splits.json").items()}
    for name in ("tasks.jsonl", "splits.json", "NOTICE"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    assert TaskSuite.from_folder(tmp_path).fingerprint() == TaskSuite.from_folder(FOLDER).fingerprint()
