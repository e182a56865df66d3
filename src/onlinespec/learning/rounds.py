"""What telemetry notes of every round, and what that comes to over a run. Imports no torch: reports read it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msgspec import Struct


class Round(Struct, frozen=True, kw_only=True):
    """One update of the drafter, as telemetry saw it: on all rows served since the one before, with the weights that
    drafted them."""

    step: int  # decoded so far
    request: int  # finished so far
    data: str
    interval: float  # steps to the next round, as the schedule has it
    loss: float | None  # the one that is trained, on the round's fresh rows, before the update; None without one
    kl: float  # KL(target || draft) of raw rows, nats
    token_loss: float  # cross-entropy of the committed tokens, nats
    acceptance_prob: float  # 1 - total variation of raw rows
    frozen_kl: float  # the same of the drafter as it started
    frozen_acceptance_prob: float
    acceptance_length_bound: float  # what the losses at all drafting depths guarantee, see `bounds.py`
    distance: float  # of the weights from the start
    num_rows: int = 0  # that it stands for; 0 in files that are older than this count
    is_update: bool = True  # False: at the end of a run, the rows for which no update came any more
    gradient_cosine: float | None = None  # of what was descended and what the round before descended
    moved: float | None = None  # of the weights, since some rounds ago
    function_moved: float | None = None  # mean total variation on fixed rows, since some rounds ago
    agreement: float | None = None  # share of the fresh rows whose first draft would have been the committed token
    is_undoing: bool = False  # whether it took back the round before, whose weights scored worse than those before it
    learner: dict[str, Any] = {}  # what the learner itself reports: hint errors, meta weights


class TelemetrySummary(Struct, frozen=True, kw_only=True):
    """How a drafter learned, over a run. Regrets are in nats.

    Sums over rounds are what the theory bounds; they grow with the number of rounds, so learners that had different
    numbers of them compare by the figures per row alone: means over the rounds, each by its `num_rows`.
    """

    regret_upper: float  # against any comparator: the sum of kl
    regret_vs_frozen: float
    regret_vs_best_expert: float | None = None  # in the loss that is trained
    num_rows: int = 0  # that the rounds stand for
    token_loss_per_row: float | None = None  # None where no rows were counted
    kl_per_row: float | None = None  # regret_upper by the row
    regret_vs_frozen_per_row: float | None = None
    regret_vs_best_expert_per_row: float | None = None  # the best by the row
    hint_error_ratio: float | None = None  # below 1, the hints were better than none
    direction_hint_error_ratio: float | None = None  # the same in the learner's geometry
    gradient_cosine: float | None = None  # mean over the rounds that have one
    acceptance_length_bound: float | None  # mean over the steps; None where none were counted
    rounds: tuple[Round, ...]


def summarise(rounds: Sequence[Round]) -> TelemetrySummary | None:
    """Sums over rounds, and means over the rows and steps that they stand for; None without any."""
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
    """None where nothing has weight."""
    whole = math.fsum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / whole if whole else None


def _per_row(rounds: Sequence[Round], values: Sequence[float]) -> float | None:
    return weighted_mean(values, [each.num_rows for each in rounds])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _regrets_vs_best_expert(rounds: Sequence[Round]) -> tuple[float | None, float | None]:
    """Summed over rounds, and by the row: each against the expert that was best so counted."""
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
