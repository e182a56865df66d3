"""What a round of learning costs on this machine: measured once, then given as numbers, so that runs ask no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from onlinespec.core import Feedback
from onlinespec.drafters.contract import Drafter
from onlinespec.learners import make_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.clock import Clock, HostClock

_INTERVAL = 16  # steps, as at a run's start: rounds of few rows, and every second one with replayed rows beside them
_NUM_ROUNDS = 20
_MOST_ANSWERS = 40  # where nothing can be learned, rounds never come


class RoundCosts(NamedTuple):
    """Of learning, in steps as requests decode, their drafts included: for `LearnConfig`."""

    round_cost: float
    row_cost: float


def measure_round_costs(
    drafter: Drafter,
    config: LearnConfig,
    steps: Iterable[tuple[Sequence[Feedback], float]],
    clock: Clock | None = None,
) -> RoundCosts:
    """What a round costs on this machine, in decode steps with their drafts, by itself and for each of its rows.

    Trains for some seconds, rounds of few and of many rows taking turns; the drafter's weights are put back. Rounded,
    so that runs on like machines agree; given the numbers, learning asks no clock.

    Args:
        steps: Feedback and seconds of steps as requests decode, more than will be read (`profile.steps_to_learn_from`).
            Drafted tokens and sampling count, for rounds on greedy rows are cheaper.
        clock: Of the drafter's device; None for a CPU's.
    """
    weights = drafter.weights
    rounds, step_seconds = _timed(drafter, config, steps, clock or HostClock())
    drafter.swap(weights)
    middle = statistics.fmean(one.rows for one in rounds) if rounds else 0.0
    few, many = [one for one in rounds if one.rows < middle], [one for one in rounds if one.rows >= middle]
    if not few or not many:  # learning fails or finds nothing, which is not said here
        return RoundCosts(config.round_cost, config.row_cost)
    (few_rows, few_steps), (many_rows, many_steps) = (_middle(part, step_seconds) for part in (few, many))
    slope = (many_steps - few_steps) / (many_rows - few_rows)
    row_cost = float(f"{min(max(slope, 1e-3), many_steps / many_rows):.1g}")
    return RoundCosts(round(max(few_steps - row_cost * few_rows, 0.0), 1), row_cost)


class _Round(NamedTuple):
    rows: int
    seconds: float  # for each time that its rows were evaluated


class _Timing(InlineLearning):
    """Learning that keeps the time of each round, with what led up to it since the last one; it never moves."""

    rounds: tuple[_Round, ...] = ()
    clock: Clock = HostClock()  # of the device that it learns on
    _seconds = 0.0

    def offer(self, feedback: Sequence[Feedback]) -> None:
        began, rows, work = self.clock.mark(), self.num_rows, self.work
        super().offer(feedback)
        self._seconds += self.clock.seconds(began, self.clock.mark())
        if self.work > work:
            self.rounds = (*self.rounds, _Round(self.num_rows - rows, self._seconds / (self.work - work)))
            self._seconds = 0.0


def _timed(
    drafter: Drafter, config: LearnConfig, steps: Iterable[tuple[Sequence[Feedback], float]], clock: Clock
) -> tuple[tuple[_Round, ...], float]:
    """Rounds of all answers but the first, and seconds of a step in them; a good drafter's answers have few steps."""
    always = replace(
        config, budget=math.inf, min_interval=_INTERVAL, max_interval=_INTERVAL, requests_per_round=0, replay_every=2,
        telemetry=False, round_cost=1.0, row_cost=1e-9,
    )  # fmt: skip
    learning = _Timing(drafter, make_learner("online_gradient", 0.0, config.geometry, config.clip_norm), always)
    learning.clock = clock
    answers: list[float] = []  # seconds of a step, mean over each answer
    of_this_one: list[float] = []
    num_first = 0
    for feedback, seconds in steps:
        of_this_one.append(seconds)
        learning.offer(feedback)
        if not any(record.is_last for record in feedback):
            continue
        answers.append(statistics.fmean(of_this_one))
        of_this_one = []
        if len(answers) == 1:
            num_first = len(learning.rounds)
        elif len(learning.rounds) >= num_first + _NUM_ROUNDS or len(answers) > _MOST_ANSWERS or learning.is_frozen:
            break
    return learning.rounds[num_first:], statistics.median(answers[1:])


def _middle(rounds: list[_Round], step_seconds: float) -> tuple[float, float]:
    """Mean rows, and the median round's time in steps."""
    return (
        statistics.fmean(one.rows for one in rounds),
        statistics.median(one.seconds for one in rounds) / step_seconds,
    )
