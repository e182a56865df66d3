"""Prometheus metrics: the engine's current counters, and histograms of HTTP latencies."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onlinespec.engine.step import Learning
from onlinespec.server.engine import Engine, Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one app, in their own registry, so that several apps in a process don't mix."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.http = Counter("onlinespec_http_responses", "HTTP responses.", ["path", "status"], registry=self.registry)
        self._first = Histogram(
            "onlinespec_time_to_first_token_seconds",
            "From an HTTP request's arrival to the first token of an answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._between = Histogram(
            "onlinespec_time_between_chunks_seconds",
            "Between two pieces of an answer; a piece is what one step added.",
            buckets=_SHORT_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "onlinespec_request_seconds",
            "From an HTTP request's arrival to the end of its last answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    async def timed(
        self, pieces: AsyncGenerator[tuple[int, Piece], None], began: float
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """Passes pieces on and records their latencies.

        Args:
            pieces: (index of the answer, piece), as from `merged`.
            began: `time.perf_counter` when the HTTP request arrived.
        """
        last: dict[int, float] = {}
        try:
            async for index, piece in pieces:
                now = time.perf_counter()
                if index in last:
                    self._between.observe(now - last[index])
                elif piece.token_ids:
                    self._first.observe(now - began)
                last[index] = now
                yield index, piece
            self._whole.observe(time.perf_counter() - began)
        finally:
            await pieces.aclose()


class _EngineCollector(Collector):
    """Reads an engine's counters at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        totals, scheduler = self._engine.totals, self._engine.scheduler
        stats = totals.stats
        finished = CounterMetricFamily(
            "onlinespec_requests", "Requests that ended, one for each choice.", labels=["finish_reason"]
        )
        for reason, count in dict(totals.finished).items():
            finished.add_metric([reason], count)
        yield finished
        for name, help_text, value in (
            ("prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
            ("cached_prompt_tokens", "Of these, tokens found in the prefix cache.", totals.cached_tokens),
            ("tokens", "Tokens of answers.", stats.tokens),
            ("steps", "Verifications by the target.", stats.steps),
            ("drafted_tokens", "Tokens that were drafted.", stats.drafted),
            ("accepted_tokens", "Drafted tokens that were kept.", stats.accepted),
            (
                "tokens_beyond_drafter",
                "Tokens of answers beyond the longest text that the drafter can draft for.",
                totals.tokens_beyond_drafter,
            ),
            ("decode_seconds", "Time spent on prefill and decoding.", stats.decode_seconds),
            (
                "learn_seconds",
                "Time in the decoding thread spent on learning, or on handing records to it.",
                stats.learn_seconds,
            ),
        ):
            yield CounterMetricFamily(f"onlinespec_{name}", f"{help_text} Of requests that ended.", value)
        loop = scheduler.loop
        for name, help_text, number in (
            ("requests_waiting", "Requests in the queue.", len(scheduler.waiting)),
            ("requests_prefilling", "Requests whose prompts are being prefilled.", len(scheduler.prefilling)),
            ("requests_running", "Requests that decode.", len(scheduler.running)),
            ("weights_version", "Of the drafter.", loop.drafter.weights.version if loop.drafter else 0),
            ("prefix_cache_bytes", "Of prompts kept for later ones.", loop.prefixes.num_bytes if loop.prefixes else 0),
            ("ready", "Whether the server takes requests.", int(self._engine.is_ready)),
            ("learning", "Whether the drafter learns; 0 once learning has failed.", int(_is_learning(loop.learning))),
        ):
            yield GaugeMetricFamily(f"onlinespec_{name}", help_text, number)


def _is_learning(learning: Learning | None) -> bool:
    return learning is not None and not (getattr(learning, "failure", "") or getattr(learning, "is_frozen", False))


class CountResponses:
    """ASGI middleware: counts responses by route (without parameter values) and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._http = app, metrics.http

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._http.labels(_path(scope), message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _path(scope: Scope) -> str:
    """The path of the declared route; "other" for paths that clients make up, which must not fill the registry."""
    return getattr(scope.get("route"), "path", "other")
