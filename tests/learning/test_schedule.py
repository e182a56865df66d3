import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.learning.schedule import Budget, Cadence

LEAST = 0.02  # nats a round


def cadence_of(min_interval=10, max_interval=160):
    return Cadence(min_interval, max_interval, LEAST)


def compare(cadence, gain_per_round, loss=2.0):
    """Rounds up to the next comparison, which finds that they have brought so much each."""
    num_rounds = 0
    while not cadence.wants_probe:
        cadence.observe_round(loss)
        num_rounds += 1
    cadence.observe_gain(num_rounds * gain_per_round)


def stretched(loss=2.0):
    """A cadence that has come to its longest interval: served well, a flat loss, and nothing gained."""
    cadence = cadence_of()
    serve(cadence, 200, num_accepted=3)
    for _ in range(4):
        compare(cadence, 0.0, loss)
    assert cadence.interval == 160
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
    assert cadence_of().interval == 10


def test_rounds_that_bring_nothing_stretch_the_interval_to_its_maximum():
    cadence, seen = cadence_of(), []
    for _ in range(4):
        compare(cadence, 0.0)
        seen.append(cadence.interval)
    assert seen == [40, 160, 160, 160]


@pytest.mark.parametrize("gain", [0.0, 0.9 * LEAST, -0.3], ids=["none", "next to none", "a loss"])
def test_a_gain_below_the_least_counts_as_none(gain):
    cadence = stretched()
    compare(cadence, gain)
    assert cadence.interval == 160


def test_a_gain_counts_per_round_whatever_their_number():
    cadence = cadence_of()
    for _ in range(5):
        cadence.observe_round(2.0)
    cadence.observe_gain(4 * 0.9 * LEAST)  # more than the least, but of four rounds
    assert cadence.interval == 40


def test_rounds_that_go_on_bringing_something_stay_frequent():
    cadence = cadence_of()
    for number in range(20):
        compare(cadence, 2 * LEAST, loss=4 * 0.9**number)
        assert cadence.interval == 10


def test_rounds_become_frequent_again_step_by_step_while_they_bring_something():
    cadence, seen = stretched(), []
    for _ in range(3):
        compare(cadence, 3 * LEAST)
        seen.append(cadence.interval)
    assert seen == [40, 10, 10]


def test_one_comparison_without_a_gain_after_many_with_one_changes_nothing():
    cadence = cadence_of()
    for gain in (3 * LEAST, 3 * LEAST, 0.0):
        compare(cadence, gain)
    assert cadence.interval == 10


@steady
@given(gains=st.lists(st.floats(-1, 1), max_size=30), low=st.integers(1, 50), more=st.integers(0, 500))
def test_the_interval_stays_within_its_ends(gains, low, more):
    cadence = cadence_of(low, low + more)
    for gain in gains:
        cadence.observe_gain(gain)
        assert low <= cadence.interval <= low + more


# Where little is wrong


def test_rounds_are_rarer_in_proportion_where_the_loss_is_small():
    cadence = Cadence(10, 160, LEAST, full_loss=4.0)
    assert cadence.interval == 10  # nothing is known yet
    cadence.observe_round(2.0)
    assert cadence.interval == 20
    cadence.observe_round(0.0)
    assert cadence.interval == 40  # at 1 nat on average


@pytest.mark.parametrize("loss", [0.0, 1e-6, 0.5])
def test_however_small_the_loss_an_interval_is_at_most_four_times_as_long(loss):
    cadence = Cadence(10, 160, LEAST, full_loss=4.0)
    for _ in range(4):
        compare(cadence, 0.0, loss)
    assert cadence.interval == 4 * 160


@pytest.mark.parametrize("loss", [4.0, 9.0, math.nan])
def test_a_loss_that_is_not_small_changes_nothing(loss):
    cadence = Cadence(10, 160, LEAST, full_loss=4.0)
    cadence.observe_round(loss)
    assert cadence.interval == 10


def test_equal_intervals_stay_fixed_whatever_the_loss():
    cadence = Cadence(32, 32, LEAST, full_loss=4.0)
    cadence.observe_round(0.1)
    assert cadence.interval == 32


# Traffic that moves


def agree(cadence, num_rounds, share, rng, num_rows=32, loss=2.0):
    """Rounds in which each fresh row would have been drafted rightly with this probability, each of its own text."""
    for _ in range(num_rounds):
        cadence.observe_round(loss, sum(rng.random() < share for _ in range(num_rows)), num_rows, object())


def serve_and_learn(cadence, num_steps, share, rng, chosen=(1, 2, 4, 8, 16), every=100):
    """A request after another at a chosen length that moves; every row is right with one probability, wherever it is.
    Rounds come when they are due, on the newest 64 rows or so."""
    rows, waited, num_drafted = [], 0, chosen[0]
    for step in range(num_steps):
        if step % every == 0:
            num_drafted = rng.choice(chosen)
        fates = [rng.random() < share for _ in range(num_drafted + 1)]
        num_accepted = (*fates[:num_drafted], False).index(False)
        rows = (rows + fates[: num_accepted + 1])[-64:]
        cadence.observe_step(num_accepted, num_drafted, step // 40)
        waited += 1
        if waited >= cadence.interval:
            cadence.observe_round(2.0, sum(rows), len(rows), step // 40)
            if cadence.wants_probe:
                cadence.observe_gain(0.0)
            rows, waited = [], 0


@pytest.mark.parametrize(
    ("share", "num_runs"),
    [(0.7, 50), *(pytest.param(share, 100, marks=pytest.mark.full) for share in (0.5, 0.7, 0.85))],
)
def test_drafts_that_get_deeper_or_shallower_at_constant_quality_are_no_drift(share, num_runs):
    """Runs of 2,000 steps; judged by accepted over drafted, 1, 59 and 73 of a hundred saw one."""
    num_seen = 0
    for seed in range(num_runs):
        cadence = Cadence(16, 128, LEAST)
        serve_and_learn(cadence, 2000, share, Random(seed))
        num_seen += cadence.num_drifts > 0
    assert num_seen <= num_runs // 50


@pytest.mark.parametrize("num_rows", [16, 64])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.4, 0.7, 0.95])
def test_steady_agreement_is_a_drift_once_in_thousands_of_rounds_at_most(share, num_rows):
    cadence = cadence_of()
    agree(cadence, 10_000, share, Random(0), num_rows)
    assert cadence.num_drifts <= 10


def test_texts_that_differ_are_no_drift():
    """Three rounds of each text, whose shares are spread by 0.14 around 0.7: its rounds are not independent."""
    num_drifts, rng = 0, Random(0)
    for _ in range(10):
        cadence = cadence_of()
        for text in range(300):
            share = rng.betavariate(7, 3)
            for _ in range(3):
                cadence.observe_round(2.0, sum(rng.random() < share for _ in range(32)), 32, text)
        num_drifts += cadence.num_drifts
    assert num_drifts <= 15  # in 9,000 rounds


@pytest.mark.parametrize("seed", range(20))
def test_a_real_fall_of_agreement_is_a_drift_within_a_few_rounds(seed):
    cadence, rng = cadence_of(), Random(seed)
    agree(cadence, 30, 0.7, rng)
    assert cadence.num_drifts == 0
    agree(cadence, 4, 0.3, rng)
    assert cadence.num_drifts == 1


@pytest.mark.parametrize("seed", range(20))
def test_while_rounds_are_rare_a_real_fall_is_seen_within_some_steps(seed):
    cadence, rng = Cadence(16, 128, LEAST, full_loss=8.0), Random(seed)
    serve_and_learn(cadence, 4000, 0.7, rng)
    assert cadence.interval == 4 * 128
    serve_and_learn(cadence, 200, 0.3, rng)
    assert cadence.num_drifts == 1


def test_a_drift_brings_rounds_back():
    cadence = stretched()
    for _ in range(4):
        cadence.observe_round(2.0, 30, 32)
    assert cadence.interval == 160
    cadence.observe_round(2.0, 3, 32)
    assert (cadence.num_drifts, cadence.interval) == (1, 10)


def test_what_came_after_a_drift_is_the_new_measure():
    cadence, rng = cadence_of(), Random(0)
    agree(cadence, 20, 0.8, rng)
    agree(cadence, 100, 0.2, rng)
    assert cadence.num_drifts == 1
    agree(cadence, 20, 0.8, rng)
    agree(cadence, 20, 0.2, rng)
    assert cadence.num_drifts == 2


def test_a_fall_that_is_under_way_does_not_move_what_it_is_measured_against():
    """Small rounds, so that many of them make a fall."""
    cadence, rng = cadence_of(), Random(0)
    agree(cadence, 100, 0.7, rng, num_rows=4)
    agree(cadence, 30, 0.3, rng, num_rows=4)
    assert cadence.num_drifts == 1


def test_a_rise_of_agreement_is_no_drift():
    cadence, rng = cadence_of(), Random(0)
    for share in (0.1, 0.3, 0.6, 0.9):
        agree(cadence, 20, share, rng)
    assert cadence.num_drifts == 0


def test_evidence_for_a_drift_that_is_half_enough_brings_the_next_round_near():
    cadence = stretched()
    for _ in range(4):
        cadence.observe_round(2.0, 22, 32)
    assert cadence.interval == 160
    cadence.observe_round(2.0, 11, 32)
    assert (cadence.num_drifts, cadence.interval) == (0, 10)
    assert not cadence.is_resting
    cadence.observe_round(2.0, 24, 32)
    assert cadence.interval == 160  # it was chance


def test_rounds_whose_rows_are_unknown_say_nothing_of_drift():
    cadence = stretched()
    for _ in range(20):
        cadence.observe_round(2.0)
    assert cadence.num_drifts == 0


def test_a_jump_of_the_loss_brings_the_next_round_near_and_is_no_verdict():
    cadence = stretched(loss=2.0)
    cadence.observe_round(3.0)
    assert (cadence.num_drifts, cadence.interval) == (0, 10)
    cadence.observe_round(2.0)
    assert cadence.interval == 160


@pytest.mark.parametrize(("spread", "jump"), [(0.03, 0.8), (0.8, 2.5)], ids=["rounds alike", "rounds unlike"])
def test_a_jump_is_measured_by_how_rounds_differ(spread, jump):
    cadence = stretched()
    rng = Random(0)
    for _ in range(200):
        cadence.observe_round(2 + spread * rng.uniform(-1, 1))
        assert cadence.interval == 160
    assert cadence.is_jump(2 + jump)
    assert not cadence.is_jump(2 + spread)
    cadence.observe_round(2 + jump)
    assert cadence.interval == 10


def test_before_the_first_round_no_loss_is_a_jump():
    assert not cadence_of().is_jump(100.0)


def test_a_fall_of_the_loss_does_not_bring_rounds_back():
    cadence = stretched(loss=2.0)
    cadence.observe_round(1.0)
    assert cadence.interval == 160


def test_a_fall_of_acceptance_brings_the_next_round_near_and_is_no_verdict():
    cadence = stretched()
    serve(cadence, 20, num_accepted=0)
    assert (cadence.num_drifts, cadence.interval) == (0, 10)
    cadence.observe_round(2.0, 24, 32)
    assert cadence.interval == 160


def test_a_rise_of_acceptance_is_no_reason_to_learn_more():
    cadence = stretched()
    serve(cadence, 100, num_accepted=4)
    assert cadence.interval == 160


@pytest.mark.parametrize("seed", range(10))
def test_a_fall_is_seen_through_the_noise_of_steps(seed):
    cadence = stretched()
    serve_drawn(cadence, 60, acceptance_prob=0.3, seed=seed)
    assert cadence.interval == 10


@pytest.mark.parametrize("acceptance_prob", [0.3, 0.5, 0.6])
def test_steady_acceptance_of_noisy_steps_is_no_fall(acceptance_prob):
    num_alarms = 0
    for seed in range(20):
        cadence = cadence_of()
        for _ in range(4):
            compare(cadence, 0.0)
        serve_drawn(cadence, 200, acceptance_prob, seed)
        num_alarms += cadence.interval < 160
    assert num_alarms <= 1


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_lucky_first_step_does_not_look_like_a_fall(after):
    cadence = cadence_of()
    for _ in range(4):
        compare(cadence, 0.0)
    cadence.observe_step(4, 4)
    serve(cadence, 200, num_accepted=after)
    assert cadence.interval == 160


def test_steps_without_a_draft_say_nothing_about_acceptance():
    cadence = stretched()
    serve(cadence, 50, num_accepted=0, num_draft_tokens=0)
    assert cadence.interval == 160


# When to compare with older weights


def test_every_fourth_round_compares():
    cadence, seen = cadence_of(), []
    for number in range(1, 13):
        assert not cadence.wants_probe
        cadence.observe_round(2.0)
        if cadence.wants_probe:
            cadence.observe_gain(0.1)
            seen.append(number)
    assert seen == [5, 9]  # the first has nothing behind it


def test_a_drift_starts_the_count_anew():
    cadence = stretched()
    for _ in range(3):
        cadence.observe_round(2.0, 30, 32)
    cadence.observe_round(2.0, 3, 32)
    assert cadence.num_drifts == 1  # what came before is not compared with
    assert not cadence.wants_probe


# The budget

ROUND = 64  # rows

LENT = 8  # rounds

work = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 4 * ROUND)), max_size=40)  # steps, then rows wanted


def test_some_rounds_are_lent_at_the_start():
    budget, num_rounds = Budget(share=0.125, round_cost=0.5, row_cost=0.0234375, max_rows=ROUND), 0
    while budget.has_room:
        budget.spend(ROUND)
        num_rounds += 1
    assert num_rounds == LENT


@steady
@given(share=st.floats(0.001, 2), round_cost=st.floats(0, 5), row_cost=st.floats(0.001, 1), work=work)
def test_what_was_spent_is_always_earned_or_lent_before_the_next_round(share, round_cost, row_cost, work):
    budget, earned, spent = Budget(share, round_cost, row_cost, ROUND), 0.0, 0.0
    lent = LENT * (round_cost + ROUND * row_cost)
    for num_steps, num_rows in work:
        for _ in range(num_steps):
            budget.earn()
        earned += share * num_steps
        if budget.has_room:
            assert spent <= earned + lent + 1e-6
            budget.spend(num_rows)
            spent += round_cost + num_rows * row_cost
    assert budget.spent == pytest.approx(spent)
    assert spent <= earned + lent + round_cost + 4 * ROUND * row_cost + 1e-6


@steady
@given(share=st.sampled_from([0.0625, 0.125, 0.5]), num_steps=st.integers(0, 2000))
def test_all_that_is_earned_may_be_spent(share, num_steps):
    budget, num_rounds = Budget(share, round_cost=0.5, row_cost=0.0234375, max_rows=ROUND), 0
    for _ in range(num_steps):
        budget.earn()
        if budget.has_room:
            budget.spend(ROUND)
            num_rounds += 1
    assert num_rounds == min(num_steps, LENT + share * num_steps // 2)


@pytest.mark.parametrize("num_quiet_steps", [1_000, 100_000])
def test_what_is_saved_in_quiet_times_is_worth_some_rounds_and_no_more(num_quiet_steps):
    budget, num_rounds = Budget(share=0.125, round_cost=0.5, row_cost=0.0234375, max_rows=ROUND), 0
    for _ in range(num_quiet_steps):
        budget.earn()
    while budget.has_room:
        budget.spend(ROUND)
        num_rounds += 1
    assert num_rounds == 16


def test_a_round_that_costs_more_is_paid_for_longer():
    plain, triple = (Budget(share=0.125, round_cost=0.5, row_cost=0.0234375, max_rows=ROUND) for _ in range(2))
    waits = []
    for budget, num_evaluations in ((plain, 1), (triple, 3)):
        budget.spend(ROUND, num_evaluations=LENT - 1)
        budget.spend(ROUND, num_evaluations)
        waits.append(0)
        while not budget.has_room:
            budget.earn()
            waits[-1] += 1
    assert waits == [16, 48]


@steady
@given(work=work)
def test_without_a_limit_there_is_always_room(work):
    budget = Budget(math.inf, round_cost=1.0, row_cost=0.5, max_rows=ROUND)
    for num_steps, num_rows in work:
        assert budget.has_room
        budget.spend(num_rows)
        for _ in range(num_steps):
            budget.earn()
    assert budget.has_room


# A step of several requests


@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("num_draft_tokens", [0, 2, 4])
def test_a_step_of_a_batch_is_earned_for_once_and_by_its_rows(num_requests, num_draft_tokens):
    """Times of steps as measured, in steps of one request alone: what is earned is the share of no more than that."""
    measured = {(1, 0): 1, (1, 2): 1, (1, 4): 1, (4, 0): 1.31, (4, 2): 1.49, (4, 4): 1.72, (16, 0): 3.17, (16, 2): 3.98,
                (16, 4): 4.75}  # fmt: skip
    budget, num_rounds = Budget(share=0.25, round_cost=0.5, row_cost=0.0234375, max_rows=ROUND), 0
    for _ in range(400):
        budget.earn([num_draft_tokens + 1] * num_requests)
        while budget.has_room:
            budget.spend(ROUND)
            num_rounds += 1
    lent, full_round = LENT * 2, 2
    assert budget.spent == num_rounds * full_round
    assert budget.spent <= 1.01 * 0.25 * 400 * measured[num_requests, num_draft_tokens] + lent
    assert budget.spent >= 0.25 * 400 + lent - full_round  # at least what one request would have earned


def test_a_request_alone_earns_the_same_however_deep_it_drafts():
    earned = []
    for num_rows in (1, 5, 17):
        budget, num_rounds = Budget(share=0.25, round_cost=1.0, row_cost=0.01, max_rows=ROUND), 0
        for _ in range(200):
            budget.earn([num_rows])
            if budget.has_room:
                budget.spend(ROUND)
                num_rounds += 1
        earned.append(num_rounds)
    assert len(set(earned)) == 1
