"""Whether a share has fallen: Page's test, for texts whose draws are not independent."""

from __future__ import annotations

import math


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
