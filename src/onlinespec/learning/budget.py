"""What learning may cost: a share of something that passes, earned as it passes, spent by work, kept up to a bound.

There is one budget and two meters. Inline, decoding is counted in steps and learning by a formula, so that the same
requests learn the same way on every machine. Beside serving, both are read off clocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class Reading(NamedTuple):
    """Totals since a meter was made, in its own unit."""

    passed: float  # of what learning has a share of
    taken: float  # by learning


class Meter(Protocol):
    """Says how much has passed, and how much of it learning took."""

    most_saved: float  # units that are kept for later
    saved_at_start: float  # on credit: a drafter is most often cold then
    least: float  # units that must be saved before work begins
    counts_comparisons: bool  # whether comparing weights with others costs something here

    def observe_step(self, num_rows: Sequence[int]) -> None:
        """A step was decoded, in which the target scored so many rows for each request."""

    def observe_round(self, num_rows: int, num_evaluations: float) -> None:
        """A round trained so many rows, with a gradient so many times."""

    def read(self) -> Reading:
        """The totals so far."""


class Budget:
    """A learner's share of what passes, and what is left of it.

    Two accounts are kept: of all that learning took, and of its work alone (rounds and comparisons), whose share may be
    changed. Beside serving, reading the records of many streams takes more than a hundredth of a core, and what is to
    find out whether drafts pay again must not starve on that.

    Args:
        share: Of what passes, learning may take this much; inf for no limit.
    """

    def __init__(self, share: float, meter: Meter) -> None:
        self._share = self._work_share = share
        self._meter = meter
        self._saved = self._work_saved = meter.saved_at_start
        self.begin()

    def begin(self) -> None:
        """Counts from now on; for a meter whose clock is the calling thread's."""
        self._start = self._last = self._meter.read()

    def set_share(self, share: float) -> None:
        """Work may take this share from now on."""
        self._work_share = share

    def observe_step(self, num_rows: Sequence[int] = (1,)) -> None:
        """A step was decoded, of a batch or of one request.

        Args:
            num_rows: That the target scored for each of its requests: the drafted tokens and one.
        """
        self._meter.observe_step(num_rows)

    def spend(self, num_rows: int = 0, num_evaluations: float = 0.0) -> None:
        """Work has ended that began when there was room for it: a round, or a comparison."""
        self._meter.observe_round(num_rows, num_evaluations)
        self._work_saved -= self._settle()

    def has_room(self) -> bool:
        """Whether what was taken is earned again: ask before work begins. Brings the accounts up to date."""
        self._settle()
        return math.isinf(self._work_share) or min(self._saved, self._work_saved) >= self._meter.least

    def has_room_to_compare(self) -> bool:
        """Whether weights may be compared with others now."""
        return self.has_room() or not self._meter.counts_comparisons

    @property
    def spent(self) -> float:
        """What learning took since `begin`, in the meter's unit."""
        return self._meter.read().taken - self._start.taken

    @property
    def share_spent(self) -> float:
        """The same, of all that passed."""
        return self.spent / max(self._meter.read().passed - self._start.passed, 1e-9)

    def _settle(self) -> float:
        """Books what passed and what was taken since the last time; the latter."""
        now, most = self._meter.read(), self._meter.most_saved
        passed, taken = now.passed - self._last.passed, now.taken - self._last.taken
        self._last = now
        self._saved = min(self._saved + self._share * passed, most) - taken if passed else self._saved - taken
        if passed:
            self._work_saved = min(self._work_saved + self._work_share * passed, most)
        return taken


class StepMeter:
    """Counts in steps: a request's step, alone, is 1. No clock is asked.

    Args:
        round_cost: What a round costs, in steps, whatever its rows ...
        row_cost: ... and what each row adds; `measure_round_costs` tells both for a machine and a pair.
        max_rows: Of a round.
    """

    counts_comparisons = False
    _MOST_SAVED = 16  # rounds
    _SAVED_AT_START = 8
    # What a row of another request in the batch adds to a step, in steps of one request alone. By tokens per second of
    # 1, 4 and 16 streams at fixed lengths, on two processors ("never slower" in benchmarks/results/serving.md): 0.048
    # to 0.051 with four drafted tokens, 0.06 to 0.08 with one or two, 0.10 to 0.15 with none. The least of them,
    # so that learning takes no more than its share there.
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
    """Counts in seconds. What learning took is read from a clock of its own, so that all of it counts.

    Args:
        taken: Seconds that learning has run so far: its thread's or its process's processor time.
        passed: Seconds so far, of anything.
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
        """Nothing: the clock does."""

    def observe_round(self, num_rows: int, num_evaluations: float) -> None:
        """Nothing: the clock does."""

    def read(self) -> Reading:
        return Reading(self._passed(), self._taken())
