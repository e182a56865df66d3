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
from simulator import Machine

from onlinespec.background import ProcessLearning, Recipe
from onlinespec.control import Controller, StepRecord
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


def live_of(engine, monkeypatch, figures=None):
    """What the page shows of an engine whose control and learning say what a test wants."""
    live, control = Live(engine, {}), FakeControl()
    monkeypatch.setattr(live, "_control", control.report)
    monkeypatch.setattr(live, "_learning", lambda: {} if figures is None else figures)
    return live, control


def test_samples_are_of_the_time_between_them_and_marks_of_what_changed(monkeypatch):
    engine = make_engine()
    figures = {"drifts": 0, "num_events": 0, "events": []}
    live, control = live_of(engine, monkeypatch, figures)
    flow = engine.scheduler.flow
    promoted = {"kind": "promoted", "at": "2026-01-02T12:00:00+00:00", "reason": "better", "version": 1}
    live.sample()
    assert live.snapshot()["course"]["tokens_per_second"] == [None]
    flow.tokens, flow.steps, flow.drafted, flow.accepted = 30, 10, 40, 20
    flow.verify_seconds, flow.read_seconds = 0.2, 5.0
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


def test_where_nothing_is_drafted_plain_speed_is_what_was_measured(monkeypatch):
    engine = make_engine()
    live, _ = live_of(engine, monkeypatch)
    flow = engine.scheduler.flow
    flow.tokens, flow.steps, flow.drafted, flow.accepted, flow.verify_seconds = 30, 10, 40, 20, 0.2
    live.sample()
    assert live.snapshot()["now"]["plain_tokens_per_second"] == 50.0  # as control estimates it
    flow.tokens, flow.steps, flow.verify_seconds, flow.learn_seconds = 50, 30, 0.4, 0.1
    live.sample()
    assert live.snapshot()["now"]["plain_tokens_per_second"] == pytest.approx(20 / 0.2)  # learning is no part of it
    assert live.snapshot()["now"]["tokens_per_second"] == pytest.approx(20 / 0.3)


def test_while_drafting_is_off_plain_speed_is_estimated_for_the_requests_that_run():
    machine = Machine()
    controller = Controller(machine.profile(), 4)

    def step(num_requests, accepted=0):
        ids = list(range(num_requests))
        shape = controller.choose(ids, [4] * num_requests)
        seconds = machine.draft_seconds(shape), machine.verify_seconds(shape)
        controller.observe(StepRecord(ids, shape, [min(accepted, K) for K in shape], *seconds))

    while controller.report()["is_drafting"]:
        step(8)
    for num_requests in (8, 1, 8):
        step(num_requests)
        assert not controller.report()["is_drafting"]
        expected = num_requests / machine.verify_seconds([0] * num_requests)
        assert controller.report()["goodput_plain"] == pytest.approx(expected, rel=0.01)
