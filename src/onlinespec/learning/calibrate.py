"""What this machine says of costs, before a run: measured once, then given as numbers, so that runs ask no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, LearnConfig, SamplingParams
from onlinespec.control.costs import StepCosts, profile
from onlinespec.core import Feedback
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.step import DecodeLoop, Request
from onlinespec.learners import make_learner
from onlinespec.learning.update import InlineLearning
from onlinespec.models.clock import Clock, HostClock, clock_for
from onlinespec.models.loading import Target

_PROMPT = "Tell me of the sea, the wind and the ships that come home in the evening. " * 12  # context costs too
_INTERVAL = 16  # steps, as at a run's start: rounds of few rows, and every second one with replayed rows beside them
_NUM_ROUNDS = 20
_ANSWER_TOKENS = 64
_MOST_ANSWERS = 40  # where nothing can be learned, rounds never come


class Costs(NamedTuple):
    """Of learning, in steps as requests decode, their drafts included: for `LearnConfig`."""

    round_cost: float
    row_cost: float


def measure_costs(target: Target, drafter: Drafter, config: LearnConfig, params: GenerationParams) -> Costs:
    """What a round costs on this machine, in decode steps with their drafts, by itself and for each of its rows.

    Decodes and trains for some seconds, rounds of few and of many rows taking turns; the drafter's weights are put
    back. Rounded, so that runs on like machines agree; given the numbers, learning asks no clock.

    Args:
        params: How requests decode: drafted tokens and sampling count, for rounds on greedy rows are cheaper.
    """
    weights = drafter.weights
    rounds, step_seconds = _timed(target, drafter, config, params)
    drafter.swap(weights)
    middle = statistics.fmean(one.rows for one in rounds) if rounds else 0.0
    few, many = [one for one in rounds if one.rows < middle], [one for one in rounds if one.rows >= middle]
    if not few or not many:  # learning fails or finds nothing, which is not said here
        return Costs(config.round_cost, config.row_cost)
    (few_rows, few_steps), (many_rows, many_steps) = (_middle(part, step_seconds) for part in (few, many))
    slope = (many_steps - few_steps) / (many_rows - few_rows)
    row_cost = float(f"{min(max(slope, 1e-3), many_steps / many_rows):.1g}")
    return Costs(round(max(few_steps - row_cost * few_rows, 0.0), 1), row_cost)


class _Round(NamedTuple):
    rows: int
    seconds: float  # for each time that its rows were evaluated


class _Timing(InlineLearning):
    """Learning that keeps the time of each round, with what led up to it since the last one; it never moves."""

    rounds: tuple[_Round, ...] = ()
    clock: Clock = HostClock()
    _seconds = 0.0

    def offer(self, feedback: Sequence[Feedback]) -> None:
        began, rows, work = self.clock.mark(), self.num_rows, self.work
        super().offer(feedback)
        self._seconds += self.clock.seconds(began, self.clock.mark())
        if self.work > work:
            self.rounds = (*self.rounds, _Round(self.num_rows - rows, self._seconds / (self.work - work)))
            self._seconds = 0.0


def _timed(
    target: Target, drafter: Drafter, config: LearnConfig, params: GenerationParams
) -> tuple[tuple[_Round, ...], float]:
    """Rounds of all answers but the first, and seconds of a step in them; a good drafter's answers have few steps."""
    always = replace(
        config, budget=math.inf, min_interval=_INTERVAL, max_interval=_INTERVAL, requests_per_round=0, replay_every=2,
        telemetry=False, round_cost=1.0, row_cost=1e-9,
    )  # fmt: skip
    learning = _Timing(drafter, make_learner("online_gradient", 0.0, config.geometry, config.clip_norm), always)
    learning.clock = clock_for(target.decoder.device)
    loop = DecodeLoop(target, drafter, learning)
    params = GenerationParams(_ANSWER_TOKENS, params.num_draft_tokens, params.sampling, ignore_end_tokens=True)
    prompt_ids = target.encode(_PROMPT)[: target.decoder.config.max_positions // 2]
    _step_seconds(loop, prompt_ids, params)
    num_first, steps = len(learning.rounds), [_step_seconds(loop, prompt_ids, params)]
    while len(learning.rounds) < num_first + _NUM_ROUNDS and len(steps) < _MOST_ANSWERS and not learning.is_frozen:
        steps.append(_step_seconds(loop, prompt_ids, params))
    return learning.rounds[num_first:], statistics.median(steps)


def _step_seconds(loop: DecodeLoop, prompt_ids: Sequence[int], params: GenerationParams) -> float:
    """Mean over an answer. Reading the prompt is left out: steps earn the budget, prompts do not."""
    request = loop.start(prompt_ids, params)
    prompt_seconds = request.stats.decode_seconds
    while request.finish_reason is None:
        loop.step([request])
    loop.finish(request)
    return (request.stats.decode_seconds - prompt_seconds) / request.stats.steps


def _middle(rounds: list[_Round], step_seconds: float) -> tuple[float, float]:
    """Mean rows, and the median round's time in steps."""
    return (
        statistics.fmean(one.rows for one in rounds),
        statistics.median(one.seconds for one in rounds) / step_seconds,
    )


# --- what steps cost, by their shape ----------------------------------------------------------------------------------


_DEPTHS = (0, 1, 2, 4, 8, 16)
_STEPS_OF_A_SHAPE = 4
_ROOM = 600  # tokens that a request of the measurement may come to, beside its prompt
_LEAST_ROOM = 4 * MAX_DRAFT_TOKENS  # a shape takes two steps, of MAX_DRAFT_TOKENS + 1 tokens at most


def measure_step_costs(
    target: Target,
    drafter: Drafter,
    max_running: int,
    max_draft_tokens: int,
    sampling: SamplingParams | None = None,
    max_bytes: float = math.inf,
) -> StepCosts:
    """What steps of every shape cost on this machine, as far as `max_running` requests that draft `max_draft_tokens`.

    Decodes for some seconds; nothing of it is learned, and the drafter's weights are left alone.

    Args:
        max_bytes: What the requests of the measurement may hold together, counted by `DecodeLoop.num_bytes` as a
            scheduler counts. Where it is short, they are shorter, as requests must be that run together then; and
            fewer, where they could not decode any more.

    Raises:
        ValueError: if max_bytes does not hold one request that could be measured.
    """
    loop = DecodeLoop(target, drafter)
    context = target.decoder.config.max_positions
    prompt_ids = target.encode(_PROMPT)[: max(1, min(context // 2, context - _ROOM))]
    params = GenerationParams(_ROOM, MAX_DRAFT_TOKENS, sampling or SamplingParams(), ignore_end_tokens=True)
    largest = loop.open(prompt_ids, params)
    max_running, num_tokens = _that_fit(largest.max_tokens, max_running, max_bytes, loop.num_bytes(largest))
    if num_tokens < largest.max_tokens:
        room = max(_LEAST_ROOM, _ROOM * num_tokens // largest.max_tokens)
        prompt_ids, params = prompt_ids[: num_tokens - room], replace(params, max_new_tokens=room)

    def started(seed: int) -> Request:
        return loop.start(prompt_ids, replace(params, seed=seed), learns=False)

    requests = [started(i) for i in range(max_running)]

    def measure(batch: int, depth: int) -> tuple[float, float]:
        for i, request in enumerate(requests[:batch]):
            if request.max_tokens - len(request.trace.token_ids) < _LEAST_ROOM:  # it nears its end
                loop.finish(request)
                requests[i] = started(i)
        chosen = requests[:batch]
        loop.step(chosen, [max(depth, 1)] * batch)  # reads what the drafter missed while others had their turn
        step = loop.step(chosen, [depth] * batch)
        return step.draft_seconds, step.verify_seconds

    batches = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < max_running] + [max_running]
    depths = [depth for depth in _DEPTHS if depth < max_draft_tokens] + [max_draft_tokens]
    try:
        return profile(measure, _few(batches), depths, _STEPS_OF_A_SHAPE)
    finally:
        for request in requests:
            loop.finish(request)


def _that_fit(num_tokens: int, max_running: int, max_bytes: float, num_bytes: int) -> tuple[int, int]:
    """How many requests fit into a budget, and of how many tokens each.

    Args:
        num_bytes: Of a request of `num_tokens`; others take as much for each of their tokens.
    """
    if max_running * num_bytes <= max_bytes:
        return max_running, num_tokens
    tokens, least = int(max_bytes * num_tokens / num_bytes), min(num_tokens, _LEAST_ROOM + 1)
    if tokens < least:
        needed = math.ceil(least * num_bytes / num_tokens)
        raise ValueError(
            f"requests that run together may take {max_bytes / 1e6:g} MB, and one of {least} tokens, the shortest that "
            f"steps can be measured with, takes {needed / 1e6:.2g} MB; raise --cache-megabytes, or give "
            "--fixed-draft-length, which measures nothing"
        )
    fitting = min(max_running, tokens // least)
    return fitting, tokens // fitting


def _few(batches: Sequence[int]) -> list[int]:
    """The first, the last, and every other one between; what lies between is interpolated."""
    return sorted({*batches[::2], batches[-1]})
