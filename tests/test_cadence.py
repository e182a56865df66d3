import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.cadence import Budget, Cadence


def stretched(min_interval=10, max_interval=100, loss=2.0):
    """A cadence that has come to its longest interval: served well, a flat loss, and nothing gained."""
    cadence = Cadence(min_interval, max_interval)
    serve(cadence, 200, num_accepted=3)
    for _ in range(12):
        cadence.observe_round(loss)
        cadence.observe_gain(0.0)
    assert cadence.interval == max_interval
    return cadence


def serve(cadence, num_steps, num_accepted, num_draft_tokens=4):
    for _ in range(num_steps):
        cadence.observe_step(num_accepted, num_draft_tokens)


def serve_drawn(cadence, num_steps, acceptance_prob, seed=0):
    """Each drafted token is kept with this probability; those behind a rejection are lost."""
    rng = Random(seed)
    for _ in range(num_steps):
        kept = [rng.random() < acceptance_prob for _ in range(4)]
        cadence.observe_step((*kept, False).index(False), 4)


# What rounds bring


def test_rounds_are_frequent_at_first():
    assert Cadence(10, 100).interval == 10


def test_rounds_that_bring_nothing_stretch_the_interval_to_its_maximum():
    cadence, seen = Cadence(10, 100), []
    for _ in range(12):
        cadence.observe_gain(0.0)
        seen.append(cadence.interval)
    assert seen == sorted(seen)
    assert seen[0] > 10
    assert seen[-1] == 100


@pytest.mark.parametrize("gain", [0.0, 0.005, -0.3], ids=["none", "next to none", "a loss"])
def test_a_gain_below_one_percent_counts_as_none(gain):
    cadence = stretched()
    cadence.observe_gain(gain)
    assert cadence.interval == 100


def test_rounds_that_bring_something_are_frequent_at_once():
    cadence = stretched()
    cadence.observe_gain(0.02)
    assert cadence.interval == 10


def test_rounds_that_go_on_bringing_something_stay_frequent():
    cadence = Cadence(10, 100)
    for number in range(20):
        cadence.observe_round(4 * 0.9**number)
        cadence.observe_gain(0.05)
        assert cadence.interval == 10


@steady
@given(gains=st.lists(st.floats(-1, 1), max_size=30), low=st.integers(1, 50), more=st.integers(0, 500))
def test_the_interval_stays_within_its_ends(gains, low, more):
    cadence = Cadence(low, low + more)
    for gain in gains:
        cadence.observe_gain(gain)
        assert low <= cadence.interval <= low + more


# Traffic that moves


def test_a_jump_of_the_loss_brings_rounds_back():
    cadence = stretched(loss=2.0)
    cadence.observe_round(3.0)
    assert cadence.interval == 10


def test_the_loss_after_a_jump_is_the_new_measure():
    cadence = stretched(loss=2.0)
    cadence.observe_round(3.0)
    for _ in range(12):
        cadence.observe_round(3.0)
        cadence.observe_gain(0.0)
    assert cadence.interval == 100


@pytest.mark.parametrize("losses", [[2.0, 2.06, 1.94], [2.0, 2.3, 1.8, 1.9]], ids=["3%", "15%"])
def test_noise_of_small_rounds_does_not_bring_rounds_back(losses):
    cadence = stretched(loss=2.0)
    for loss in losses * 10:
        cadence.observe_round(loss)
        assert cadence.interval == 100


def test_a_fall_of_the_loss_alone_does_not_bring_rounds_back():
    cadence = stretched(loss=2.0)
    cadence.observe_round(1.0)
    assert cadence.interval == 100


def test_a_fall_of_acceptance_brings_rounds_back_within_some_steps():
    cadence = stretched()
    serve(cadence, 8, num_accepted=0)
    assert cadence.interval == 10


def test_a_rise_of_acceptance_is_no_reason_to_learn_more():
    cadence = stretched()
    serve(cadence, 100, num_accepted=4)
    assert cadence.interval == 100


@pytest.mark.parametrize("seed", range(10))
def test_a_fall_is_seen_through_the_noise_of_steps(seed):
    cadence = stretched()
    serve_drawn(cadence, 60, acceptance_prob=0.3, seed=seed)
    assert cadence.interval == 10


@pytest.mark.parametrize("acceptance_prob", [0.3, 0.5, 0.6])
def test_steady_acceptance_of_noisy_steps_is_no_fall(acceptance_prob):
    num_alarms = 0
    for seed in range(20):
        cadence = Cadence(10, 100)
        for _ in range(4):
            cadence.observe_gain(0.0)
        serve_drawn(cadence, 200, acceptance_prob, seed)
        num_alarms += cadence.interval < 100
    assert num_alarms <= 1


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_lucky_first_step_does_not_look_like_a_fall(after):
    cadence = Cadence(10, 100)
    for _ in range(4):
        cadence.observe_gain(0.0)
    cadence.observe_step(4, 4)
    serve(cadence, 200, num_accepted=after)
    assert cadence.interval == 100


def test_steps_without_a_draft_say_nothing_about_acceptance():
    cadence = stretched()
    serve(cadence, 50, num_accepted=0, num_draft_tokens=0)
    assert cadence.interval == 100


# When to compare with older weights


def probes(cadence, num_rounds, gain):
    """Which rounds compare."""
    seen = []
    for number in range(1, num_rounds + 1):
        cadence.observe_round(2.0)
        if cadence.wants_probe:
            cadence.observe_gain(gain)
            seen.append(number)
    return seen


def test_nothing_is_compared_before_the_first_round():
    assert not Cadence(10, 100).wants_probe


def test_frequent_rounds_compare_rarely():
    assert probes(Cadence(10, 100), 12, gain=0.1) == [4, 8, 12]


def test_rounds_compare_more_often_as_they_become_rare_and_then_all_do():
    assert probes(Cadence(10, 100), 10, gain=0.0) == [4, 6, 7, 8, 9, 10]


def test_a_fixed_interval_compares_as_if_rounds_were_frequent():
    assert probes(Cadence(10, 10), 12, gain=0.0) == [4, 8, 12]


# The budget

ROUND = 64  # rows

work = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 4 * ROUND)), max_size=40)  # steps, then rows wanted


def test_the_first_round_is_free_and_no_other():
    budget = Budget(share=0.125, row_cost=0.03125, max_rows=ROUND)
    assert budget.has_room
    budget.spend(ROUND)
    assert not budget.has_room


@steady
@given(share=st.floats(0.001, 2), row_cost=st.floats(0.001, 1), work=work)
def test_what_was_spent_is_always_earned_before_the_next_round(share, row_cost, work):
    budget, earned, spent = Budget(share, row_cost, ROUND), 0.0, 0.0
    for num_steps, num_rows in work:
        for _ in range(num_steps):
            budget.earn()
        earned += share * num_steps
        if budget.has_room:
            assert spent <= earned + 1e-6
            budget.spend(num_rows)
            spent += num_rows * row_cost
    assert spent <= earned + 4 * ROUND * row_cost + 1e-6


@steady
@given(share=st.sampled_from([0.0625, 0.125, 0.5]), num_steps=st.integers(0, 2000))
def test_all_that_is_earned_may_be_spent(share, num_steps):
    budget, num_rounds = Budget(share, row_cost=0.03125, max_rows=ROUND), 0
    for _ in range(num_steps):
        budget.earn()
        if budget.has_room:
            budget.spend(ROUND)
            num_rounds += 1
    assert num_rounds == (1 + share * num_steps // 2 if num_steps else 0)


@pytest.mark.parametrize("num_quiet_steps", [1_000, 100_000])
def test_what_is_saved_in_quiet_times_is_worth_some_rounds_and_no_more(num_quiet_steps):
    budget, num_rounds = Budget(share=0.125, row_cost=0.03125, max_rows=ROUND), 0
    for _ in range(num_quiet_steps):
        budget.earn()
    while budget.has_room:
        budget.spend(ROUND)
        num_rounds += 1
    assert num_rounds == 16


def test_a_round_that_costs_more_is_paid_for_longer():
    plain, triple = (Budget(share=0.125, row_cost=0.03125, max_rows=ROUND) for _ in range(2))
    waits = []
    for budget, num_rows in ((plain, ROUND), (triple, 3 * ROUND)):
        budget.spend(num_rows)
        waits.append(0)
        while not budget.has_room:
            budget.earn()
            waits[-1] += 1
    assert waits == [16, 48]


@steady
@given(work=work)
def test_without_a_limit_there_is_always_room(work):
    budget = Budget(math.inf, row_cost=0.5, max_rows=ROUND)
    for num_steps, num_rows in work:
        assert budget.has_room
        budget.spend(num_rows)
        for _ in range(num_steps):
            budget.earn()
    assert budget.has_room
