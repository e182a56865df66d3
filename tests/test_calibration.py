"""What rounds cost is read off rounds of few and of many rows; the drafter is left as it was."""

from __future__ import annotations

import time

import rigs

from onlinespec import calibration
from onlinespec.calibration import Costs, measure_costs
from onlinespec.config import GenerationParams, LearnConfig
from onlinespec.core import DecodeStats
from onlinespec.decode import DecodeLoop
from onlinespec.drafters.eagle import Eagle
from onlinespec.replay import ReplayBuffer

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


def test_real_rounds_have_few_rows_and_many():
    rounds, step_seconds = calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)
    rows = sorted(one.rows for one in rounds)
    assert rows[-1] > 3 * rows[0]
    assert step_seconds > 0


def test_a_drafter_whose_answers_have_few_steps_is_measured_on_more_of_them(monkeypatch):
    monkeypatch.setattr(calibration, "_ANSWER_TOKENS", 12)  # as many steps: nothing is accepted here
    rounds, _ = calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)
    assert [one.rows for one in rounds][:20] == [16 + 12, 16] * 10  # every second one with a replayed answer


def test_where_rounds_never_come_measuring_ends(monkeypatch):
    monkeypatch.setattr(calibration, "_ANSWER_TOKENS", 1)
    monkeypatch.setattr(Eagle, "batch", lambda *_, **__: [])
    monkeypatch.setattr(calibration, "_MOST_ANSWERS", 3)
    assert calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)[0] == ()


def test_reading_the_prompt_is_no_part_of_a_step(monkeypatch):
    start = DecodeLoop.start

    def slow_start(loop, *args):
        request = start(loop, *args)
        request.stats += DecodeStats(decode_seconds=1000.0)
        return request

    monkeypatch.setattr(DecodeLoop, "start", slow_start)
    assert calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)[1] < 1


def test_what_learning_does_between_rounds_is_part_of_their_cost(monkeypatch):
    monkeypatch.setattr(ReplayBuffer, "offer", lambda *_: time.sleep(0.01))
    rounds, _ = calibration._timed(TARGET, Eagle.fresh(TARGET), LearnConfig(), PARAMS)
    assert min(one.seconds for one in rounds) > 0.01 * calibration._INTERVAL / (1 + 0.35)  # a comparison beside it


def test_measuring_puts_the_weights_back():
    drafter = Eagle.fresh(TARGET)
    weights = drafter.weights
    assert measure_costs(TARGET, drafter, LearnConfig(), PARAMS).row_cost > 0
    assert drafter.weights is weights
