"""The pages, as an ASGI application; whoever calls it has been let in (federation.flower.superlink.Guard).

Rules:

- Nothing here changes anything: every path answers to GET and HEAD alone.
- Pages are whole without a script; with it, what they show is replaced while it changes (server-sent events).
- No word of a study, a site or an error goes into a page unescaped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from federation import report
from federation.readable import ago, clock, number, size, timestamp
from orchestrator.books import Books, Site
from orchestrator.history import PHASES, REPORT, History
from orchestrator.web import drawing

ROOT = "/status"
EVERY, ALIVE = 1.0, 10.0
MOST_STREAMS = 32
_HERE = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Pages:
    """The status page over an orchestrator's state folder.

    Parameters
    ----------
    books : Books
        What is known.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._streams = 0
        self._rendered: dict[str | None, tuple[object, str]] = {}
        self._environment = Environment(
            loader=FileSystemLoader(_HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals |= {"ROOT": ROOT, "PHASES": PHASES, "version": version("fednnunet")}
        self._environment.filters |= {"ago": ago, "clock": clock, "number": number, "size": size, "when": timestamp}
        style = (Path(report.__file__).parent / "report.css").read_text(encoding="utf-8")
        self._style = style + (_HERE / "status.css").read_text(encoding="utf-8")
        self.app = Starlette(
            routes=[
                Route("/", self._start),
                Route(f"{ROOT}/", self._overview),
                Route(f"{ROOT}/events", self._events),
                Route(f"{ROOT}/status.css", self._stylesheet),
                Route(f"{ROOT}/live.js", self._script),
                Route(f"{ROOT}/studies/{{study}}/", self._study),
                Route(f"{ROOT}/studies/{{study}}/events", self._events),
                Route(f"{ROOT}/studies/{{study}}/{{file}}", self._file),
            ]
        )

    async def _start(self, request: Request) -> Response:
        return RedirectResponse(f"{ROOT}/", headers=_HEADERS)

    async def _stylesheet(self, request: Request) -> Response:
        return Response(self._style, media_type="text/css", headers=_HEADERS)

    async def _script(self, request: Request) -> Response:
        return FileResponse(_HERE / "live.js", media_type="text/javascript", headers=_HEADERS)

    async def _overview(self, request: Request) -> Response:
        return await self._page("Studies and sites", None)

    async def _study(self, request: Request) -> Response:
        history = await self._history(request)
        return await self._page(f"Study {history.study.name}", history.study.id)

    async def _page(self, title: str, study: str | None) -> Response:
        content = Markup(await asyncio.to_thread(self._content, study))  # noqa: S704 - rendered, so escaped
        page = self._environment.get_template("page.html").render(title=title, content=content, study=study)
        return HTMLResponse(page, headers=_HEADERS)

    def _content(self, study: str | None) -> str:
        """What changes on a page: the overview, or one study. Rendered anew only where something has changed."""
        histories, sites = self._books.histories(), self._books.sites()
        shown = [one for one in histories if study in (None, one.study.id)]
        files = [len(self._offered(one)) for one in shown]
        state = ([(one.study.id, one.lines) for one in shown], [(site.name, site.online) for site in sites], files)
        before, content = self._rendered.get(study, (None, ""))
        if before != state:
            content = self._render(shown, sites, study)
            self._rendered[study] = state, content
        return content

    def _render(self, histories: list[History], sites: list[Site], study: str | None) -> str:
        if study is None:
            return self._environment.get_template("overview.html").render(histories=histories, sites=sites)
        if not histories:
            return "<p>The study is gone.</p>"
        (history,) = histories
        online = {site.name: site.online for site in sites}
        return self._environment.get_template("study.html").render(
            history=history, online=online, **self._drawn(history), files=list(self._offered(history))
        )

    def _drawn(self, history: History) -> dict[str, Any]:
        fold = history.rounds[-1].fold if history.rounds else history.study.folds[0]
        drawn = {}
        for name, title in (("train_loss", "training loss"), ("mean_dice", "pseudo-Dice")):
            sites = {
                site: [
                    (e.epoch, value) for e in told.epochs if e.fold == fold and (value := getattr(e, name)) is not None
                ]
                for site, told in history.sites.items()
            }
            svg = drawing.curves(f"{title}, fold {fold}", sites, history.pooled_curve(fold, name))
            drawn[title] = Markup(svg)  # noqa: S704 - drawn here, escaped there
        grid = drawing.grid(list(history.sites), [one.missing for one in history.rounds], history.all_rounds)
        return {"curves": drawn, "grid": Markup(grid), "fold": fold}  # noqa: S704 - drawn here, escaped there

    def _offered(self, history: History) -> dict[str, Path]:
        """Files of a study that may be fetched, by what they are called in the address."""
        folder = self._books.folder(history)
        names = {REPORT: REPORT}
        if history.exported is not None:
            names["model.zip"] = history.exported["path"]
        return {name: folder / path for name, path in names.items() if (folder / path).is_file()}

    async def _history(self, request: Request) -> History:
        history = await asyncio.to_thread(self._books.history, request.path_params["study"])
        if history is None:
            raise HTTPException(404)
        return history

    async def _file(self, request: Request) -> Response:
        history = await self._history(request)
        path = self._offered(history).get(request.path_params["file"])
        if path is None:
            raise HTTPException(404)
        if path.name == REPORT:  # it brings its own policy
            return FileResponse(path, media_type="text/html", headers={"Cache-Control": "no-store"})
        return FileResponse(path, filename=path.name, headers=_HEADERS)

    async def _events(self, request: Request) -> Response:
        study = request.path_params.get("study")
        if study is not None:
            await self._history(request)
        if self._streams >= MOST_STREAMS:
            raise HTTPException(503)
        return StreamingResponse(self._changes(study), media_type="text/event-stream", headers=_HEADERS)

    async def _changes(self, study: str | None) -> AsyncIterator[str]:
        """The content each time that it has changed, and a sign of life in between."""
        self._streams += 1
        try:
            sent, silent = "", 0.0
            while True:
                content = await asyncio.to_thread(self._content, study)
                if content != sent:
                    sent, silent = content, 0.0
                    yield "".join(f"data: {line}\n" for line in content.splitlines()) + "\n"
                elif silent >= ALIVE:
                    silent = 0.0
                    yield ": alive\n\n"
                await asyncio.sleep(EVERY)
                silent += EVERY
        finally:
            self._streams -= 1
