"""What this machine says of costs, before a run: measured once, then given as numbers, so that runs ask no clock."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from onlinespec.config import GenerationParams, LearnConfig
from onlinespec.decode import DecodeLoop
from onlinespec.drafters.base import Drafter
from onlinespec.learn import InlineLearning
from onlinespec.learners import make_learner
from onlinespec.models.loading import Target

_PROMPT = "Tell me of the sea, the wind and the ships that come home in the evening. " * 12  # context costs too
_INTERVALS = 4, 28  # steps: rounds of few rows, and of many
_REPEATS = 2


class Costs(NamedTuple):
    """Of learning, in steps as requests decode, their drafts included: for `LearnConfig`."""

    round_cost: float
    row_cost: float


def measure_costs(target: Target, drafter: Drafter, config: LearnConfig, params: GenerationParams) -> Costs:
    """What a round costs on this machine, in decode steps with their drafts, by itself and for each of its rows.

    Decodes and trains for some seconds, with few rows a round and with many; the drafter's weights are put back.
    Rounded, so that runs on like machines agree; given the numbers, learning asks no clock.

    Args:
        params: How requests decode: drafted tokens and sampling count, for rounds on greedy rows are cheaper.
    """
    weights = drafter.weights
    few, many = (_cheapest(target, drafter, config, interval, params) for interval in _INTERVALS)
    drafter.swap(weights)
    if few is None or many is None:  # learning fails, which is not said here
        return Costs(config.round_cost, config.row_cost)
    slope = (many.steps - few.steps) / max(many.rows - few.rows, 1.0)
    row_cost = float(f"{min(max(slope, 1e-3), many.steps / many.rows):.1g}")
    return Costs(round(max(many.steps - row_cost * many.rows, 0.0) * 4) / 4, row_cost)


class _Round(NamedTuple):
    rows: float
    steps: float  # that it costs


def _cheapest(
    target: Target, drafter: Drafter, config: LearnConfig, interval: int, params: GenerationParams
) -> _Round | None:
    """The mean round of the least disturbed of some answers."""
    always = replace(
        config, budget=math.inf, min_interval=interval, max_interval=interval, requests_per_round=0, replay_every=0,
        telemetry=False,
    )  # fmt: skip
    learning = InlineLearning(drafter, make_learner("online_gradient", 0.0, config.geometry, config.clip_norm), always)
    loop = DecodeLoop(target, drafter, learning)
    params = GenerationParams(64, params.num_draft_tokens, params.sampling, ignore_end_tokens=True)
    prompt_ids, rounds = target.encode(_PROMPT)[: target.decoder.config.max_positions // 2], []
    for _ in range(_REPEATS):
        rounds_before, rows_before = learning.num_rounds, learning.num_rows
        stats = loop.complete(prompt_ids, params).stats
        if count := learning.num_rounds - rounds_before:
            cost = stats.learn_seconds / count / (stats.decode_seconds / stats.steps)
            rounds.append(_Round((learning.num_rows - rows_before) / count, cost))
    return min(rounds, key=lambda one: one.steps, default=None)
