"""The live page in a browser, at the width of a desk and of a phone. Skipped without playwright or Chromium."""

import asyncio
import re
import shutil
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import rigs
import uvicorn

from onlinespec.background import ProcessLearning, Recipe
from onlinespec.decode import DecodeLoop
from onlinespec.drafters import load_drafter
from onlinespec.scheduler import Scheduler
from onlinespec.server.app import create_app
from onlinespec.server.engine import Engine
from onlinespec.server.live import Live
from onlinespec.server.run import listening
from onlinespec.server.settings import ServerSettings

TARGET = rigs.random_target()


def make_engine(learning=None, drafter=None):
    return Engine(Scheduler(DecodeLoop(TARGET, drafter or load_drafter("eagle", TARGET), learning)))


@contextmanager
def served(engine, **facts):
    """A server's address; it runs in a thread."""
    with listening("127.0.0.1", 0) as door:
        app = create_app(engine, ServerSettings("tiny"), {"drafter": "eagle", "learning_mode": "learns", **facts})
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[door])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=path, args=["--no-sandbox"])


def shows(page, place, text):
    """Waits until a place on the page does."""
    from playwright.sync_api import expect

    expect(page.locator(place)).to_contain_text(text, timeout=20_000)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desk", "phone"])
def test_a_prompt_can_be_tried_and_its_figures_show(browser, width, height, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": height})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    with served(make_engine()) as url:
        page.goto(url)
        page.fill("#prompt", "<b>a prompt</b>")
        page.click("#ask")
        shows(page, "#usage", "200 tokens in")
        assert page.locator("#answer span").count() == 200
        assert page.locator("#answer b").count() == 0  # text, whatever it spells
        shows(page, "#speed", re.compile(r"\d"))
        shows(page, "#requests", "1 length")
        assert page.locator("#model").text_content() == "tiny"
        assert page.locator("canvas").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / "page.png", full_page=True)
    shows(page, "#state", "the server does not answer")
    assert [fault for fault in faults if "ERR_CONNECTION_REFUSED" not in fault] == []
    page.close()


def test_a_mistake_is_told_and_an_answer_can_be_stopped(browser):
    page, engine = browser.new_page(), make_engine()
    step = engine.scheduler.step
    engine.scheduler.step = lambda: time.sleep(0.05) or step()
    with served(engine) as url:
        page.goto(url)
        page.fill("#prompt", "x" * 3000)
        page.click("#ask")
        shows(page, "#answer .bad", "context")
        page.fill("#prompt", "a prompt")
        page.click("#ask")
        page.wait_for_selector("#answer span:nth-child(5)", state="attached")
        page.click("#halt")
        page.wait_for_selector("#ask:enabled")
        assert page.locator("#answer span").count() < 200
        shows(page, "#requests", "1 cancelled")
    page.close()


# Without a browser


def test_the_page_holds_all_it_needs_and_may_load_nothing_else():
    httpx = pytest.importorskip("httpx")
    with served(make_engine()) as url:
        response = httpx.get(url)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "uPlot" in response.text
    assert "/*uplot" not in response.text
    assert [part for part in ("src=", 'href="http', "@import", "url(") if part in response.text] == []


def test_what_the_page_shows_follows_what_is_served():
    httpx = pytest.importorskip("httpx")
    drafter = load_drafter("eagle", TARGET)
    learning = ProcessLearning(TARGET, drafter, Recipe("eagle", niceness=0))
    learning.start()
    with served(make_engine(learning, drafter)) as url:
        assert httpx.get(f"{url}/live").json()["now"] is None
        body = {"prompt": "a prompt", "max_tokens": 100}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        while (shown := httpx.get(f"{url}/live").json())["now"] is None or not shown["learning"].get("rounds"):
            time.sleep(0.1)
    learning.stop()
    assert shown["tokens"] == 100
    assert shown["requests"]["finished"] == {"length": 1}
    assert shown["acceptance_length"] >= 1
    assert max(x or 0 for x in shown["course"]["tokens_per_second"]) > 0
    assert shown["learning"]["offered"] > 0


class FakeControl:
    is_drafting = True

    def report(self):
        return {"is_drafting": self.is_drafting, "goodput_plain": 50.0}


def test_samples_are_of_the_time_between_them_and_marks_of_what_changed(monkeypatch):
    engine = make_engine()
    live = Live(engine, {})
    control = FakeControl()
    monkeypatch.setattr(live, "_control", control.report)
    figures = {"drifts": 0, "num_events": 0, "events": []}
    monkeypatch.setattr(live, "_learning", lambda: figures)
    flow = engine.scheduler.flow
    promoted = {"kind": "promoted", "at": "2026-01-02T12:00:00+00:00", "reason": "better", "version": 1}
    live.sample()
    assert live.snapshot()["course"]["tokens_per_second"] == [None]
    flow.tokens, flow.steps, flow.accepted, flow.verify_seconds, flow.read_seconds = 30, 10, 20, 0.2, 5.0
    figures |= {"drifts": 1, "num_events": 1, "events": [promoted]}
    control.is_drafting = False
    live.sample()
    shown = live.snapshot()
    assert shown["now"]["tokens_per_second"] == pytest.approx(150.0)  # reading prompts is no decoding
    assert shown["now"]["plain_tokens_per_second"] == 50.0
    assert shown["now"]["acceptance_length"] == 3.0
    assert [mark["kind"] for mark in shown["marks"]] == ["promoted", "drift", "drafting off"]
    assert shown["marks"][0]["at"] == datetime(2026, 1, 2, 12, tzinfo=UTC).timestamp()  # not when it was heard of
    live.sample()
    assert len(live.snapshot()["marks"]) == 3
