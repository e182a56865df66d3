"""What a step costs by its shape: measured before serving, then corrected by the steps that are served.

Nothing here reads a clock: seconds come in. Axis letters: B requests, K drafted tokens, G batch sizes of the profile,
N its numbers of drafted tokens.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step in which every one of a batch's requests drafts the same number of tokens.

    `draft_seconds[g][n]` drafts `num_draft_tokens[n]` tokens for `batch_sizes[g]` requests, 0 for none;
    `verify_seconds[g][n]` is all the rest of that step: target forward, verification, commit.

    >>> costs = StepCosts((1, 4), (0, 2), ((0.0, 1e-3), (0.0, 2e-3)), ((4e-3, 5e-3), (8e-3, 9e-3)))
    >>> costs.max_draft_tokens
    2
    """

    batch_sizes: tuple[int, ...]
    num_draft_tokens: tuple[int, ...]
    draft_seconds: tuple[tuple[float, ...], ...]
    verify_seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check_rising("batch_sizes", self.batch_sizes, 1)
        _check_rising("num_draft_tokens", self.num_draft_tokens, 0)
        if self.num_draft_tokens[0] != 0:
            raise ValueError(
                f"num_draft_tokens starts at {self.num_draft_tokens[0]}; start at 0, so that plain decoding is measured"
            )
        shape = len(self.batch_sizes), len(self.num_draft_tokens)
        for name, seconds in (("draft_seconds", self.draft_seconds), ("verify_seconds", self.verify_seconds)):
            found = len(seconds), *{len(row) for row in seconds}
            if found != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape}: a row a batch size, a column a K")
        columns = {"draft_seconds": [row[1:] for row in self.draft_seconds], "verify_seconds": self.verify_seconds}
        for name, rows in columns.items():
            wrong = [cell for row in rows for cell in row if not 0 < cell < math.inf]
            if wrong:
                raise ValueError(f"{name} has {wrong[0]}; measured seconds are positive numbers, measure again")

    @property
    def max_draft_tokens(self) -> int:
        """The deepest draft that was measured."""
        return self.num_draft_tokens[-1]


def _check_rising(name: str, counts: Sequence[int], least: int) -> None:
    if not counts or counts[0] < least or any(a >= b for a, b in itertools.pairwise(counts)):
        raise ValueError(f"{name} is {tuple(counts)}; give rising counts of at least {least}")


def profile(
    measure: Callable[[int, int], tuple[float, float]],
    batch_sizes: Sequence[int],
    num_draft_tokens: Sequence[int],
    repeats: int = 5,
) -> StepCosts:
    """Medians of steps of every shape. Shapes take turns, so that a machine whose speed drifts hurts all alike.

    Args:
        measure: Runs a step in which so many requests draft so many tokens each; its draft and verify seconds.
        repeats: Timed steps of a shape; one more goes before them, to warm up.
    """
    shapes = [(batch, depth) for batch in batch_sizes for depth in num_draft_tokens]
    seen: dict[tuple[int, int], list[tuple[float, float]]] = {shape: [] for shape in shapes}
    for number in range(repeats + 1):
        for shape in shapes:
            seconds = measure(*shape)
            if number:
                seen[shape].append(seconds)

    def medians(part: int) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(statistics.median(one[part] for one in seen[batch, depth]) for depth in num_draft_tokens)
            for batch in batch_sizes
        )

    return StepCosts(tuple(batch_sizes), tuple(num_draft_tokens), medians(0), medians(1))


class TrackedCosts:
    """The profile as it stands now: one common scale for the machine's speed, one correction for each of its cells.

    Each timed step tells its part's log of measured over expected seconds. A surprise in a cell that steps visit all
    the time is mostly the machine's, so the scale takes it and all cells follow; one in a cell that was not seen for
    long is mostly the cell's, so a wrong profile heals where it is visited (a Kalman filter with the covariances left
    out). Only what two visits of a cell in a row agree on counts: a hiccup, however long, moves nothing.

    Only ratios matter to who chooses, so tables are in seconds as of the profile's machine; `scale` tells the rest.
    """

    _NOISE = 0.1**2  # variance of a step's log seconds
    _SCALE_DRIFT = 0.02**2  # of the scale, by a step
    _LEAST_LEAP = 3.0  # standard deviations of a surprise; one so large is the machine's leap

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._draft = _Grid(costs, costs.draft_seconds)
        self._verify = _Grid(costs, costs.verify_seconds)
        self._log_scale, self._scale_variance = 0.0, 0.0
        self._now = 0  # timed steps so far

    @property
    def scale(self) -> float:
        """By how much the machine is slower than when it was profiled."""
        return math.exp(self._log_scale)

    def verify_by_rows(self, batch: int, num_drafted: int) -> list[float]:
        """Verify seconds of a step of `batch` requests with 0, 1, ... num_drafted drafted tokens in all."""
        by_batch, by_depth = (
            _between(self.costs.batch_sizes, batch),
            _by_rows(self.costs.num_draft_tokens, batch, num_drafted),
        )
        seconds: list[float] = (by_batch @ self._verify.seconds @ by_depth).tolist()
        return seconds

    def draft_by_depth(self, batch: int, depth: int) -> list[list[float]]:
        """Seconds that the d-th drafted token adds to a step if n requests draft it: [d - 1][n], n from 0 to batch."""
        by_batch, by_depth = _by_batch(self.costs.batch_sizes, batch), _by_rows(self.costs.num_draft_tokens, 1, depth)
        drafted = by_batch @ self._draft.seconds @ by_depth  # [n, depth], for all that draft alike
        added: list[list[float]] = (drafted[:, 1:] - drafted[:, :-1]).T.tolist()
        return added

    def step_seconds(self, num_draft_tokens_B: Sequence[int]) -> tuple[float, float]:
        """Draft and verify seconds expected of a step, on the machine as it is now."""
        batch, drafted, depth = len(num_draft_tokens_B), sum(num_draft_tokens_B), max(num_draft_tokens_B)
        by_depth = self.draft_by_depth(batch, depth) if depth else []
        draft = sum(by_depth[d][sum(d < K for K in num_draft_tokens_B)] for d in range(depth))
        return draft * self.scale, self._verify.value(*self._verify_place(batch, drafted)) * self.scale

    def observe(self, num_draft_tokens_B: Sequence[int], draft_seconds: float, verify_seconds: float) -> None:
        """A step of this shape took so long. Verification tells the machine's speed: drafts after a pause read first
        what they have missed."""
        self._now += 1
        batch, drafted, depth = len(num_draft_tokens_B), sum(num_draft_tokens_B), max(num_draft_tokens_B)
        if verify_seconds > 0:
            self._scale_variance += self._SCALE_DRIFT
            expected = self.step_seconds(num_draft_tokens_B)[1]
            self._correct(self._verify, self._verify_place(batch, drafted), math.log(verify_seconds / expected))
        expected = self.step_seconds(num_draft_tokens_B)[0]
        if draft_seconds > 0 and expected > 0:
            surprise = math.log(draft_seconds / expected)
            self._correct(self._draft, self._draft_place(drafted / depth, depth), surprise, moves_scale=False)

    def stalest(self, batch: int, limit: int) -> int:
        """The profile's number of drafted tokens, at most `limit`, that a batch of about this size drafted longest ago;
        the smallest of those that it never did."""
        row = int(np.argmin(np.abs(np.log(np.array(self.costs.batch_sizes) / batch))))
        columns = [n for n, depth in enumerate(self.costs.num_draft_tokens) if depth <= limit]
        return self.costs.num_draft_tokens[min(columns, key=lambda n: self._verify.visited[row, n])]

    def _verify_place(self, batch: int, drafted: int) -> tuple[Floats, Floats]:
        return _between(self.costs.batch_sizes, batch), _between(self.costs.num_draft_tokens, drafted / batch)

    def _draft_place(self, batch: float, depth: int) -> tuple[Floats, Floats]:
        return _between(self.costs.batch_sizes, batch), _between(self.costs.num_draft_tokens, depth)

    def _correct(self, grid: _Grid, place: tuple[Floats, Floats], surprise: float, moves_scale: bool = True) -> None:
        weights, variance = grid.visit(place, self._now)
        scale_variance = self._scale_variance * moves_scale
        total = scale_variance + float((weights * variance).sum()) + self._NOISE
        likely = self._LEAST_LEAP * math.sqrt(total)
        agreed = grid.agreed(place, surprise)
        if agreed is None or abs(surprise - agreed) > likely:
            return
        if moves_scale and abs(agreed) > likely:
            scale_variance += agreed**2
            total += agreed**2
        if moves_scale:
            self._log_scale += scale_variance / total * agreed
            self._scale_variance = scale_variance * (1 - scale_variance / total)
        grid.correct(weights, variance / total, agreed)


class _Grid:
    """One part's seconds by batch size and drafted tokens, and how far each cell is to be trusted."""

    _AT_START = 0.4**2  # variance of a cell's log seconds, profiled but never served: wrong by 3 times is within reach
    _DRIFT = 3e-5  # of it, by a step in which it is not visited: answers get longer, caches fill

    def __init__(self, costs: StepCosts, seconds: Sequence[Sequence[float]]) -> None:
        self.seconds: Floats = np.array(seconds)
        self.visited = np.zeros(self.seconds.shape, dtype=np.int64)  # step number, 0 for never
        self._variance = np.full(self.seconds.shape, self._AT_START)
        self._last = np.full(self.seconds.shape, math.nan)  # surprise

    def value(self, by_batch: Floats, by_depth: Floats) -> float:
        return float(by_batch @ self.seconds @ by_depth)

    def agreed(self, place: tuple[Floats, Floats], surprise: float) -> float | None:
        """What this surprise and the last one at its cell have in common: the smaller, or nothing; None the first time."""
        cell = int(np.argmax(place[0])), int(np.argmax(place[1]))
        last, self._last[cell] = float(self._last[cell]), surprise
        if math.isnan(last):
            return None
        return math.copysign(min(abs(last), abs(surprise)), surprise) if last * surprise > 0 else 0.0

    def visit(self, place: tuple[Floats, Floats], now: int) -> tuple[Floats, Floats]:
        """Marks the cells around a place; how much each counts there, and that times its variance."""
        weights = np.clip(place[0], 0, 1)[:, None] * np.clip(place[1], 0, 1)
        touched = weights > 0
        self._variance[touched] += self._DRIFT * (now - self.visited[touched])
        np.minimum(self._variance, self._AT_START, out=self._variance)
        self.visited[weights >= 0.5 * weights.max()] = now
        return weights, weights * self._variance

    def correct(self, weights: Floats, gains: Floats, surprise: float) -> None:
        self.seconds *= np.exp(gains * surprise)
        self._variance *= 1 - weights * gains


# Interpolation. Linear between the profile's shapes, and beyond its largest batch along its last two.


@lru_cache(maxsize=4096)
def _between(grid: tuple[int, ...], x: float) -> Any:
    """How much each point of a rising grid counts at x."""
    weights = np.zeros(len(grid))
    if len(grid) == 1:
        weights[0] = 1
        return weights
    right = min(max(int(np.searchsorted(grid, x)), 1), len(grid) - 1)
    weights[right] = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
    weights[right - 1] = 1 - weights[right]
    return weights


@lru_cache(maxsize=256)
def _by_batch(grid: tuple[int, ...], batch: int) -> Any:
    """[batch + 1, G]; no request costs nothing."""
    return np.stack([np.zeros(len(grid)), *(_between(grid, n) for n in range(1, batch + 1))])


@lru_cache(maxsize=1024)
def _by_rows(grid: tuple[int, ...], batch: int, num_drafted: int) -> Any:
    """[N, num_drafted + 1], the drafted tokens shared among a batch."""
    return np.stack([_between(grid, drafted / batch) for drafted in range(num_drafted + 1)], axis=1)
