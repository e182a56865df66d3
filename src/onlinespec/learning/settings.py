"""How a drafter learns, as numbers and names. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onlinespec.config import check_that, check_types

ROW_CHOICES = ("all", "rejected")


@dataclass(frozen=True)
class LearnConfig:
    """How a drafter learns inline. Rows are verified positions; a round trains each of its rows once."""

    learner: str = "online_gradient"
    step_size: float | None = None  # None: by how many weights learn, 1e-3 for a million (`learners/step_sizes.py`)
    geometry: str = "preconditioned"  # or "diagonal", "euclidean"
    clip_norm: float = 1.0
    full_loss: float | None = None  # loss of all drafting depths together below which the diagonal geometries' steps
    # shorten in proportion, and of the first depth alone below which rounds become rarer; 0 for never; None for 4 nats
    # with cross-entropies, and never with other losses
    options: Mapping[str, Any] = field(default_factory=dict)  # what this learner takes beside the three above
    loss: str = "auto"  # by how requests decode: mostly the committed token when greedy, the whole row when sampled
    rows: str = "all"  # or "rejected": count only rows that refused a drafted token
    min_interval: int = 16  # steps between rounds while they bring something ...
    max_interval: int = 128  # ... and once they don't; up to fourfold where the loss is small, equal ones stay fixed
    requests_per_round: int = 0  # rounds after so many finished requests instead of steps; 0 for steps
    least_gain: float = 0.004  # of the loss, per round; rounds that bring less become rarer
    max_rows: int = 64  # newest rows a round trains; bounds what a long answer can cost
    replay_every: int = 6  # every so many rounds rows of a stored request join; 0 for no memory
    replay_megabytes: float = 64.0  # of memory
    replay_minutes: float = float("inf")  # after which a request is forgotten
    budget: float = 0.08  # most of decoding time that learning may take; inf for no limit
    round_cost: float = 1.0  # what a round costs, in steps, whatever its rows: what the budget is counted in ...
    row_cost: float = 0.03  # ... and what each of its rows adds
    telemetry: bool = False  # measure regret, gradients and drift beside learning, timed apart

    def __post_init__(self) -> None:
        check_types(self)
        check_that(0 <= (self.step_size or 0) < float("inf"), "step_size", self.step_size, "0 or a positive number")
        check_that(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")
        check_that(0 <= (self.full_loss or 0) < float("inf"), "full_loss", self.full_loss, "0 or a positive number")
        check_that(self.rows in ROW_CHOICES, "rows", self.rows, f"one of {', '.join(ROW_CHOICES)}")
        check_that(self.min_interval >= 1, "min_interval", self.min_interval, "at least 1")
        check_that(
            self.max_interval >= self.min_interval,
            "max_interval",
            self.max_interval,
            f"at least min_interval ({self.min_interval})",
        )
        check_that(
            self.requests_per_round >= 0, "requests_per_round", self.requests_per_round, "0 (by steps) or a count"
        )
        check_that(self.max_rows >= 1, "max_rows", self.max_rows, "at least 1")
        check_that(self.least_gain >= 0, "least_gain", self.least_gain, "0 or a positive number")
        check_that(self.replay_every >= 0, "replay_every", self.replay_every, "0 (no memory) or a number of rounds")
        check_that(0 < self.replay_megabytes < float("inf"), "replay_megabytes", self.replay_megabytes, "positive")
        check_that(self.replay_minutes > 0, "replay_minutes", self.replay_minutes, "positive; inf for ever")
        check_that(self.budget > 0, "budget", self.budget, "positive; inf for no limit")
        check_that(0 <= self.round_cost < float("inf"), "round_cost", self.round_cost, "0 or a positive number")
        check_that(0 < self.row_cost < float("inf"), "row_cost", self.row_cost, "positive")
