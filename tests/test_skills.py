"""Skills as files: read whatever their length, read with the description where they are about it, refused in one line where malformed."""

import pytest
import torch
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorag import generate_lora
from lorag.cli import main as cli
from lorag.errors import ArtifactError, DescriptionError
from lorag.files.markdown import plain_text, split_front, visible_text
from lorag.generator.generate import open_generator
from lorag.tasks.skills import read_skill
from lorag.text.embedding import Embedding, with_details

ABOUT = "say in one word and in capital letters which label the legal text has"
SKILL = f"""---
name: legal-label
description: write the label of the legal text in upper case
metadata:
  version: 1.2
---
# Labels

## When to use
- {ABOUT}
- Read *all* of the [input](https://example.org) first.

```python
print("code")
```

| a | table |
|---|-------|

## House rules
Report problems in the tracker.
"""


@pytest.fixture
def write(tmp_path):
    """Writes a skill file and gives its path."""

    def write(text, name="SKILL.md"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_skill_s_parts(write):
    """Description and name of the front matter, and pieces under their headings, without code, tables, links and marks."""
    skill = read_skill(write(SKILL))
    assert skill.description == "write the label of the legal text in upper case" and skill.name == "legal-label"
    assert skill.origin == "its front matter" and skill.dropped == 0
    assert skill.pieces == (
        f"When to use: {ABOUT} Read all of the input first.",
        "House rules: Report problems in the tracker.",
    )
    assert read_skill(write(SKILL).parent) == skill  # a skill's folder
    assert read_skill(write("\ufeff" + SKILL.replace("\n", "\r\n"))) == skill  # as Windows writes it


def test_a_text_without_front_matter_is_described_by_its_first_paragraph(write):
    """Also one whose front matter has no description, and one that is empty."""
    for front in ("# Title\n\n", "---\nname: x\n---\n", "---\n---\n", ""):
        text = f"{front}summarise legal text\n\nand more"
        skill = read_skill(write(text))
        assert skill.origin == "its first paragraph" and "summarise legal text" in skill.description
    assert read_skill(write("---\ndescription: summarise legal text\n---\n")).pieces == ()


@pytest.mark.parametrize("word", ["word", "語", "ก", "🙂"])
def test_long_texts_are_cut_into_pieces_of_bounded_size(write, word):
    """Whatever the script, with blanks and without; nothing is lost but what is said."""
    body = " ".join(f"{word}{number}" for number in range(3000)) + "\n\n" + word * 3000
    skill = read_skill(write(f"---\ndescription: about {word * 2000}\n---\n{body}"))
    assert len(skill.pieces) + skill.dropped > 10 and all(len(piece.encode()) <= 600 for piece in skill.pieces)
    many = read_skill(write("summarise\n\n" + "\n\n".join(f"paragraph {number}" for number in range(500))))
    assert len(many.pieces) == 128 and many.dropped == 500 - 128
    assert "372 pieces beyond the first 128" in many.line(())


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=400))
def test_any_text_is_read_or_refused(tmp_path, text):
    """No other error than lorag's, and no piece that an embedder could not take."""
    path = tmp_path / "SKILL.md"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        skill = read_skill(path)
    except (DescriptionError, ArtifactError):
        return
    assert skill.description.strip() and all(piece.strip() and len(piece.encode()) <= 600 for piece in skill.pieces)


BAD = {
    "unclosed": ("---\nname: x\ndescription: y\n\n# text\n", "does not end"),
    "not YAML": ("---\ndescription: a: b: c\n---\ntext", "not valid YAML"),
    "a list": ("---\n- a\n---\ntext", "KEY: VALUE"),
    "a number": ("---\ndescription: 3\n---\ntext", "not text"),
    "tags": ("---\ndescription: !!python/object:os.system x\n---\ntext", "YAML tag"),
    "anchors": ("---\na: &a [x]\ndescription: *a\n---\ntext", "anchors"),
    "nothing": ("\n\n", "says nothing"),
    "only code": ("```\ncode\n```\n", "says nothing"),
    "no text": (b"\x80\x04\x95binary", "not UTF-8"),
    "control characters": ("---\ndescription: x\n---\nsome\x00thing", "is not text"),
    "too large": (b"a" * (2**20 + 1), "too large"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_malformed_files_get_one_line(write, kind, tmp_path, capsys):
    """With what is wrong and where; nothing is written."""
    text, said = BAD[kind]
    with pytest.raises((DescriptionError, ArtifactError), match=said):
        read_skill(write(text))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--file", str(write(text)), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and len(err.splitlines()) == 1 and said in err and not (tmp_path / "out").exists()


def test_missing_files_and_doubled_wishes(tmp_path, capsys):
    """No such file; a description and a file."""
    for arguments, code in ((["--file", str(tmp_path / "none.md")], 1), (["text", "--file", str(tmp_path)], 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["generate", *arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == code and "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_details_that_are_about_the_task_are_read_with_it():
    """They change the code; others, and none, leave every byte; the adapter says which were used."""
    text = "write the label of the legal text in upper case"
    plain = generate_lora(text)
    unlike = generate_lora(text, details=["Report problems in the tracker.", "Version 1.2 was written on a rainy day."])
    about = generate_lora(text, details=[ABOUT, "Report problems in the tracker."])
    assert "details" not in plain.info and "details" not in unlike.info and about.info["details"] == [ABOUT]
    same = [torch.equal(x, y) for name in plain.factors for x, y in zip(plain.factors[name], unlike.factors[name], strict=True)]
    assert all(same)
    assert plain.factors.cosine(about.factors) > 0.8 and plain.factors.cosine(about.factors) < 1 - 1e-6
    assert about.info["gate"]["decision"] != "refuse"
    with pytest.raises(DescriptionError):
        generate_lora(text, details=[""])


def test_pieces_count_half_together():
    """The mean of unit vectors, and all tokens; without pieces the description itself."""
    one, two, three = (Embedding(torch.eye(3)[place], torch.full((2, 3), float(place))) for place in range(3))
    assert with_details(one, []) is one
    both = with_details(one, [two, three])
    assert torch.allclose(both.pooled, torch.tensor([1.0, 0.5**0.5, 0.5**0.5]) / 2**0.5) and both.tokens.shape == (6, 3)


def test_usual_similarity_is_the_median_of_pairs():
    """Of the bank's own descriptions; a generator without two experts has none."""
    conditioner = open_generator().conditioner
    pairs = conditioner.centroids @ conditioner.centroids.T
    upper = pairs[torch.ones_like(pairs).triu(1).bool()]
    assert conditioner.usual_similarity == pytest.approx(upper.median().item())
    assert type(conditioner)((), torch.zeros(0, 4)).usual_similarity == 0.0 == type(conditioner)(("a",), torch.ones(1, 4)).usual_similarity


@pytest.mark.slow
def test_the_command_says_what_was_used(write, tmp_path, capsys):
    """And the adapter's lorag.json holds it."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--file", str(write(SKILL)), "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    assert "described by its front matter: 'write the label" in out and "1 of 2 other pieces are about the same" in out


def test_markdown_is_plain():
    """Front matter apart, comments and open fences hidden, marks taken off."""
    assert split_front("---\na: b\n---\nrest") == ("a: b\n", "rest") and split_front("rest") == (None, "rest")
    assert visible_text("a <!-- b -->\nc\n```\nd").split() == ["a", "c"] and plain_text("**a** [b](c) `d`\ne") == "a b d e"
