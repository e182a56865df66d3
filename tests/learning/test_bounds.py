import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.learning.bounds import acceptance_length_at, coupled_distance, distance_bound, greedy_distance_bound

distances, depths = st.floats(0, 1), st.integers(0, 16)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, 16])
def test_all_is_kept_without_a_distance_and_nothing_at_the_greatest(num_draft_tokens):
    assert acceptance_length_at(0.0, num_draft_tokens) == num_draft_tokens + 1
    assert acceptance_length_at(1.0, num_draft_tokens) == 1.0


def test_the_acceptance_length_is_the_mean_of_steps_whose_tokens_are_kept_alike():
    keep = 0.7
    law = [keep**j * (1 - keep) for j in range(4)] + [keep**4]  # j drafts kept, and one token of the target's own
    assert acceptance_length_at(1 - keep, 4) == pytest.approx(sum((1 + j) * p for j, p in enumerate(law)))


@steady
@given(one=distances, other=distances, num_draft_tokens=depths)
def test_the_acceptance_length_falls_with_the_distance(one, other, num_draft_tokens):
    near, far = (acceptance_length_at(d, num_draft_tokens) for d in sorted((one, other)))
    assert 1 <= far <= near <= num_draft_tokens + 1


@steady
@given(each=st.lists(distances, min_size=1, max_size=10), num_draft_tokens=depths)
def test_the_acceptance_length_at_a_mean_distance_is_at_most_the_mean(each, num_draft_tokens):
    mean = math.fsum(acceptance_length_at(d, num_draft_tokens) for d in each) / len(each)
    assert acceptance_length_at(math.fsum(each) / len(each), num_draft_tokens) <= mean + 1e-9


def drawn_rows(seed, num_rows, vocab, spread, apart):
    """Target and drafted rows in float64; the draft is the target and so much of something else."""
    generator = torch.Generator().manual_seed(seed)
    target, other = spread * torch.randn(2, num_rows, vocab, generator=generator, dtype=torch.float64)
    return target.softmax(-1), (target + apart * other).softmax(-1)


row_pairs = st.builds(
    drawn_rows, st.integers(0, 1000), st.integers(1, 8), st.integers(2, 12), st.floats(0.1, 8), st.floats(0.01, 2)
)


@steady
@given(pair=row_pairs)
def test_no_rows_are_further_apart_than_their_mean_kl_allows(pair):
    p, draft = pair
    mean_kl = float((p * (p / draft).log()).sum(-1).mean())
    assert float((p - draft).abs().sum(-1).mean() / 2) <= distance_bound(mean_kl) + 1e-9


@steady
@given(pair=row_pairs)
def test_no_more_greedy_drafts_differ_than_the_mean_token_loss_allows(pair):
    p, draft = pair
    tokens = p.argmax(-1)
    token_loss = float(-draft[torch.arange(len(p)), tokens].log().mean())
    assert float((draft.argmax(-1) != tokens).double().mean()) <= greedy_distance_bound(token_loss) + 1e-9


@steady
@given(pair=row_pairs)
def test_no_more_sampled_drafts_differ_under_one_noise_than_the_mean_distance_allows(pair):
    """Both choose v with chance 1 / sum_u max(target_u / target_v, draft_u / draft_v): v's race is won in both."""
    p, draft = pair
    ratios = torch.maximum(p[:, None, :] / p[:, :, None], draft[:, None, :] / draft[:, :, None])
    differ = 1 - (1 / ratios.sum(-1)).sum(-1)
    mean_distance = float((p - draft).abs().sum(-1).mean() / 2)
    assert float(differ.mean()) <= coupled_distance(mean_distance) + 1e-9


def test_the_greedy_bound_is_reached_where_two_tokens_are_alike():
    assert greedy_distance_bound(math.log(2)) == pytest.approx(1.0)


@pytest.mark.parametrize("bound", [distance_bound, greedy_distance_bound])
def test_a_bound_grows_with_the_loss_from_0_to_1(bound):
    bounds = [bound(loss / 100) for loss in range(2000)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == pytest.approx(1)


def test_a_kl_that_rounds_below_zero_allows_nothing():
    assert distance_bound(-1e-8) == 0
