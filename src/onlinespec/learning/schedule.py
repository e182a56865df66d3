"""When a round is due: often while rounds bring something or the traffic has moved, rarely once they bring nothing."""

from __future__ import annotations

import math

from onlinespec.learning.drift import FallTest


class UpdateSchedule:
    """How many steps lie between rounds.

    Steps and not tokens, because a step is what decoding time is made of: a drafter that is accepted often commits
    more tokens in it, has less to learn, and should not pay more for it. Each request's step counts.

    What rounds bring is measured in pairs: on the same fresh rows, the loss now against that of the weights some rounds
    ago. Losses of different rounds differ too much by their rows to be compared. It counts as it is and not as a share
    of the loss: a nat is worth about as many tokens to a warm drafter as to a cold one.

    A drift is a fall in *agreement*: of the fresh rows of a round, the share where the drafter's first draft would have
    been the committed token. All committed rows count, whoever drafted and however deep; so it means the same at any
    number of drafted tokens, which accepted over drafted does not. Between rounds the first drafts of steps are
    watched. They stand where steps began, which depends on what was drafted before; so a fall of theirs is no verdict,
    but brings the next round near, whose rows decide. So does a jump of the loss, which chance brings more often.

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
    _LONGEST = 4.0  # times its length, an interval where nothing is wrong
    _LEAST_DEVIATION = 0.1  # of the average loss; a few rounds may be alike by chance

    def __init__(self, min_interval: int, max_interval: int, least_gain: float, full_loss: float = 0.0) -> None:
        self._min, self._max, self._least_gain = float(min_interval), float(max_interval), least_gain
        self._full_loss = full_loss if max_interval > min_interval else 0.0
        self.num_drifts = 0  # noticed so far
        self._agreement, self._first_drafts = FallTest(), FallTest()
        self.restart()

    @property
    def interval(self) -> float:
        """Steps from the last round to the next."""
        if self._is_in_doubt:
            return self._min
        loss = self._losses.mean
        if not (self._losses.count and loss < self._full_loss):
            return self._paced
        return self._paced * min(self._full_loss / max(loss, 1e-9), self._LONGEST)

    def restart(self) -> None:
        """Begins anew, as after a drift or with other weights."""
        self._paced = self._min  # by what rounds bring
        self._gain = math.nan  # moving average, per round
        self._rounds_since_probe, self._is_anew = 0, True
        self._losses = _Spread()
        self._agreement.forget()
        self._first_drafts.forget()
        self._has_alarm = False  # the last round, or a step since then, gives reason to look again soon

    @property
    def is_resting(self) -> bool:
        """Whether rounds are as rare as may be, for those of late brought nothing."""
        return self._paced >= self._max and not self._is_in_doubt

    @property
    def _is_in_doubt(self) -> bool:
        """Whether the traffic may have moved, and a round is to tell."""
        return self._has_alarm or self._agreement.is_suspicious

    @property
    def wants_probe(self) -> bool:
        """Whether this round should compare the loss with that of older weights."""
        return self._rounds_since_probe >= self._PROBE_ROUNDS

    def observe_step(self, num_accepted: int, num_draft_tokens: int, text: object = None) -> None:
        """Takes every step of a request; where first drafts are kept half as often as before, the next round is near.

        Args:
            text: Which request it is.
        """
        if num_draft_tokens and self._first_drafts.add(float(num_accepted > 0), 1, text):
            self._has_alarm = True

    def is_jump(self, fresh_loss: float) -> bool:
        """Whether a round's loss lies far above those of the last rounds. Said of the same traffic about once in a
        hundred rounds: reason to look closer, not to conclude."""
        known = self._losses
        deviation = max(known.deviation, self._LEAST_DEVIATION * known.mean)
        return known.count > 0 and fresh_loss > known.mean + self._JUMP * deviation

    def observe_round(self, fresh_loss: float, num_agreed: float = 0.0, num_rows: int = 0, text: object = None) -> bool:
        """Takes what every round scored before its update.

        Args:
            num_agreed: Of the fresh rows `num_rows`, so many had the committed token as the drafter's first draft.
            text: Which request the newest row is of.

        Returns:
            Whether the traffic has moved since the last round: comparisons start anew with the weights of this one.
        """
        self._has_alarm = self.is_jump(fresh_loss)
        if self._agreement.add(num_agreed, num_rows, text):
            self._drift(num_agreed, num_rows, text)
        self._losses.add(fresh_loss)
        is_anew, self._is_anew = self._is_anew, False
        self._rounds_since_probe += not is_anew
        return is_anew

    def _drift(self, num_agreed: float, num_rows: int, text: object) -> None:
        """The traffic has moved; what this round saw of it is what is known."""
        self.num_drifts += 1
        self.restart()
        self._agreement.add(num_agreed, num_rows, text)

    def observe_gain(self, gain: float) -> None:
        """Takes what the rounds since the last comparison brought: the older weights' loss less today's."""
        gain /= max(1, self._rounds_since_probe)
        self._rounds_since_probe = 0
        self._gain = gain if math.isnan(self._gain) else self._SMOOTHING * self._gain + (1 - self._SMOOTHING) * gain
        wanted = self._paced / self._STRETCH if self._gain > self._least_gain else self._paced * self._STRETCH
        self._paced = min(max(wanted, self._min), self._max)


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
