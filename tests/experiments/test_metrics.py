from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlinespec.core import DecodeStats
from onlinespec.experiments.metrics import speedup, total, totals_of, windows
from onlinespec.experiments.report_schema import Totals

ONE = DecodeStats(
    requests=1, tokens=6, steps=2, drafted=8, accepted=4, accepted_by_position=(2, 1, 1, 0), decode_seconds=2.0
)
SKIPPED = DecodeStats(skipped=1)

requests = st.builds(
    lambda tokens, steps, accepted, seconds: DecodeStats(1, 0, tokens, steps, accepted + 1, accepted, (), seconds),
    st.integers(0, 100),
    st.integers(1, 100),
    st.integers(0, 100),
    st.floats(0, 10),
)


def test_nothing_adds_up_to_nothing():
    assert total([]) == DecodeStats()
    assert total([]).acceptance_length == total([]).acceptance_rate == total([]).tokens_per_second == 0
    assert total([]).acceptance_by_position == ()


def test_a_total_counts_everything_once():
    other = replace(ONE, learn_seconds=1.0, ties=1, accepted_by_position=(1, 1))
    both = total([ONE, SKIPPED, other])
    for field in fields(DecodeStats):
        if field.name != "accepted_by_position":
            parts = [getattr(stats, field.name) for stats in (ONE, SKIPPED, other)]
            assert getattr(both, field.name) == sum(parts), field.name
    assert both.accepted_by_position == (3, 2, 1, 0)  # drafts of different lengths
    assert both.tokens_per_second == 12 / 5  # learning time is counted


def test_a_total_weighs_requests_by_their_steps():
    long, short = DecodeStats(steps=9, accepted=9), DecodeStats(steps=1, accepted=0)
    assert total([long, short]).acceptance_length == pytest.approx(1.9)


def test_speedup_is_a_ratio_of_net_rates():
    learning = replace(ONE, learn_seconds=2.0)
    assert speedup(ONE, ONE) == 1.0
    assert speedup(learning, ONE) == 0.5
    assert speedup(ONE, learning) == 2.0


@pytest.mark.parametrize("control", [None, DecodeStats(), SKIPPED])
def test_there_is_no_speedup_over_a_control_that_measured_nothing(control):
    assert speedup(ONE, control) is None


@pytest.mark.parametrize("is_identical", [True, False, None])
def test_figures_are_the_fields_of_the_report(is_identical):
    found = totals_of(ONE, replace(ONE, decode_seconds=4.0), None, is_identical)
    assert Totals(**found).identical_to_plain is is_identical
    assert (found["speedup_vs_none"], found["speedup_vs_frozen"]) == (2.0, None)
    assert found["acceptance_length"] == 3.0
    assert found["acceptance_by_position"] == (1.0, 0.5, 0.5, 0.0)


@given(st.lists(requests | st.just(SKIPPED), max_size=30), st.integers(1, 12))
def test_windows_split_the_requests_in_order(stats, size):
    found = windows(stats, size)
    assert len(found) == -(-len(stats) // size)
    assert sum(window.requests for window in found) == total(stats).requests
    for number, window in enumerate(found):
        group = total(stats[number * size : (number + 1) * size])
        assert window.acceptance_length == group.acceptance_length
        assert window.tokens_per_second == group.tokens_per_second
