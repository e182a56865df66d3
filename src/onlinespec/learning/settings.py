"""Settings of learning. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onlinespec.config import check_that, check_types

ROW_CHOICES = ("all", "rejected")


@dataclass(frozen=True)
class LearnConfig:
    """How a drafter learns. Rows are verified positions; a round trains each of its rows once."""

    learner: str = "online_gradient"  # a table name or "pkg.module:Class"
    step_size: float | None = None  # None: by the number of weights, 1e-3 for a million (`learners/step_sizes.py`)
    geometry: str = "preconditioned"  # or "diagonal", "euclidean"
    clip_norm: float = 1.0  # maximum norm of all gradients together; inf for no limit
    full_loss: float | None = None  # below this loss, summed over drafting depths, the steps of the diagonal geometries
    # shorten in proportion; below this loss at the first depth, rounds become rarer. 0 for never. None: 4 nats for
    # cross-entropies, never for other losses
    options: Mapping[str, Any] = field(default_factory=dict)  # further settings of the learner
    loss: str = "auto"  # mostly the committed token for greedy requests, the whole row for sampled ones
    rows: str = "all"  # or "rejected": count only rows that rejected a drafted token
    min_interval: int = 16  # steps between rounds while they help ...
    max_interval: int = 128  # ... and when they do not; up to fourfold for a small loss. Equal intervals are fixed
    requests_per_round: int = 0  # a round after this many finished requests, instead of steps; 0 counts steps
    least_gain: float = 0.004  # minimum gain in loss per round; if rounds gain less, they become rarer
    max_rows: int = 64  # maximum number of fresh rows that a round trains, the newest
    replay_every: int = 6  # in one of so many rounds, rows of a stored request join; 0 for no replay
    replay_megabytes: float = 64.0  # size of the replay memory
    replay_minutes: float = float("inf")  # age at which a stored request is dropped
    budget: float = 0.08  # maximum share of decoding time for learning; inf for no limit
    round_cost: float = 1.0  # cost of a round in decoding steps, without its rows, for the budget ...
    row_cost: float = 0.03  # ... and of each of its rows
    telemetry: bool = False  # measure regret, gradients and drift; not counted as learning time

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
