"""Which weights of a drafter learn. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from onlinespec.config import check_that, check_types

TUNINGS = ("layers", "all", "adapters")


@dataclass(frozen=True)
class Tuning:
    """Which weights learn, for drafters that offer a choice (`small_lm`).

    Raises:
        ValueError: for an unknown `what`, a rank below 1, or an alpha that is not positive and finite.
    """

    what: str = "layers"  # "layers": all but embedding and LM head; "all"; "adapters": LoRA adapters of the layers
    rank: int = 8  # rank of the adapters
    alpha: float = 16.0  # the product of the adapter matrices is multiplied by alpha / rank

    def __post_init__(self) -> None:
        check_types(self)
        check_that(self.what in TUNINGS, "tuning", self.what, f"one of {', '.join(TUNINGS)}")
        check_that(self.rank >= 1, "adapter rank", self.rank, "at least 1")
        check_that(0 < self.alpha < float("inf"), "adapter alpha", self.alpha, "positive")
