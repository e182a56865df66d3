"""The routes of the live page: one HTML file with its script inside, which polls `/live` and loads nothing else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from onlinespec.server.live import Live

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def routes(live: Live) -> APIRouter:
    """Returns the routes `/` (the page) and `/live` (its data)."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """The live page."""
        return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})

    @router.get("/live", include_in_schema=False)
    async def live_data() -> dict[str, Any]:
        """The data that the live page shows."""
        return live.snapshot()

    return router


@cache
def _page() -> str:
    """The HTML with uPlot's script and style inlined."""
    here = files("onlinespec.server")
    page = (here / "dashboard.html").read_text(encoding="utf-8")
    for mark, name in (("/*uplot.css*/", "uPlot.min.css"), ("/*uplot.js*/", "uPlot.iife.min.js")):
        page = page.replace(mark, (here / "vendor" / name).read_text(encoding="utf-8"))
    return page
