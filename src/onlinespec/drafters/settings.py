"""Settings of which weights of a drafter learn. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import check_that, check_types

TUNINGS = ("layers", "all", "adapters")


@dataclass(frozen=True)
class Tuning:
    """What of a drafter learns, where it leaves a choice (`small_lm`)."""

    what: str = "layers"  # all but embedding and head; "all" of it; or low-rank "adapters" of the layers' products
    rank: int = 8  # of the adapters ...
    alpha: float = 16.0  # ... which count alpha / rank times

    def __post_init__(self) -> None:
        check_types(self)
        check_that(self.what in TUNINGS, "tuning", self.what, f"one of {', '.join(TUNINGS)}")
        check_that(self.rank >= 1, "adapter rank", self.rank, "at least 1")
        check_that(0 < self.alpha < float("inf"), "adapter alpha", self.alpha, "positive")
