"""Drift detection: Page's cumulative-sum test for a fall of a success rate, for draws that depend on each other."""

from __future__ import annotations

import math


class FallTest:
    """Detects that a share of successes has fallen to half of what it was, by Page's cumulative sum.

    Each observation adds the log-likelihood ratio of "half the known share" over "the known share"; the sum is kept at
    0 or above. For independent draws and a known share, chance brings it to log(N) at most once in N observations
    (Lorden). Draws of one text are not independent, so each ratio is divided by the dispersion: how much more whole
    texts have differed from the known share than independent draws would.

    Observations that support a fall are added to the known share only when the sum is back at 0, so that a fall does
    not change its own reference. A rising share, as learning causes, is followed.

    Reference: Page, "Continuous inspection schemes" (1954); Lorden, "Procedures for reacting to a change in
    distribution" (1971); the dispersion is that of quasi-likelihood: Wedderburn (1974).
    """

    _CHANCE = 4000  # observations between two false alarms, at least
    _MEMORY = 320  # draws that the known share is averaged over, some ten rounds: a standard error of at most 0.03
    _LEAST_DRAWS = 64  # draws before the share counts as known: a standard error of 0.06

    def __init__(self) -> None:
        self._squares = self._variances = 0.0  # of finished texts: squared deviations, and those of independent draws
        self._text: object = None  # the newest text ...
        self._miss = self._variance = 0.0  # ... its deviation so far, and the variance that independent draws have
        self.forget()

    def forget(self) -> None:
        """Forgets the share, which is learned anew. The dispersion is kept."""
        self._successes = self._draws = 0.0  # discounted
        self._pending: list[tuple[float, int, object]] = []  # observations since the sum was 0
        self._sum = 0.0

    @property
    def is_suspicious(self) -> bool:
        """Whether half of the evidence for a fall is reached."""
        return self._sum > math.log(self._CHANCE) / 2

    def add(self, successes: float, draws: int, text: object) -> bool:
        """Adds an observation. Returns whether the share has fallen; this observation then begins the new share.

        Args:
            text: Identifies the text that the draws are from.
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
        return (self._successes + 0.5) / (self._draws + 1)  # Jeffreys prior, so never 0 or 1

    @property
    def _dispersion(self) -> float:
        variances = self._variances + self._variance
        return max(1.0, (self._squares + self._miss**2) / variances) if variances else 1.0

    def _log_ratio(self, successes: float, draws: int) -> float:
        """Log-likelihood ratio of half the known share over the known share, taken one standard error lower."""
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
        """Adds an observation's deviation to the dispersion, allowing for the error of the estimated share."""
        if text != self._text:
            self._squares, self._variances = self._squares + self._miss**2, self._variances + self._variance
            self._text, self._miss, self._variance = text, 0.0, 0.0
        share = self._share
        self._miss += successes - draws * share
        self._variance += draws * share * (1 - share) * (1 + draws / (self._draws + 1))
