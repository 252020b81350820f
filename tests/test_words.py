"""The words of the field, one per concept, in docs, messages, docstrings and names; what is still to be cleaned can only get less.

`tests/words_to_clean.txt` counts what older files still hold. `python tests/test_words.py` takes off what has been cleaned, and never
adds anything.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests/words_to_clean.txt"
_COMPARED = "longer|more|less|better|worse|larger|smaller|faster|slower|higher|lower|greater|further|shorter|fewer|nearer|different"
_UNITS = (
    "task|module|step|expert|description|token|row|adapter|line|skill|method|second|minute|file|value|character|seed|epoch|layer|batch"
    "|side|group|example|category|query|validation"
)
_COUNTED = (
    "examples?|descriptions?|wordings?|checkpoints?|values?|rows?|tokens?|samples?|bytes|one"
    "|lines?|runs?|vectors?|loss|scale|class|id|activations"
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
OLD_NAMES = ("lorag/generator/convert.py", "lorag/moved.py")  # of what older versions wrote and were called
FENCE = re.compile(r"^```.*?^```", re.S | re.M)


def _prose(text):
    return [f"{match.group(0)!r}: {better}" for pattern, better in PROSE.items() for match in re.finditer(pattern, text, re.I)]


def _name(name):
    parts = re.findall(r"[a-z0-9]+|[A-Z][a-z0-9]*", name)
    found = [f"{name}: {PARTS[part.lower()]}" for part in parts if part.lower() in PARTS]
    return found + ([f"{name}: {NAMES[name]}"] if name in NAMES else [])


def _of_page(text):
    """What stands in a page's sentences, outside of code."""
    return _prose(re.sub(r"`[^`\n]*`", "`…`", FENCE.sub("", text)))


def _of_module(text):
    """What stands in a module's strings and names. A table of renamed keys has to say the old ones."""
    tree, found = ast.parse(text), []

    def visit(node):
        if isinstance(node, ast.Assign | ast.AnnAssign) and "RENAMED" in ast.unparse(node).split("=")[0].upper():
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.extend(_prose(node.value))
        for attribute in ("name", "id", "attr", "arg"):
            name = getattr(node, attribute, None)
            found.extend(_name(name) if isinstance(name, str) and not isinstance(node, ast.ImportFrom | ast.alias) else [])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def findings():
    """File -> what should be said otherwise."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = {path: _of_page(path.read_text(encoding="utf-8")) for path in pages if path.name != "results-history.md"}  # a record
    modules = [path for path in (ROOT / "lorag").rglob("*.py") if path.relative_to(ROOT).as_posix() not in OLD_NAMES]
    found |= {path: _of_module(path.read_text(encoding="utf-8")) for path in modules}
    return {path.relative_to(ROOT).as_posix(): said for path, said in sorted(found.items()) if said}


def _listed():
    lines = [line.split() for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {path: int(count) for count, path in lines}


FOUND = findings()


@pytest.mark.parametrize("path", sorted(FOUND))
def test_words_are_the_field_s(path):
    """A file says nothing otherwise, or no more often than the list of what is still to be cleaned allows."""
    allowed = _listed().get(path, 0)
    assert len(FOUND[path]) <= allowed, f"{path}, {allowed} allowed: " + "; ".join(FOUND[path])


def test_the_list_shrinks():
    """What has been cleaned is off the list: run `python tests/test_words.py`."""
    assert not {path: count for path, count in _listed().items() if len(FOUND.get(path, ())) < count}


def test_words_are_found():
    """In sentences, messages, docstrings and names; not in code on a page, in names of libraries, or where English wants a "no"."""
    assert len(_of_page("This is no file. One a module; experts and their kin.")) == 3
    assert not _of_page("There is no file, and it is no longer there. `kin`\n```\nthe kin of it\n```\nOne per module.")
    assert len(_of_module('def blur(kin):\n    """A colleague."""\n    raise Error(f"{kin} is no key")\n')) == 5
    assert not _of_module('RENAMED = {"kin": "groups"}\nskin = "kind"\n')


if __name__ == "__main__":
    kept = {path: min(count, len(FOUND.get(path, ()))) for path, count in _listed().items()}
    lines = [f"{count} {path}" for path, count in sorted(kept.items()) if count]
    LIST.write_text(
        "# How often older files still say something otherwise: tests/test_words.py.\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
