"""The page in a real browser: a toy world served on this machine, and Chromium driven by Playwright."""

import importlib.util
import json
import re
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from web_world import TEXTS, toy_generators

from lorag.base.objectives import make_objective
from lorag.errors import ConfigError
from lorag.web.page import build_page
from lorag.web.serving import serving
from lorag.web.session import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason='gradio is not installed: pip install "lorag[web]"'),
]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LACKING = [name for name, there in (("playwright", importlib.util.find_spec("playwright")), ("chromium", CHROMIUM)) if not there]
in_browser = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
SLOW = 60_000  # milliseconds: a busy machine is not a failure


@pytest.fixture(scope="module")
def generators(tmp_path_factory, tiny_models, tokenizer):
    return toy_generators(tmp_path_factory.mktemp("toys"), tiny_models["llama"], tokenizer)


@pytest.fixture(scope="module")
def address(generators):
    with serving(Session(generators), inputs="\n".join(TEXTS[:2])) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One user with the page open; at the end nothing may have been asked of another machine or complained about."""

    def __init__(self, browser, address, **more):
        self.complaints, self.foreign, self.address = [], [], address
        self.context = browser.new_context(accept_downloads=True, **more)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", lambda answer: answer.status >= 400 and self.complaints.append(f"{answer.status} {answer.url}"))
        self.page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or self.foreign.append(asked.url))
        self.page.goto(address)
        self.page.locator("#description textarea").wait_for()

    def ask(self, text):
        """Types a description and presses the button."""
        self.page.locator("#description textarea").fill(text)
        self.page.locator("#generate").click()

    def says(self, words):
        """Waits until the page's sentence on how it went has these words, and returns it."""
        self.page.locator("#status").get_by_text(re.compile(words)).wait_for()
        return self.page.locator("#status").inner_text()

    def download(self, folder):
        """Downloads the adapter and unpacks it; returns the PEFT folder."""
        with self.page.expect_download() as found:
            self.page.locator("#download").click()
        with zipfile.ZipFile(found.value.path()) as archive:
            names = archive.namelist()
            archive.extractall(folder)
        assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".md"}
        return folder / names[0].split("/")[0]

    def leave(self):
        """Closes it."""
        self.context.close()
        assert self.complaints == [] and self.foreign == []


@pytest.fixture
def visit(chromium, address):
    """Opens the page for one more user."""
    visits = []

    def come(**more):
        visits.append(Visit(chromium, address, **more))
        return visits[-1]

    yield come
    for one in visits:
        one.leave()


# --- what is served, without a browser --------------------------------------------------------------------------------


def test_the_page_takes_no_files_and_keeps_its_doors_shut(generators):
    """No component takes files, pictures, sound or recordings; no event is public; one user computes at a time; the queue is short."""
    page = build_page(Session(generators), None)
    config = page.get_config_file()
    kinds = {part["type"] for part in config["components"]}
    assert not kinds & {"file", "uploadbutton", "image", "audio", "video", "multimodaltextbox", "fileexplorer", "dataframe"}
    events = [event for event in page.fns.values() if event.fn is not None]
    assert len(events) >= 3 and {event.concurrency_id for event in events} == {"base model"}
    assert {event.concurrency_limit for event in events} == {1} and {event.api_visibility for event in events} == {"private"}
    assert page.analytics_enabled is False and page._queue.max_size == 16
    texts = [part["props"] for part in config["components"] if part["type"] == "textbox"]
    assert len(texts) == 3 and all(props["max_length"] for props in texts)


def test_only_this_machine_is_served_and_only_what_the_page_needs(address):
    """The port listens on 127.0.0.1 alone; uploads, other interfaces and files of the machine are not there; no page may frame it."""
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(5)
        other.connect(("127.0.0.2", port))
    import httpx  # comes with gradio

    with httpx.Client(base_url=address) as client:
        front = client.get("/")
        assert front.status_code == 200 and "frame-ancestors 'none'" in front.headers["content-security-policy"]
        assert not re.findall(r"(?:src|href)=[\"']https?://(?!127\.0\.0\.1)", front.text)
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 404
        assert client.get(f"/gradio_api/file={Path(__file__).resolve()}").status_code == 404
        assert client.get("/gradio_api/info").status_code == 404 == client.get("/docs").status_code
        assert client.get("/", headers={"host": "evil.example"}).status_code == 421
        joined = client.post("/gradio_api/queue/join", json={}, headers={"origin": "http://evil.example"})
        assert joined.status_code in (400, 403)


def test_files_are_gone_when_the_page_is(generators, monkeypatch, tmp_path):
    """The private folder of downloads is removed at the end, and a taken port is a sentence."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(Session(generators)) as url:
        (folder,) = tmp_path.glob("lorag-web-*")
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "left.zip").write_bytes(b"x")
        port = int(url.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match="the page cannot listen"), serving(Session(generators), port=port):
            pass
    assert not list(tmp_path.glob("lorag-web-*"))


# --- in the browser ---------------------------------------------------------------------------------------------------


@in_browser
def test_type_generate_compare_download_load(visit, generators, tmp_path):
    """The whole way: what the downloaded adapter answers in PEFT is what the page showed beside the base model's answers."""
    user = visit()
    for label in ("sg_lora",):
        user.page.get_by_label(label).check()
    user.page.locator("#samples input").fill("2")
    user.ask("paint the red cat")
    assert "3 adapters" in user.says("Made") and "does not sample" in user.says("Made")
    assert "red-cat" in user.page.locator("#neighbours").inner_text()
    verdict = user.page.locator("#verdict").inner_text()
    assert "0.10" in verdict and "62%" in verdict and "40%" in verdict
    assert user.page.locator("#map circle").count() == 21
    dot = user.page.locator("#map .lorag-near").last
    dot.locator("circle").hover()
    assert dot.locator("text").evaluate("one => getComputedStyle(one).visibility") == "visible"
    assert user.page.locator("#made tbody tr").count() == 4
    user.page.locator("#run").click()
    user.page.locator("#answers tbody tr").first.wait_for()
    head = user.page.locator("#answers thead th").all_inner_texts()
    assert head == ["Input", "base", "ridge, seed 0", "sg_lora, seed 0", "sg_lora, seed 1"]
    shown = [row.locator("td").all_inner_texts() for row in user.page.locator("#answers tbody tr").all()]
    user.page.locator("#choice input").click()
    user.page.get_by_role("option", name="sg_lora, seed 1").click()
    user.page.locator("#code").get_by_text("seed").wait_for()
    assert "from lorag import generate_lora" in user.page.locator("#code").inner_text()
    folder = user.download(tmp_path)
    assert json.loads((folder / "lorag.json").read_text())["seed"] == 1
    base = generators["ridge"].base
    objective = make_objective(base.objective, base.model.tokenizer(), base.settings)
    with torch.inference_mode():
        bare = objective.generate(base.model.load("cpu"), TEXTS[:2])
        adapted = objective.generate(PeftModel.from_pretrained(base.model.load("cpu"), folder).eval(), TEXTS[:2])
    assert [row[0].split() for row in shown] == [text.split() or ["nothing"] for text in bare]
    assert [row[3].split() for row in shown] == [text.split() or ["nothing"] for text in adapted]


@in_browser
def test_a_refusal_is_a_sentence(visit):
    """Why, what to do and the nearest tasks; nothing to download; told otherwise, it generates all the same."""
    user = visit()
    user.ask("move the robot arm to the bin")
    text = user.says("no task of the bank is like")
    assert "0.97" in text and "Traceback" not in text and "on_unknown" not in text
    assert user.page.locator("#status [role=alert]").count() == 1
    assert "refuse" in user.page.locator("#verdict").inner_text() and user.page.locator("#neighbours tbody tr").count() >= 3
    assert not user.page.locator("#download").is_visible()
    user.page.get_by_label("Generate even where").check()
    user.page.locator("#generate").click()
    user.says("Made 1 adapter")
    assert user.page.locator("#download").is_visible()
    user.ask("   ")
    assert "description is empty" in user.says("description is empty")
    user.page.locator("#seed input").fill("-4")
    user.ask("red cat")
    assert "seed cannot be used" in user.says("seed cannot be used")


@in_browser
def test_two_users_at_once_each_get_their_own(visit, tmp_path):
    """Both press the button before either has an answer; each page, and each download, is about its own description."""
    users = {text: visit() for text in ("blue bird please", "green horse please")}
    for text, user in users.items():
        user.ask(text)
    for text, user in users.items():
        user.says("Made")
        assert text in user.page.locator("#made").inner_text()
        assert json.loads((user.download(tmp_path / text) / "lorag.json").read_text())["description"] == text


@in_browser
def test_the_keyboard_is_enough(visit):
    """The description has the focus; Enter generates; with Tab alone one reaches inputs, both buttons and the download."""
    user = visit()
    user.page.wait_for_function("document.activeElement.matches('#description textarea')")
    user.page.keyboard.type("paint the pink dog")
    user.page.keyboard.press("Enter")
    user.says("Made")
    reached = set()
    for _ in range(40):
        user.page.keyboard.press("Tab")
        reached.add(user.page.evaluate("(document.activeElement.closest('[id]') || {}).id || ''"))
        reached.add(
            user.page.evaluate("(document.activeElement.closest('#inputs, #run, #download, #generate, #strength, #seed') || {}).id || ''")
        )
        if {"generate", "inputs", "run", "download"} <= reached:
            break
    assert {"seed", "strength", "generate", "inputs", "run", "download"} <= reached, reached


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_light_and_dark(visit, scheme):
    """At 360 pixels nothing is wider than the screen, and text keeps a contrast of at least 4.5 to what is behind it."""
    user = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    user.ask("paint the grey horse")
    user.says("Made")
    user.page.locator("#run").click()
    user.page.locator("#answers tbody tr").first.wait_for()
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 360
    for place in (
        "#status p",
        "#neighbours td",
        "#verdict dd",
        "#map figcaption",
        "#answers td",
        "#answers tbody th",
        "#made td",
        "#generate",
        "#run",
        "#download",
    ):
        assert user.page.locator(place).first.evaluate(CONTRAST) >= 4.5, place
    dark = user.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 380) == (scheme == "dark")


@in_browser
def test_what_is_typed_is_only_text(visit):
    """Markup and templates in a description are shown as typed: no element comes of them and no request."""
    hostile = "<img src=x onerror=alert(1)> ${1+1} {{value}} red cat"
    user = visit()
    user.ask(hostile)
    user.says("Made")
    assert hostile in user.page.locator("#made .lorag-title").inner_text()
    assert user.page.locator("#made img").count() == 0
    user.page.locator("#inputs textarea").fill(hostile)
    user.page.locator("#run").click()
    user.page.locator("#answers tbody th").first.wait_for()
    assert user.page.locator("#answers tbody th").first.inner_text() == hostile and user.page.locator("#answers img").count() == 0


# WCAG's contrast ratio of an element's text to the first background behind it that is not transparent.
CONTRAST = """one => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = one, found = [0, 0, 0, 0];
  while (behind && found.length === 4 && found[3] === 0) {
    found = rgb(getComputedStyle(behind).backgroundColor);
    behind = behind.parentElement;
  }
  const [a, b] = [light(rgb(getComputedStyle(one).color)), light(found)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
