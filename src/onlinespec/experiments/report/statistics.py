"""The statistics that a report shows of a run: name, definition and number format of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from statistics import median
from typing import NamedTuple

from onlinespec.experiments.report_schema import Run, Totals, Window
from onlinespec.learning.rounds import Round


class Spread(NamedTuple):
    """Median and range of one statistic over several runs."""

    median: float
    low: float
    high: float


class Metric(NamedTuple):
    """A statistic that is plotted over the stream and listed per segment."""

    title: str
    unit: str
    of: Callable[[Totals | Window], float]
    digits: int  # after the decimal point


METRICS = (
    Metric("Acceptance length", "tokens per step", lambda counted: counted.acceptance_length, 2),
    Metric("Net tokens per second", "tokens per second", lambda counted: counted.tokens_per_second, 1),
)


class Statistic(NamedTuple):
    """A column of the table on learning."""

    title: str
    of: Callable[[Run], float | None]
    digits: int  # after the decimal point, at most
    meaning: str
    good_below: float | None = None  # values below are marked good, values above bad; None marks nothing


def _told(name: str) -> Callable[[Run], float | None]:
    """Returns a function that gets a field of a run's telemetry; None without telemetry."""
    return lambda run: getattr(run.telemetry, name, None)


def _num_rounds(run: Run) -> float | None:
    return sum(each.is_update for each in rounds_of(run)) or None


def _final_distance(run: Run) -> float | None:
    rounds = rounds_of(run)
    return rounds[-1].distance if rounds else None


LEARNING_STATISTICS = (
    Statistic("Rounds", _num_rounds, 0, "Updates of the drafter."),
    Statistic(
        "Rows",
        lambda run: run.telemetry.num_rows or None if run.telemetry else None,
        0,
        "Verified positions, each measured with the weights that drafted it. Figures per row are means over them, so "
        "that learners compare whether they had many rounds or few.",
    ),
    Statistic(
        "Token loss per row",
        _told("token_loss_per_row"),
        3,
        "Cross-entropy of the committed tokens, in nats, whichever loss is trained. Lower is better.",
    ),
    Statistic(
        "Regret per row, at most",
        _told("kl_per_row"),
        3,
        "KL divergence from target to drafter, in nats. Against whatever weights, the regret is no larger. Lower is "
        "better.",
    ),
    Statistic(
        "Regret per row vs frozen",
        _told("regret_vs_frozen_per_row"),
        3,
        "The same, less that of the drafter as it started on the same rows. Below zero, learning has brought more than "
        "it spoilt.",
        good_below=0.0,
    ),
    Statistic(
        "Regret per row vs best expert",
        _told("regret_vs_best_expert_per_row"),
        3,
        "Of ensembles: the loss that is trained, on what its rounds trained, less that of the expert which did best "
        "over the whole stream. Near zero, the best was found; below zero, it was beaten.",
    ),
    Statistic(
        "Hint error",
        _told("hint_error_ratio"),
        2,
        "Of learners that play a hint, a guess of the next gradient: squared errors of the hints over squared "
        "gradients. Below 1 hints helped, above 1 they misled.",
        good_below=1.0,
    ),
    Statistic(
        "Hint error in geometry",
        _told("direction_hint_error_ratio"),
        2,
        "The same of the directions that the learner's geometry makes of gradients: what the weights move along.",
        good_below=1.0,
    ),
    Statistic(
        "Gradient cosine",
        _told("gradient_cosine"),
        2,
        "Of each round's gradient with the one before, mean over the rounds. Above a half, the last gradient is a "
        "useful hint where both are of a size. Rounds of more rows hold less noise, and are more alike.",
    ),
    Statistic(
        "Distance from start",
        _final_distance,
        3,
        "Euclidean, of the last round's weights from the first's. Neither good nor bad: how much was learned, or "
        "forgotten.",
    ),
    Statistic(
        "Learning, seconds",
        lambda run: run.totals.learn_seconds,
        1,
        "Time spent learning between steps, which tokens per second count.",
    ),
    Statistic(
        "Measuring, seconds",
        lambda run: run.totals.diagnostic_seconds if run.telemetry else None,
        1,
        "Time spent on the figures of this page, which nothing else counts.",
    ),
)


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Returns the spread of the finite values; None if there are none.

    >>> spread_of([1.5, None, 1.0, 2.5])
    Spread(median=1.5, low=1.0, high=2.5)
    """
    known = [value for value in values if value is not None and isfinite(value)]
    return Spread(median(known), min(known), max(known)) if known else None


def rounds_of(run: Run) -> tuple[Round, ...]:
    """Returns the rounds of a run; none without telemetry. The last may be no update, see `Round.is_update`."""
    return run.telemetry.rounds if run.telemetry else ()


def number(value: float | None, digits: int) -> str:
    """Formats a number for display, with a typographic minus sign, and none before zero.

    >>> number(-1234.56, 1), number(-0.001, 2), number(None, 2)
    ('−1,234.6', '0.00', '–')
    """
    if value is None:
        return "–"
    text = f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 and text.strip("0.,") else text
