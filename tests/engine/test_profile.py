"""What steps cost is measured within the memory that they may take; what learning costs, beside steps of their kind."""

from __future__ import annotations

from itertools import islice

import pytest
import rigs

from onlinespec.cli.arguments import EngineLimits
from onlinespec.cli.commands import Serve
from onlinespec.cli.serve import _control
from onlinespec.config import GenerationParams
from onlinespec.core import DecodeStats
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine import profile
from onlinespec.engine.profile import measure_step_costs, steps_to_learn_from
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop

TARGET = rigs.random_target()
PARAMS = GenerationParams(num_draft_tokens=2)


def test_reading_the_prompt_is_no_part_of_a_step(monkeypatch):
    start = DecodeLoop.start

    def slow_start(loop, *args):
        request = start(loop, *args)
        request.stats += DecodeStats(decode_seconds=1000.0)
        return request

    monkeypatch.setattr(DecodeLoop, "start", slow_start)
    steps = list(islice(steps_to_learn_from(TARGET, Eagle.fresh(TARGET), PARAMS), 3))
    assert all(0 < seconds < 1 for _, seconds in steps)


def test_one_answer_follows_another_and_nothing_is_held_when_no_more_is_read(monkeypatch):
    monkeypatch.setattr(profile, "_ANSWER_TOKENS", 3)
    drafter = Eagle.fresh(TARGET)
    steps = steps_to_learn_from(TARGET, drafter, PARAMS)
    ends = [record.is_last for feedback, _ in islice(steps, 12) for record in feedback]
    assert sum(ends) >= 3
    assert drafter._slots
    steps.close()
    assert not drafter._slots


@pytest.fixture
def held(monkeypatch):
    """Bytes that running requests hold, by `DecodeLoop.num_bytes`, whenever one was admitted."""
    running, sizes = {}, []
    admit, finish = DecodeLoop.admit, DecodeLoop.finish

    def noting_admit(loop, request):
        admit(loop, request)
        running[id(request)] = loop.num_bytes(request)
        sizes.append(sum(running.values()))

    def noting_finish(loop, request):
        running.pop(id(request), None)
        finish(loop, request)

    monkeypatch.setattr(DecodeLoop, "admit", noting_admit)
    monkeypatch.setattr(DecodeLoop, "finish", noting_finish)
    monkeypatch.setattr(profile, "_STEPS_OF_A_SHAPE", 1)
    return sizes


def bytes_of(num_tokens, drafter):
    loop = DecodeLoop(TARGET, drafter)
    return loop.num_bytes(loop.open([1], GenerationParams(num_tokens - 1)))


def test_a_server_is_profiled_within_the_memory_that_its_requests_may_take(held):
    """Four requests of a hundred tokens, where those of the profile would come to a thousand."""
    budget = 4.5 * bytes_of(100, Eagle.fresh(TARGET)) / 1e6
    command = Serve("random", limits=EngineLimits(4, cache_megabytes=budget))
    control = _control(command, TARGET, Eagle.fresh(TARGET), Limits(4, cache_megabytes=budget))
    assert control
    assert 0.9 * budget * 1e6 < max(held) <= budget * 1e6


@pytest.mark.parametrize(("num_tokens", "batches"), [(5000, (1, 2)), (250, (1, 2)), (130, (1, 2)), (66, (1,))])
def test_requests_of_a_profile_get_shorter_before_they_get_fewer(held, num_tokens, batches):
    budget = bytes_of(num_tokens, Ngram())
    costs = measure_step_costs(TARGET, Ngram(), 2, 1, max_bytes=budget)
    assert costs.batch_sizes == batches
    assert max(held) <= budget


def test_memory_for_less_than_one_request_is_refused_with_what_is_needed(held):
    budget = bytes_of(64, Ngram())
    with pytest.raises(
        ValueError, match=r"may take .* MB, and one of 65 tokens.* takes .* MB; raise --cache-megabytes"
    ):
        measure_step_costs(TARGET, Ngram(), 2, 1, max_bytes=budget)
    assert not held
