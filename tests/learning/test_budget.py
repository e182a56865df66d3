import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.learning.budget import Budget, ClockMeter, StepMeter

# Counted in steps

ROUND = 64  # rows

LENT = 8  # rounds

work = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 4 * ROUND)), max_size=40)  # steps, then rows wanted


def test_some_rounds_are_lent_at_the_start():
    budget, num_rounds = Budget(0.125, StepMeter(round_cost=0.5, row_cost=0.0234375, max_rows=ROUND)), 0
    while budget.has_room():
        budget.spend(ROUND, 1.0)
        num_rounds += 1
    assert num_rounds == LENT


@steady
@given(share=st.floats(0.001, 2), round_cost=st.floats(0, 5), row_cost=st.floats(0.001, 1), work=work)
def test_what_was_spent_is_always_earned_or_lent_before_the_next_round(share, round_cost, row_cost, work):
    budget, earned, spent = Budget(share, StepMeter(round_cost, row_cost, ROUND)), 0.0, 0.0
    lent = LENT * (round_cost + ROUND * row_cost)
    for num_steps, num_rows in work:
        for _ in range(num_steps):
            budget.observe_step()
        earned += share * num_steps
        if budget.has_room():
            assert spent <= earned + lent + 1e-6
            budget.spend(num_rows, 1.0)
            spent += round_cost + num_rows * row_cost
    assert budget.spent == pytest.approx(spent)
    assert spent <= earned + lent + round_cost + 4 * ROUND * row_cost + 1e-6


@steady
@given(share=st.sampled_from([0.0625, 0.125, 0.5]), num_steps=st.integers(0, 2000))
def test_all_that_is_earned_may_be_spent(share, num_steps):
    budget, num_rounds = Budget(share, StepMeter(round_cost=0.5, row_cost=0.0234375, max_rows=ROUND)), 0
    for _ in range(num_steps):
        budget.observe_step()
        if budget.has_room():
            budget.spend(ROUND, 1.0)
            num_rounds += 1
    assert num_rounds == min(num_steps, LENT + share * num_steps // 2)


@pytest.mark.parametrize("num_quiet_steps", [1_000, 100_000])
def test_what_is_saved_in_quiet_times_is_worth_some_rounds_and_no_more(num_quiet_steps):
    budget, num_rounds = Budget(0.125, StepMeter(round_cost=0.5, row_cost=0.0234375, max_rows=ROUND)), 0
    for _ in range(num_quiet_steps):
        budget.observe_step()
    while budget.has_room():
        budget.spend(ROUND, 1.0)
        num_rounds += 1
    assert num_rounds == 16


def test_a_round_that_costs_more_is_paid_for_longer():
    plain, triple = (Budget(0.125, StepMeter(round_cost=0.5, row_cost=0.0234375, max_rows=ROUND)) for _ in range(2))
    waits = []
    for budget, num_evaluations in ((plain, 1), (triple, 3)):
        budget.spend(ROUND, num_evaluations=LENT - 1)
        budget.spend(ROUND, num_evaluations)
        waits.append(0)
        while not budget.has_room():
            budget.observe_step()
            waits[-1] += 1
    assert waits == [16, 48]


@steady
@given(work=work)
def test_without_a_limit_there_is_always_room(work):
    budget = Budget(math.inf, StepMeter(round_cost=1.0, row_cost=0.5, max_rows=ROUND))
    for num_steps, num_rows in work:
        assert budget.has_room()
        budget.spend(num_rows, 1.0)
        for _ in range(num_steps):
            budget.observe_step()
    assert budget.has_room()


# A step of several requests


@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("num_draft_tokens", [0, 2, 4])
def test_a_step_of_a_batch_is_earned_for_once_and_by_its_rows(num_requests, num_draft_tokens):
    """Times of steps as measured, in steps of one request alone: what is earned is the share of no more than that."""
    measured = {(1, 0): 1, (1, 2): 1, (1, 4): 1, (4, 0): 1.31, (4, 2): 1.49, (4, 4): 1.72, (16, 0): 3.17, (16, 2): 3.98,
                (16, 4): 4.75}  # fmt: skip
    budget, num_rounds = Budget(0.25, StepMeter(round_cost=0.5, row_cost=0.0234375, max_rows=ROUND)), 0
    for _ in range(400):
        budget.observe_step([num_draft_tokens + 1] * num_requests)
        while budget.has_room():
            budget.spend(ROUND, 1.0)
            num_rounds += 1
    lent, full_round = LENT * 2, 2
    assert budget.spent == num_rounds * full_round
    assert budget.spent <= 1.01 * 0.25 * 400 * measured[num_requests, num_draft_tokens] + lent
    assert budget.spent >= 0.25 * 400 + lent - full_round  # at least what one request would have earned


def test_a_request_alone_earns_the_same_however_deep_it_drafts():
    earned = []
    for num_rows in (1, 5, 17):
        budget, num_rounds = Budget(0.25, StepMeter(round_cost=1.0, row_cost=0.01, max_rows=ROUND)), 0
        for _ in range(200):
            budget.observe_step([num_rows])
            if budget.has_room():
                budget.spend(ROUND, 1.0)
                num_rounds += 1
        earned.append(num_rounds)
    assert len(set(earned)) == 1


# By the clock


class Clocks:
    def __init__(self):
        self.taken = self.passed = 100.0

    def budget(self, share):
        return Budget(share, ClockMeter(lambda: self.taken, lambda: self.passed))


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_learning_takes_its_share_of_the_time_that_passes(share):
    clocks = Clocks()
    budget = clocks.budget(share)
    for _ in range(20_000):
        clocks.passed += 0.01
        if budget.has_room():
            clocks.taken += 0.05
    assert budget.spent / 200 == pytest.approx(share, abs=0.02)
    assert budget.share_spent == pytest.approx(share, abs=0.02)


def test_an_idle_hour_is_no_reason_to_learn_for_minutes():
    clocks = Clocks()
    budget = clocks.budget(0.5)
    clocks.passed += 3600
    rounds = 0
    while budget.has_room():
        clocks.taken += 0.1
        rounds += 1
    assert rounds <= 21


@pytest.mark.parametrize("reading", [0.0, 0.02])
def test_a_share_can_be_changed_on_the_way(reading):
    """Of work; reading what is served goes on, however much that takes, as long as both are within the whole."""
    clocks = Clocks()
    budget = clocks.budget(0.5)
    for share in (0.5, 0.01, 0.25):
        budget.set_share(share)
        before, worked = budget.spent, 0.0
        for _ in range(50_000):
            clocks.passed += 0.01
            clocks.taken += reading * 0.01
            if budget.has_room():
                clocks.taken += 0.05
                worked += 0.05
                budget.spend()
        assert worked / 500 == pytest.approx(min(share, 0.5 - reading), abs=0.01)
        assert (budget.spent - before) / 500 <= 0.51


def test_asking_twice_changes_nothing():
    clocks = Clocks()
    budget = clocks.budget(0.5)
    clocks.taken += 2.1
    clocks.passed += 0.1
    assert [budget.has_room() for _ in range(3)] == [False] * 3
    assert [budget.has_room_to_compare() for _ in range(3)] == [False] * 3
    clocks.passed += 0.2
    assert [budget.has_room() for _ in range(3)] == [True] * 3


def test_comparisons_cost_nothing_that_is_counted_in_steps():
    budget = Budget(0.1, StepMeter(round_cost=1.0, row_cost=0.1, max_rows=ROUND))
    while budget.has_room():
        budget.spend(ROUND, 1.0)
    assert budget.has_room_to_compare()


def test_a_share_of_steps_can_be_changed_on_the_way():
    budget, num_rounds = Budget(0.25, StepMeter(round_cost=1.0, row_cost=0.0, max_rows=1)), 0
    while budget.has_room():
        budget.spend(1, 1.0)
    budget.set_share(0.01)
    for _ in range(500):
        budget.observe_step()
        if budget.has_room():
            budget.spend(1, 1.0)
            num_rounds += 1
    assert num_rounds == pytest.approx(5, abs=1)
