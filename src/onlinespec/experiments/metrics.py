"""From counts to the figures of a report. The ratios of one run are `DecodeStats`' own; those between runs are here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from onlinespec.core import DecodeStats
from onlinespec.experiments.report_schema import Round, Telemetry, Window


def total(stats: Sequence[DecodeStats]) -> DecodeStats:
    """All of it added up."""
    return sum(stats, start=DecodeStats())


def speedup(stats: DecodeStats, control: DecodeStats | None) -> float | None:
    """Ratio of net tokens per second; None without a control that measured something."""
    if control is None or not control.tokens_per_second:
        return None
    return stats.tokens_per_second / control.tokens_per_second


def figures(
    stats: DecodeStats, none: DecodeStats | None, frozen: DecodeStats | None, identical_to_plain: bool | None
) -> dict[str, Any]:
    """The fields that a run's totals and each of its segments share in report.json."""
    return {
        "requests": stats.requests,
        "skipped": stats.skipped,
        "tokens": stats.tokens,
        "steps": stats.steps,
        "acceptance_length": stats.acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "acceptance_by_position": stats.acceptance_by_position,
        "decode_seconds": stats.decode_seconds,
        "learn_seconds": stats.learn_seconds,
        "diagnostic_seconds": stats.diagnostic_seconds,
        "tokens_per_second": stats.tokens_per_second,
        "speedup_vs_none": speedup(stats, none),
        "speedup_vs_frozen": speedup(stats, frozen),
        "identical_to_plain": identical_to_plain,
        "ties": stats.ties,
    }


def windows(stats: Sequence[DecodeStats], size: int) -> tuple[Window, ...]:
    """Consecutive groups of `size` requests; the last may be smaller."""
    groups = [total(stats[i : i + size]) for i in range(0, len(stats), size)]
    return tuple(
        Window(
            requests=group.requests,
            acceptance_length=group.acceptance_length,
            tokens_per_second=group.tokens_per_second,
        )
        for group in groups
    )


def acceptance_length_at(distance: float, num_draft_tokens: int) -> float:
    """Tokens per step if each drafted token is kept with probability 1 - distance: sum_j (1 - distance)^j, j = 0..K.

    Convex and decreasing, so that at a mean distance it bounds the mean from below.

    >>> acceptance_length_at(0.5, 2)
    1.75
    """
    return math.fsum((1 - distance) ** j for j in range(num_draft_tokens + 1))


def distance_bound(kl: float) -> float:
    """The most total variation that a mean KL allows: the lower of Pinsker's bound and Bretagnolle and Huber's.

    >>> distance_bound(0.0), distance_bound(0.02), distance_bound(50.0)
    (0.0, 0.1, 1.0)
    """
    if math.isnan(kl):
        return 1.0
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl))) if kl > 0 else 0.0


def coupled_distance(distance: float) -> float:
    """The largest share of sampled drafts that can differ from the target's token where both take the best of their own
    scores and the same Gumbel noise, from the total variation between their rows: 1 - (1 - d) / (1 + d).

    Concave and increasing, so that at a mean distance it bounds the mean from above.

    >>> coupled_distance(0.0), coupled_distance(0.25), coupled_distance(1.0)
    (0.0, 0.4, 1.0)

    Reference: arXiv:2408.07978.
    """
    return 2 * distance / (1 + distance)


def greedy_distance_bound(token_loss: float) -> float:
    """The largest share of greedy drafts that can differ from the target's token, from that token's mean cross-entropy.

    A draft's likeliest token is another one only if the right one has at most half its probability; then 1 is at most
    2 (1 - probability), and the mean of 1 - exp(-loss) is at most that of the mean loss.

    >>> greedy_distance_bound(math.log(4 / 3)), greedy_distance_bound(3.0)
    (0.5, 1.0)
    """
    return min(1.0, -2 * math.expm1(-token_loss))


def student_quantile(tail: float, degrees: float) -> float:
    """What Student's t exceeds with chance `tail`: Cornish and Fisher's series, to 1 % from 15 degrees of freedom on.

    >>> student_quantile(0.025, 15), student_quantile(0.005, 30)
    (2.131, 2.750)

    Reference: Abramowitz and Stegun, 26.7.5.
    """
    z, n = statistics.NormalDist().inv_cdf(1 - tail), degrees
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / n**power for power, term in enumerate(terms))


def telemetry(rounds: Sequence[Round]) -> Telemetry | None:
    """Sums over rounds, and means over the rows and steps that they stand for; None without any."""
    if not rounds:
        return None
    steps = [each.step - before for each, before in zip(rounds, (0, *(r.step for r in rounds)), strict=False)]
    sum_vs_best, mean_vs_best = _regrets_vs_best_expert(rounds)
    return Telemetry(
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
