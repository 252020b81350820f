"""The report: what is gathered is what was measured, figures can be read by anybody, and the page is safe, whole and the same each time."""

import itertools
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
import torch
from toy_world import HELD_OUT, TRAINING, LookedUp, make_bank, make_suite, prepare_toy, quiet_loop, save_base

from lorag.cli import main as cli
from lorag.errors import MissingDependencyError
from lorag.evaluation.folders import Ladder
from lorag.evaluation.report.chapters import write_chapters
from lorag.evaluation.report.figures import ROLES, draw_ladder, draw_pairs
from lorag.evaluation.report.findings import Absent, Curves, Distances, Findings, MethodScore, Norms, Pairs, Selective, Stage, Tasks
from lorag.evaluation.report.gathering import gather_findings
from lorag.evaluation.report.page import render_page, write_report
from lorag.evaluation.report.style import DARK, LIGHT, drawing, shorten, to_png
from lorag.generator.calibration import Logistic, risk_coverage
from lorag.generator.evidence import FEATURES, Reference
from lorag.generator.gate import Gate
from lorag.methods.baselines import Mean
from lorag.training.train import fit_generator

HOSTILE = "<script>alert(1)</script> \"'&amp; $\\frac{ ${x} {{y}}\n\u202e\x1b[2J" + "long " * 40
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(16)
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


def _risk(values):
    risks = torch.tensor(values, dtype=torch.float64)
    return risk_coverage(-risks, risks)


def _findings(name="house", task="legal-person"):
    """Two tasks' worth of everything."""
    tasks = (task, "other")
    methods = tuple(
        MethodScore(label, role, score, score - 0.1, score + 0.1, score)
        for label, role, score in (
            *(("base", "bound", 0.1), ("mean", "baseline", 0.2), (name, "generator", 0.8)),
            *((f"{name}_shuffled", "control", 0.1), ("oracle", "bound", 0.9)),
        )
    )
    curve = _risk([0.1, 0.2])
    return Findings(
        subject=name,
        facts={"Tasks": f"2 of {task}", "Bank": "3 experts"},
        metric="exact match",
        tasks=2,
        examples=4,
        seeds=1,
        ladder=methods,
        pairs=(Pairs(name, tasks, (0.9, 0.7), (0.1, 0.7), 0.4, 0.0, 0.8),),
        distances=Distances(tasks, (0.2, 0.5), (0.9, 0.7), ((0.2, 0.9, 0.9, 0.9), (0.5, 0.7, 0.7, 0.7))),
        map=Tasks(((0.0, 0.0), (1.0, 0.5), (0.2, 0.9)), tasks, ((0.1, 0.1), (0.6, 0.4)), (0.9, None), 0.4),
        selective=Selective(curve, curve, curve, curve, 2, 1, 0.8, 0.85),
        norms=Norms(("0.q_proj", task), ((1.0, 2.0, 3.0),) * 2, ((1.0, 1.5, 2.0),) * 2, 3, 2, False),
        curves=Curves((Stage(task, (10, 20), (1.0, 0.5), (20,), (0.6,)),)),
    )


@pytest.fixture(scope="module")
def findings():
    return _findings()


@pytest.fixture(scope="module")
def written(tmp_path_factory, findings):
    """A report of them, as written: folder and page."""
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(folder, findings).read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Tags with attributes, text, and whether every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_page_needs_nothing_else(written):
    """Well-formed, no script, no address but its own anchors and pictures inside; a policy that forbids the rest."""
    page = _Reader(written[1])
    names = [tag for tag, _ in page.tags]
    assert names.count("html") == names.count("body") == names.count("main") == names.count("h1") == 1
    assert not {"script", "link", "iframe", "object", "form"} & set(names)
    for _, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "srcset", "href"):
            assert attributes.get(key, "data:").startswith(("data:image/png;base64,", "data:", "#"))
    assert "url(" not in written[1] and "@import" not in written[1]
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)


@pytest.mark.slow
def test_the_page_can_be_used_without_eyes_or_mouse(written):
    """Each picture has its own text; ids are unique and anchors lead to them; what scrolls can be reached and has a name."""
    page = _Reader(written[1])
    texts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(texts) == 7 and len(set(texts)) == 7 and min(map(len, texts)) > 40
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(ids)
    scrolling = [attributes for _, attributes in page.tags if attributes.get("class") in ("scroll", "plate")]
    assert len(scrolling) == 14 and all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolling)
    assert page.tags[0][1]["lang"]


@pytest.mark.slow
def test_light_and_dark_are_both_there(written):
    """Each figure has a picture for dark paper, another than for light; the colours of the page follow the system."""
    page = _Reader(written[1])
    dark = [attributes["srcset"] for tag, attributes in page.tags if tag == "source"]
    light = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(dark) == len(light) == 7 and not set(dark) & set(light)
    assert written[1].count("prefers-color-scheme: dark") == 8


@pytest.mark.slow
def test_each_figure_has_its_picture_and_its_numbers(written, findings):
    """A PNG a chapter beside the page, and a table as long as what is drawn."""
    folder, text = written
    chapters = write_chapters(findings)
    assert {path.name for path in folder.iterdir()} == {"report.html", *(f"{one.name}.png" for one in chapters)}
    assert all((folder / f"{one.name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for one in chapters)
    for one in chapters:
        assert one.rows and all(len(row) == len(one.head) for row in one.rows)
    assert text.count("<tbody>") == len(chapters) and "legal-person" in text


@pytest.mark.slow
def test_a_figure_asks_its_question_and_names_its_axes(written, findings):
    """Its title is the chapter's question, each panel says what is on its axes, and the number of tasks or adapters is in it.

    And a figure is the same, byte for byte, when it is drawn again, whatever the user's own settings of matplotlib are.
    """
    for one in write_chapters(findings):
        with matplotlib.rc_context({"axes.facecolor": "pink", "font.size": 30, "savefig.dpi": 40}):
            with drawing(LIGHT):
                figure = one.draw(LIGHT)
                assert to_png(figure) == (written[0] / f"{one.name}.png").read_bytes()
            assert matplotlib.rcParams["axes.facecolor"] == "pink"
        assert figure.get_suptitle() == one.question and one.question.endswith("?")
        assert all(axes.get_xlabel() for axes in figure.axes)
        first = figure.axes[0]  # panels beside it share its scale
        assert first.get_ylabel() or first.get_yticklabels()[0].get_text()
        texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
        if one.name != "training":
            assert any(re.search(r"n = 2|\b2 (tasks|generated)|\(n = 2\)|\(1\)", text) for text in texts), one.name


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_nothing_is_told_by_colour_alone(theme):
    """Roles differ in shape; every colour stands out from the paper by 3 to 1, text by 7 to 1 (WCAG 1.4.11, 1.4.6)."""
    assert len({mark.marker for mark in ROLES.values()}) == len(ROLES)

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a, b):
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(theme.colour(name), theme.paper) >= 3 for name in ("grey", "blue", "red", "green"))
    assert contrast(theme.ink, theme.paper) >= 7


@pytest.mark.slow
def test_hostile_names_stay_text():
    """Markup, formulas, templates, control characters and great length in names of tasks, methods, stages and modules."""
    found = _findings(name=HOSTILE, task=HOSTILE)
    chapters = write_chapters(found)
    with drawing(DARK):
        pictures = {one.name: (to_png(one.draw(DARK)), PICTURE) for one in chapters}
    text = render_page(HOSTILE, found.facts, chapters, pictures)
    page = _Reader(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "alert(1)" in page.text and "$\\frac{" in page.text
    assert not set("\x1b\u202e") & set(text)


@pytest.mark.slow
def test_the_same_findings_give_the_same_page(findings):
    """No date, no machine, no order of a dictionary's or a set's."""
    pictures = {one.name: (PICTURE, PICTURE) for one in write_chapters(findings)}
    pages = {render_page("Title", made.facts, write_chapters(made), pictures) for made in (findings, _findings())}
    assert len(pages) == 1


@pytest.mark.slow
def test_what_is_missing_is_said(tmp_path, findings):
    """A reason in place of each figure; the picture of an earlier report does not stay behind; other files do."""
    for name in ("training.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    names = ("pairs", "distances", "map", "selective", "norms", "curves")
    text = write_report(tmp_path, replace(findings, **{name: Absent(f"No {name}.") for name in names})).read_text(encoding="utf-8")
    assert all(f"No {name}." in text for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "ladder.png", "notes.txt"}


@pytest.mark.slow
def test_a_failure_leaves_the_report_that_was_there(tmp_path, findings, monkeypatch):
    """What is drawn is drawn before the page is touched."""
    (tmp_path / "report.html").write_text("old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorag.evaluation.report.page.render_page", broken)
    names = ("pairs", "distances", "map", "selective", "norms", "curves")
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, replace(findings, **dict.fromkeys(names, Absent("None."))))
    assert (tmp_path / "report.html").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_without_matplotlib_nothing_long_begins(monkeypatch, tmp_path, capsys):
    """The error names the extra, and comes before a generator is opened."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"lorag\[report\]"):
        write_report(tmp_path, _findings())
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--generator", str(tmp_path / "nothing"), "--report", str(tmp_path / "out")])
    assert "lorag[report]" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_names_are_shortened_in_the_middle():
    """Both ends stay, because names of tasks differ at either."""
    assert shorten("short") == "short"
    assert len(shorten("a" * 50 + "z")) <= 34 and shorten("a" * 50 + "z").endswith("z")


@pytest.mark.slow
def test_all_of_the_ladder_is_drawn():
    """Forty methods: each has its row, and no two labels overlap."""
    methods = tuple(MethodScore(f"method_{i}", "baseline", i / 40, i / 40, i / 40, None) for i in range(40))
    with drawing(LIGHT):
        figure = draw_ladder(LIGHT, "How far?", methods, "accuracy", "n = 1 task")
        to_png(figure)
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 40
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(above[0] >= below[1] - 1 for below, above in itertools.pairwise(tops))


@pytest.mark.slow
def test_panels_do_not_write_over_each_other(findings):
    """Two generators side by side: labels and titles of one end before those of the other begin."""
    (pair,) = findings.pairs
    with drawing(LIGHT):
        figure = draw_pairs(LIGHT, "Does it?", [pair, replace(pair, method="a_method_of_length")], "bits per character", "n = 60 tasks")
        to_png(figure)
        for parts in ([axes.xaxis.label for axes in figure.axes], [axes._left_title for axes in figure.axes]):
            left, right = (part.get_window_extent() for part in parts)
            assert left.x1 < right.x0 and right.x1 < figure.bbox.x1


# --- what is gathered ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ladder(tmp_path_factory, tiny_models, tokenizer):
    """The four held-out tasks of the toy world, with a generator that looks up, and one whose gate trusts what is near."""
    base = save_base(tmp_path_factory.mktemp("base"), tiny_models["llama"], tokenizer)
    bank = make_bank(tmp_path_factory.mktemp("bank"), base, TRAINING)
    oracles = make_bank(tmp_path_factory.mktemp("oracles"), base, HELD_OUT)
    prepared = prepare_toy(bank)
    made = [fit_generator(prepared, method(), quiet_loop(), rank=4, strength=1.0, origin={}) for method in (Mean, LookedUp)]
    made[1].gate = _gate(made[1], prepared.data.codes)
    folder = tmp_path_factory.mktemp("generator")
    rows = [{"stage": "fit", "step": step, "loss": 1 / step, "validation": 2 / step if step == 20 else None} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "fi')
    return Ladder(bank, make_suite(HELD_OUT), oracles, {"mean": [made[0]], "looked_up": [made[1]]}, {"looked_up": folder})


def _gate(generator, codes):
    weights = [1.0 if name == "nearest" else 0.0 for name in FEATURES]
    flat = Logistic((0.0,) * len(FEATURES), (1.0,) * len(FEATURES), (0.0,) * len(FEATURES), -4.0)
    return Gate(
        reference=Reference.of(generator.space, codes), novelty=flat, refuse_above=0.5, gap_closed=replace(flat, weights=tuple(weights)),
        gap_range=(0.0, 1.0), offsets=(-0.1, 0.1), same_above=None, fuse_above=None,
        wordings=torch.zeros(0, dtype=torch.int64), owners=torch.zeros(0, dtype=torch.int32),
    )  # fmt: skip


def _scores(ladder):
    """A ladder's report with scores that were chosen, not measured: gaps of 0, 0.5, 1 and none."""
    names = [task.name for task in ladder.suite]
    values = {
        "base": (0.0, 0.2, 0.0, 0.5),
        "mean": (0.0,) * 4,
        "looked_up": (0.0, 0.6, 1.0, 0.5),
        "looked_up_shuffled": (0.0, 0.7, 0.0, 0.4),
    }
    values["oracle"] = (0.8, 1.0, 0.9, 0.52)
    methods = {
        name: {"score": sum(row) / 4, "ci95": [0.0, 1.0], "gap_closed": 0.5, "per_task": dict(zip(names, row, strict=True))}
        for name, row in values.items()
    }
    differences = {"looked_up - looked_up_shuffled": {"difference": 0.25, "ci95": [-0.1, 0.6]}}
    return {
        "suite": "toy",
        "metric": "exact_match",
        "examples": 6,
        "seeds": 2,
        "tasks": names,
        "methods": methods,
        "differences": differences,
    }


@pytest.fixture(scope="module")
def gathered(ladder):
    return gather_findings(ladder, _scores(ladder))


@pytest.mark.slow
def test_gains_are_shares_of_the_gap(gathered, ladder):
    """(score - base) / (oracle - base), at most 1; a task whose oracle hardly beats the base has none."""
    names = [task.name for task in ladder.suite]
    assert gathered.subject == "looked_up"
    assert dict(zip(gathered.map.names, gathered.map.gap_closed, strict=True)) == pytest.approx(
        dict(zip(names, (0.0, 0.5, 1.0, None), strict=True))
    )
    assert dict(zip(gathered.distances.names, gathered.distances.gap_closed, strict=True)) == pytest.approx(
        dict(zip(names[:3], (0.0, 0.5, 1.0), strict=True))
    )


def test_distance_is_that_of_the_descriptions_shown(gathered, ladder):
    """Mean over seeds of 1 - the best cosine, in rising order."""
    made = ladder.generators["looked_up"][0]
    tasks = {task.name: task for task in ladder.suite}
    for name, distance in zip(gathered.distances.names, gathered.distances.distance, strict=True):
        shown = [made.condition(text).distance for text in tasks[name].descriptions[:2]]
        assert distance == pytest.approx(sum(shown) / 2)
    assert list(gathered.distances.distance) == sorted(gathered.distances.distance)


def test_methods_know_their_roles(gathered):
    """Bounds, baselines, generators and controls."""
    roles = {method.name: method.role for method in gathered.ladder}
    assert roles == {"base": "bound", "mean": "baseline", "looked_up": "generator", "looked_up_shuffled": "control", "oracle": "bound"}


def test_pairs_are_of_the_same_tasks(gathered):
    """Matched and shuffled scores in one order, with the ladder's own interval; and the page does not claim what is not shown."""
    (pair,) = gathered.pairs
    assert (pair.matched, pair.shuffled) == ((0.0, 0.6, 1.0, 0.5), (0.0, 0.7, 0.0, 0.4))
    assert (pair.difference, pair.low, pair.high) == (0.25, -0.1, 0.6)
    assert "not shown to matter" in next(one for one in write_chapters(gathered) if one.name == "description").answer


def test_norms_are_those_of_the_adapters(gathered, ladder):
    """The median expert's norm of each module, and a generated adapter's."""
    norms = [ladder.bank.adapter(name).norms() for name in ladder.bank.names]
    assert gathered.norms.experts == len(ladder.bank) and gathered.norms.adapters == 4
    for row, module in enumerate(ladder.bank.base.layout.names):
        assert module.endswith(gathered.norms.modules[row])
        own = torch.tensor([one[module] for one in norms], dtype=torch.float64)
        assert gathered.norms.real[row][1] == pytest.approx(own.quantile(0.5).item())
        low, middle, high = gathered.norms.generated[row]
        assert 0 < low <= middle <= high


def test_the_gate_is_measured_on_what_came_out(gathered):
    """Risk is 1 - gain of the tasks that have one; unknown descriptions are lost; the best order is no worse than the gate's."""
    found = gathered.selective
    assert found.tasks == 3 and found.realised == pytest.approx(0.5) and found.held_out.risk[-1] == pytest.approx(0.5)
    assert found.with_unknown.risk[-1] == pytest.approx((1.5 + found.unknown) / (3 + found.unknown))
    assert found.held_out_best.area <= found.held_out.area and found.with_unknown_best.area <= found.with_unknown.area


def test_each_description_is_read_once(ladder, monkeypatch):
    """Distances, map, gate and norms go by one evidence: no description is embedded again for the next figure."""
    generator, asked = ladder.generators["looked_up"][0], []
    embed = type(generator.embedder).embed
    monkeypatch.setattr(
        type(generator.embedder), "embed", lambda self, texts, **more: asked.append(list(texts)) or embed(self, texts, **more)
    )
    gather_findings(ladder, _scores(ladder))
    alone = [texts[0] for texts in asked if len(texts) == 1]
    assert len(alone) == len(set(alone)) and {task.descriptions[0] for task in ladder.suite} <= set(alone)


def test_curves_are_read_from_the_generator_s_folder(gathered):
    """Steps and losses; what a kill left of the last line is passed over."""
    assert gathered.curves == Curves((Stage("fit", (10, 20), (0.1, 0.05), (20,), (0.1,)),))


@pytest.mark.slow
def test_without_oracles_gate_and_metrics_the_rest_is_shown(ladder, tmp_path):
    """No gains, no gate, metrics of a stranger: each says why it is left out, and nothing else is lost."""
    report = _scores(ladder)
    report["methods"] = {name: row | {"gap_closed": None} for name, row in report["methods"].items() if name != "oracle"}
    (tmp_path / "metrics.jsonl").write_text('{"stage": 3, "step": "x"}\n')
    bare = replace(ladder.generators["looked_up"][0], gate=None)
    found = gather_findings(replace(ladder, oracles=None, generators={"looked_up": [bare]}, folders={"looked_up": tmp_path}), report)
    assert isinstance(found.distances, Absent) and "--oracles" in found.distances.reason
    assert isinstance(found.selective, Absent) and "lorag gate fit" in found.selective.reason
    assert isinstance(found.curves, Absent) and str(tmp_path) not in found.curves.reason
    assert isinstance(found.norms, Norms) and set(found.map.gap_closed) == {None}
    drawn = {one.name: one.draw for one in write_chapters(found) if one.draw is not None}
    assert set(drawn) == {"ladder", "description", "map", "norms"}
    with drawing(DARK):
        assert to_png(drawn["map"](DARK))


def test_a_page_names_no_path_of_the_machine(gathered, ladder):
    """Neither the base model's folder nor the generator's is anybody's business."""
    chapters = write_chapters(gathered)
    text = render_page("Title", gathered.facts, chapters, {one.name: (PICTURE, PICTURE) for one in chapters})
    assert str(ladder.folders["looked_up"]) not in text and ladder.bank.base.model.name not in text
