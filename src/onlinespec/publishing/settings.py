"""How sure a comparison must be before other weights are served. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import MAX_DRAFT_TOKENS, check_that, check_types


@dataclass(frozen=True)
class PublishConfig:
    """What decides which weights are served: on how many requests they are compared, and how sure that must be."""

    test_looks: tuple[int, ...] = (4, 8, 16, 32)  # requests after which a candidate is looked at; the last decides
    canary_looks: tuple[int, ...] = (16, 32, 64)  # and a promoted version, against the one before
    most_pause: int = 64  # requests between a candidate that was refused and the next: 0, 8, 16, up to so many
    max_rows: int = 64  # of a request that weights are compared on; bounds what a long answer can cost
    megabytes: float = 64.0  # of requests that wait to be looked at
    num_draft_tokens: int = 4  # K that acceptance is compared at
    level: float = 0.05  # chance that one trial promotes, or one watch takes back, what makes no difference

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("test_looks", "canary_looks"):
            looks = getattr(self, name)
            is_rising = list(looks) == sorted(set(looks)) and bool(looks)
            check_that(is_rising and looks[0] >= 4, name, looks, "rising, from at least 4 on; of fewer, chance decides")
        check_that(self.most_pause >= 0, "most_pause", self.most_pause, "0 or a count")
        check_that(self.max_rows >= 2, "max_rows", self.max_rows, "at least 2")
        check_that(0 < self.megabytes < float("inf"), "megabytes", self.megabytes, "positive")
        check_that(
            1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS,
            "num_draft_tokens",
            self.num_draft_tokens,
            f"between 1 and {MAX_DRAFT_TOKENS}",
        )
        check_that(0 < self.level < 0.5, "level", self.level, "above 0 and below 0.5")
