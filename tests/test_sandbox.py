"""The sandbox's world: every domain keeps its contract, held-out tasks stay held out, and a text tells nothing of the task."""

import random
import re
import string
from collections import Counter

import pytest
import yaml
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment before transformers is imported

from lorag.tasks.unknown import unknown_tasks
from lorag.worlds.sandbox import wordings, world
from lorag.worlds.sandbox.base_lm import TEMPLATE, train_tokenizer
from lorag.worlds.sandbox.grid import HARD_PAIRS, Cell, build_suite, cells, splits

BANK_STYLES = 3  # of each seen skill-domain pair
FACTORS = {"skills": world.SKILLS, "domains": world.DOMAINS, "styles": world.STYLES}
FACTS = {
    "person",
    "organisation",
    "place",
    "date",
    "amount",
    "items",
    "sentiment",
    "urgency",
    "required",
    "next_step",
}


def _slots(text):
    return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]


@pytest.fixture(scope="module")
def raw():
    """The domain files as they are written."""
    from importlib import resources

    folder = resources.files("lorag.worlds.sandbox").joinpath("domains")
    return {path.name.removesuffix(".yaml"): yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


# --- domains ----------------------------------------------------------------------------------------------------------


def test_domain_files_share_one_form(raw):
    """Each domain has its file and each file its domain, with the same keys and three classes each."""
    assert set(raw) == set(world.DOMAINS)
    assert len(world.DOMAINS) >= 12 and len(world.SKILLS) >= 10 and len(world.STYLES) >= 6
    keys = set(raw["legal"])
    for name, value in raw.items():
        assert (value["name"], set(value)) == (name, keys)
        assert set(value["required"]) == {"things", "yes", "no"}
        for classes in (value["sentiment"], value["urgency"]):
            cues = [cue for own in classes.values() for cue in own]
            assert len(classes) == 3 and len(set(cues)) == len(cues)
        assert value["amount"]["low"] < value["amount"]["high"]
        assert len(set(value["items"]["list"])) == len(value["items"]["list"]) >= 4


def test_clauses_state_every_fact_exactly_once(raw):
    """The wordings of a clause use the same slots; all clauses together use each fact and field once."""
    for name, value in raw.items():
        used = []
        for clause in value["clauses"]:
            slots = {tuple(sorted(_slots(wording))) for wording in clause}
            assert len(slots) == 1, f"{name}: {clause}"
            assert len(set(clause)) == len(clause)
            used += slots.pop()
        assert Counter(used) == Counter(FACTS | set(value["fields"])), name
        assert set(_slots(value["summary"])) <= FACTS | set(value["fields"])
        for wording in (*value["required"]["yes"], *value["required"]["no"]):
            assert _slots(wording) == ["thing"]


def test_what_an_answer_says_differs_between_domains(raw):
    """Another domain's expert does not answer rightly: classes, what is summed up, and the closing note are a domain's own."""
    assert len({value["summary"] for value in raw.values()}) == len(raw)
    assert len({value["note"] for value in raw.values()}) == len(raw)
    for kind in ("sentiment", "urgency"):
        names = [label for value in raw.values() for label in value[kind]]
        assert len(set(names)) == len(names) == 3 * len(raw)


# --- wordings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
def test_wordings_are_many_and_fill_their_slots(factor):
    """At least 40 distinct wordings a factor's value, with evaluation's; skills ask for a domain, styles for a task."""
    read = wordings.read(factor)
    assert set(read) == set(FACTORS[factor])
    slots = {"skills": ["domain"], "domains": [], "styles": ["task"]}[factor]
    for name, split in read.items():
        assert set(split) == {"train", "eval"}
        assert len(set(split["train"]) | set(split["eval"])) >= 40, name
        assert len(split["eval"]) >= 5
        for text in (*split["train"], *split["eval"]):
            assert _slots(text) == slots, text


def test_fused_phrases_exist_for_every_skill_of_every_domain():
    """They name skill and domain together and leave no slot."""
    read = wordings.read("fused")
    assert set(read) == set(world.DOMAINS)
    for name, skills in read.items():
        assert set(skills) == set(world.SKILLS), name
        for split in skills.values():
            assert len(split["train"]) >= 3 and len(split["eval"]) >= 1
            assert not any(_slots(text) for text in (*split["train"], *split["eval"]))


def _plain(text):
    return re.sub(r"\s+", " ", text.strip().lower())


def test_wordings_for_evaluation_never_occur_in_training():
    """In no factor, not even under another name, whatever the case; but for the bare {task}, which is not a wording."""
    for factor in FACTORS:
        read = wordings.read(factor)
        train = {_plain(text) for split in read.values() for text in split["train"]} - {"{task}"}
        shown = {_plain(text) for split in read.values() for text in split["eval"]} - {"{task}"}
        assert not train & shown, factor
    fused = wordings.read("fused")
    every = {split: {_plain(t) for skills in fused.values() for own in skills.values() for t in own[split]} for split in ("train", "eval")}
    assert not every["train"] & every["eval"]
    outside = [{_plain(t) for kind in unknown_tasks(part).values() for t in kind} for part in ("fit", "test")]
    assert outside[0].isdisjoint(outside[1]) and min(map(len, outside)) >= 20


def test_descriptions_of_held_out_tasks_are_new():
    """The suite's descriptions of held-out tasks occur at no training task; each task's are distinct."""
    known = build_suite(splits()["train"][:60], train=1, test=1, descriptions=24, wording="train")
    unseen = build_suite(splits()["test"], train=0, test=1, descriptions=8, wording="eval")
    train = {_plain(text) for task in known for text in task.descriptions}
    for task in unseen:
        assert len(set(task.descriptions)) == 8
        assert not train & {_plain(text) for text in task.descriptions}
        assert not task.split("train")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_held_out_combinations_are_new_but_their_pairs_are_not():
    """All three pairs of a test cell occur in train, never the cell; hard pairs occur nowhere."""
    found = splits()
    pairs = len(world.SKILLS) * len(world.DOMAINS) - len(HARD_PAIRS)
    train = BANK_STYLES * pairs
    assert {name: len(own) for name, own in found.items()} == {"train": train, "test": 60, "hard": 36, "without_expert": 792 - 96 - train}
    everything = [cell for own in found.values() for cell in own]
    assert len(set(everything)) == len(everything) == len(cells())
    train = found["train"]
    pairs = [{(c.skill, c.domain) for c in train}, {(c.skill, c.style) for c in train}, {(c.domain, c.style) for c in train}]
    for cell in found["test"]:
        wanted = ((cell.skill, cell.domain), (cell.skill, cell.style), (cell.domain, cell.style))
        assert all(pair in own for pair, own in zip(wanted, pairs, strict=True)), cell
    seen = {(cell.skill, cell.domain) for cell in (*train, *found["without_expert"])}
    assert seen.isdisjoint(HARD_PAIRS)
    assert {(cell.skill, cell.domain) for cell in found["hard"]} == set(HARD_PAIRS)
    assert "legal-summarise-plain" in {cell.name for cell in found["test"]}
    assert set(Counter(cell.style for cell in found["test"]).values()) == {10}


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", world.DOMAINS)
def test_texts_depend_on_the_seed_alone_and_are_short(name):
    """The same seed writes the same text; 12 to 60 words; all of a text's answers are in it or of its classes."""
    for seed in range(40):
        text = world.write_text(name, random.Random(seed))
        assert text == world.write_text(name, random.Random(seed))
        assert 12 <= len(text.text.split()) <= 60
        assert set(text.answers) == set(world.SKILLS)
        assert "{" not in text.text
        for skill in ("person", "date", "amount", "place", "organisation", "next_step"):
            assert text.answers[skill] in text.text
        assert text.answers["sentiment"] in world.domain(name).sentiment
        assert text.answers["urgency"] in world.domain(name).urgency
    assert len({world.write_text(name, random.Random(seed)).text for seed in range(200)}) == 200


def test_texts_do_not_tell_the_style_and_answers_differ_between_all_tasks_of_a_domain():
    """All styles of a pair are asked about the same texts; and no two tasks of a domain have the same answers."""
    for name in ("legal", "weather"):
        own = tuple(cell for cell in cells() if cell.domain == name)
        suite = build_suite(own, train=6, test=4, descriptions=1, wording="train")
        by_skill = {}
        answers = set()
        for cell in own:
            task = suite[cell.name]
            by_skill.setdefault(cell.skill, set()).add(tuple(e.input for e in task.examples))
            texts = [world.write_text(name, random.Random(seed)) for seed in range(8)]
            answers.add(tuple(world.answer(text, cell.skill, cell.style, name) for text in texts))
        assert all(len(texts) == 1 for texts in by_skill.values())
        assert len(answers) == len(own)


def test_texts_of_skills_are_drawn_from_one_grammar():
    """Whichever skill is asked, the domain's words come as often: a text gives its task away no more than chance."""
    counts = {}
    for skill in ("summarise", "date", "count"):
        suite = build_suite((Cell(skill, "legal", "plain"),), train=300, test=0, descriptions=1, wording="train")
        words = Counter(word for task in suite for e in task.examples for word in set(re.findall(r"\w+", e.input.lower())))
        counts[skill] = {word: number / 300 for word, number in words.items()}
    vocabulary = set().union(*counts.values())
    for a, b in (("summarise", "date"), ("date", "count")):
        assert max(abs(counts[a].get(w, 0) - counts[b].get(w, 0)) for w in vocabulary) < 0.2


def test_train_and_test_texts_differ():
    """No text of a task occurs in both its splits, and as many as asked for are there."""
    suite = build_suite(splits()["train"][:6], train=64, test=16, descriptions=2, wording="train")
    for task in suite:
        train, test = ({e.input for e in task.split(name)} for name in ("train", "test"))
        assert (len(train), len(test)) == (64, 16) and not train & test


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_and_texts_come_back_from_the_tokenizer():
    """Decoded, each is what it was: in every style, and for words that the world does not know."""
    tokenizer = train_tokenizer()
    rng = random.Random(5)
    for cell in cells()[::3]:
        text = world.write_text(cell.domain, rng)
        for part in (TEMPLATE.format(input=text.text), world.answer(text, cell.skill, cell.style, cell.domain)):
            assert tokenizer.decode(tokenizer(part, add_special_tokens=False)["input_ids"]) == part
    for strange in ("Zürich, 3½ €", 'she said "no way"'):
        assert tokenizer.decode(tokenizer(strange, add_special_tokens=False)["input_ids"]) == strange
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
