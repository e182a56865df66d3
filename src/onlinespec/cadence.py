"""When a round is due: often while rounds bring something or the traffic has moved, rarely once they bring nothing."""

from __future__ import annotations

import math


class Cadence:
    """How many steps lie between rounds.

    Steps and not tokens, because a step is what decoding time is made of: a drafter that is accepted often commits
    more tokens in it, has less to learn, and should not pay more for it.

    What rounds bring is measured in pairs: on the same fresh rows, the loss now against that of the weights some rounds
    ago. Losses of different rounds differ too much by their rows to be compared. A drift shows in the served
    acceptance, which costs nothing to watch, or in the loss of the next round.
    """

    _GAIN = 0.01  # of the older weights' loss; rounds that bring less are not worth their frequency
    _JUMP = 0.25  # of the loss over its average; smaller ones are noise of small rounds
    _DROP = 0.15  # of the share of drafts that are kept; on steady traffic it is seen once in some 3,000 steps
    _STRETCH = 2.0
    _PROBE_ROUNDS = 4  # between two comparisons while rounds are frequent

    def __init__(self, min_interval: int, max_interval: int) -> None:
        self._min, self._max = min_interval, max_interval
        self.interval = float(min_interval)
        self._loss = math.nan
        self._acceptance = _Averages(fast=0.95, slow=0.99)
        self._rounds_since_probe = 0

    @property
    def wants_probe(self) -> bool:
        """Whether this round should compare the loss with that of older weights; rare rounds all do."""
        return self._rounds_since_probe >= self._PROBE_ROUNDS * self._min / self.interval

    def observe_step(self, num_accepted: int, num_draft_tokens: int) -> None:
        """Hears of every step; a clear fall in acceptance brings the next round near."""
        if num_draft_tokens:
            self._acceptance.add(num_accepted / num_draft_tokens)
            if self._acceptance.slow - self._acceptance.fast > self._DROP:
                self._restart()

    def observe_round(self, fresh_loss: float) -> None:
        """Hears of every round's loss before its update."""
        self._rounds_since_probe += 1
        if fresh_loss > (1 + self._JUMP) * self._loss:  # never while there is no average yet
            self._restart()
        self._loss = fresh_loss if math.isnan(self._loss) else 0.8 * self._loss + 0.2 * fresh_loss

    def observe_gain(self, gain: float) -> None:
        """Hears what the rounds since the last comparison brought, as a share of the older weights' loss."""
        self._rounds_since_probe = 0
        self.interval = float(self._min) if gain > self._GAIN else min(float(self._max), self.interval * self._STRETCH)

    def _restart(self) -> None:
        self.interval = float(self._min)
        self._loss = math.nan
        self._acceptance = _Averages(fast=0.95, slow=0.99)


class Budget:
    """A learner's share of decoding, in work units that a clock does not change: the cost of a plain step is 1.

    Every step earns `share`; a round spends what its rows cost. What is not spent while rounds are rare is kept, up to
    some rounds, for the next drift.

    Args:
        share: Of decoding time, learning may take this much; inf for no limit.
        row_cost: What training one row costs, in steps; `calibration.measure_row_cost` tells it for a machine and a
            pair.
    """

    _MOST_SAVED = 16  # rounds

    def __init__(self, share: float, row_cost: float, max_rows: int) -> None:
        self._share, self._row_cost = share, row_cost
        self._round_cost = row_cost * max_rows
        self._saved = self._round_cost  # the first round is free

    def earn(self) -> None:
        """One more step was decoded."""
        self._saved = min(self._saved + self._share, self._MOST_SAVED * self._round_cost)

    def spend(self, num_rows: float) -> None:
        """Rows were trained, each as often as it was evaluated with a gradient."""
        self._saved -= num_rows * self._row_cost

    @property
    def has_room(self) -> bool:
        """Whether what was spent is earned again, and a round's cost beside it."""
        return self._saved >= self._round_cost or math.isinf(self._share)


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
