"""Summaries of learners for the report: medians and spreads over runs (repeats and seeds) at one temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan
from statistics import median
from typing import NamedTuple

from onlinespec import registry
from onlinespec.experiments.report.statistics import (
    LEARNING_STATISTICS,
    Metric,
    Spread,
    Statistic,
    _told,
    number,
    rounds_of,
    spread_of,
)
from onlinespec.experiments.report_schema import Report, Run, Segment, Totals

PLAIN, FROZEN = registry.NONE, registry.FROZEN  # the controls: plain decoding, and drafting without learning
_CONTROL_RANK = {FROZEN: 1, PLAIN: 2}


class Place(NamedTuple):
    """The position of a segment in the stream."""

    segment: int  # its index in the records
    data: str
    start: int  # requests before it
    length: int  # requests in it


class Points(NamedTuple):
    """The points of a learner's curve, one per window; NaN where a segment is missing."""

    requests: list[float]
    medians: list[float]
    lows: list[float]
    highs: list[float]


@dataclass(frozen=True)
class LearnerSummary:
    """All runs of one learner at one temperature."""

    learner: str
    runs: tuple[Run, ...]

    @cached_property
    def measured(self) -> tuple[Totals, ...]:
        """The totals of the runs with at least one request."""
        return tuple(run.totals for run in self.runs if run.totals.requests)

    @cached_property
    def with_telemetry(self) -> tuple[Run, ...]:
        """The runs with telemetry of at least one round."""
        return tuple(run for run in self.runs if run.totals.requests and rounds_of(run))

    def statistic(self, statistic: Statistic) -> Spread | None:
        """Returns the spread of a statistic on learning; None if no run has it."""
        return spread_of(statistic.of(run) for run in self.runs if run.totals.requests)

    def spread(self, name: str) -> Spread | None:
        """Returns the spread of a field of the totals; None if no run has it."""
        return spread_of(getattr(totals, name) for totals in self.measured)

    def segment_spread(self, index: int, metric: Metric) -> Spread | None:
        """Returns the spread of a metric in one segment; None if no run has requests there."""
        return spread_of(metric.of(segment) for segment in self.segments(index) if segment.requests)

    def segments(self, index: int) -> list[Segment]:
        """Returns this segment of every run that has it."""
        return [segment for run in self.runs for segment in run.segments if segment.index == index]

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each position, the median over the runs that drafted that many tokens."""
        rows = [totals.acceptance_by_position for totals in self.measured]
        width = max(map(len, rows), default=0)
        return [median(row[i] for row in rows if i < len(row)) for i in range(width)]

    @property
    def num_compared(self) -> int:
        """Requests, over all runs, whose output was compared with plain decoding."""
        return sum(totals.requests for totals in self.measured if totals.identical_to_plain is not None)

    @property
    def ties(self) -> int:
        """Requests, over all runs, that differ from plain decoding by a near-tie only."""
        return sum(totals.ties for totals in self.measured)

    @property
    def differs(self) -> bool:
        """Whether an answer differs from plain decoding by more than a tie."""
        return any(totals.identical_to_plain is False for totals in self.measured)

    @property
    def identical(self) -> str:
        """Text of the table cell "identical to plain"."""
        if self.differs:
            return "no"
        return f"{self.num_compared - self.ties:,} of {self.num_compared:,}" if self.num_compared else "–"

    def points(self, places: Sequence[Place], metric: Metric) -> Points:
        """Returns the curve of a metric over the windows of all segments."""
        points = Points([], [], [], [])
        for place in places:
            for x, spread in self._windows(place, metric):
                for column, value in zip(points, (x, *(spread or (nan, nan, nan))), strict=False):
                    column.append(value)
        return points

    def _windows(self, place: Place, metric: Metric) -> Iterator[tuple[float, Spread | None]]:
        """Yields (request number, spread) of each window of a segment; one gap if nothing was measured."""
        rows = [segment.windows for segment in self.segments(place.segment) if segment.windows]
        longest = max(rows, key=len, default=())
        if not longest:
            yield place.start + (place.length + 1) / 2, None
        start = place.start
        for i, window in enumerate(longest):
            values = (metric.of(row[i]) for row in rows if i < len(row) and row[i].requests)
            yield start + (window.requests + 1) / 2, spread_of(value for value in values if value > 0)
            start += window.requests


@dataclass(frozen=True)
class Group:
    """All learners at one temperature, which are compared with each other."""

    temperature: float
    learners: tuple[LearnerSummary, ...]

    @cached_property
    def measured(self) -> tuple[LearnerSummary, ...]:
        """The learners with at least one request."""
        return tuple(learner for learner in self.learners if learner.measured)

    @cached_property
    def places(self) -> list[Place]:
        """The segments of the stream; the length of each is the longest in any run."""
        furthest: dict[int, tuple[int, str]] = {}
        for segment in (segment for learner in self.learners for run in learner.runs for segment in run.segments):
            length = max(segment.requests, sum(window.requests for window in segment.windows))
            if length > furthest.get(segment.index, (0, ""))[0]:
                furthest[segment.index] = (length, segment.data)
        places, start = [], 0
        for index, (length, data) in sorted(furthest.items()):
            places.append(Place(index, " ".join(data.split()), start, length))
            start += length
        return places

    def segment_row(self, index: int, metric: Metric) -> list[tuple[Spread | None, bool]]:
        """Returns for every learner the spread of a metric in one segment, and whether it is the highest."""
        spreads = [learner.segment_spread(index, metric) for learner in self.measured]
        highest = max((spread.median for spread in spreads if spread), default=0.0)
        return [(spread, len(spreads) > 1 and _median(spread) == highest) for spread in spreads]

    @property
    def num_runs(self) -> int:
        """The largest number of runs of any learner."""
        return max((len(learner.measured) for learner in self.measured), default=0)

    @property
    def num_positions(self) -> int:
        """The largest number of drafted positions of any learner."""
        return max((len(learner.acceptance_by_position) for learner in self.measured), default=0)

    @property
    def has_windows(self) -> bool:
        """Whether there is anything to plot."""
        return any(segment.windows for learner in self.measured for run in learner.runs for segment in run.segments)

    @property
    def is_uneven(self) -> bool:
        """Whether the runs saw different numbers of requests, as in an interrupted stream."""
        return len({totals.requests for learner in self.measured for totals in learner.measured}) > 1

    @property
    def seconds_measuring(self) -> Spread | None:
        """Seconds spent on telemetry, summed over learners; the spread is over repeats. None without telemetry."""
        by_repeat: dict[tuple[int, int], float] = {}
        for run in (run for learner in self.measured for run in learner.runs):
            key = run.seed, run.repeat
            by_repeat[key] = by_repeat.get(key, 0.0) + run.totals.diagnostic_seconds
        return spread_of(seconds for seconds in by_repeat.values() if seconds)

    @property
    def drafting(self) -> tuple[LearnerSummary, ...]:
        """The learners that draft: all but plain decoding."""
        return tuple(learner for learner in self.measured if learner.learner != PLAIN)

    @property
    def with_telemetry(self) -> tuple[LearnerSummary, ...]:
        """The learners with telemetry."""
        return tuple(learner for learner in self.measured if learner.with_telemetry)

    @property
    def learning_statistics(self) -> list[Statistic]:
        """The statistics on learning that some learner has, with three significant digits of the largest value."""
        statistics = []
        for statistic in LEARNING_STATISTICS:
            spreads = [spread for learner in self.with_telemetry if (spread := learner.statistic(statistic))]
            if spreads:
                largest = int(max(abs(spread.median) for spread in spreads))
                digits = 3 - len(str(largest)) if largest else 3
                statistics.append(statistic._replace(digits=max(0, min(statistic.digits, digits))))
        return statistics

    @property
    def best(self) -> LearnerSummary | None:
        """The fastest learner; a control if nothing learns."""
        by_speed = sorted(self.measured, key=lambda learner: -_median(learner.spread("tokens_per_second")))
        return min(by_speed, key=lambda learner: _CONTROL_RANK.get(learner.learner, 0), default=None)

    @property
    def differing(self) -> list[str]:
        """Names of the learners with output that differs from plain decoding by more than a tie."""
        return [learner.learner for learner in self.measured if learner.differs]

    @property
    def verdict(self) -> str:
        """A sentence on whether the output is identical to plain decoding."""
        compared, ties = (sum(getattr(learner, name) for learner in self.drafting) for name in ("num_compared", "ties"))
        if self.differing:
            return f"Output differs from plain decoding with {', '.join(self.differing)}: requests.jsonl says where."
        if not self.drafting:
            return "Nothing was drafted."
        if not compared:
            return "Output was not compared with plain decoding."
        text = f"Output identical to plain decoding on {compared - ties:,} of {compared:,} answers"
        return f"{text}; the other {ties:,} first differ at a near-tie of the target." if ties else f"{text}."

    @property
    def headline(self) -> str:
        """The main results as a sentence."""
        best = self.best
        if best is None:
            return "Nothing was measured."
        learning = [learner for learner in self.measured if learner.learner not in _CONTROL_RANK]
        opening = f"Fastest of {len(learning)} learners, {best.learner}" if len(learning) > 1 else best.learner
        speedups = [
            f"{number(spread.median, 2)}× {other}{' (slower)' if round(spread.median, 2) < 1 else ''}"
            for name, other in (("speedup_vs_none", "plain decoding"), ("speedup_vs_frozen", "frozen"))
            if (spread := best.spread(name)) and best.learner not in (name.removeprefix("speedup_vs_"), PLAIN)
        ]
        text = " and ".join(speedups) or f"{number(_median(best.spread('tokens_per_second')), 1)} tokens per second"
        if learning:
            text += f", learning counted ({number(100 * _median(best.spread('learning_share')), 1)} % of decode time)"
        return f"{opening}: {text}. {self.verdict}"

    @property
    def regret_sentence(self) -> str:
        """A sentence on the regret against `frozen`, per row because learners have different numbers of rounds."""
        by_row = _told("regret_vs_frozen_per_row")
        regrets = {learner.learner: spread_of(map(by_row, learner.with_telemetry)) for learner in self.with_telemetry}
        known = {name: spread.median for name, spread in regrets.items() if spread}
        if not known:
            return "No regret was measured."
        best = min(known, key=lambda name: known[name])
        opening = f"Of {len(known)} learners, {best} did best" if len(known) > 1 else best
        side, outcome = ("below", "paid") if known[best] < 0 else ("above", "has not paid")
        return f"{opening}: {number(abs(known[best]), 2)} nats a row {side} frozen, so learning {outcome}."


def learner_names(report: Report) -> list[str]:
    """Returns the learners of a report: controls first, the others in order of appearance."""
    names = dict.fromkeys(run.learner for run in report.runs)
    return sorted(names, key=lambda name: -_CONTROL_RANK.get(name, 0))


def groups_of(report: Report) -> list[Group]:
    """Returns the runs, grouped by temperature and learner."""
    groups = []
    for temperature in sorted({run.temperature for run in report.runs}):
        runs = [run for run in report.runs if run.temperature == temperature]
        by_name = {name: tuple(run for run in runs if run.learner == name) for name in learner_names(report)}
        learners = (LearnerSummary(name, its_runs) for name, its_runs in by_name.items() if its_runs)
        groups.append(Group(temperature, tuple(learners)))
    return groups


def _median(spread: Spread | None) -> float:
    return spread.median if spread else 0.0
