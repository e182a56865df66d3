import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import chi_square_p, steady

from onlinespec.randomness import ACCEPT, DRAFT, LAST, uniforms

any_seed = st.integers(-(2**130), 2**130)


@steady
@given(seed=any_seed, position=st.integers(0, 2**40), count=st.integers(0, 20))
def test_a_row_depends_on_seed_and_absolute_position_only(seed, position, count):
    rows = uniforms(seed, position, count)
    assert rows.shape == (count, 3)
    assert rows.dtype == torch.float64
    for i in range(count):
        assert torch.equal(rows[i], uniforms(seed, position + i, 1)[0])


@steady
@given(seed=any_seed)
def test_any_integer_seeds_a_stream_within_the_unit_interval(seed):
    rows = uniforms(seed, 0, 100)
    assert (rows >= 0).all()
    assert (rows < 1).all()


def test_seeds_differ_unless_equal_modulo_the_key():
    seeds = [0, 1, -1, 2**32, 2**64, 2**127]
    assert len({tuple(uniforms(seed, 3, 1).flatten().tolist()) for seed in seeds}) == len(seeds)
    assert torch.equal(uniforms(-1, 3, 2), uniforms(2**128 - 1, 3, 2))


def test_the_stream_of_a_seed_never_changes_between_releases():
    expected = [0.011546754286331562, 0.24154919656271812, 0.11142585551493822]
    assert uniforms(0, 0, 1).flatten().tolist() == expected


def test_columns_are_uniform_and_pairwise_independent():
    rows = uniforms(seed=17, position=0, count=40_000)
    cells = torch.full((64,), 1 / 64)
    for first, second in [(DRAFT, ACCEPT), (DRAFT, LAST), (ACCEPT, LAST)]:
        pairs = (rows[:, first] * 8).long() * 8 + (rows[:, second] * 8).long()
        assert chi_square_p(pairs.bincount(minlength=64), cells) > 1e-4
    neighbours = (rows[:-1, LAST] * 8).long() * 8 + (rows[1:, DRAFT] * 8).long()
    assert chi_square_p(neighbours.bincount(minlength=64), cells) > 1e-4


def test_a_position_before_the_first_is_refused():
    with pytest.raises(ValueError, match="positive"):
        uniforms(0, -1, 1)
