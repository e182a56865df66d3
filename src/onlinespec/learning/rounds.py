"""The records of telemetry: one per round, and their summary over a run. Imports no torch, because reports read
them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msgspec import Struct


class Round(Struct, frozen=True, kw_only=True):
    """Measurements of one round, on all rows served since the round before, with the weights that drafted them."""

    step: int  # steps decoded so far
    request: int  # requests finished so far
    data: str  # domain tag
    interval: float  # steps to the next round
    loss: float | None  # training loss on the fresh rows, before the update; None if there was no update
    kl: float  # KL(target || draft) of raw rows, nats
    token_loss: float  # cross-entropy of the committed tokens, nats
    acceptance_prob: float  # 1 - total variation of raw rows
    frozen_kl: float  # the same for the initial weights
    frozen_acceptance_prob: float
    acceptance_length_bound: float  # guaranteed by the losses at all drafting depths, see `bounds.py`
    distance: float  # Euclidean distance of the weights from the initial ones
    num_rows: int = 0  # rows that were measured; 0 in files older than this field
    is_update: bool = True  # False for the rest of a run, after its last update
    gradient_cosine: float | None = None  # cosine between this round's gradient and the one before
    moved: float | None = None  # distance of the weights from those 16 rounds ago
    function_moved: float | None = None  # mean total variation on fixed rows, from 16 rounds ago
    agreement: float | None = None  # share of fresh rows whose first draft would have been the committed token
    is_undoing: bool = False  # whether this round undid the round before, whose weights scored worse than those before
    learner: dict[str, Any] = {}  # the learner's own report: hint errors, meta weights


class TelemetrySummary(Struct, frozen=True, kw_only=True):
    """Summary of learning over a run. Regrets are in nats.

    The theory bounds sums over rounds, which grow with the number of rounds. To compare learners with different numbers
    of rounds, use the fields per row: means over rounds, weighted by `num_rows`.
    """

    regret_upper: float  # upper bound of the regret against any comparator: the sum of kl
    regret_vs_frozen: float
    regret_vs_best_expert: float | None = None  # in the training loss
    num_rows: int = 0  # rows that were measured
    token_loss_per_row: float | None = None  # None if no rows were counted
    kl_per_row: float | None = None  # regret_upper per row
    regret_vs_frozen_per_row: float | None = None
    regret_vs_best_expert_per_row: float | None = None  # against the expert that is best per row
    hint_error_ratio: float | None = None  # squared hint error over squared gradient; below 1, hints helped
    direction_hint_error_ratio: float | None = None  # the same in the learner's geometry
    gradient_cosine: float | None = None  # mean over the rounds that have one
    acceptance_length_bound: float | None  # mean over steps; None if no steps were counted
    rounds: tuple[Round, ...]


def summarise(rounds: Sequence[Round]) -> TelemetrySummary | None:
    """Summarises the rounds of a run; None if there are none."""
    if not rounds:
        return None
    steps = [each.step - before for each, before in zip(rounds, (0, *(r.step for r in rounds)), strict=False)]
    sum_vs_best, mean_vs_best = _regrets_vs_best_expert(rounds)
    return TelemetrySummary(
        regret_upper=math.fsum(r.kl for r in rounds),
        regret_vs_frozen=math.fsum(r.kl - r.frozen_kl for r in rounds),
        regret_vs_best_expert=sum_vs_best,
        num_rows=sum(r.num_rows for r in rounds),
        token_loss_per_row=_per_row(rounds, [r.token_loss for r in rounds]),
        kl_per_row=_per_row(rounds, [r.kl for r in rounds]),
        regret_vs_frozen_per_row=_per_row(rounds, [r.kl - r.frozen_kl for r in rounds]),
        regret_vs_best_expert_per_row=mean_vs_best,
        hint_error_ratio=_hint_ratio(rounds, ""),
        direction_hint_error_ratio=_hint_ratio(rounds, "direction_"),
        gradient_cosine=_mean([r.gradient_cosine for r in rounds if r.gradient_cosine is not None]),
        acceptance_length_bound=weighted_mean([r.acceptance_length_bound for r in rounds], steps),
        rounds=tuple(rounds),
    )


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """Returns the weighted mean; None if all weights are 0."""
    whole = math.fsum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / whole if whole else None


def _per_row(rounds: Sequence[Round], values: Sequence[float]) -> float | None:
    return weighted_mean(values, [each.num_rows for each in rounds])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _regrets_vs_best_expert(rounds: Sequence[Round]) -> tuple[float | None, float | None]:
    """The regret against the best expert, summed over rounds, and per row; each has its own best expert."""
    compared = [(each, each.loss, each.learner["expert_losses"]) for each in rounds if "expert_losses" in each.learner]
    names = compared[0][2] if compared else ()
    gaps = [[loss - experts[name] for _, loss, experts in compared if loss is not None] for name in names]
    finite = [gap for gap in gaps if all(map(math.isfinite, gap))]  # the others diverged
    sums = [math.fsum(gap) for gap in finite]
    means = [_per_row([each for each, loss, _ in compared if loss is not None], gap) for gap in finite]
    return max(sums, default=None), max((mean for mean in means if mean is not None), default=None)


def _hint_ratio(rounds: Sequence[Round], prefix: str) -> float | None:
    pairs = [
        (r.learner[f"{prefix}hint_error"], r.learner[f"{prefix}gradient_norm"])
        for r in rounds
        if f"{prefix}hint_error" in r.learner
    ]
    of_gradients = math.fsum(norm for _, norm in pairs)
    return math.fsum(error for error, _ in pairs) / of_gradients if of_gradients else None
