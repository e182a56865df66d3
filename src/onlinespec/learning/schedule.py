"""When a round is due: often while rounds bring something or the traffic has moved, rarely once they bring nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence


class FallTest:
    """Whether a share, so many of so many draws, has fallen to half of what it was: Page's cumulative sum.

    Every observation adds the log-likelihood ratio of "half the known share" over "the known share"; below 0 the sum
    starts again. Where draws are independent and the share is known, chance brings it to log(N) once in N observations
    or less often (Lorden). Draws of one text are not independent, so each ratio is divided by the dispersion: how much
    more whole texts have differed from the known share than independent draws would.

    Observations that speak for a fall join the known share only when the sum is back at 0, so that a fall can't move
    what it is measured against. A share that rises, as learning lets it, is followed.

    Reference: Page, "Continuous inspection schemes" (1954); Lorden, "Procedures for reacting to a change in
    distribution" (1971); the dispersion is that of quasi-likelihood: Wedderburn (1974).
    """

    _CHANCE = 4000  # observations between two false alarms: a drift that is none once in thousands of rounds
    _MEMORY = 320  # draws that the known share is a mean of, ten rounds or so: its standard error is at most .03
    _LEAST_DRAWS = 64  # before a share is known: a standard error of .06

    def __init__(self) -> None:
        self._squares = self._variances = 0.0  # of texts that are over: squared misses, and those of independent draws
        self._text: object = None  # the newest one ...
        self._miss = self._variance = 0.0  # ... how far it is off so far, and the variance of independent draws
        self.forget()

    def forget(self) -> None:
        """A new share is learned from now on. How much texts differ is remembered."""
        self._successes = self._draws = 0.0  # discounted
        self._pending: list[tuple[float, int, object]] = []  # observations since the sum was 0
        self._sum = 0.0

    @property
    def is_suspicious(self) -> bool:
        """Whether half of the evidence that a fall takes is there."""
        return self._sum > math.log(self._CHANCE) / 2

    def add(self, successes: float, draws: int, text: object) -> bool:
        """Takes an observation, and says whether the share has fallen; if so, this one begins the new share.

        Args:
            text: Which text the draws are from; those that follow each other with the same one are one text's.
        """
        if not draws:
            return False
        if self._draws >= self._LEAST_DRAWS:
            self._sum = max(0.0, self._sum + self._log_ratio(successes, draws) / self._dispersion)
        self._pending.append((successes, draws, text))
        has_fallen = self._sum > math.log(self._CHANCE)
        if has_fallen or not self._sum:
            for observation in self._pending:
                self._learn(*observation)
            self._pending, self._sum = [], 0.0
        if has_fallen:
            self.forget()
            self._learn(successes, draws, text)
        return has_fallen

    @property
    def _share(self) -> float:
        return (self._successes + 0.5) / (self._draws + 1)  # Jeffreys' prior: never 0 or 1

    @property
    def _dispersion(self) -> float:
        variances = self._variances + self._variance
        return max(1.0, (self._squares + self._miss**2) / variances) if variances else 1.0

    def _log_ratio(self, successes: float, draws: int) -> float:
        """Of half the known share over that share, which is taken one standard error lower: it is an estimate."""
        share = self._share
        share -= math.sqrt(share * (1 - share) * self._dispersion / (self._draws + 1))
        share = max(share, 0.5 / (self._draws + 1))
        return successes * math.log(0.5) + (draws - successes) * math.log((1 - share / 2) / (1 - share))

    def _learn(self, successes: float, draws: int, text: object) -> None:
        if self._draws:
            self._compare(successes, draws, text)
        kept = (1 - 1 / self._MEMORY) ** draws
        self._successes, self._draws = kept * self._successes + successes, kept * self._draws + draws

    def _compare(self, successes: float, draws: int, text: object) -> None:
        """Adds to the dispersion how far an observation is off; that the share itself is an estimate is allowed for."""
        if text != self._text:
            self._squares, self._variances = self._squares + self._miss**2, self._variances + self._variance
            self._text, self._miss, self._variance = text, 0.0, 0.0
        share = self._share
        self._miss += successes - draws * share
        self._variance += draws * share * (1 - share) * (1 + draws / (self._draws + 1))


class Cadence:
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


class Budget:
    """A learner's share of decoding, in work units that a clock does not change: a request's step, alone, costs 1.

    Every step earns `share` of what it costs; a round spends what it and its rows cost, as often as it is evaluated.
    What is not spent while rounds are rare is kept, up to some rounds, for the next drift.

    Args:
        share: Of decoding time, learning may take this much; inf for no limit.
        round_cost: What a round costs, in steps, whatever its rows ...
        row_cost: ... and what each row adds; `measure_round_costs` tells both for a machine and a pair.
    """

    _MOST_SAVED = 16  # rounds
    _SAVED_AT_START = 8  # on credit: a drafter is most often cold then
    # What a row of another request in the batch adds to a step, in steps of one request alone. By tokens per second of
    # 1, 4 and 16 streams at fixed lengths, on two processors ("never slower" in benchmarks/results/serving.md): 0.048
    # to 0.051 with four drafted tokens, 0.06 to 0.08 with one or two, 0.10 to 0.15 with none. The least of them,
    # so that learning takes no more than its share there.
    _FURTHER_ROW_COST = 0.048

    def __init__(self, share: float, round_cost: float, row_cost: float, max_rows: int) -> None:
        self.share, self._round_cost, self._row_cost = share, round_cost, row_cost
        self._full_round = round_cost + row_cost * max_rows
        self._saved = self._SAVED_AT_START * self._full_round
        self.spent = 0.0

    def earn(self, num_rows: Sequence[int] = (1,)) -> None:
        """One more step was decoded, of a batch or of one request.

        Args:
            num_rows: That the target scored for each of its requests: the drafted tokens and one.
        """
        further_rows = sum(num_rows) - max(num_rows)
        step_cost = 1 + self._FURTHER_ROW_COST * further_rows
        self._saved = min(self._saved + self.share * step_cost, self._MOST_SAVED * self._full_round)

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

    def earn(self, num_rows: Sequence[int] = (1,)) -> None:
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
