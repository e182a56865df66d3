"""The time of a step by its shape (requests, drafted tokens): profiled before serving, then tracked while serving.

Nothing here reads a clock; seconds are passed in. Axis letters: B requests, K drafted tokens, G batch sizes of the
profile, N its numbers of drafted tokens.
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
Cell = tuple[int, int]
Cells = tuple[tuple[Cell, float], ...]  # cells of a grid with their weights; cells of weight 0 are left out


@dataclass(frozen=True)
class StepCosts:
    """Seconds of steps in which all requests of a batch draft the same number of tokens.

    `draft_seconds[g][n]` is the time to draft `num_draft_tokens[n]` tokens for `batch_sizes[g]` requests (0 if no
    tokens); `verify_seconds[g][n]` is the rest of that step: the target's forward pass, verification, commit.

    Raises:
        ValueError: if the grids do not rise, the shapes do not match, or a time is not positive.

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
        """The largest number of drafted tokens that was measured."""
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
    """Measures the median time of steps of all shapes. Shapes take turns, so that drifting machine speed affects all.

    Args:
        measure: Called with (requests, drafted tokens); runs such a step and returns its draft and verify seconds.
        repeats: Timed steps per shape, after one that is not counted.
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
    """The profile, corrected by the steps that are served: one scale for the machine's speed, one factor per cell.

    Each step gives the log of measured over expected seconds. In a cell that is visited all the time, a deviation is
    mostly the machine's, so the scale takes it; in a cell that was not visited for long it is mostly the cell's. This
    is a Kalman filter without the covariances. A cell is updated only when two consecutive measurements deviate in the
    same direction; single outliers are ignored.

    Choices depend on ratios only, so the tables are in seconds of the machine as it was profiled; `scale` is its
    slowdown since then.
    """

    _NOISE = 0.1**2  # variance of a step's log seconds
    _SCALE_DRIFT = 0.02**2  # variance that the scale gains per step
    _LIKELY = 3.0  # standard deviations; a larger deviation is a jump if two measurements agree, else an outlier

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        drafted = np.stack([_mended(costs.num_draft_tokens, row) for row in costs.draft_seconds])
        added = np.maximum(np.diff(drafted, axis=1, prepend=0.0), 1e-3 * drafted)
        self._draft, self._verify = _Grid(added), _Grid(np.array(costs.verify_seconds))
        self._log_scale, self._scale_variance = 0.0, 0.0
        self._now = 0  # timed steps so far

    @property
    def scale(self) -> float:
        """Factor by which the machine is slower than when it was profiled."""
        return math.exp(self._log_scale)

    def verify_by_rows(self, batch: int, num_drafted: int) -> list[float]:
        """Returns the verify seconds of a step of `batch` requests with 0, 1, ... num_drafted drafted tokens in all."""
        by_batch = _between(self.costs.batch_sizes, batch)
        seconds = by_batch @ self._verify.seconds @ _by_rows(self.costs.num_draft_tokens, batch, num_drafted)
        return [float(x) for x in seconds]

    def draft_by_depth(self, batch: int, depth: int) -> list[list[float]]:
        """Returns the seconds that the d-th drafted token adds if n requests draft it, at [d - 1][n]."""
        by_batch = _by_batch(self.costs.batch_sizes, batch)
        seconds: list[list[float]] = (
            by_batch @ self._draft.seconds @ _added(self.costs.num_draft_tokens, depth)
        ).T.tolist()
        return seconds

    def step_seconds(self, num_draft_tokens_B: Sequence[int]) -> tuple[float, float]:
        """Returns the expected draft and verify seconds of a step, at the machine's present speed."""
        batch, drafted, depth = len(num_draft_tokens_B), sum(num_draft_tokens_B), max(num_draft_tokens_B)
        by_depth = self.draft_by_depth(batch, depth) if depth else []
        draft = sum(by_depth[d][sum(d < K for K in num_draft_tokens_B)] for d in range(depth))
        verify = self._verify.sum(_around(self.costs.batch_sizes, batch, self.costs.num_draft_tokens, drafted / batch))
        return draft * self.scale, verify * self.scale

    def observe(
        self, num_draft_tokens_B: Sequence[int], draft_seconds: float, verify_seconds: float
    ) -> tuple[float, float]:
        """Updates the costs with the time of a step; 0 stands for an unknown time.

        Only the verify time updates the scale, because the draft time also depends on how many tokens the drafter had
        to process first.

        Returns:
            The draft and verify seconds that were expected before the update.
        """
        self._now += 1
        batch, drafted, depth = len(num_draft_tokens_B), sum(num_draft_tokens_B), max(num_draft_tokens_B)
        batches, depths, scale = self.costs.batch_sizes, self.costs.num_draft_tokens, self.scale
        expected_draft, expected_verify = self.step_seconds(num_draft_tokens_B)
        if verify_seconds > 0:
            self._scale_variance += self._SCALE_DRIFT
            weights = _around(batches, batch, depths, drafted / batch)
            cell = _nearest(batches, batch), _nearest(depths, drafted / batch)
            self._correct(self._verify, weights, cell, math.log(verify_seconds / expected_verify))
        if depth and draft_seconds > 0:
            together = drafted / depth  # requests that draft at a depth, on average
            weights = _down_to(batches, together, depths, depth)
            cell = _nearest(batches, together), _nearest(depths, depth)
            surprise = math.log(draft_seconds / expected_draft * scale / self.scale)
            self._correct(self._draft, weights, cell, surprise, moves_scale=False)
        return expected_draft, expected_verify

    def stalest(self, batch: int, limit: int) -> int:
        """Returns the profiled number of drafted tokens, at most `limit`, that a batch of about this size drafted
        longest ago; of those it never drafted, the smallest."""
        row = _nearest(self.costs.batch_sizes, batch)
        columns = [n for n, depth in enumerate(self.costs.num_draft_tokens) if depth <= limit]
        return self.costs.num_draft_tokens[min(columns, key=lambda n: self._verify.visited[row, n])]

    def _correct(self, grid: _Grid, weights: Cells, cell: Cell, surprise: float, moves_scale: bool = True) -> None:
        shares = grid.visit(weights, cell, self._now)
        known = grid.variance(shares), self._scale_variance if moves_scale else 0.0
        likely = self._LIKELY * math.sqrt(sum(known) + self._NOISE)
        agreed = grid.agreed(cell, surprise)
        if agreed is None or abs(surprise - agreed) > likely:
            return
        if abs(agreed) > likely:  # a jump, of whichever is known less well
            if known[0] > known[1]:
                grid.loosen(shares, agreed**2)
            else:
                self._scale_variance += agreed**2
        scale_variance = self._scale_variance if moves_scale else 0.0
        total = grid.variance(shares) + scale_variance + self._NOISE
        if moves_scale:
            self._log_scale += scale_variance / total * agreed
            self._scale_variance *= 1 - scale_variance / total
        grid.correct(shares, agreed, total)


class _Grid:
    """Seconds by batch size and drafted tokens, with a variance for each cell.

    A step's seconds are a weighted sum of cells, and each cell takes its share of an error of the sum. A step involves
    few cells, so Python loops over them are faster than array operations.
    """

    _AT_START = 0.1**2  # variance of a profiled cell's log seconds; also the maximum
    _DRIFT = 3e-5  # variance gained per step without a visit: answers get longer, caches fill

    def __init__(self, seconds: Floats) -> None:
        self.seconds = seconds
        self.visited = np.zeros(seconds.shape, dtype=np.int64)  # number of the last step there; 0 for never
        self._updated = np.zeros(seconds.shape, dtype=np.int64)  # number of the step that `_variance` is from
        self._variance = np.full(seconds.shape, self._AT_START)
        self._last = np.full(seconds.shape, math.nan)  # last deviation

    def sum(self, weights: Cells) -> float:
        """Returns the seconds of a weighted sum of cells."""
        return math.fsum(weight * float(self.seconds[cell]) for cell, weight in weights)

    def agreed(self, cell: Cell, surprise: float) -> float | None:
        """Returns the smaller of this deviation and the last one; 0 if their signs differ, None the first time."""
        last, self._last[cell] = float(self._last[cell]), surprise
        if math.isnan(last):
            return None
        return math.copysign(min(abs(last), abs(surprise)), surprise) if last * surprise > 0 else 0.0

    def visit(self, weights: Cells, at: Cell, now: int) -> Cells:
        """Marks a cell as visited. Returns the share of every cell in a weighted sum."""
        parts = [(cell, weight * float(self.seconds[cell])) for cell, weight in weights if weight > 0]
        total = math.fsum(part for _, part in parts)
        for cell, _ in parts:
            grown = float(self._variance[cell]) + self._DRIFT * int(now - self._updated[cell])
            self._variance[cell], self._updated[cell] = min(grown, self._AT_START), now
        self.visited[at] = now
        return tuple((cell, part / total) for cell, part in parts)

    def variance(self, shares: Cells) -> float:
        """Returns the variance of the logarithm of a sum."""
        return math.fsum(share * share * float(self._variance[cell]) for cell, share in shares)

    def loosen(self, shares: Cells, variance: float) -> None:
        """Adds to the variance of these cells."""
        for cell, _ in shares:
            self._variance[cell] += variance

    def correct(self, shares: Cells, surprise: float, total_variance: float) -> None:
        """Applies the cells' part of a deviation."""
        for cell, share in shares:
            gain = share * float(self._variance[cell]) / total_variance
            self.seconds[cell] *= math.exp(gain * surprise)
            self._variance[cell] *= 1 - share * gain


def _mended(depths: Sequence[int], seconds: Sequence[float]) -> Floats:
    """Makes draft seconds rise with depth: values outside the longest rising subsequence are interpolated anew."""
    rising: list[list[int]] = []  # for each column, the longest rising subsequence that ends there
    for n, cell in enumerate(seconds):
        before = [row for row in rising if seconds[row[-1]] <= cell]
        rising.append([*max(before, key=len, default=[]), n])
    fine = max(rising, key=len)
    return np.interp(depths, [depths[n] for n in fine], [seconds[n] for n in fine])


# Interpolation: linear between profiled shapes; beyond the largest batch, along the last two.


@lru_cache(maxsize=4096)
def _between(grid: tuple[int, ...], x: float) -> Any:
    """Weight of each point of a rising grid at x."""
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
    """Weights [batch + 1, G] for 0 to `batch` requests; those of 0 requests are 0."""
    return np.stack([np.zeros(len(grid)), *(_between(grid, n) for n in range(1, batch + 1))])


@lru_cache(maxsize=1024)
def _by_rows(grid: tuple[int, ...], batch: int, num_drafted: int) -> Any:
    """Weights [N, num_drafted + 1] for 0 to num_drafted tokens, divided evenly among a batch."""
    return np.stack([_between(grid, drafted / batch) for drafted in range(num_drafted + 1)], axis=1)


@lru_cache(maxsize=256)
def _added(grid: tuple[int, ...], depth: int) -> Any:
    """[N, depth]: the share of the d-th token in what each point of the grid adds to the one before it."""
    reached = np.stack(
        [[min(max(d - a, 0) / (b - a), 1.0) for d in range(depth + 1)] for a, b in itertools.pairwise(grid)]
    )
    return np.vstack([np.zeros(depth), np.diff(reached, axis=1)])


@lru_cache(maxsize=4096)
def _around(rows: tuple[int, ...], x: float, columns: tuple[int, ...], y: float) -> Cells:
    """The cells around a point of a grid, with their weights."""
    return _cells(np.outer(_between(rows, x), _between(columns, y)))


@lru_cache(maxsize=4096)
def _down_to(rows: tuple[int, ...], x: float, columns: tuple[int, ...], depth: int) -> Cells:
    """The cells in the sum of what tokens down to a depth add, with their weights."""
    return _cells(np.outer(_between(rows, x), _added(columns, depth).sum(1)))


def _cells(weights: Floats) -> Cells:
    return tuple(((int(row), int(column)), float(weights[row, column])) for row, column in np.argwhere(weights))


@lru_cache(maxsize=4096)
def _nearest(grid: tuple[int, ...], x: float) -> int:
    """Index of the point with the largest weight at x."""
    return int(np.argmax(_between(grid, x)))
