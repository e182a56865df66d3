"""The live page in a browser, at the width of a desk and of a phone. Skipped without playwright or Chromium."""

import asyncio
import itertools
import re
import shutil
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import rigs
import torch
import uvicorn
from simulator import Machine
from waiting import HANG_SECONDS

from onlinespec.control.chooser import Controller, StepRecord
from onlinespec.core import Features, Feedback, Trace
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.scheduler import Scheduler
from onlinespec.engine.step import DecodeLoop, Step
from onlinespec.publishing.workers import ThreadLearning, TrainerSpec
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
    with listening("127.0.0.1", 0) as listener:
        app = create_app(engine, ServerSettings("tiny"), {"drafter": "eagle", "learning_mode": "learns", **facts})
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
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

    expect(page.locator(place)).to_contain_text(text, timeout=1000 * HANG_SECONDS)


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


NOTE_TEXTS = """
window.drawn = new Map();  // of each canvas, the texts of its last drawing
const {clearRect, fillText} = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.clearRect = function (...box) {
  drawn.set(this.canvas, []);
  clearRect.apply(this, box);
};
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const size = this.measureText(text);
  drawn.get(this.canvas).push({text, left: x - size.actualBoundingBoxLeft, right: x + size.actualBoundingBoxRight,
    top: y - size.actualBoundingBoxAscent, bottom: y + size.actualBoundingBoxDescent, end: this.canvas.width});
  fillText.call(this, text, x, y);
};
"""
MIDNIGHT = datetime(2026, 1, 2, tzinfo=UTC).timestamp()


def show_course(page, url, num_samples, ends_at):
    """The page as it is after so many samples."""
    import httpx

    shown = httpx.get(f"{url}/live").json()
    ages = [2.0 * (num_samples - 1 - i) for i in range(num_samples)]
    course = {name: [1.0 + i % 7 for i in range(num_samples)] for name in shown["course"]}
    course["at"] = [ends_at - age for age in ages]
    page.route("**/live", lambda route: route.fulfill(json=shown | {"course": course, "marks": []}))
    page.goto(url)


@pytest.mark.parametrize("width", [1280, 760, 390])
def test_labels_of_the_time_axis_lie_apart_and_inside_their_chart(browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, timezone_id="Europe/London")
    page.add_init_script(NOTE_TEXTS)
    with served(make_engine()) as url:
        for num_samples, seconds in itertools.product((1, 20, 33, 100, 900), (0.0, 30.0, 54.5)):
            show_course(page, url, num_samples, ends_at=MIDNIGHT + seconds)
            shows(page, "#requests", "up for")  # which is said behind the drawing
            charts = page.evaluate("[...drawn.values()]")
            assert len(charts) == 2
            for one, other in (pair for texts in charts for pair in itertools.combinations(texts, 2)):
                is_beside = one["right"] + 4 < other["left"] or other["right"] + 4 < one["left"]
                assert is_beside or one["bottom"] + 2 < other["top"] or other["bottom"] + 2 < one["top"], (one, other)
            for one in itertools.chain(*charts):
                assert 0 <= one["left"] < one["right"] <= one["end"], one
    page.close()


def test_the_legend_has_the_newest_figures_until_a_pointer_asks_for_others(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, timezone_id="Europe/London")
    legend = page.locator("#chart-speed .u-legend")
    with served(make_engine()) as url:
        page.goto(url)
        shows(page, "#verdict", "Nothing has been asked yet.")
        assert not legend.is_visible()
        show_course(page, url, 30, ends_at=MIDNIGHT + 3.5)
        for place in ("#chart-speed", "#chart-length"):
            shows(page, place, "00:00:03")
        shows(page, "#chart-speed", "served")
        page.hover("#chart-speed .u-over")
        shows(page, "#chart-speed", "23:59:3")
        page.mouse.move(1, 1)
        shows(page, "#chart-speed", "00:00:03")
        assert "–" not in legend.inner_text()
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
    learning = ThreadLearning(TARGET, TrainerSpec("eagle"), drafter.weights, drafter.swap)
    learning.start()
    with served(make_engine(learning, drafter)) as url:
        assert httpx.get(f"{url}/live").json()["now"] is None
        body = {"prompt": "a prompt", "max_tokens": 100}
        httpx.post(f"{url}/v1/completions", json=body, timeout=HANG_SECONDS).raise_for_status()
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
    counters = engine.scheduler.counters
    promoted = {"kind": "promoted", "at": "2026-01-02T12:00:00+00:00", "reason": "better", "version": 1}
    live.sample()
    assert live.snapshot()["course"]["tokens_per_second"] == [None]
    counters.tokens, counters.steps, counters.drafted, counters.accepted = 30, 10, 40, 20
    counters.verify_seconds, counters.prefill_seconds = 0.2, 5.0
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


def test_where_little_is_drafted_plain_speed_is_what_was_measured(monkeypatch):
    engine = make_engine()
    live, _ = live_of(engine, monkeypatch)
    counters = engine.scheduler.counters

    def steps(num_steps, num_draft_tokens, seconds, learn_seconds=0.0):
        for _ in range(num_steps):
            drafted = [Feedback(Trace([], Features(torch.empty(0))), 0, 1, num_draft_tokens, 0, 0)]
            counters.add(Step([], drafted, 0.0, seconds, learn_seconds))

    def plain_speed():
        live.sample()
        return live.snapshot()["now"]["plain_tokens_per_second"]

    steps(10, 4, 0.02)
    assert plain_speed() == 50.0  # as control estimates it
    steps(10, 0, 0.01, learn_seconds=0.005)
    assert plain_speed() == pytest.approx(100.0)  # learning is no part of it
    assert live.snapshot()["now"]["tokens_per_second"] == pytest.approx(10 / 0.15)
    steps(40, 0, 0.002)
    steps(2, 4, 0.01)  # a probe
    assert plain_speed() == pytest.approx(500.0)
    steps(40, 4, 0.002)
    steps(2, 0, 0.01)  # the ends of answers, say: they may have come of fewer requests
    assert plain_speed() == 50.0


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
