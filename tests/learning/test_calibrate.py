"""What rounds cost is read off rounds of few and of many rows; the drafter is left as it was. What steps cost is
measured within the memory that they may take."""

from __future__ import annotations

import time

import pytest
import rigs

from onlinespec.cli.arguments import Serve
from onlinespec.cli.serve import _control
from onlinespec.config import GenerationParams, LearnConfig
from onlinespec.core import DecodeStats
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.scheduler import Limits
from onlinespec.engine.step import DecodeLoop
from onlinespec.learning import calibrate as calibration
from onlinespec.learning.calibrate import Costs, measure_costs, measure_step_costs
from onlinespec.learning.replay import ReplayBuffer

TARGET = rigs.random_target()
PARAMS = GenerationParams(num_draft_tokens=2)


def timed(rounds, step_seconds, monkeypatch):
    rounds = tuple(calibration._Round(*one) for one in rounds)
    monkeypatch.setattr(calibration, "_timed", lambda *_: (rounds, step_seconds))
    return measure_costs(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)


def test_costs_are_the_line_through_short_and_long_rounds_in_steps(monkeypatch):
    rounds = [(rows, 0.010 + 0.0002 * rows) for rows in (8, 70, 10, 72)]
    assert timed(rounds, 0.005, monkeypatch) == Costs(round_cost=2.0, row_cost=0.04)


def test_one_disturbed_round_changes_nothing(monkeypatch):
    quiet = [(rows, 0.010 + 0.0002 * rows) for rows in (8, 70) * 4]
    assert timed([*quiet, (8, 1.0), (70, 1.0)], 0.005, monkeypatch) == timed(quiet, 0.005, monkeypatch)


def test_where_learning_fails_the_settings_own_costs_stand(monkeypatch):
    assert timed([], 0.005, monkeypatch) == Costs(LearnConfig().round_cost, LearnConfig().row_cost)


@pytest.fixture
def few_rounds(monkeypatch):
    """For what four rounds show as well as twenty."""
    monkeypatch.setattr(calibration, "_NUM_ROUNDS", 4)


def test_real_rounds_have_few_rows_and_many(few_rounds):
    rounds, step_seconds = calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)
    rows = sorted(one.rows for one in rounds)
    assert rows[-1] > 3 * rows[0]
    assert step_seconds > 0


@pytest.mark.parametrize("num_rounds", [4, pytest.param(20, marks=pytest.mark.full)])
def test_a_drafter_whose_answers_have_few_steps_is_measured_on_more_of_them(monkeypatch, num_rounds):
    monkeypatch.setattr(calibration, "_NUM_ROUNDS", num_rounds)
    monkeypatch.setattr(calibration, "_ANSWER_TOKENS", 12)  # as many steps: nothing is accepted here
    rounds, _ = calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)
    by_turns = [16 + 12, 16] * (num_rounds // 2)  # every second one with a replayed answer
    assert [one.rows for one in rounds][:num_rounds] == by_turns


def test_where_rounds_never_come_measuring_ends(monkeypatch):
    monkeypatch.setattr(calibration, "_ANSWER_TOKENS", 1)
    monkeypatch.setattr(Eagle, "batch", lambda *_, **__: [])
    monkeypatch.setattr(calibration, "_MOST_ANSWERS", 3)
    assert calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)[0] == ()


def test_reading_the_prompt_is_no_part_of_a_step(few_rounds, monkeypatch):
    start = DecodeLoop.start

    def slow_start(loop, *args):
        request = start(loop, *args)
        request.stats += DecodeStats(decode_seconds=1000.0)
        return request

    monkeypatch.setattr(DecodeLoop, "start", slow_start)
    assert calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)[1] < 1


def test_what_learning_does_between_rounds_is_part_of_their_cost(few_rounds, monkeypatch):
    monkeypatch.setattr(ReplayBuffer, "offer", lambda *_: time.sleep(0.01))
    rounds, _ = calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)
    assert min(one.seconds for one in rounds) > 0.01 * calibration._INTERVAL / (1 + 0.35)  # a comparison beside it


def test_measuring_puts_the_weights_back(few_rounds):
    drafter = Eagle.fresh(TARGET)
    weights = drafter.weights
    assert measure_costs(TARGET, drafter, LearnConfig(), PARAMS).row_cost > 0
    assert drafter.weights is weights


# --- what steps cost, by their shape --------------------------------------------------------------------------------


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
    monkeypatch.setattr(calibration, "_STEPS_OF_A_SHAPE", 1)
    return sizes


def bytes_of(num_tokens, drafter):
    loop = DecodeLoop(TARGET, drafter)
    return loop.num_bytes(loop.open([1], GenerationParams(num_tokens - 1)))


def test_a_server_is_profiled_within_the_memory_that_its_requests_may_take(held):
    """Four requests of a hundred tokens, where those of the profile would come to a thousand."""
    budget = 4.5 * bytes_of(100, Eagle.fresh(TARGET)) / 1e6
    command = Serve("random", max_running=4, cache_megabytes=budget)
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
