"""What this machine says of costs, before a run: measured once, then given as a number, so that runs ask no clock."""

from __future__ import annotations

import math
from dataclasses import replace

from onlinespec.config import GenerationParams, LearnConfig
from onlinespec.decode import DecodeLoop
from onlinespec.drafters.base import Drafter
from onlinespec.learn import InlineLearning
from onlinespec.learners import make_learner
from onlinespec.models.loading import Target

_PROMPT = "Tell me of the sea, the wind and the ships that come home in the evening."


def measure_row_cost(target: Target, drafter: Drafter, config: LearnConfig, num_draft_tokens: int = 4) -> float:
    """What training one row costs, in decode steps, on this machine: for `LearnConfig.row_cost`.

    Decodes and trains for some seconds; the drafter's weights are put back. Rounded to one digit, so that runs on like
    machines agree; given the number, learning asks no clock.
    """
    config = replace(config, budget=math.inf, min_interval=16, max_interval=16, requests_per_round=0, telemetry=False)
    weights, params = drafter.weights, GenerationParams(96, num_draft_tokens, ignore_end_tokens=True)
    learning = InlineLearning(drafter, make_learner("online_gradient", 0.0, config.geometry, config.clip_norm), config)
    prompt_ids = target.encode(_PROMPT)
    costs = []
    for _ in range(3):
        rows_before = learning.num_rows
        stats = DecodeLoop(target, drafter, learning).complete(prompt_ids, params).stats
        if num_rows := learning.num_rows - rows_before:  # none if learning fails, which is not said here
            costs.append(stats.learn_seconds / num_rows / (stats.decode_seconds / stats.steps))
    drafter.swap(weights)
    return float(f"{min(costs):.1g}") if costs else config.row_cost
