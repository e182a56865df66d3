"""The data of the live page: current statistics, their history over the last half hour, and its events."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace
from datetime import datetime
from typing import Any

from onlinespec.control.chooser import Controller
from onlinespec.engine.scheduler import StepCounters
from onlinespec.learning.update import InlineLearning
from onlinespec.publishing.workers import BackgroundLearning
from onlinespec.server.engine import Engine

SECONDS = 2.0  # between two samples; 900 of them are half an hour
_MOST_SAMPLES, _MOST_MARKS = 900, 100
_COLUMNS = ("at", "tokens_per_second", "plain_tokens_per_second", "acceptance_length", "served_per_second", "running")


class Live:
    """Samples an engine's counters while the server runs.

    Args:
        facts: Shown on the page as they are; see `create_app`.
    """

    def __init__(self, engine: Engine, facts: dict[str, Any]) -> None:
        self._engine, self._facts = engine, facts
        self._started = time.time()
        self._samples: deque[tuple[float | None, ...]] = deque(maxlen=_MOST_SAMPLES)
        self._marks: deque[dict[str, Any]] = deque(maxlen=_MOST_MARKS)
        self._counters, self._at = replace(engine.scheduler.counters), time.monotonic()
        self._seen = {"drifts": 0, "events": 0, "is_drafting": True}

    async def run(self) -> None:
        """Takes a sample every `SECONDS`, until it is cancelled."""
        while True:
            await asyncio.sleep(SECONDS)
            self.sample()

    def sample(self) -> None:
        """Records the rates since the last sample, None if no step was decoded, and new events."""
        counters, now = replace(self._engine.scheduler.counters), time.monotonic()
        before, self._counters = self._counters, counters
        seconds, self._at = now - self._at, now
        rates = self._rates(before, counters, seconds)
        self._samples.append((time.time(), *rates, len(self._engine.scheduler.running)))
        self._notice()

    def snapshot(self) -> dict[str, Any]:
        """Returns everything the page shows, ready for JSON."""
        scheduler, totals = self._engine.scheduler, self._engine.totals
        counters = scheduler.counters
        return {
            **self._facts,
            "uptime_seconds": time.time() - self._started,
            "is_ready": self._engine.is_ready,
            "now": dict(zip(_COLUMNS, self._samples[-1], strict=True)) if self._samples else None,
            "course": {name: [sample[i] for sample in self._samples] for i, name in enumerate(_COLUMNS)},
            "marks": sorted(self._marks, key=lambda mark: mark["at"]),
            "requests": {
                "running": len(scheduler.running),
                "prefilling": len(scheduler.prefilling),
                "waiting": len(scheduler.waiting),
                "most_running": scheduler.limits.max_running,
                "finished": dict(totals.finished),
            },
            "tokens": counters.tokens,
            "drafted": counters.drafted,
            "longest_drafted": scheduler.loop.drafter.longest_text if scheduler.loop.drafter else None,
            "tokens_beyond_drafter": totals.tokens_beyond_drafter,
            "acceptance_length": 1 + counters.accepted / counters.steps if counters.steps else None,
            "control": self._control(),
            "learning": self._learning(),
        }

    def _rates(self, before: StepCounters, counters: StepCounters, seconds: float) -> tuple[float | None, ...]:
        """Returns the rates between two samples.

        They are: tokens per second of decoding and learning time, the same for plain decoding, acceptance length, and
        tokens per second of elapsed time. Speed without drafts is measured if steps without drafts took most of the
        decoding time; else the controller estimates it.
        """
        tokens, steps = counters.tokens - before.tokens, counters.steps - before.steps
        decoding = counters.decode_seconds - before.decode_seconds
        if not steps or decoding <= 0:
            return None, None, None, 0.0
        busy = decoding + counters.learn_seconds - before.learn_seconds
        plain_tokens = counters.plain_tokens - before.plain_tokens
        plain_seconds = counters.plain_seconds - before.plain_seconds
        is_measured = plain_seconds > 0.5 * decoding
        plain = plain_tokens / plain_seconds if is_measured else self._control().get("goodput_plain")
        return tokens / busy, plain, 1 + (counters.accepted - before.accepted) / steps, tokens / max(seconds, 1e-9)

    def _control(self) -> dict[str, Any]:
        control = self._engine.scheduler.control
        return control.report() if isinstance(control, Controller) else {}

    def _learning(self) -> dict[str, Any]:
        learning = self._engine.scheduler.loop.learning
        if isinstance(learning, BackgroundLearning):
            return learning.statistics()
        if isinstance(learning, InlineLearning):
            return {"rounds": learning.num_rounds, "rows": learning.num_rows, "drifts": learning.schedule.num_drifts}
        return {}

    def _notice(self) -> None:
        """Adds a mark for each event since the last sample: of learning, a drift, drafting switched on or off."""
        learning, control = self._learning(), self._control()
        events = learning.get("events", [])
        now = {
            "drifts": learning.get("drifts", 0),
            "events": learning.get("num_events", 0),
            "is_drafting": control.get("is_drafting", True),
        }
        num_new = now["events"] - self._seen["events"]
        for event in events[-num_new:] if num_new > 0 else []:
            at = datetime.fromisoformat(event["at"]).timestamp()  # its own time: a busy learning process reports late
            self._mark(event["kind"], event.get("reason", ""), at, event["version"])
        if now["drifts"] > self._seen["drifts"]:
            self._mark("drift", "the traffic has moved")
        if now["is_drafting"] != self._seen["is_drafting"]:
            self._mark("drafting on" if now["is_drafting"] else "drafting off", "by measured cost")
        self._seen = now

    def _mark(self, kind: str, reason: str, at: float | None = None, version: int | None = None) -> None:
        self._marks.append({"at": at or time.time(), "kind": kind, "reason": reason, "version": version})
