"""The settings of the server, fixed when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import GenerationParams, check_that

MAX_CHOICES = 128  # in one HTTP request: number of prompts times n


@dataclass(frozen=True)
class ServerSettings:
    """The settings of the server. Those in `defaults` can be overridden by each request."""

    model: str  # model name in the API
    defaults: GenerationParams = GenerationParams()  # generation settings for fields that a request leaves out
    api_key: str | None = None  # that clients must send; None requires no key
    max_body_bytes: int = 4_000_000  # larger request bodies get 413
    body_seconds: float = 60.0  # time limit for receiving a request body
    max_prompt_tokens: int | None = None  # None: limited by the target's context only
    retry_after: int = 1  # seconds; value of Retry-After in 429 and 503 responses
    grace_seconds: float = 30.0  # that running requests have to finish when the server stops

    def __post_init__(self) -> None:
        check_that(bool(self.model), "model", repr(self.model), "a name")
        check_that(self.api_key != "", "api_key", "empty", "a text, or left out")
        check_that(self.max_body_bytes >= 1, "max_body_bytes", self.max_body_bytes, "at least 1")
        check_that(0 < self.body_seconds < float("inf"), "body_seconds", self.body_seconds, "positive")
        check_that(
            self.max_prompt_tokens is None or self.max_prompt_tokens >= 1,
            "max_prompt_tokens",
            self.max_prompt_tokens,
            "at least 1",
        )
        check_that(self.retry_after >= 1, "retry_after", self.retry_after, "at least 1 second")
        check_that(0 <= self.grace_seconds < float("inf"), "grace_seconds", self.grace_seconds, "0 or a time")
