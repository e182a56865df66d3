"""Settings of the gate: how weights are compared before other ones are served. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import MAX_DRAFT_TOKENS, check_that, check_types


@dataclass(frozen=True)
class PublishConfig:
    """Settings of the gate: how many requests weights are compared on, and at which significance level."""

    test_looks: tuple[int, ...] = (4, 8, 16, 32)  # requests after which a candidate is tested; the last look decides
    canary_looks: tuple[int, ...] = (16, 32, 64)  # the same for a promoted version against the one before
    max_pause: int = 64  # longest pause, in requests, after a refused candidate; refusals in a row pause 0, 8, 16, ...
    max_rows: int = 64  # rows of each request that weights are compared on; bounds the cost of long answers
    megabytes: float = 64.0  # memory for requests that wait to be evaluated
    num_draft_tokens: int = 4  # draft length (K) at which acceptance is compared
    level: float = 0.05  # false positive probability of one candidate test or one canary test, over all its looks

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("test_looks", "canary_looks"):
            looks = getattr(self, name)
            is_rising = list(looks) == sorted(set(looks)) and bool(looks)
            check_that(is_rising and looks[0] >= 4, name, looks, "rising, from at least 4 on; of fewer, chance decides")
        check_that(self.max_pause >= 0, "max_pause", self.max_pause, "0 or a count")
        check_that(self.max_rows >= 2, "max_rows", self.max_rows, "at least 2")
        check_that(0 < self.megabytes < float("inf"), "megabytes", self.megabytes, "positive")
        check_that(
            1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS,
            "num_draft_tokens",
            self.num_draft_tokens,
            f"between 1 and {MAX_DRAFT_TOKENS}",
        )
        check_that(0 < self.level < 0.5, "level", self.level, "above 0 and below 0.5")
