"""Serve the page to this machine alone: what is let in, what is handed out, and what is left behind, which is nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.errors import ConfigError, MissingDependencyError
from lorag.web.downloads import Downloads
from lorag.web.page import build_page

if TYPE_CHECKING:
    from lorag.web.session import Session

__all__ = ["RequestFilter", "serving"]

_HOST = "127.0.0.1"
_MOST_BYTES = 512 * 1024  # of what a browser sends; the longest texts that the page takes fit
_API = "/gradio_api"
# What the page asks for. All else that gradio offers, such as uploads, proxying and its programming interface, is shut.
_GET = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{_API}/theme.css", f"{_API}/startup-events", f"{_API}/queue/data")
_GET_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/")
_POST = (f"{_API}/queue/join", f"{_API}/cancel", f"{_API}/reset")
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequestFilter:
    """ASGI middleware that lets in only what the page needs, from pages of this machine, and adds security headers.

    Args:
        app: What is behind the door.
        folder: The only folder whose files are handed out.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]], folder: Path) -> None:
        self._app, self._folder = app, folder.resolve()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status = self._refusal(scope) if scope["type"] == "http" else 404
        if status:
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
                await send({"type": "http.response.body", "body": b"Not here."})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return

        async def add_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), text.encode()) for name, text in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, add_headers)

    def _refusal(self, scope: _Scope) -> int:
        """The HTTP status of a refusal, or 0."""
        headers = {name.decode("latin-1").lower(): text.decode("latin-1") for name, text in scope["headers"]}
        if not _is_local(headers.get("host", "")):  # a name that somebody else's page made point here
            return 421
        origin = headers.get("origin")
        if origin is not None and not (origin.startswith("http://") and _is_local(origin.removeprefix("http://"))):
            return 403
        path = scope["path"]
        if scope["method"] == "POST":
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > _MOST_BYTES:
                return 413
            return 0 if path.rstrip("/") in _POST else 404
        if scope["method"] not in ("GET", "HEAD"):
            return 405
        if path.startswith(f"{_API}/file="):
            return 0 if Path(path.removeprefix(f"{_API}/file=")).resolve().is_relative_to(self._folder) else 404
        return 0 if path in _GET or path.startswith(_GET_BELOW) else 404


def _is_local(host: str) -> bool:
    name, _, port = host.partition(":")
    return name in (_HOST, "localhost") and (not port or port.isdecimal())


@contextmanager
def serving(session: Session, *, port: int | None = None, inputs: str = "") -> Iterator[str]:
    """Serves the page on 127.0.0.1 until the block ends; then files that it made are gone.

    Args:
        session: What the page computes with.
        port: Port to listen on; by default the first free one from 7860.
        inputs: Example inputs to start with, one on each line.

    Yields:
        The page's address.

    Raises:
        MissingDependencyError: If gradio is not installed.
        ConfigError: If the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and by what it starts
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="lorag-web-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            page = _launch(session, Path(folder), port, inputs)
            try:
                yield page.local_url
            finally:
                page.close(verbose=False)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _launch(session: Session, folder: Path, port: int | None, inputs: str) -> Any:  # noqa: ANN401 - gradio is an extra
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as error:
        raise MissingDependencyError("the page needs gradio", got=str(error)[:80], remedy='pip install "lorag[web]"') from error
    session.warm_up()
    page = build_page(session, Downloads(folder), inputs)
    style = resources.files("lorag.web").joinpath("page.css").read_text(encoding="utf-8")
    # Fonts of the system: a theme's own may be fetched from elsewhere.
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # The theme's own button is too pale to be read by everybody: contrast 2.8, where 4.5 is due.
    strong = {f"button_primary_background_fill{part}{dark}": "*primary_700" for part in ("", "_hover") for dark in ("", "_dark")}
    styled = theme.set(**strong, button_primary_text_color="white", button_primary_text_color_dark="white")
    try:
        page.launch(
            server_name=_HOST,
            server_port=port,
            share=False,
            inline=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            num_workers=0,
            root_path="",
            max_file_size=1,
            state_session_capacity=200,
            theme=styled,
            css=style,
            app_kwargs={"middleware": [Middleware(RequestFilter, folder=folder)], "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError as error:
        raise ConfigError(
            "the page cannot listen", got=str(error)[:160], expected="a free port", remedy="Give another with --port."
        ) from error
    return page
