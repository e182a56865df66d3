"""Measures what a learning round costs on this machine. Runs then count with these numbers instead of a clock."""

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

_INTERVAL = 16  # steps between rounds, as at the start of a run; every second round has replayed rows too
_NUM_ROUNDS = 20
_MOST_ANSWERS = 40  # gives up after so many, if nothing can be learned and no round comes


class RoundCosts(NamedTuple):
    """Costs in units of one decoding step with its drafts, for `LearnConfig`."""

    round_cost: float
    row_cost: float


def measure_round_costs(
    drafter: Drafter,
    config: LearnConfig,
    steps: Iterable[tuple[Sequence[Feedback], float]],
    clock: Clock | None = None,
) -> RoundCosts:
    """Measures what a round costs, in decoding steps with their drafts: a fixed part, and a part per row.

    Trains for some seconds, with rounds of few and of many rows in turn, and restores the drafter's weights. The result
    is rounded, so that runs on similar machines agree. If no rounds could be measured, the config's costs are returned.

    Args:
        config: The learning settings; geometry, loss and max_rows matter.
        steps: Feedback and seconds of decoding steps, without end (`engine.profile.steps_to_learn_from`). Draft length
            and sampling should be those of the run, because rounds on greedy rows are cheaper.
        clock: Of the drafter's device; None for the CPU's.
    """
    weights = drafter.weights
    rounds, step_seconds = _timed(drafter, config, steps, clock or HostClock())
    drafter.swap(weights)
    middle = statistics.fmean(one.rows for one in rounds) if rounds else 0.0
    few, many = [one for one in rounds if one.rows < middle], [one for one in rounds if one.rows >= middle]
    if not few or not many:  # learning failed or found nothing to learn, which is reported elsewhere
        return RoundCosts(config.round_cost, config.row_cost)
    (few_rows, few_steps), (many_rows, many_steps) = (_middle(part, step_seconds) for part in (few, many))
    slope = (many_steps - few_steps) / (many_rows - few_rows)
    row_cost = float(f"{min(max(slope, 1e-3), many_steps / many_rows):.1g}")
    return RoundCosts(round(max(few_steps - row_cost * few_rows, 0.0), 1), row_cost)


class _Round(NamedTuple):
    rows: int
    seconds: float  # per evaluation of its rows with gradient


class _Timing(InlineLearning):
    """Learning with step size 0 that measures each round, together with all `offer` calls since the last one."""

    rounds: tuple[_Round, ...] = ()
    clock: Clock = HostClock()  # of the device that learns
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
    """Returns the rounds of all answers but the first, and the median over answers of a step's mean seconds."""
    always = replace(
        config, budget=math.inf, min_interval=_INTERVAL, max_interval=_INTERVAL, requests_per_round=0, replay_every=2,
        telemetry=False, round_cost=1.0, row_cost=1e-9,
    )  # fmt: skip
    learning = _Timing(drafter, make_learner("online_gradient", 0.0, config.geometry, config.clip_norm), always)
    learning.clock = clock
    answers: list[float] = []  # mean seconds of a step, for each answer
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
    """Mean number of rows, and median time in steps, of some rounds."""
    return (
        statistics.fmean(one.rows for one in rounds),
        statistics.median(one.seconds for one in rounds) / step_seconds,
    )
