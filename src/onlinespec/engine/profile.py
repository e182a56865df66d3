"""Measures the time of decode steps by their shape (requests, drafted tokens) before serving begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, SamplingParams
from onlinespec.control.costs import StepCosts, profile
from onlinespec.core import Feedback
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.request import Request
from onlinespec.engine.step import DecodeLoop
from onlinespec.models.loading import Target

_PROMPT = "Tell me of the sea, the wind and the ships that come home in the evening. " * 12  # context costs too
_ANSWER_TOKENS = 64


def steps_to_learn_from(
    target: Target, drafter: Drafter, params: GenerationParams
) -> Iterator[tuple[list[Feedback], float]]:
    """Yields Feedback and seconds of each step while it answers one prompt again and again, without end.

    Used to measure what learning costs beside decoding: the caller may run rounds between two steps. Prefill is not
    part of the seconds.

    Args:
        params: Only num_draft_tokens and sampling are used.
    """
    loop = DecodeLoop(target, drafter)
    params = GenerationParams(_ANSWER_TOKENS, params.num_draft_tokens, params.sampling, ignore_end_tokens=True)
    prompt_ids = target.encode(_PROMPT)[: target.decoder.config.max_positions // 2]
    while True:
        request = loop.start(prompt_ids, params)
        try:
            while request.finish_reason is None:
                step = loop.step([request])
                yield step.feedback, step.draft_seconds + step.verify_seconds
        finally:
            loop.finish(request)


_DEPTHS = (0, 1, 2, 4, 8, 16)
_STEPS_OF_A_SHAPE = 4
_ROOM = 600  # answer tokens of a request that is measured
_LEAST_ROOM = 4 * MAX_DRAFT_TOKENS  # answer tokens that must be left for a shape: two steps, with some reserve


def measure_step_costs(
    target: Target,
    drafter: Drafter,
    max_running: int,
    max_draft_tokens: int,
    sampling: SamplingParams | None = None,
    max_bytes: float = math.inf,
) -> StepCosts:
    """Measures the seconds of steps of all shapes, up to `max_running` requests that draft `max_draft_tokens` each.

    Decodes for some seconds. Nothing is learned from it, and the drafter's weights are not changed.

    Args:
        max_bytes: Memory that the measured requests may hold together, counted by `DecodeLoop.num_bytes` like the
            scheduler's. If it is too small, requests are shorter, and then fewer.

    Raises:
        ValueError: if max_bytes is too small for the shortest request that can be measured.
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
        return loop.start(prompt_ids, replace(params, seed=seed), may_learn=False)

    requests = [started(i) for i in range(max_running)]

    def measure(batch: int, depth: int) -> tuple[float, float]:
        for i, request in enumerate(requests[:batch]):
            if request.max_tokens - len(request.trace.token_ids) < _LEAST_ROOM:  # start it again before it ends
                loop.finish(request)
                requests[i] = started(i)
        chosen = requests[:batch]
        loop.step(chosen, [max(depth, 1)] * batch)  # not timed: the drafter processes tokens of steps without drafts
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
    """Returns how many requests fit into max_bytes, and of how many tokens each.

    Args:
        num_bytes: Of a request of `num_tokens`; memory is proportional to tokens.
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
    """Every other batch size, and the last one. Costs between them are interpolated."""
    return sorted({*batches[::2], batches[-1]})
