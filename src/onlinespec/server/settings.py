"""What the server is told once, when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import GenerationParams, check_that

MAX_CHOICES = 128  # of one HTTP request: prompts times n


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers; what a request may change is in `defaults`."""

    model: str  # the name clients ask for
    defaults: GenerationParams = GenerationParams()  # for what a request does not say
    api_key: str | None = None  # None: anyone may ask
    max_body_bytes: int = 4_000_000
    body_seconds: float = 60.0  # that a body may take to come
    max_prompt_tokens: int | None = None  # None: what the target's context holds
    retry_after: int = 1  # seconds, told to whom is turned away because the server is full or stopping
    grace_seconds: float = 30.0  # for requests that run when the server is asked to stop

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
