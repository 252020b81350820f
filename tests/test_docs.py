"""The pages: commands parse, settings exist, code compiles, links lead somewhere, nothing is fetched from elsewhere."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from conftest import WORDS  # noqa: F401 - the conftest sets the offline environment

import lorag
from lorag.bank.build import BankConfig
from lorag.cli.main import app
from lorag.config import load_config, read_settings
from lorag.methods import method_type
from lorag.training.train import TrainConfig
from lorag.worlds.sandbox.build import SandboxConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND_LINE = typer.main.get_command(app)
# Settings of these commands are fields of a dataclass; of a recipe, they take the part of the command's name.
SCHEMAS = {("train",): TrainConfig, ("bank", "build"): BankConfig, ("sandbox", "build"): SandboxConfig}


def _commands(page):
    """Lines of fenced blocks that start with lorag, a line that ends with a backslash together with the next."""
    found = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("python", "json", "yaml"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("lorag "):
                found.append([word for word in shlex.split(line, comments=True)[1:] if word != "…"])
    return found


def _parse(words):
    """Runs the parser alone, as the command line does, and returns the command's path and its values."""
    command, name, parent, path = COMMAND_LINE, "lorag", None, ()
    while True:
        context = command.make_context(name, list(words), parent=parent)
        if not hasattr(command, "commands"):
            return path, context.params
        words = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, words)
        parent, path = context, (*path, name)


COMMANDS = [pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}") for page in PAGES for words in _commands(page)]


def test_there_are_commands():
    """The search finds what the pages show; a page on banks, one on training and the README among them."""
    with_commands = {page.name for page in PAGES if _commands(page)}
    assert {"README.md", "own-bank.md", "evaluation.md", "importing.md", "results.md"} <= with_commands
    assert len(COMMANDS) > 40


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_pages_parses(words):
    """Command, options and arguments are those of the command line, and settings are those of its dataclass and its method."""
    path, values = _parse(words)
    if path not in SCHEMAS:
        return
    settings = values["settings"] or []
    config = load_config(SCHEMAS[path], values.get("config"), settings, path[-1])
    if path == ("train",):
        method = "aligned" if config.start else config.method  # whatever goes on has the method of what it goes on from
        method_type(method).with_settings(config.settings)


def test_a_wrong_command_is_found_out():
    """A misspelt command, option or setting does not pass for a right one."""
    for words in (["generat", "x", "--out", "y"], ["generate", "x", "--outt", "y"], ["generate", "x"], ["bank", "add", "x"]):
        with pytest.raises(Exception, match="(?i)no such|missing|requires"):
            _parse(words)
    path, values = _parse(["train", "methode=ridge"])
    with pytest.raises(lorag.LoragError):
        load_config(SCHEMAS[path], None, values["settings"])
    assert read_settings(["a.b=1"]) == {"a": {"b": 1}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_running_text_exist(page):
    """`lorag …` in a sentence names a command that there is, and only options that it has."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.S)
    for span in re.findall(r"`lorag ([^`\n]+)`", text):
        words = shlex.split(span.replace("…", " "))
        command, rest = COMMAND_LINE, words
        known = {"--help"} | {option for parameter in command.params for option in parameter.opts}
        while hasattr(command, "commands") and rest:
            if rest[0].startswith("-"):  # an option of lorag itself, with its value
                assert rest[0] in known, span
                rest = rest[2:]
                continue
            assert rest[0] in command.commands, f"{page.name}: lorag {span}"
            command, rest = command.commands[rest[0]], rest[1:]
            known |= {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, f"{page.name}: lorag {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_the_pages_is_python(page):
    """Every block compiles, and what it imports from lorag is there."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "lorag":
                module = __import__(node.module, fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    """Every relative link and picture is a file; those of docs/ stay inside, since the site has nothing else."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        assert not page.is_relative_to(DOCS) or file.is_relative_to(DOCS), f"{page.name} links to {target}, which is not a page of the site"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_the_pages_name_exist(page):
    """`lorag/…`, `tests/…` and `benchmarks/…` in a sentence are files or folders; the changelog and the history tell of what was."""
    if page.name in ("CHANGELOG.md", "results-history.md"):
        return
    for path in re.findall(r"`((?:lorag|tests|benchmarks)/[\w./]*)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"


def _anchors(file):
    """Headings as addresses: lower case, no punctuation, dashes for blanks."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", line).strip().lower()) for line in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"^```console\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.S | re.M))
def test_the_quick_start_shows_what_a_command_prints(block, lorag, tmp_path, monkeypatch):
    """Word for word; figures within a hundredth, since processors round differently. The page may end with an ellipsis."""
    monkeypatch.chdir(tmp_path)
    command, *lines = block.splitlines()
    printed = "\n".join(map(str, lorag(*shlex.split(command.removeprefix("$ lorag ")))))
    figure = re.compile(r"\d+(?:\.\d+)?")
    shown = {figure.sub("#", line): line for line in printed.splitlines()}
    assert len(lines) > 1
    for line in lines:
        if line == "…":
            continue
        assert figure.sub("#", line) in shown, f"{line}\n{printed}"
        figures = [float(number) for number in figure.findall(shown[figure.sub("#", line)])]
        assert [float(number) for number in figure.findall(line)] == pytest.approx(figures, rel=0.01, abs=0.011)


def test_every_page_is_in_the_site_and_nothing_is_fetched():
    """The navigation lists exactly the pages of docs/, and the theme takes fonts and scripts from nowhere else."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(part):
        children = part.values() if isinstance(part, dict) else part
        return [part] if isinstance(part, str) else [page for child in children for page in pages(child)]

    listed = pages(config["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    assert config["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "hooks"} & set(config)
    for picture in DOCS.glob("*.svg"):
        assert not re.search(r"<script|href=|url\((?!#)|@import", picture.read_text(encoding="utf-8"))


def _figures(page):
    """Scores and shares in the text of a page, by their value: .902 is 0.902, and 95.7 % is itself. Code is left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    scores = re.findall(r"(?<![\w.])0?(\.\d{2,3})(?![\w.]*\d)", text)
    return set(scores) | {f"{share} %" for share in re.findall(r"(?<![\w.])(\d[\d.]*) ?%", text)}


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/smollm2.md", "docs/faq.md", "docs/concepts.md"])
def test_figures_have_one_source(name):
    """What README, quick start, concepts and questions state was measured and stands in docs/results.md."""
    assert _figures(ROOT / name) <= _figures(DOCS / "results.md")


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").glob("*.md")), ids=lambda page: page.stem)
def test_figures_of_decisions_were_measured(page):
    """They stand in the results of today or in their history."""
    assert _figures(page) <= _figures(DOCS / "results.md") | _figures(DOCS / "results-history.md")


def _ladder(page):
    """Rows of the first table with a score, its interval and the gap closed: method -> the three."""
    table = re.search(r"^\| method \| exact match .*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M).group(1)
    rows = [[cell.strip().replace("*", "") for cell in line.strip("| \n").split("|")] for line in table.splitlines()]
    return {re.split(r",| \(", method)[0]: values for method, *values in rows}


def test_the_ladder_on_the_readme_is_that_of_the_results():
    """Row by row; and what the README leaves out is not what would make it look worse."""
    readme, results = _ladder(ROOT / "README.md"), _ladder(DOCS / "results.md")
    assert len(readme) > 10 and readme == {method: results[method][:3] for method in readme}
    assert {"base", "mean", "multitask", "nearest", "top_k", "house_shuffled", "house_junk", "oracle"} <= set(readme)


def _first_score(cell):
    """The first number of a cell, None if it has none."""
    score = re.search(r"\d*\.?\d+", cell)
    return float(score.group(0)) if score else None


def _language_model(page):
    """First scores of the table on SmolLM2's held-out tasks, row by row."""
    table = re.search(r"^\| held-out tasks \|.*\n\|[-|]+\n((?:\|.*\n?)+)", page.read_text(encoding="utf-8"), re.M).group(1)
    return [[_first_score(cell) for cell in line.split("|")[2:-1]] for line in table.splitlines()]


def test_the_language_model_s_scores_are_those_of_the_results():
    """Cell by cell: a column on README and docs/smollm2.md is a row of the first table of docs/results.md."""
    text = (DOCS / "results.md").read_text(encoding="utf-8").split("## The embedded world")[0]
    results = {row: line.split("|")[2:] for line in text.splitlines() for row in re.findall(r"^\| \**(\w+)[*,: ]", line)}
    rows = ("aligned", "aligned_shuffled", "base_prompted", "multitask_prompted", "few_shot", "oracle")
    expected = [[_first_score(results[row][column]) for row in rows] for column in (0, 2, 3)]
    assert _language_model(ROOT / "README.md") == _language_model(DOCS / "smollm2.md") == expected


def test_the_changelog_has_the_version():
    """Its newest entry is the package's version, and 0.1.0 is where it begins."""
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == lorag.__version__ and versions[-1] == "0.1.0"
    assert versions == sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def test_the_hooks_are_the_linters_of_ci():
    """What .ci/run asks of the code, .pre-commit-config.yaml asks before a commit."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    asked = [hook["entry"].replace(" --force-exclude", "") for hook in hooks]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").split('echo "== linters"')[1].split("echo")[0]
    lines = [line.removesuffix(" .") for line in script.splitlines() if re.match(r"ruff|mypy", line)]
    assert asked == lines


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    """No broken link, anchor or name in the API reference; no page loads anything from another host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for page in (tmp_path / "site").rglob("*.html"):
        elsewhere = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', page.read_text(encoding="utf-8"))
        assert not elsewhere, page
    reference = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for name in ("LoraGenerator.generate", "AdapterBank.add", "LoraAdapter.apply_to", "UnknownTaskError", "Objective.losses"):
        assert f".{name}" in reference, name


def test_examples_are_on_the_page_about_them():
    """docs/examples.md lists each script of examples/, and no other."""
    named = set(re.findall(r"python examples/(\w+\.py)", (DOCS / "examples.md").read_text(encoding="utf-8")))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_the_language_model_s_rows_are_what_ships():
    """Score and interval of each row and split of data/smollm2/ladder.json stand in that row of docs/results.md."""
    stored = json.loads((ROOT / "data/smollm2/ladder.json").read_text(encoding="utf-8"))["splits"]
    text = (DOCS / "results.md").read_text(encoding="utf-8").split("## The embedded world")[0]
    lines = {row: line for line in text.splitlines() for row in re.findall(r"^\| \**(\w+)\**(?:,|:| \|)", line)}

    def shown(value):
        return f"{value:.3f}".removeprefix("0")

    assert set(stored) == {"unseen_label", "unseen_format", "unseen_task"}
    for split, report in stored.items():
        for row in ("few_shot", "aligned_shuffled", "aligned", "oracle"):
            found, line = report["methods"][row], lines[row].replace("*", "")
            assert f"{shown(found['score'])} ({shown(found['ci95'][0])} to {shown(found['ci95'][1])})" in line, f"{row}, {split}"
        assert report["methods"]["base"]["score"] == report["methods"]["base_prompted"]["score"] == 0
