import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.core import DecodeStats, DrafterWeights, Features, Feedback, Trace

NO_FEATURES = Features(torch.empty(0))

counts = st.integers(0, 1000)
stats = st.builds(
    DecodeStats,
    requests=counts,
    skipped=counts,
    tokens=counts,
    steps=counts,
    drafted=counts,
    accepted=counts,
    accepted_by_position=st.lists(counts, max_size=4).map(tuple),
    decode_seconds=counts,
    learn_seconds=counts,
    ties=counts,
)


@steady
@given(one=stats, other=stats)
def test_adding_stats_adds_every_count(one, other):
    total = one + other
    for field in dataclasses.fields(DecodeStats):
        if field.name != "accepted_by_position":
            assert getattr(total, field.name) == getattr(one, field.name) + getattr(other, field.name)
    assert len(total.accepted_by_position) == max(len(one.accepted_by_position), len(other.accepted_by_position))
    assert sum(total.accepted_by_position) == sum(one.accepted_by_position) + sum(other.accepted_by_position)


@steady
@given(one=stats, other=stats, third=stats)
def test_the_order_of_adding_does_not_matter(one, other, third):
    assert (one + other) + third == third + (other + one)
    assert one + DecodeStats() == one


def test_ratios_are_of_sums_not_means_of_ratios():
    total = DecodeStats(steps=1, drafted=4, accepted=4) + DecodeStats(steps=3, drafted=4, accepted=0)
    assert total.acceptance_length == 2.0
    assert total.acceptance_rate == 0.5


def test_tokens_per_second_counts_the_time_spent_learning():
    assert DecodeStats(tokens=30, decode_seconds=2.0, learn_seconds=1.0).tokens_per_second == 10.0


def test_before_the_first_step_every_ratio_is_zero():
    empty = DecodeStats()
    assert (empty.acceptance_length, empty.acceptance_rate, empty.tokens_per_second) == (0.0, 0.0, 0.0)
    assert empty.acceptance_by_position == ()


@pytest.mark.parametrize(
    "value",
    [
        DecodeStats(),
        DrafterWeights({}, 0),
        Feedback(
            Trace([], Features(torch.empty(0))),
            start=0,
            num_rows=1,
            num_draft_tokens=0,
            num_accepted=0,
            weights_version=0,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_passed_around_cannot_be_changed(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
