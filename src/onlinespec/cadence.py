"""When a round is due: often while rounds bring something or the traffic has moved, rarely once they bring nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Cadence:
    """How many steps lie between rounds.

    Steps and not tokens, because a step is what decoding time is made of: a drafter that is accepted often commits
    more tokens in it, has less to learn, and should not pay more for it.

    What rounds bring is measured in pairs: on the same fresh rows, the loss now against that of the weights some rounds
    ago. Losses of different rounds differ too much by their rows to be compared. It counts as it is and not as a share
    of the loss: a nat is worth about as many tokens to a warm drafter as to a cold one. A drift shows in the served
    acceptance, which costs nothing to watch, or in the loss of the next round.

    Where little is wrong there is little to gain, and it takes rounds to find that out: below `full_loss` they are
    rarer from the start, in proportion, so that a drafter that starts well pays less.

    Args:
        least_gain: What a round must bring, in the loss's own units; those that bring less become rarer.
        full_loss: Fresh loss below which intervals are longer, up to fourfold; 0 for never. Equal intervals stay fixed.
    """

    _PROBE_ROUNDS = 4  # between two comparisons
    _SMOOTHING = 0.5  # of gains: the old average's share
    _STRETCH = 4.0  # of the interval, after a comparison; one that pays shrinks it as much
    _JUMP = 3.0  # standard deviations above the average loss
    _LEAST_ROUNDS = 4  # before an average loss means anything
    _LONGEST = 4.0  # times its length, an interval where nothing is wrong
    _LEAST_DEVIATION = 0.1  # of the average loss; a few rounds may be alike by chance
    _DROP = 0.25  # of the share of drafts that are kept; on steady traffic it is seen once in some thousand steps

    def __init__(self, min_interval: int, max_interval: int, least_gain: float, full_loss: float = 0.0) -> None:
        self._min, self._max, self._least_gain = float(min_interval), float(max_interval), least_gain
        self._full_loss = full_loss if max_interval > min_interval else 0.0
        self.num_drifts = 0  # noticed so far
        self.restart()

    @property
    def interval(self) -> float:
        """Steps from the last round to the next."""
        loss = self._losses.mean
        if not (self._losses.count and loss < self._full_loss):
            return self._paced
        return self._paced * min(self._full_loss / max(loss, 1e-9), self._LONGEST)

    def restart(self) -> None:
        self._paced = self._min  # by what rounds bring
        self._gain = math.nan  # moving average, per round
        self._rounds_since_probe, self._is_anew = 0, True
        self._losses = _Spread()
        self._acceptance = _Averages(fast=0.95, slow=0.99)

    def _drift(self) -> None:
        """The traffic has moved."""
        self.num_drifts += 1
        self.restart()

    @property
    def is_resting(self) -> bool:
        """Whether rounds are as rare as may be, for those of late brought nothing."""
        return self._paced >= self._max

    @property
    def wants_probe(self) -> bool:
        """Whether this round should compare the loss with that of older weights."""
        return self._rounds_since_probe >= self._PROBE_ROUNDS

    def observe_step(self, num_accepted: int, num_draft_tokens: int) -> None:
        """Hears of every step; a clear fall in acceptance brings the next round near."""
        if num_draft_tokens:
            self._acceptance.add(num_accepted / num_draft_tokens)
            if self._acceptance.slow - self._acceptance.fast > self._DROP:
                self._drift()

    def observe_round(self, fresh_loss: float) -> bool:
        """Hears of every round's loss before its update.

        Returns:
            Whether the traffic has moved since the last round: comparisons start anew with the weights of this one.
        """
        known = self._losses
        deviation = max(known.deviation, self._LEAST_DEVIATION * known.mean)
        if known.count >= self._LEAST_ROUNDS and fresh_loss > known.mean + self._JUMP * deviation:
            self._drift()
        self._losses.add(fresh_loss)
        is_anew, self._is_anew = self._is_anew, False
        self._rounds_since_probe += not is_anew
        return is_anew

    def observe_gain(self, gain: float) -> None:
        """Hears what the rounds since the last comparison brought: the older weights' loss less today's."""
        gain /= max(1, self._rounds_since_probe)
        self._rounds_since_probe = 0
        self._gain = gain if math.isnan(self._gain) else self._SMOOTHING * self._gain + (1 - self._SMOOTHING) * gain
        wanted = self._paced / self._STRETCH if self._gain > self._least_gain else self._paced * self._STRETCH
        self._paced = min(max(wanted, self._min), self._max)


class Budget:
    """A learner's share of decoding, in work units that a clock does not change: a step, its drafts included, costs 1.

    Every step earns `share`; a round spends what it and its rows cost, as often as it is evaluated. What is not spent
    while rounds are rare is kept, up to some rounds, for the next drift.

    Args:
        share: Of decoding time, learning may take this much; inf for no limit.
        round_cost: What a round costs, in steps, whatever its rows ...
        row_cost: ... and what each row adds; `calibration.measure_costs` tells both for a machine and a pair.
    """

    _MOST_SAVED = 16  # rounds
    _SAVED_AT_START = 8  # on credit: a drafter is most often cold then

    def __init__(self, share: float, round_cost: float, row_cost: float, max_rows: int) -> None:
        self.share, self._round_cost, self._row_cost = share, round_cost, row_cost
        self._full_round = round_cost + row_cost * max_rows
        self._saved = self._SAVED_AT_START * self._full_round
        self.spent = 0.0

    def earn(self) -> None:
        """One more step was decoded."""
        self._saved = min(self._saved + self.share, self._MOST_SAVED * self._full_round)

    def spend(self, num_rows: int, num_evaluations: float = 1.0) -> None:
        """A round trained so many rows, with a gradient so many times."""
        cost = num_evaluations * (self._round_cost + num_rows * self._row_cost)
        self._saved -= cost
        self.spent += cost

    may_judge = True  # weights against others: that is not counted in steps

    @property
    def has_room(self) -> bool:
        """Whether what was spent is earned again, and a round's cost beside it."""
        return self._saved >= self._full_round or math.isinf(self.share)


class ClockBudget:
    """The same by the clock, for learning that runs beside decoding: a share of the time that passes.

    What learning took is read from a clock of its own, so that all of it counts: reading records, rounds, comparisons.
    `work_share` bounds the work alone, rounds and comparisons, and may be lowered: the records of many streams take
    more than a hundredth of a core to read, and what is to find out whether drafts pay again must not starve on that.

    Args:
        share: Of the time that passes; 1 is one core all the time.
        taken: Seconds that learning has run so far: its thread's or its process's processor time.
        passed: Seconds so far, of anything.
    """

    _MOST_SAVED = 2.0  # seconds
    _SAVED_AT_START = 2.0

    def __init__(
        self, share: float, taken: Callable[[], float] = time.process_time, passed: Callable[[], float] = time.monotonic
    ) -> None:
        self.share = self.work_share = share
        self._taken, self._passed = taken, passed
        self._saved = self._work_saved = self._SAVED_AT_START
        self.begin()

    def begin(self) -> None:
        """Counts from now on; for a clock that runs in the caller's thread."""
        self._start = self._last = self._taken(), self._passed()

    def earn(self) -> None:
        """Nothing: the clock does."""

    def spend(self, num_rows: int, num_evaluations: float = 1.0) -> None:
        """Work ends that began when there was room for it."""
        self._work_saved -= self._taken() - self._last[0]

    @property
    def spent(self) -> float:
        """Seconds that learning took so far."""
        return self._taken() - self._start[0]

    @property
    def share_spent(self) -> float:
        """The same, of all the time that passed."""
        return self.spent / max(self._passed() - self._start[1], 1e-9)

    @property
    def may_judge(self) -> bool:
        """Whether there is time to compare weights with others."""
        return self.has_room

    @property
    def has_room(self) -> bool:
        """Whether what was taken is earned again: ask before work begins."""
        now = self._taken(), self._passed()
        taken, passed = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        self._saved = min(self._saved + self.share * passed, self._MOST_SAVED) - taken
        self._work_saved = min(self._work_saved + self.work_share * passed, self._MOST_SAVED)
        return self._saved >= 0 and self._work_saved >= 0


class _Spread:
    """Mean and variance of what was seen, the newest ten or so counting most."""

    _LEAST_WEIGHT = 0.1

    def __init__(self) -> None:
        self.count, self.mean, self._variance = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        weight = max(1 / self.count, self._LEAST_WEIGHT)
        away = value - self.mean
        self.mean += weight * away
        self._variance = (1 - weight) * (self._variance + weight * away**2)

    @property
    def deviation(self) -> float:
        return math.sqrt(self._variance)


class _Averages:
    """A fast and a slow moving average; neither gives its first values more weight than their age leaves them."""

    def __init__(self, fast: float, slow: float) -> None:
        self._decays = fast, slow
        self._sums = self._weights = (0.0, 0.0)
        self.fast = self.slow = math.nan

    def add(self, value: float) -> None:
        fast, slow = self._decays
        self._sums = fast * self._sums[0] + value, slow * self._sums[1] + value
        self._weights = fast * self._weights[0] + 1, slow * self._weights[1] + 1
        self.fast, self.slow = self._sums[0] / self._weights[0], self._sums[1] / self._weights[1]
