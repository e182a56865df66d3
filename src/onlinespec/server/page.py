"""The live page: one file that asks `/live` for its figures, with its chart script inside; nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from onlinespec.server.live import Live

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def routes(live: Live) -> APIRouter:
    """The page, and what it shows."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """For people."""
        return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})

    @router.get("/live", include_in_schema=False)
    async def figures() -> dict[str, Any]:
        """For the page."""
        return live.snapshot()

    return router


@cache
def _page() -> str:
    """The page with script and style put in."""
    here = files("onlinespec.server")
    page = (here / "dashboard.html").read_text(encoding="utf-8")
    for mark, name in (("/*uplot.css*/", "uPlot.min.css"), ("/*uplot.js*/", "uPlot.iife.min.js")):
        page = page.replace(mark, (here / "vendor" / name).read_text(encoding="utf-8"))
    return page
