"""What rounds cost is read off rounds of few and of many rows; the drafter is left as it was."""

from __future__ import annotations

import time

import pytest
import rigs

from onlinespec.config import GenerationParams
from onlinespec.drafters.eagle import Eagle
from onlinespec.engine import profile
from onlinespec.engine.profile import steps_to_learn_from
from onlinespec.learning import round_costs
from onlinespec.learning.replay import ReplayBuffer
from onlinespec.learning.round_costs import RoundCosts, measure_round_costs
from onlinespec.learning.settings import LearnConfig
from onlinespec.models.clock import HostClock

TARGET = rigs.random_target()
PARAMS = GenerationParams(num_draft_tokens=2)


def measured(drafter):
    return measure_round_costs(drafter, LearnConfig(), steps_to_learn_from(TARGET, drafter, PARAMS))


def timed_rounds():
    drafter = Eagle.fresh(TARGET)
    return round_costs._timed(drafter, LearnConfig(), steps_to_learn_from(TARGET, drafter, PARAMS), HostClock())


def timed(rounds, step_seconds, monkeypatch):
    rounds = tuple(round_costs._Round(*one) for one in rounds)
    monkeypatch.setattr(round_costs, "_timed", lambda *_: (rounds, step_seconds))
    return measured(Eagle.fresh(TARGET))


def test_costs_are_the_line_through_short_and_long_rounds_in_steps(monkeypatch):
    rounds = [(rows, 0.010 + 0.0002 * rows) for rows in (8, 70, 10, 72)]
    assert timed(rounds, 0.005, monkeypatch) == RoundCosts(round_cost=2.0, row_cost=0.04)


def test_one_disturbed_round_changes_nothing(monkeypatch):
    quiet = [(rows, 0.010 + 0.0002 * rows) for rows in (8, 70) * 4]
    assert timed([*quiet, (8, 1.0), (70, 1.0)], 0.005, monkeypatch) == timed(quiet, 0.005, monkeypatch)


def test_where_learning_fails_the_settings_own_costs_stand(monkeypatch):
    assert timed([], 0.005, monkeypatch) == RoundCosts(LearnConfig().round_cost, LearnConfig().row_cost)


@pytest.fixture
def few_rounds(monkeypatch):
    """For what four rounds show as well as twenty."""
    monkeypatch.setattr(round_costs, "_NUM_ROUNDS", 4)


def test_real_rounds_have_few_rows_and_many(few_rounds):
    rounds, step_seconds = timed_rounds()
    rows = sorted(one.rows for one in rounds)
    assert rows[-1] > 3 * rows[0]
    assert step_seconds > 0


@pytest.mark.parametrize("num_rounds", [4, pytest.param(20, marks=pytest.mark.full)])
def test_a_drafter_whose_answers_have_few_steps_is_measured_on_more_of_them(monkeypatch, num_rounds):
    monkeypatch.setattr(round_costs, "_NUM_ROUNDS", num_rounds)
    monkeypatch.setattr(profile, "_ANSWER_TOKENS", 12)  # as many steps: nothing is accepted here
    rounds, _ = timed_rounds()
    by_turns = [16 + 12, 16] * (num_rounds // 2)  # every second one with a replayed answer
    assert [one.rows for one in rounds][:num_rounds] == by_turns


def test_where_rounds_never_come_measuring_ends(monkeypatch):
    monkeypatch.setattr(profile, "_ANSWER_TOKENS", 1)
    monkeypatch.setattr(Eagle, "batch", lambda *_, **__: [])
    monkeypatch.setattr(round_costs, "_MOST_ANSWERS", 3)
    assert timed_rounds()[0] == ()


def test_what_learning_does_between_rounds_is_part_of_their_cost(few_rounds, monkeypatch):
    monkeypatch.setattr(ReplayBuffer, "offer", lambda *_: time.sleep(0.01))
    rounds, _ = timed_rounds()
    assert min(one.seconds for one in rounds) > 0.01 * round_costs._INTERVAL / (1 + 0.35)  # a comparison beside it


def test_measuring_puts_the_weights_back(few_rounds):
    drafter = Eagle.fresh(TARGET)
    weights = drafter.weights
    assert measured(drafter).row_cost > 0
    assert drafter.weights is weights
