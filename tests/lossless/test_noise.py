import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import chi_square_p, steady

from onlinespec.lossless.noise import Noise, StepNoise, gumbel, gumbel_rows, uniforms

any_seed = st.integers(-(2**66), 2**66)


@steady
@given(seed=any_seed, choice=st.integers(0, 2**62), position=st.integers(0, 2**40), size=st.integers(1, 40))
def test_a_number_depends_on_seed_choice_position_and_token_only(seed, choice, position, size):
    row = uniforms(seed, choice, position, size)
    assert row.shape == (size,)
    assert row.dtype == torch.float64
    assert torch.equal(row, uniforms(seed, choice, position, size + 100)[:size])


@pytest.mark.parametrize("size", [8191, 8192, 8193, 16385])
def test_how_many_numbers_are_made_changes_none_of_them(size):
    assert torch.equal(uniforms(5, 1, 9, size), uniforms(5, 1, 9, 20_000)[:size])


@steady
@given(seed=any_seed)
def test_every_number_lies_strictly_between_0_and_1_and_its_noise_is_finite(seed):
    row = uniforms(seed, 0, 3, 1000)
    assert (row > 0).all()
    assert (row < 1).all()
    assert gumbel(row).isfinite().all()


def test_the_extreme_words_give_finite_noise():
    extremes = torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)
    assert gumbel(extremes).isfinite().all()


def test_seeds_and_choices_differ_unless_equal_modulo_the_key():
    rows = [uniforms(seed, choice, 3, 4) for seed in (0, 1, -1, 2**32) for choice in (0, 1, 2**63)]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert torch.equal(uniforms(-1, 0, 3, 4), uniforms(2**64 - 1, 2**64, 3, 4))


def test_the_stream_of_a_seed_never_changes_between_releases():
    assert uniforms(0, 0, 0, 3).tolist() == [0.011546754286331562, 0.24154919656271812, 0.11142585551493822]
    assert uniforms(42, 1, 7, 2).tolist() == [0.2906834043483586, 0.9521573308969473]


def test_rows_of_neighbouring_positions_share_no_number():
    """Also where a row takes many values of the counter."""
    numbers = torch.cat([uniforms(3, choice, position, 5000) for choice in (0, 1) for position in range(4)])
    assert len(set(numbers.tolist())) == len(numbers)


def test_numbers_are_uniform_and_those_of_neighbours_independent():
    rows = torch.stack([uniforms(17, 0, position, 40) for position in range(1000)])
    cells = torch.full((64,), 1 / 64)
    eighths = (rows * 8).long()
    for pairs in (
        eighths[:, :-1] * 8 + eighths[:, 1:],
        eighths[:-1] * 8 + eighths[1:],
        eighths[:-1, :-1] * 8 + eighths[1:, 1:],
    ):
        assert chi_square_p(pairs.flatten().bincount(minlength=64), cells) > 1e-4


def test_gumbel_noise_has_its_law():
    noise = gumbel(uniforms(1, 0, 0, 40_000))
    edges = [-math.log(-math.log(i / 16)) for i in range(1, 16)]
    cells = torch.bucketize(noise, torch.tensor(edges, dtype=torch.float64))
    assert chi_square_p(cells.bincount(minlength=16), torch.full((16,), 1 / 16)) > 1e-4


def test_a_position_before_the_first_is_refused():
    with pytest.raises(ValueError, match="positive"):
        uniforms(0, 0, -1, 1)


def test_a_request_makes_each_row_once_and_drops_it_when_its_position_is_committed(monkeypatch):
    made = []
    monkeypatch.setattr(
        "onlinespec.lossless.noise._uniforms", lambda key, at, size: made.append(at) or torch.ones(size)
    )
    noise = Noise(1, 0, vocab_size=3)
    noise.rows(5, 3), noise.rows(6, 3)
    noise.forget_before(7)
    noise.rows(7, 2)
    assert made == [5, 6, 7, 8]
    noise.row(6)
    assert made == [5, 6, 7, 8, 6]


def test_a_step_has_a_row_of_noise_for_each_request_and_none_if_all_are_greedy():
    step = StepNoise([Noise(1, 0, 9), None, Noise(2, 1, 9)], [4, 7, 2])
    rows, some = step.at(3), torch.tensor([8, 0, 5])
    assert torch.equal(
        rows, torch.stack([gumbel(uniforms(1, 0, 7, 9)), torch.zeros(9).double(), gumbel(uniforms(2, 1, 5, 9))])
    )
    assert torch.equal(step.at(3, some), rows[:, some])
    assert torch.equal(step.take([2, 1]).at(3), rows[[2, 1]])
    assert step.take([1]).at(0) is None
    assert torch.equal(gumbel_rows([(1, 0, 7), (2, 1, 5)], 9), rows[[0, 2]])
