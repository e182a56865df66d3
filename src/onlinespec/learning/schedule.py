"""The update schedule: rounds are frequent while they help or after a drift, and rare when they do not help."""

from __future__ import annotations

import math

from onlinespec.learning.drift import FallTest


class UpdateSchedule:
    """Decides how many steps lie between rounds.

    It counts steps, not tokens, because steps take the decoding time: a well accepted drafter commits more tokens per
    step, but has less to learn and should not spend more on it. The steps of all requests count.

    The gain of rounds is measured in pairs: the loss of the present weights against that of the weights some rounds
    ago, on the same fresh rows. Losses on different rows differ too much to be compared. The gain counts in nats, not
    as a share of the loss, because a nat is worth about as many tokens to a warm drafter as to a cold one.

    A drift is a fall in *agreement*: the share of a round's fresh rows for which the drafter's first draft would have
    been the committed token. It covers all committed rows, so unlike accepted over drafted it does not depend on the
    number of drafted tokens. Between rounds, the first drafts of steps are observed as well. Their positions depend on
    earlier drafts, so a fall of their acceptance only brings the next round forward, and that round's rows decide. A
    jump of the loss does the same.

    Below `full_loss` there is little to gain, and it takes rounds to find that out. So intervals grow in proportion to
    full_loss over the loss, from the start.

    Args:
        min_interval, max_interval: Steps between rounds that help, and between rounds that do not.
        least_gain: Minimum gain of a round, in units of the loss; if rounds gain less, they become rarer.
        full_loss: Fresh loss below which intervals are longer, up to fourfold; 0 turns that off, and so do equal
            intervals.
    """

    _PROBE_ROUNDS = 4  # rounds between two comparisons with older weights
    _SMOOTHING = 0.5  # share of the old average of gains
    _STRETCH = 4.0  # factor by which a comparison lengthens or shortens the interval
    _JUMP = 3.0  # standard deviations above the average loss
    _LONGEST = 4.0  # maximum factor of an interval while the loss is small
    _LEAST_DEVIATION = 0.1  # of the average loss; a few rounds may be similar by chance

    def __init__(self, min_interval: int, max_interval: int, least_gain: float, full_loss: float = 0.0) -> None:
        self._min, self._max, self._least_gain = float(min_interval), float(max_interval), least_gain
        self._full_loss = full_loss if max_interval > min_interval else 0.0
        self.num_drifts = 0  # detected so far
        self._agreement, self._first_drafts = FallTest(), FallTest()
        self.restart()

    @property
    def interval(self) -> float:
        """Number of steps from the last round to the next."""
        if self._is_in_doubt:
            return self._min
        loss = self._losses.mean
        if not (self._losses.count and loss < self._full_loss):
            return self._paced
        return self._paced * min(self._full_loss / max(loss, 1e-9), self._LONGEST)

    def restart(self) -> None:
        """Starts from the shortest interval again, after a drift or with other weights."""
        self._paced = self._min  # the interval, before it is lengthened for a small loss
        self._gain = math.nan  # moving average, per round
        self._rounds_since_probe, self._is_anew = 0, True
        self._losses = _Spread()
        self._agreement.forget()
        self._first_drafts.forget()
        self._has_alarm = False  # the last round, or a step since then, brings the next round forward

    @property
    def is_resting(self) -> bool:
        """Whether rounds are as rare as possible, because recent ones did not help."""
        return self._paced >= self._max and not self._is_in_doubt

    @property
    def _is_in_doubt(self) -> bool:
        """Whether a drift is suspected, so that the next round should come soon."""
        return self._has_alarm or self._agreement.is_suspicious

    @property
    def wants_probe(self) -> bool:
        """Whether this round should compare its loss with that of older weights."""
        return self._rounds_since_probe >= self._PROBE_ROUNDS

    def observe_step(self, num_accepted: int, num_draft_tokens: int, text: object = None) -> None:
        """Takes a step of one request. If first drafts are kept half as often as before, the next round comes soon.

        Args:
            text: Identifies the request.
        """
        if num_draft_tokens and self._first_drafts.add(float(num_accepted > 0), 1, text):
            self._has_alarm = True

    def is_jump(self, fresh_loss: float) -> bool:
        """Whether a round's loss lies far above those of the last rounds. Without a drift this happens about once in a
        hundred rounds, so it is only a reason to check."""
        known = self._losses
        deviation = max(known.deviation, self._LEAST_DEVIATION * known.mean)
        return known.count > 0 and fresh_loss > known.mean + self._JUMP * deviation

    def observe_round(self, fresh_loss: float, num_agreed: float = 0.0, num_rows: int = 0, text: object = None) -> bool:
        """Takes the scores of a round before its update.

        Args:
            num_agreed: Fresh rows whose first draft would have been the committed token, out of `num_rows`.
            text: Identifies the request of the newest row.

        Returns:
            Whether comparisons start anew with the weights of this round: after a drift, and in the first round.
        """
        self._has_alarm = self.is_jump(fresh_loss)
        if self._agreement.add(num_agreed, num_rows, text):
            self._drift(num_agreed, num_rows, text)
        self._losses.add(fresh_loss)
        is_anew, self._is_anew = self._is_anew, False
        self._rounds_since_probe += not is_anew
        return is_anew

    def _drift(self, num_agreed: float, num_rows: int, text: object) -> None:
        """Restarts after a drift, with this round as the first of the new traffic."""
        self.num_drifts += 1
        self.restart()
        self._agreement.add(num_agreed, num_rows, text)

    def observe_gain(self, gain: float) -> None:
        """Takes the gain of the rounds since the last comparison: the older weights' loss minus the present ones'."""
        gain /= max(1, self._rounds_since_probe)
        self._rounds_since_probe = 0
        self._gain = gain if math.isnan(self._gain) else self._SMOOTHING * self._gain + (1 - self._SMOOTHING) * gain
        wanted = self._paced / self._STRETCH if self._gain > self._least_gain else self._paced * self._STRETCH
        self._paced = min(max(wanted, self._min), self._max)


class _Spread:
    """Exponentially weighted mean and variance, over some ten values."""

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
