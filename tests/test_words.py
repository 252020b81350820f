"""The words of the field, one per concept: in docs, messages, docstrings, comments and names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_COMPARED = "longer|more|less|better|worse|larger|smaller|faster|slower|higher|lower|greater|further|shorter|fewer|nearer|different"
_UNITS = (
    "task|module|step|expert|description|token|row|adapter|line|skill|method|second|minute|file|value|character|seed|epoch|layer|batch"
    "|side|group|example|category|query|validation|program|cluster|code|feature|word|abuse|domain"
)
_COUNTED = (
    "examples?|descriptions?|wordings?|checkpoints?|values?|rows?|tokens?|samples?|bytes|one"
    "|lines?|runs?|vectors?|loss|scale|class|id|activations|units?|verdicts?|files?|products?"
)
# What a reader should not meet in prose, and what to write instead.
PROSE = {
    rf"(?<!there )\b(?:is|are|was|were) no (?!(?:{_COMPARED}|one|matter|use|need)\b)": '"is not a …"',
    rf"\b(?:{_COUNTED}) a (?:{_UNITS})\b": '"per"',
    r"\bkin\b": "groups",
    r"\bcolleagues?\b": "ensemble members",
    r"\bpupils?\b": "student",
    r"\bblur(?:s|red|ring)?\b": "augmentation",
    r"\bshak(?:e|es|en|ing)\b": "noise",
    r"\bplay(?:s|ed|ing)? (?:the|an?) unseen\b": "leave-one-group-out",
    r"\bdoorkeepers?\b": "request filter",
    r"\boutlooks?\b": "preview",
    r"\bworkbench(?:es)?\b": "session",
    r"\brungs?\b": "baseline, or method",
    r"\bby heart\b": "memorises",
}
# Parts of names between underscores, and whole names.
PARTS = {
    **dict.fromkeys(("kin",), "groups"),
    **dict.fromkeys(("colleague", "colleagues"), "ensemble, members"),
    **dict.fromkeys(("pupil", "pupils"), "student"),
    **dict.fromkeys(("blur", "blurred", "shake", "shaken"), "augment, noise"),
    **{"doorkeeper": "request filter", "outlook": "preview", "workbench": "session", "rung": "baseline"},
    **{"rungs": "baselines", "sharpness": "temperature"},
}
NAMES = {
    "told": "broadcast",
    "left_out": "masked",
    "late": "checkpoints",
    "understood": "teacher features",
    "share_closed": "gap_closed",
    "worth": "reduction",
    **dict.fromkeys(("found", "own", "made", "there"), "what the value is"),
}
# Of what older versions wrote and were called; and this list itself.
OLD_NAMES = (
    *("lorag/generator/convert.py", "lorag/moved.py"),
    *(f"tests/test_{name}.py" for name in ("convert", "ensemble", "moved", "training_set", "words")),
)
FENCE = re.compile(r"^```.*?^```", re.S | re.M)


_ANY = re.compile("|".join(f"(?:{pattern})" for pattern in PROSE), re.I)


def _prose(text):
    if not _ANY.search(text):  # which is nearly always so
        return []
    return [f"{match.group(0)!r}: {better}" for pattern, better in PROSE.items() for match in re.finditer(pattern, text, re.I)]


def _name(name):
    parts = re.findall(r"[a-z0-9]+|[A-Z][a-z0-9]*", name)
    found = [f"{name}: {PARTS[part.lower()]}" for part in parts if part.lower() in PARTS]
    return found + ([f"{name}: {NAMES[name]}"] if name in NAMES else [])


def _of_page(text):
    """What stands in a page's sentences, outside of code."""
    return _prose(re.sub(r"`[^`\n]*`", "`…`", FENCE.sub("", text)))


def _of_comments(text):
    """What stands in a module's comments, and after a # in its strings."""
    return [what for comment in re.findall(r"#\s.*", text) for what in _prose(comment)]


def _of_module(text):
    """What stands in a module's strings and names. A table of renamed keys has to say the old ones."""
    tree, found = ast.parse(text), []

    def visit(node):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any("RENAMED" in getattr(target, "id", getattr(target, "attr", "")).upper() for target in targets):
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.extend(_prose(node.value))
        for attribute in ("name", "id", "attr", "arg"):
            name = getattr(node, attribute, None)
            found.extend(_name(name) if isinstance(name, str) and not isinstance(node, ast.ImportFrom | ast.alias) else [])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found + _of_comments(text)


def _of_script(text):
    """What stands in the strings and comments of tests, benchmarks and examples, whose names are their own affair."""
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [what for string in strings for what in _prose(string)] + _of_comments(text)


def test_words_are_the_field_s():
    """No file says anything otherwise, but for the history of results and what names older versions."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    read = {path: _of_page for path in pages if path.name != "results-history.md"}  # a record
    read |= {path: _of_module for path in (ROOT / "lorag").rglob("*.py")}
    read |= {path: _of_script for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")}
    names = {path.relative_to(ROOT).as_posix(): path for path in read}
    found = {name: read[path](path.read_text(encoding="utf-8")) for name, path in names.items() if name not in OLD_NAMES}
    assert not {name: what for name, what in found.items() if what}


def test_words_are_found():
    """In sentences, messages, docstrings and names; not in code on a page, in names of libraries, or where English wants a "no"."""
    assert len(_of_page("This is no file. One a module; experts and their kin.")) == 3
    assert not _of_page("There is no file, and it is no longer there. `kin`\n```\nthe kin of it\n```\nOne per module.")
    assert len(_of_module('def blur(kin):\n    """A colleague."""\n    raise Error(f"{kin} is no key")\n')) == 5
    assert _of_module("x = 1  # this is no number")[0] == _of_script("# this is no number")[0]
    assert not _of_module('RENAMED = {"kin": "groups"}\nskin = "kind"\n')
