"""Limits of the scheduler. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import check_that, check_types


@dataclass(frozen=True)
class Limits:
    """Limits of what a scheduler runs and holds at once."""

    max_running: int = 16
    """Maximum number of requests that decode at once."""
    max_waiting: int = 256
    """Maximum number of waiting requests; further ones are refused, over HTTP with status 429."""
    cache_megabytes: float = 1024.0
    """Memory for keys, values and hidden states of running requests, in megabytes."""
    prefill_tokens: int = 128
    """Prompt tokens to prefill between two decode steps while other requests run."""
    prefill_alone: int = 512
    """Prompt tokens to prefill in one forward pass while no request runs."""

    def __post_init__(self) -> None:
        check_types(self)
        check_that(self.max_running >= 1, "max_running", self.max_running, "at least 1")
        check_that(self.max_waiting >= 0, "max_waiting", self.max_waiting, "0 or a count")
        check_that(0 < self.cache_megabytes < float("inf"), "cache_megabytes", self.cache_megabytes, "positive")
        for name in ("prefill_tokens", "prefill_alone"):
            check_that(getattr(self, name) >= 32, name, getattr(self, name), "at least 32")
