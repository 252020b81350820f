"""The glosses of the closed label sets: every label says in several plain ways what it means, so that a detector can be asked for."""

import re
from collections import Counter
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "lorag/worlds/smollm2/labels"
SETS = {path.stem: yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) for path in sorted(FOLDER.glob("*.yaml"))}
FEWEST = 6
KEPT = 2  # the last glosses, for evaluation only
PLAIN = set("a an the of to is it or and in on for with by about that their they someone who".split())


def _words(text):
    return set(re.findall(r"[\w+#']+", text.lower()))


def _content(text):
    return _words(text) - PLAIN


def _entries(name):
    """Labels of a set, then its groups of labels."""
    return [*SETS[name]["labels"].items(), *SETS[name].get("groups", {}).items()]


def test_a_label_set_has_the_fields():
    """Task, noun and labels; a label is text, with its concept, glosses and noun phrase. A group has members; a rule is a known one."""
    for name in SETS:
        found = SETS[name]
        assert set(found) - {"groups", "rule"} == {"task", "noun", "labels"}, name
        assert found.get("rule", "present") in ("present", "listed"), name
        assert name.endswith(found["task"]) and found["noun"] == found["noun"].lower().strip(), name
        assert found["labels"], name
        for label, entry in _entries(name):
            assert isinstance(label, str) and label.strip() == label, f"{name}: {label!r} is not text: quote it"
            assert set(entry) - {"members"} == {"concept", "glosses", "noun_phrase"}, f"{name}, {label}"
            texts = (entry["concept"], entry["noun_phrase"], *entry["glosses"])
            assert all(isinstance(text, str) and text and text.strip() == text for text in texts), f"{name}, {label}"


def test_glosses_are_clauses():
    """Each fits after "say yes if": one clause without end mark, neither a question nor an order."""
    for name in SETS:
        for label, entry in _entries(name):
            for gloss in entry["glosses"]:
                assert not re.search(r"[.!?:;]$", gloss), f"{name}, {label}: {gloss}"
                assert 2 <= len(gloss.split()) <= 30, f"{name}, {label}: {gloss}"
                assert gloss.split()[0].lower() not in {"if", "whether", "say", "answer", "what", "how", "please"}, (
                    f"{name}, {label}: {gloss}"
                )
            assert not re.search(r"[.!?]$", entry["noun_phrase"]), f"{name}, {label}"


def test_a_gloss_names_one_label():
    """Within a set no wording stands for two labels, and a label has enough of its own."""
    for name in SETS:
        entries = [entry for _, entry in _entries(name)]
        seen = Counter(gloss.lower() for entry in entries for gloss in entry["glosses"])
        assert seen.most_common(1)[0][1] == 1, (name, seen.most_common(1))
        phrases = Counter(entry["noun_phrase"].lower() for entry in entries)
        assert phrases.most_common(1)[0][1] == 1, (name, phrases.most_common(1))
        assert all(len(entry["glosses"]) >= FEWEST for entry in entries), name


def test_a_group_is_made_of_labels():
    """Two members or more, none twice, and no two groups of a set with the same ones."""
    for name, found in SETS.items():
        groups = found.get("groups", {})
        for group, entry in groups.items():
            members = entry["members"]
            assert len(members) == len(set(members)) >= 2 and set(members) <= set(found["labels"]), f"{name}: {group}"
        assert len({frozenset(entry["members"]) for entry in groups.values()}) == len(groups), name


def test_kept_glosses_are_worded_anew():
    """What evaluation reads is not a copy of what training reads: at most three fifths of its words stand in any one training gloss."""
    for name in SETS:
        for label, entry in _entries(name):
            for kept in entry["glosses"][-KEPT:]:
                for gloss in entry["glosses"][:-KEPT]:
                    shared = len(_content(kept) & _content(gloss)) / len(_content(kept))
                    assert shared <= 0.6, f"{name}, {label}: {kept!r} repeats {gloss!r}"


def test_meaning_is_said_in_other_words_than_the_name():
    """At least one gloss of each label does without one of the name's words, so that matching letters is not enough."""
    for name in SETS:
        for label, entry in _entries(name):
            if label.lower() not in ("yes", "present") and _content(label):
                assert any(not _content(label) <= _words(gloss) for gloss in entry["glosses"]), f"{name}, {label}"


def test_one_concept_has_one_name():
    """Concepts differ in more than case and articles, so that the same meaning in two sets has the same string."""
    names = {entry["concept"] for found in SETS.values() for part in ("labels", "groups") for entry in found.get(part, {}).values()}
    spelt = {name: " ".join(sorted(_words(name) - {"a", "an", "the"})) for name in names}
    assert len(set(spelt.values())) == len(names), [name for name in names if Counter(spelt.values())[spelt[name]] > 1]
