"""The page without a browser: requests, answers, drawings, zips, and who is let in."""

import asyncio
import json
import sys
import threading
import zipfile
from contextlib import contextmanager
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from web_world import TEXTS, Picky, encoder_generator, toy_generators

import lorag.cli.web as web_command
import lorag.generator.lora_generator as generator_module
import lorag.web.serving as serving_module
from lorag.bank.bank import AdapterBank, find_bank
from lorag.base.objectives import make_objective
from lorag.cli import main as cli
from lorag.errors import BankError, ConfigError, DescriptionError, MissingDependencyError, TaskError, UnknownTaskError
from lorag.generator.gate import Verdict
from lorag.text.task_map import TaskMap
from lorag.web import drawings
from lorag.web.downloads import Downloads
from lorag.web.requests import MOST_INPUT, MOST_INPUTS, Preview, Request
from lorag.web.serving import RequestFilter, serving
from lorag.web.session import Session

TEXT = "paint the red dog"


@pytest.fixture(scope="module")
def generators(tmp_path_factory, tiny_models, tokenizer):
    return toy_generators(tmp_path_factory.mktemp("toys"), tiny_models["llama"], tokenizer)


@pytest.fixture
def bench(generators):
    return Session(generators)


def _equal(one, other):
    return all(
        torch.equal(a, b)
        for pair, twin in zip(one.factors.values(), other.factors.values(), strict=True)
        for a, b in zip(pair, twin, strict=True)
    )


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ()}, "no generator is chosen"),
        ({"seed": -1}, "seed cannot be used"),
        ({"seed": None}, "seed cannot be used"),
        ({"seed": 1.5}, "seed cannot be used"),
        ({"samples": 0}, "samples cannot be used"),
        ({"samples": 5}, "samples cannot be used"),
        ({"strength": float("nan")}, "strength cannot be used"),
        ({"strength": 11}, "strength cannot be used"),
        ({"strength": True}, "strength cannot be used"),
    ],
)
def test_a_request_that_cannot_be_carried_out_names_its_field(change, words):
    """Out of range, of the wrong type or missing: ConfigError, whatever a browser sends."""
    with pytest.raises(ConfigError, match=words):
        Request(**{"description": TEXT, "methods": ("ridge",)} | change)


@pytest.mark.parametrize("text", ["", "   ", "x" * 4097, "a\x00b", None])
def test_a_request_needs_a_description(text):
    """Empty, too long, not text: DescriptionError before anything is computed."""
    with pytest.raises(DescriptionError):
        Request(text, ("ridge",))


# --- the session ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_gives_what_generate_gives(bench, generators):
    """Each adapter is the generator's own for that seed and strength, byte for byte, and a second request gives it again."""
    request = Request(TEXT, ("ridge", "sg_lora"), seed=3, strength=1.5, samples=2)
    made = bench.make(request)
    assert [(one.method, one.seed) for one in made] == [("ridge", 3), ("ridge", 4), ("sg_lora", 3), ("sg_lora", 4)]
    assert len({one.label for one in made}) == 4
    for one, again in zip(made, bench.make(request), strict=True):
        right = generators[one.method].generate(TEXT, seed=one.seed, strength=1.5)
        assert _equal(one.adapter, right) and _equal(again.adapter, right) and one.adapter.info == right.info


def test_a_method_that_does_not_sample_says_so(bench):
    """ridge's second sample is marked as the first; sg_lora's samples differ."""
    ridge = bench.make(Request(TEXT, ("ridge",), samples=3))
    assert [one.repeats for one in ridge] == [None, ridge[0].label, ridge[0].label]
    assert [one.repeats for one in bench.make(Request(TEXT, ("sg_lora",), samples=3))] == [None, None, None]


def test_progress_names_each_adapter_and_never_falls(bench):
    """Shares from 0 rise below 1, one for each adapter."""
    heard = []
    bench.make(Request(TEXT, ("ridge", "sg_lora"), samples=2), lambda share, text: heard.append((share, text)))
    assert [share for share, _ in heard] == [0, 0.25, 0.5, 0.75] and len({text for _, text in heard}) == 4


def test_a_refused_description_is_refused_unless_told_otherwise(bench):
    """UnknownTaskError; `anyway` generates it with the verdict in its provenance; what a refusal says is there without an adapter."""
    text = "drive the robot arm"
    with pytest.raises(UnknownTaskError, match="no task of the bank is like"):
        bench.make(Request(text, ("ridge",)))
    with pytest.warns(UserWarning, match="no task of the bank"):
        (one,) = bench.make(Request(text, ("ridge",), anyway=True))
    assert one.adapter.info["gate"]["decision"] == "refuse" == bench.preview(text, "ridge").verdict["decision"]
    assert len(bench.preview(text, "ridge").neighbours) >= 3


def test_a_training_task_lies_on_the_map_next_to_itself(bench):
    """The nearest expert of an expert's description is that expert, and the map's nearest dot too."""
    preview = bench.preview("paint the red cat", "ridge")
    place = torch.tensor(preview.place)
    nearest = (preview.tasks.points - place).norm(dim=1).argmin()
    assert preview.neighbours[0][0] == "red-cat" == preview.tasks.names[nearest]


@pytest.mark.slow
def test_answers_are_those_of_the_base_and_of_peft(bench, generators, tmp_path):
    """Column `base` is the bare base model's, the others what PEFT's loaded adapter writes; they are not all alike."""
    base = generators["ridge"].base
    made = bench.make(Request(TEXT, ("ridge", "sg_lora"), strength=3.0))
    found = bench.answers(made, [*TEXTS, "  "])
    assert found.inputs == tuple(TEXTS) and [label for label, _ in found.columns] == ["base", *(one.label for one in made)]
    objective = make_objective(base.objective, base.model.tokenizer(), base.settings)
    with torch.inference_mode():
        assert list(found.columns[0][1]) == objective.generate(base.model.load("cpu"), TEXTS)
        for one, (_, answers) in zip(made, found.columns[1:], strict=True):
            folder = one.adapter.save_pretrained(tmp_path / one.method)
            assert list(answers) == objective.generate(PeftModel.from_pretrained(base.model.load("cpu"), folder).eval(), TEXTS)
    assert found.columns[0][1] != found.columns[1][1]


@pytest.mark.slow
def test_two_users_at_once_do_not_meet(bench):
    """Generating and answering in threads gives each what it gets alone: no adapter leaks into another's run."""
    requests = [Request(f"paint the {colour} dog", ("ridge",), strength=3.0) for colour in ("red", "blue")]
    alone = [bench.answers(bench.make(request), TEXTS[:1]).columns for request in requests]
    found = [None] * len(requests)

    def use(place):
        found[place] = [bench.answers(bench.make(requests[place]), TEXTS[:1]).columns for _ in range(2)]

    threads = [threading.Thread(target=use, args=(place,)) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[columns] * 2 for columns in alone] and alone[0] != alone[1]


@pytest.mark.parametrize("texts", [[], ["  "], ["a"] * (MOST_INPUTS + 1), ["x" * (MOST_INPUT + 1)]])
def test_inputs_are_limited(bench, texts):
    """None, too many, too long: TaskError before the base model runs."""
    with pytest.raises(TaskError, match="example inputs cannot be used"):
        bench.answers(bench.make(Request(TEXT, ("ridge",))), texts)


def test_a_sentence_encoder_chooses_among_candidates(tmp_path, tiny_models, tokenizer):
    """Its answer is the candidate with the highest cosine; without two candidates it says what is missing."""
    made = encoder_generator(tmp_path, tiny_models["bert"], tokenizer)
    bench = Session({"ridge": made})
    request = bench.make(Request("paint the red cat", ("ridge",)))
    found = bench.answers(request, TEXTS, ["red cat", "late home"])
    vectors = torch.nn.functional.normalize(made.runner().hidden([*TEXTS, "red cat", "late home"]), dim=-1)
    best = (vectors[:3] @ vectors[3:].T).argmax(1).tolist()
    assert [answer.rsplit(" (", 1)[0] for answer in found.columns[0][1]] == [("red cat", "late home")[i] for i in best]
    assert not bench.writes
    with pytest.raises(TaskError, match="candidates cannot be used"):
        bench.answers(request, TEXTS, ["red cat"])


def test_generators_of_different_bases_are_not_mixed(generators, tmp_path, tiny_models, tokenizer):
    """ConfigError names the generator: their adapters could not be compared on one base model."""
    other = encoder_generator(tmp_path, tiny_models["bert"], tokenizer)
    with pytest.raises(ConfigError, match="generator other is for another base model"):
        Session({"ridge": generators["ridge"], "other": other})


@pytest.mark.slow
def test_with_the_bank_a_known_task_gets_its_own_expert(tmp_path, tiny_models, tokenizer):
    """What is served says so, the Python names the bank, and a bank that the generators did not learn from is refused."""
    made = toy_generators(tmp_path, tiny_models["llama"], tokenizer)["ridge"]
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    known = bank.names[0]
    verdict = Verdict("expert", "known", 0.0, 1.0, (1.0, 1.0), (), known)
    made.gate = SimpleNamespace(reference=None, needed=(), decide=lambda evidence: verdict)
    bench = Session({"ridge": made}, bank=tmp_path / "bank")
    request = Request("paint it", ("ridge",))
    (one,) = bench.make(request)
    assert one.adapter.info["gate"]["served"] == "expert" and all(
        torch.allclose(one.adapter.delta(name), bank.adapter(known).delta(name)) for name in made.base.layout.names
    )
    assert f"bank={str(tmp_path / 'bank')!r}" in bench.python(request, one)
    bank.remove([known])
    with pytest.raises(BankError, match="not the one that the generator learned from"):
        Session({"ridge": made}, bank=tmp_path / "bank")


@pytest.mark.slow
def test_the_command_takes_a_bank_by_name(monkeypatch, capsys):
    """`lorag web --bank sandbox`: the bank that comes with the package; the page's Python names it so too."""
    opened = []

    @contextmanager
    def stand_in(session, *, port, inputs):
        opened.append(session)
        yield "http://127.0.0.1:7860"

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(serving_module, "serving", stand_in)
    monkeypatch.setattr(web_command, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupted)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["web", "--bank", "sandbox"])
    assert stopped.value.code == 0 and "closed" in capsys.readouterr().out
    (session,), bank = opened, find_bank("sandbox")
    known, (label,) = bank.experts[0], session.generators
    request = Request(known.descriptions[0], (label,))
    (one,) = session.make(request)
    assert session.bank.names == bank.names and one.adapter.info["gate"]["served"] == "expert"
    assert "bank='sandbox'" in session.python(request, one)


def test_a_base_model_of_images_is_refused(generators):
    """ConfigError before anything is loaded: the page has no place for images."""
    seeing = SimpleNamespace(base=SimpleNamespace(model=SimpleNamespace(kind="two_towers", name="clip"), objective="image_text"))
    with pytest.raises(ConfigError, match="base models of text.*clip, two_towers"):
        Session({"ridge": seeing})


def test_three_lines_of_python_make_the_same_adapter(generators, tmp_path, monkeypatch):
    """What is copied from the page runs, with any quotes in the description, and writes the same bytes."""
    folder = tmp_path / "it's"
    folder.mkdir()
    bench = Session({"ridge": generators["ridge"]}, {"ridge": str(folder)})
    request = Request('paint the "red" dog\nit\'s \\good', ("ridge",), seed=2, strength=1.25)
    (one,) = bench.make(request)
    lines = bench.python(request, one)
    assert len(lines.splitlines()) == 3
    opened = []
    monkeypatch.setattr(generator_module.LoraGenerator, "from_pretrained", lambda path, **_: opened.append(path) or generators["ridge"])
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "copied", "exec"), {})  # noqa: S102 - what a user does with it
    assert opened == [folder]
    written, right = load_file(tmp_path / "adapter/adapter_model.safetensors"), one.adapter.state_dict()
    assert written.keys() == right.keys() and all(torch.equal(written[key], right[key]) for key in right)


def test_labels_of_generators_differ(generators, monkeypatch):
    """Two of one method are told apart by their folders, even if the folders have one name."""
    monkeypatch.setattr(generator_module.LoraGenerator, "from_pretrained", lambda path, device: generators["ridge"])
    bench = Session.from_folders(["a/x", "b/x", "c/x", "a/x"])
    assert list(bench.generators) == ["ridge", "ridge (x)", "ridge (c/x)"] and set(bench.sources.values()) == {"a/x", "b/x", "c/x"}


# --- what is handed out -----------------------------------------------------------------------------------------------


def test_a_zip_is_a_peft_folder_and_nothing_more(bench, generators, tmp_path):
    """Safetensors, JSON and Markdown in one folder, loadable by PEFT, the same bytes each time, and no other file is left."""
    (one,) = bench.make(Request(TEXT, ("ridge",)))
    (tmp_path / "out").mkdir()
    downloads = Downloads(tmp_path / "out")
    packed, again = downloads.pack(one.adapter, "../../etc/passwd"), downloads.pack(one.adapter, "../../etc/passwd")
    assert packed.read_bytes() == again.read_bytes() and packed.parent != again.parent and packed.name == again.name
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "in")
    (top,) = {name.split("/")[0] for name in names}
    assert ".." not in top and {name.split("/", 1)[1] for name in names} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorag.json",
        "README.md",
    }
    assert json.loads((tmp_path / "in" / top / "lorag.json").read_text())["description"] == TEXT
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == {packed, again}
    loaded = PeftModel.from_pretrained(generators["ridge"].base.model.load("cpu"), tmp_path / "in" / top)
    stored = {key: value for key, value in loaded.state_dict().items() if ".lora_" in key}
    assert len(stored) == len(one.adapter.state_dict())


def test_old_zips_are_forgotten(bench, tmp_path):
    """Of five only the newest two are kept."""
    (one,) = bench.make(Request(TEXT, ("ridge",)))
    downloads = Downloads(tmp_path, most=2)
    packed = [downloads.pack(one.adapter, TEXT) for _ in range(5)]
    assert [path.exists() for path in packed] == [False, False, False, True, True] and len(list(tmp_path.iterdir())) == 2


# --- drawings ---------------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Tags and attributes of a drawing, and its text."""

    def __init__(self, drawing):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(drawing)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


HOSTILE = "<script>x</script><img src=x onerror=y> \"' ${1+1} {{value}} `x`"


def _preview(names, neighbours=None):
    rng = torch.Generator().manual_seed(0)
    tasks = TaskMap.fit(names, torch.randn(len(names), 4, generator=rng))
    return Preview(neighbours or tuple((name, 0.5) for name in names[:3]), (9.0, -9.0), tasks, {})


def test_nothing_from_outside_becomes_markup(bench):
    """Names of experts, descriptions, inputs, answers, labels and reasons: shown as they are, neither tags nor templates."""
    made = bench.make(Request(TEXT, ("ridge",)))
    gate = {
        "served": None,
        "decision": HOSTILE,
        "reason": HOSTILE,
        "novelty": 0.5,
        "expected_gap_closed": 0.5,
        "expected_gap_closed_interval": [0.1, 0.9],
    }
    answers = SimpleNamespace(inputs=(HOSTILE,), columns=((HOSTILE, (HOSTILE,)),))
    request = SimpleNamespace(description=HOSTILE)
    for drawing in (
        drawings.draw_message(HOSTILE),
        drawings.draw_neighbours(_preview([HOSTILE, "b", "c"])),
        drawings.draw_map(_preview([HOSTILE[:40], "b", "c"])),
        drawings.draw_verdict(gate, 0.5),
        drawings.draw_results(made, request),
        drawings.draw_answers(answers),
    ):
        found = _Tags(drawing)
        assert not found.tags & {"script", "img", "iframe", "a", "style", "link"} and not {
            name for name in found.attributes if name.startswith("on")
        }
        assert "${" not in drawing and "{{" not in drawing and "`" not in drawing
        assert HOSTILE[:40] in found.text


def test_a_large_map_is_thinned_and_says_so():
    """Of 5,000 tasks at most 2,000 dots and the nearest experts are drawn, all inside the picture."""
    names = [f"task-{i}" for i in range(5000)]
    drawing = drawings.draw_map(_preview(names, (("task-1", 0.9), ("task-4999", 0.8))))
    assert drawing.count("<circle") <= 2002 and "of 5000 tasks" in drawing
    assert drawing.count("lorag-near") == 2 and ">task-1<" in drawing and ">task-4999<" in drawing
    places = [float(part.split('"')[1]) for part in drawing.split("<circle ")[1:] for part in (part.split(" r=")[0].split(" ")[0],)]
    assert all(0 <= x <= 480 for x in places)


def test_bars_are_as_long_as_the_cosines():
    """Widths in per cent, cut at 0 and 100, with the number beside them."""
    drawing = drawings.draw_neighbours(_preview(["a", "b", "c"], (("a", 0.834), ("b", -0.2), ("c", 1.0))))
    assert (
        [f"width:{width}%" in drawing for width in ("83.4", "0.0", "100.0")] == [True] * 3 and ">0.83<" in drawing and ">-0.20<" in drawing
    )


def test_a_generator_without_a_gate_promises_nothing():
    """Novelty and gain that were not estimated are called so, and the plain distance stands in."""
    gate = {
        "decision": "generate",
        "reason": "no gate was fitted",
        "novelty": None,
        "expected_gap_closed": None,
        "expected_gap_closed_interval": None,
    }
    text = _Tags(drawings.draw_verdict(gate, 0.8)).text
    assert text.count("not estimated") == 2 and "0.20" in text and "no gate was fitted" in text


# --- the door ---------------------------------------------------------------------------------------------------------


def _ask(folder, method="GET", path="/", **headers):
    """Status that the door gives, and its headers; 200 if it lets the request in."""
    sent = []

    async def inside(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in ({"host": "127.0.0.1:7860"} | headers).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": named}
    asyncio.run(RequestFilter(inside, folder)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_door_opens_for_the_page(tmp_path):
    """What the page asks for is let in, with a policy that forbids foreign scripts, fonts and frames."""
    assert _ask(tmp_path)[0] == _ask(tmp_path, "HEAD")[0] == 200
    for path in ("/assets/index.js", "/config", "/theme.css", "/gradio_api/queue/data", f"/gradio_api/file={tmp_path}/a/b.zip"):
        assert _ask(tmp_path, path=path)[0] == 200, path
    status, headers = _ask(tmp_path, "POST", "/gradio_api/queue/join", content_length="100", origin="http://127.0.0.1:7860")
    assert (
        status == 200 and b"default-src 'self'" in headers[b"content-security-policy"] and headers[b"x-content-type-options"] == b"nosniff"
    )


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/gradio_api/upload", {"content_length": "9"}, 404),
        ("POST", "/gradio_api/run/predict", {"content_length": "9"}, 404),
        ("POST", "/gradio_api/vibe-edit/", {"content_length": "9"}, 404),
        ("GET", "/gradio_api/info", {}, 404),
        ("GET", "/gradio_api/proxy=http://example.com", {}, 404),
        ("GET", "/monitoring", {}, 404),
        ("GET", "/gradio_api/file=/etc/passwd", {}, 404),
        ("GET", "/gradio_api/file=http://example.com/x", {}, 404),
        ("GET", "/gradio_api/file=FOLDER/../secret", {}, 404),
        ("GET", "/gradio_api/file=FOLDER/link", {}, 404),
        ("POST", "/gradio_api/queue/join", {"content_length": "9000000"}, 413),
        ("POST", "/gradio_api/queue/join", {}, 413),
        ("POST", "/gradio_api/queue/join", {"content_length": "9", "origin": "https://evil.example"}, 403),
        ("POST", "/gradio_api/queue/join", {"content_length": "9", "origin": "null"}, 403),
        ("GET", "/", {"host": "evil.example"}, 421),
        ("GET", "/", {"host": "127.0.0.1.evil.example:7860"}, 421),
        ("PUT", "/", {}, 405),
    ],
)
def test_the_door_is_shut_to_all_else(tmp_path, method, path, headers, status):
    """Uploads, proxying, other interfaces, files outside, links, foreign pages, rebound names, huge bodies."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/link").symlink_to("/etc/passwd")
    assert _ask(tmp_path / "own", method, path.replace("FOLDER", str(tmp_path / "own")), **headers)[0] == status


def test_without_gradio_the_command_says_what_to_install(bench, monkeypatch, capsys):
    """MissingDependencyError, on the command line one line and exit code 1."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match=r"lorag\[web\]"), serving(bench):
        pass
    monkeypatch.setattr(Session, "from_folders", lambda names, **settings: bench)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["web"])
    assert stopped.value.code == 1 and capsys.readouterr().err.startswith("lorag: the page needs gradio")


def test_the_toy_gate_is_asked(generators):
    """The fixtures' stand-in for a gate reaches adapters' provenance, so that what the tests above see is the gate's."""
    assert isinstance(generators["ridge"].gate, Picky)
    assert generators["ridge"].generate(TEXT).info["gate"]["expected_gap_closed"] == 0.62
