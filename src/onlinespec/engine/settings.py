"""What the engine may hold at once. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import check_that, check_types


@dataclass(frozen=True)
class Limits:
    """What a scheduler may hold at once."""

    max_running: int = 16
    """Requests that decode at once."""
    max_waiting: int = 256
    """Requests that wait for their turn; more are turned away, with 429 over HTTP."""
    cache_megabytes: float = 1024.0
    """Memory for the keys, values and features of requests that run."""
    prefill_tokens: int = 128
    """Prompt tokens that are read between two steps of requests that run already."""
    prefill_alone: int = 512
    """The same while nothing else runs."""

    def __post_init__(self) -> None:
        check_types(self)
        check_that(self.max_running >= 1, "max_running", self.max_running, "at least 1")
        check_that(self.max_waiting >= 0, "max_waiting", self.max_waiting, "0 or a count")
        check_that(0 < self.cache_megabytes < float("inf"), "cache_megabytes", self.cache_megabytes, "positive")
        for name in ("prefill_tokens", "prefill_alone"):
            check_that(getattr(self, name) >= 32, name, getattr(self, name), "at least 32")
