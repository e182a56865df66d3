"""The learning budget: a share of decoding work or of time, which is earned, spent by rounds, and saved up to a bound.

There is one budget and two meters. Inline, decoding is counted in steps and learning by a formula, so that the same
requests learn in the same way on every machine. In a thread or process, both are read from clocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class Reading(NamedTuple):
    """Totals since a meter was created, in its own unit."""

    passed: float  # decoding work or time; learning may take a share of it
    taken: float  # by learning


class Meter(Protocol):
    """Measures decoding and learning in one unit."""

    most_saved: float  # maximum number of units that can be saved
    saved_at_start: float  # credit at the start, when a drafter is usually cold
    least: float  # units that must be saved before a round or a comparison begins
    counts_comparisons: bool  # whether comparisons of weights are charged

    def observe_step(self, num_rows: Sequence[int]) -> None:
        """Counts a decoding step, in which the target scored num_rows[i] rows of each request."""

    def observe_round(self, num_rows: int, num_evaluations: float) -> None:
        """Counts a round on this many rows, with this many evaluations with gradient."""

    def read(self) -> Reading:
        """Returns the totals so far."""


class Budget:
    """Learning's share of decoding work or time, and how much of it is left.

    There are two accounts: one of everything that learning takes, and one of rounds and comparisons only, whose share
    can be changed. In a learning process, receiving the records of many streams takes more than 1 % of a core; with one
    account, a share of 1 % would leave nothing for the rounds that make drafting worthwhile again.

    Args:
        share: The share that learning may take; inf for no limit.
        meter: What the share is of.
    """

    def __init__(self, share: float, meter: Meter) -> None:
        self._share = self._work_share = share
        self._meter = meter
        self._saved = self._work_saved = meter.saved_at_start
        self.begin()

    def begin(self) -> None:
        """Starts counting now. Needed if the meter's clock is that of the calling thread."""
        self._start = self._last = self._meter.read()

    def set_share(self, share: float) -> None:
        """Sets the share that rounds and comparisons may take from now on."""
        self._work_share = share

    def observe_step(self, num_rows: Sequence[int] = (1,)) -> None:
        """Counts a decoding step.

        Args:
            num_rows: Rows that the target scored for each request: the drafted tokens and one.
        """
        self._meter.observe_step(num_rows)

    def spend(self, num_rows: int = 0, num_evaluations: float = 0.0) -> None:
        """Charges a round or a comparison that has ended."""
        self._meter.observe_round(num_rows, num_evaluations)
        self._work_saved -= self._settle()

    def has_room(self) -> bool:
        """Whether a round may begin: the cost of earlier ones has been earned again. Updates the accounts."""
        self._settle()
        return math.isinf(self._work_share) or min(self._saved, self._work_saved) >= self._meter.least

    def has_room_to_compare(self) -> bool:
        """Whether a comparison of weights may begin."""
        return self.has_room() or not self._meter.counts_comparisons

    @property
    def spent(self) -> float:
        """Units that learning has taken since `begin`."""
        return self._meter.read().taken - self._start.taken

    @property
    def share_spent(self) -> float:
        """Share that learning has taken since `begin`."""
        return self.spent / max(self._meter.read().passed - self._start.passed, 1e-9)

    def _settle(self) -> float:
        """Books what passed and what was taken since the last call. Returns the latter."""
        now, most = self._meter.read(), self._meter.most_saved
        passed, taken = now.passed - self._last.passed, now.taken - self._last.taken
        self._last = now
        self._saved = min(self._saved + self._share * passed, most) - taken if passed else self._saved - taken
        if passed:
            self._work_saved = min(self._work_saved + self._work_share * passed, most)
        return taken


class StepMeter:
    """Counts in steps of a single request. It reads no clock.

    Args:
        round_cost: Cost of a round without rows, in steps; `measure_round_costs` measures both costs.
        row_cost: Additional cost of each row, in steps.
        max_rows: Maximum number of rows of a round.
    """

    counts_comparisons = False
    _MOST_SAVED = 16  # rounds
    _SAVED_AT_START = 8
    # Cost that a row of another request in the batch adds to a step, in steps of a single request. From tokens per
    # second of 1, 4 and 16 streams at fixed draft lengths, on two processors ("never slower" in
    # benchmarks/results/serving.md): 0.048 to 0.051 with four drafted tokens, 0.06 to 0.08 with one or two, 0.10 to
    # 0.15 with none. The smallest is used, so that learning never takes more than its share.
    _FURTHER_ROW_COST = 0.048

    def __init__(self, round_cost: float, row_cost: float, max_rows: int) -> None:
        self._round_cost, self._row_cost = round_cost, row_cost
        self.least = round_cost + row_cost * max_rows
        self.most_saved, self.saved_at_start = self._MOST_SAVED * self.least, self._SAVED_AT_START * self.least
        self._passed = self._taken = 0.0

    def observe_step(self, num_rows: Sequence[int]) -> None:
        further_rows = sum(num_rows) - max(num_rows)
        self._passed += 1 + self._FURTHER_ROW_COST * further_rows

    def observe_round(self, num_rows: int, num_evaluations: float) -> None:
        self._taken += num_evaluations * (self._round_cost + num_rows * self._row_cost)

    def read(self) -> Reading:
        return Reading(self._passed, self._taken)


class ClockMeter:
    """Counts in seconds. Learning has its own clock, so that everything it does is counted.

    Args:
        taken: Returns the processor time that learning has used: its thread's or process's.
        passed: Returns the time that has passed.
    """

    counts_comparisons = True
    most_saved = 2.0
    saved_at_start = 2.0
    least = 0.0

    def __init__(
        self, taken: Callable[[], float] = time.process_time, passed: Callable[[], float] = time.monotonic
    ) -> None:
        self._taken, self._passed = taken, passed

    def observe_step(self, num_rows: Sequence[int]) -> None:
        """Does nothing: the clock counts."""

    def observe_round(self, num_rows: int, num_evaluations: float) -> None:
        """Does nothing: the clock counts."""

    def read(self) -> Reading:
        return Reading(self._passed(), self._taken())
