"""The page's layout and what its buttons do; all that is computed is the session's."""

from __future__ import annotations

import logging
from collections.abc import Callable
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

    plain: dict[str, Any] = {"apply_default_css": False}  # page.css is enough
    labels = list(session.generators)
    base = session.first.base.model.name
    with gr.Blocks(title="lorag", analytics_enabled=False) as page:
        kept = gr.State(None)
        gr.Markdown(f"# lorag\nFrom the description of a task to a LoRA adapter for `{base}`, in one pass: no data, no fine-tuning.")
        with gr.Row():
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
                methods = gr.CheckboxGroup(
                    labels, value=labels[:1], label="Generators to compare", visible=len(labels) > 1, elem_id="methods"
                )
                with gr.Row():
                    seed = gr.Number(0, precision=0, label="Seed", min_width=90, elem_id="seed")
                    samples = gr.Number(1, precision=0, label=f"Samples, 1 to {MOST_SAMPLES}", min_width=90, elem_id="samples")
                strength = gr.Slider(0, 3, value=1, step=0.05, label="Strength: factor on the generated weights", elem_id="strength")
                anyway = gr.Checkbox(False, label=_FORCE, visible=session.can_refuse, elem_id="anyway")
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                status = gr.HTML(drawings.draw_message("Nothing is generated yet."), **plain, elem_id="status", min_height=70)
                verdict = gr.HTML("", **plain, elem_id="verdict")
            with gr.Column(min_width=300):
                neighbours = gr.HTML("", **plain, elem_id="neighbours")
                task_map = gr.HTML("", **plain, elem_id="map")
        with gr.Column(visible=False) as results:
            adapters = gr.HTML("", **plain, elem_id="made")
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
            answers = gr.HTML("", **plain, elem_id="answers", min_height=70)
            gr.Markdown("## Take it away")
            choice = gr.Dropdown([], label="Adapter", visible=False, elem_id="choice")
            download = gr.DownloadButton("Download the adapter as a zip, with its card", interactive=False, elem_id="download")
            code = gr.Code("", language="python", label="The same in Python", interactive=False, elem_id="code", lines=3)

        def hand_out(request: Request, one: Result) -> dict[Any, Any]:
            packed = downloads.pack(one.adapter, f"{request.description} {one.label}")
            return {download: gr.DownloadButton(value=str(packed), interactive=True), code: session.python(request, one)}

        def on_generate(
            text: str,
            chosen: list[str],
            first: int,
            factor: float,
            count: int,
            force: bool,
            progress: Any = gr.Progress(),  # noqa: ANN401, B008
        ) -> dict[Any, Any]:
            shown: dict[Any, Any] = {
                kept: None,
                verdict: "",
                neighbours: "",
                task_map: "",
                results: gr.Column(visible=False),
                answers: "",
            }

            def work() -> None:
                request = Request(text, tuple(chosen), first, factor, count, force)
                progress(0.0, desc="reading the description")
                preview = session.preview(text, chosen[0], int(first))
                shown[neighbours] = drawings.draw_neighbours(preview)
                shown[task_map] = drawings.draw_map(preview)
                cosine = preview.neighbours[0][1]
                try:
                    variants = session.make(request, lambda share, what: progress(share, desc=what))
                except UnknownTaskError as refusal:
                    shown[verdict] = drawings.draw_verdict(preview.verdict, cosine)
                    remedy = f"Describe it otherwise, or tick “{_FORCE}”."
                    shown[status] = drawings.draw_message(f"{refusal.what}; {refusal.got}. {remedy}", "error")
                    return
                progress(0.95, desc="packing")
                names = [one.label for one in variants if one.repeats is None]
                shown.update(hand_out(request, variants[0]))
                shown[verdict] = drawings.draw_verdict(variants[0].adapter.info["gate"], cosine)
                shown[adapters] = drawings.draw_results(variants, request)
                shown[choice] = gr.Dropdown(names, value=names[0], visible=len(names) > 1)
                shown[results] = gr.Column(visible=True)
                shown[kept] = request
                repeats = len(variants) - len(names)
                note = f" {repeats} more came out the same: the method does not sample." if repeats else ""
                several = "1 adapter" if len(names) == 1 else f"{len(names)} adapters"
                shown[status] = drawings.draw_message(f"Made {several} in {sum(one.seconds for one in variants):.1f} s.{note}")

            failed = _sentence(work)
            if failed is not None:
                shown[status] = drawings.draw_message(failed, "error")
            return shown

        def on_run(request: Request | None, lines: str, choices: str, progress: Any = gr.Progress()) -> str:  # noqa: ANN401, B008
            shown = [drawings.draw_message("Generate an adapter first.", "error")]

            def work() -> None:
                if request is not None:
                    variants = session.make(request)
                    tell = lambda share, what: progress(share, desc=what)  # noqa: E731
                    shown[0] = drawings.draw_answers(session.answers(variants, lines.splitlines(), choices.splitlines(), tell))

            failed = _sentence(work)
            return shown[0] if failed is None else drawings.draw_message(failed, "error")

        def on_choose(request: Request | None, label: str) -> dict[Any, Any]:
            shown: dict[Any, Any] = {}

            def work() -> None:
                if request is not None:
                    shown.update(hand_out(request, next(one for one in session.make(request) if one.label == label)))

            failed = _sentence(work)
            if failed is not None:
                shown[status] = drawings.draw_message(failed, "error")
            return shown

        inputs_of = [description, methods, seed, strength, samples, anyway]
        outputs = [kept, status, verdict, neighbours, task_map, results, adapters, answers, choice, download, code]
        gr.on([generate.click, description.submit], on_generate, inputs_of, outputs, show_progress_on=status, **_ONE_AT_A_TIME)
        run.click(on_run, [kept, texts, candidates], answers, **_ONE_AT_A_TIME)
        choice.input(on_choose, [kept, choice], [download, code, status], show_progress="minimal", **_ONE_AT_A_TIME)
    return page.queue(max_size=_MOST_WAITING, api_open=False)


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
