"""The page's layout and what its buttons do; all that is computed is the session's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorag.errors import LoragError, UnknownTaskError
from lorag.tasks.descriptions import MAX_DESCRIPTION
from lorag.web import drawings
from lorag.web.requests import MOST_INPUT, MOST_INPUTS, MOST_SAMPLES, Request, Result

if TYPE_CHECKING:
    from lorag.web.downloads import Downloads
    from lorag.web.session import Session

__all__ = ["build_page"]

_log = logging.getLogger("lorag")
_MOST_WAITING = 16
_FORCE = "Generate even where the generator would refuse"
_PLAIN: dict[str, Any] = {"apply_default_css": False}  # page.css is enough
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "base model", "concurrency_limit": 1, "api_visibility": "private"}


def build_page(session: Session, downloads: Downloads, inputs: str = "") -> Any:  # noqa: ANN401 - gradio is an extra
    """Lays the page out and connects it.

    Args:
        session: Computes.
        downloads: Packs what is downloaded.
        inputs: Example inputs to start with, one on each line.

    Returns:
        A gradio.Blocks, not yet launched.
    """
    import gradio as gr

    base = session.first.base.model.name
    with gr.Blocks(title="lorag", analytics_enabled=False) as page:
        kept = gr.State(None)
        gr.Markdown(f"# lorag\nFrom the description of a task to a LoRA adapter for `{base}`, in one pass: no data, no fine-tuning.")
        with gr.Row():
            form = _lay_out_form(gr, session)
            bank = _lay_out_bank(gr)
        outcome = _lay_out_outcome(gr, session, inputs)
        buttons = _Buttons(gr, session, downloads, kept, form, bank, outcome)

        def on_generate(
            text: str,
            methods: list[str],
            seed: int,
            strength: float,
            samples: int,
            anyway: bool,
            progress: Any = gr.Progress(),  # noqa: ANN401, B008
        ) -> dict[Any, Any]:
            return buttons.generate((text, tuple(methods), seed, strength, samples, anyway), progress)

        def on_run(request: Request | None, lines: str, choices: str, progress: Any = gr.Progress()) -> str:  # noqa: ANN401, B008
            return buttons.run(request, lines, choices, progress)

        starts = [form.generate.click, form.description.submit]
        gr.on(starts, on_generate, form.asked, buttons.changed, show_progress_on=form.status, **_ONE_AT_A_TIME)
        outcome.run.click(on_run, [kept, outcome.texts, outcome.candidates], outcome.answers, **_ONE_AT_A_TIME)
        handed = [outcome.download, outcome.code, form.status]
        outcome.choice.input(buttons.choose, [kept, outcome.choice], handed, show_progress="minimal", **_ONE_AT_A_TIME)
    return page.queue(max_size=_MOST_WAITING, api_open=False)


# --- the page's parts: each function lays out what its class names ----------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """What a user asks for, and what is said of it at once."""

    description: Any
    methods: Any
    seed: Any
    samples: Any
    strength: Any
    anyway: Any
    generate: Any
    status: Any
    verdict: Any

    @property
    def asked(self) -> list[Any]:
        """What a request is made of, in its order."""
        return [self.description, self.methods, self.seed, self.strength, self.samples, self.anyway]


@dataclass(frozen=True)
class _Bank:
    """Where the description lies in the bank."""

    neighbours: Any
    task_map: Any


@dataclass(frozen=True)
class _Outcome:
    """The adapters, what they answer, and one to take away; hidden until there are some."""

    column: Any
    adapters: Any
    texts: Any
    candidates: Any
    run: Any
    answers: Any
    choice: Any
    download: Any
    code: Any


def _lay_out_form(gr: Any, session: Session) -> _Form:  # noqa: ANN401
    labels = list(session.generators)
    with gr.Column(min_width=300):
        description = gr.Textbox(
            label="Describe the task",
            placeholder="summarise legal text",
            lines=1,
            max_lines=6,
            max_length=MAX_DESCRIPTION,
            autofocus=True,
            elem_id="description",
        )
        methods = gr.CheckboxGroup(labels, value=labels[:1], label="Generators to compare", visible=len(labels) > 1, elem_id="methods")
        with gr.Row():
            seed = gr.Number(0, precision=0, label="Seed", min_width=90, elem_id="seed")
            samples = gr.Number(1, precision=0, label=f"Samples, 1 to {MOST_SAMPLES}", min_width=90, elem_id="samples")
        return _Form(
            description,
            methods,
            seed,
            samples,
            strength=gr.Slider(0, 3, value=1, step=0.05, label="Strength: factor on the generated weights", elem_id="strength"),
            anyway=gr.Checkbox(False, label=_FORCE, visible=session.can_refuse, elem_id="anyway"),
            generate=gr.Button("Generate", variant="primary", elem_id="generate"),
            status=gr.HTML(drawings.draw_message("Nothing is generated yet."), **_PLAIN, elem_id="status", min_height=70),
            verdict=gr.HTML("", **_PLAIN, elem_id="verdict"),
        )


def _lay_out_bank(gr: Any) -> _Bank:  # noqa: ANN401
    with gr.Column(min_width=300):
        return _Bank(gr.HTML("", **_PLAIN, elem_id="neighbours"), gr.HTML("", **_PLAIN, elem_id="map"))


def _lay_out_outcome(gr: Any, session: Session, inputs: str) -> _Outcome:  # noqa: ANN401
    with gr.Column(visible=False) as column:
        adapters = gr.HTML("", **_PLAIN, elem_id="made")
        gr.Markdown("## Try it")
        texts = gr.Textbox(
            inputs,
            label=f"Your own example inputs, one on each line, at most {MOST_INPUTS}",
            lines=3,
            max_lines=MOST_INPUTS,
            max_length=MOST_INPUTS * (MOST_INPUT + 1),
            elem_id="inputs",
        )
        candidates = gr.Textbox(
            "",
            label="Candidates to choose from, one on each line: labels, or texts",
            lines=3,
            max_length=MOST_INPUTS * (MOST_INPUT + 1),
            visible=not session.writes,
            elem_id="candidates",
        )
        run = gr.Button("Run base and adapted model", elem_id="run")
        answers = gr.HTML("", **_PLAIN, elem_id="answers", min_height=70)
        gr.Markdown("## Take it away")
        return _Outcome(
            column,
            adapters,
            texts,
            candidates,
            run,
            answers,
            choice=gr.Dropdown([], label="Adapter", visible=False, elem_id="choice"),
            download=gr.DownloadButton("Download the adapter as a zip, with its card", interactive=False, elem_id="download"),
            code=gr.Code("", language="python", label="The same in Python", interactive=False, elem_id="code", lines=3),
        )


# --- what its buttons do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Buttons:
    """What happens at a click; each answers with new values for parts of the page, an error as a message among them."""

    gr: Any
    session: Session
    downloads: Downloads
    kept: Any
    form: _Form
    bank: _Bank
    outcome: _Outcome

    @property
    def changed(self) -> list[Any]:
        """All parts that `generate` may change."""
        out = self.outcome
        said = [self.kept, self.form.status, self.form.verdict, self.bank.neighbours, self.bank.task_map]
        return [*said, out.column, out.adapters, out.answers, out.choice, out.download, out.code]

    def generate(self, asked: tuple[Any, ...], progress: Any) -> dict[Any, Any]:  # noqa: ANN401
        """Carries out a new request, of which nothing older is shown."""
        form, bank, out = self.form, self.bank, self.outcome
        shown: dict[Any, Any] = {self.kept: None, out.column: self.gr.Column(visible=False), out.answers: ""}
        shown |= dict.fromkeys((form.verdict, bank.neighbours, bank.task_map), "")
        return self._with_errors(lambda: self._generate(shown, asked, progress), shown)

    def _generate(self, shown: dict[Any, Any], asked: tuple[Any, ...], progress: Any) -> None:  # noqa: ANN401
        form, bank, out = self.form, self.bank, self.outcome
        request = Request(*asked)
        progress(0.0, desc="reading the description")
        preview = self.session.preview(request.description, request.methods[0], int(request.seed))
        shown[bank.neighbours] = drawings.draw_neighbours(preview)
        shown[bank.task_map] = drawings.draw_map(preview)
        cosine = preview.neighbours[0][1]
        try:
            variants = self.session.make(request, lambda share, what: progress(share, desc=what))
        except UnknownTaskError as refusal:
            shown[form.verdict] = drawings.draw_verdict(preview.verdict, cosine)
            remedy = f"Describe it otherwise, or tick “{_FORCE}”."
            shown[form.status] = drawings.draw_message(f"{refusal.what}; {refusal.got}. {remedy}", "error")
            return
        progress(0.95, desc="packing")
        names = [one.label for one in variants if one.repeats is None]
        shown.update(self._hand_out(request, variants[0]))
        shown[form.verdict] = drawings.draw_verdict(variants[0].adapter.info["gate"], cosine)
        shown[out.adapters] = drawings.draw_results(variants, request)
        shown[out.choice] = self.gr.Dropdown(names, value=names[0], visible=len(names) > 1)
        shown[out.column] = self.gr.Column(visible=True)
        shown[self.kept] = request
        repeats = len(variants) - len(names)
        note = f" {repeats} more came out the same: the method does not sample." if repeats else ""
        several = "1 adapter" if len(names) == 1 else f"{len(names)} adapters"
        shown[form.status] = drawings.draw_message(f"Made {several} in {sum(one.seconds for one in variants):.1f} s.{note}")

    def run(self, request: Request | None, lines: str, choices: str, progress: Any) -> str:  # noqa: ANN401
        """Answers of the base model and of the adapters of the last request."""
        shown = [drawings.draw_message("Generate an adapter first.", "error")]

        def work() -> None:
            if request is not None:
                variants = self.session.make(request)
                tell = lambda share, what: progress(share, desc=what)  # noqa: E731
                shown[0] = drawings.draw_answers(self.session.answers(variants, lines.splitlines(), choices.splitlines(), tell))

        failed = _sentence(work)
        return shown[0] if failed is None else drawings.draw_message(failed, "error")

    def choose(self, request: Request | None, label: str) -> dict[Any, Any]:
        """Hands another adapter out."""
        shown: dict[Any, Any] = {}

        def work() -> None:
            if request is not None:
                shown.update(self._hand_out(request, next(one for one in self.session.make(request) if one.label == label)))

        return self._with_errors(work, shown)

    def _hand_out(self, request: Request, one: Result) -> dict[Any, Any]:
        packed = self.downloads.pack(one.adapter, f"{request.description} {one.label}")
        button = self.gr.DownloadButton(value=str(packed), interactive=True)
        return {self.outcome.download: button, self.outcome.code: self.session.python(request, one)}

    def _with_errors(self, work: Callable[[], None], shown: dict[Any, Any]) -> dict[Any, Any]:
        """What is shown once something has run, with the reason why it failed, if it did."""
        failed = _sentence(work)
        return shown if failed is None else {**shown, self.form.status: drawings.draw_message(failed, "error")}


def _sentence(work: Callable[[], None]) -> str | None:
    """Runs something, and says in a sentence why it failed, if it did; what nobody foresaw goes to the log in full."""
    try:
        work()
    except LoragError as error:
        return f"{error}"
    except Exception as error:  # the page must answer whatever happened
        _log.exception("the page failed")
        return f"Something failed inside lorag ({type(error).__name__}); the terminal says more."
    return None
