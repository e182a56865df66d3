import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot
from toy import steady

from onlinespec.learners.losses import (
    GREEDY_TOKEN_SHARE,
    TargetRows,
    auto,
    cross_entropy,
    jsd,
    kl,
    mix,
    reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from onlinespec.registry import LOSSES, resolve


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


@pytest.fixture
def loss(name):
    return resolve(LOSSES, name, "loss")


def rows(seed, num_rows=6, vocab=7, spread=3.0):
    """Drafted logits and target rows, every second one of a greedy request."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = spread * torch.randn(num_rows, vocab, generator=generator)
    probs_NV = (spread * torch.randn(num_rows, vocab, generator=generator)).softmax(-1)
    token_ids_N = torch.randint(vocab, (num_rows,), generator=generator)
    return logits_NV, TargetRows(probs_NV, token_ids_N, torch.arange(num_rows) % 2 * 0.7)


def certain(*token_ids, vocab=3):
    """Target rows that allow one token each."""
    ids = torch.tensor(token_ids)
    return TargetRows(one_hot(ids, vocab).float(), ids, torch.ones(len(ids)))


def at(target, index):
    return target.take(index)


drawn = st.builds(rows, st.integers(0, 1000), st.integers(1, 6), st.integers(2, 9), st.floats(0.1, 6))


# What each is, and its gradient, in float64 and by the definitions


class Exact(NamedTuple):
    """One case; all [N, V]."""

    draft: Tensor
    p: Tensor
    token: Tensor  # one-hot
    label: Tensor  # what `auto` trains towards

    @classmethod
    def of(cls, logits, target):
        p, token = target.probs_NV.double(), one_hot(target.token_ids_N, logits.shape[-1]).double()
        share = torch.where(target.temperatures_N == 0, GREEDY_TOKEN_SHARE, 0.0).double()[:, None]
        return cls(logits.detach().double().softmax(-1), p, token, share * token + (1 - share) * p)

    @property
    def mean(self):
        return (self.draft + self.p) / 2

    @property
    def below(self):
        return (self.draft < self.p).double()


def divergence(a, b):
    return (a * (a / b).log()).sum(-1, keepdim=True)


def entropy(label, draft):
    return -(label * draft.log()).sum(-1, keepdim=True)


VALUES = {
    "soft_cross_entropy": lambda x: entropy(x.p, x.draft),
    "reverse_kl": lambda x: divergence(x.draft, x.p),
    "jsd": lambda x: (divergence(x.p, x.mean) + divergence(x.draft, x.mean)) / 2,
    "total_variation": lambda x: (x.draft - x.p).abs().sum(-1, keepdim=True) / 2,
    "cross_entropy": lambda x: entropy(x.token, x.draft),
    "mix": lambda x: entropy((x.p + x.token) / 2, x.draft),
    "auto": lambda x: entropy(x.label, x.draft),
}
GRADIENTS = {
    "soft_cross_entropy": lambda x: x.draft - x.p,
    "reverse_kl": lambda x: x.draft * ((x.draft / x.p).log() - divergence(x.draft, x.p)),
    "jsd": lambda x: x.draft * ((x.draft / x.mean).log() - divergence(x.draft, x.mean)) / 2,
    "total_variation": lambda x: -x.draft * (x.below - (x.draft * x.below).sum(-1, keepdim=True)),
    "cross_entropy": lambda x: x.draft - x.token,
    "mix": lambda x: x.draft - (x.p + x.token) / 2,
    "auto": lambda x: x.draft - x.label,
}


@pytest.mark.parametrize("name", LOSSES)
@steady
@given(case=drawn)
def test_every_loss_is_what_its_definition_says(name, case):
    expected = VALUES[name](Exact.of(*case)).float()[:, 0]
    torch.testing.assert_close(resolve(LOSSES, name, "loss")(*case), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", LOSSES)
@steady
@given(case=drawn)
def test_every_gradient_is_the_closed_form_of_the_table(name, case):
    logits, target = case
    logits.requires_grad_()
    resolve(LOSSES, name, "loss")(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, GRADIENTS[name](Exact.of(*case)).float(), rtol=1e-5, atol=3e-6)


@steady
@given(case=drawn)
def test_soft_cross_entropy_is_forward_kl_plus_the_targets_own_entropy(case):
    own = soft_cross_entropy(case[1].probs_NV.log(), case[1])
    torch.testing.assert_close(soft_cross_entropy(*case), kl(*case) + own, rtol=1e-5, atol=1e-6)


@steady
@given(case=drawn)
def test_divergences_are_never_below_zero(case):
    for divergence_of in (kl, reverse_kl, jsd, total_variation):
        assert (divergence_of(*case) > -1e-6).all()


@steady
@given(case=drawn)
def test_jsd_is_symmetric_and_at_most_log_2(case):
    logits, target = case
    swapped = target._replace(probs_NV=logits.softmax(-1))
    torch.testing.assert_close(jsd(target.probs_NV.log(), swapped), jsd(logits, target), rtol=1e-4, atol=1e-6)
    assert (jsd(logits, target) <= math.log(2) + 1e-6).all()


def test_rows_that_share_no_token_are_as_far_apart_as_can_be():
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    assert float(jsd(logits, certain(1))) == pytest.approx(math.log(2))
    assert float(total_variation(logits, certain(1))) == 1.0


@steady
@given(case=drawn)
def test_total_variation_is_what_a_sampled_draft_loses(case):
    acceptance_prob = torch.minimum(case[0].softmax(-1), case[1].probs_NV).sum(-1)
    torch.testing.assert_close(total_variation(*case), 1 - acceptance_prob)


@pytest.mark.parametrize("divergence_of", [kl, reverse_kl, jsd, total_variation])
def test_a_divergence_is_zero_where_the_rows_agree_and_only_there(divergence_of):
    logits, target = rows(0)
    assert (divergence_of(target.probs_NV.log(), target).abs() < 1e-6).all()
    assert (divergence_of(logits, target) > 1e-3).all()


@pytest.mark.parametrize("name", ["soft_cross_entropy", "reverse_kl", "jsd"])
def test_a_loss_of_rows_is_least_where_they_agree_and_has_no_gradient_there(name):
    (logits, target), loss = rows(0), resolve(LOSSES, name, "loss")
    agreeing = target.probs_NV.log().requires_grad_()
    least = loss(agreeing, target)
    least.sum().backward()
    assert (agreeing.grad.abs() < 1e-6).all()
    assert (least < loss(logits, target)).all()


# Which token, and how much of it


def test_cross_entropy_is_of_the_committed_token_whatever_the_row_says():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    target = certain(0, 0)._replace(token_ids_N=torch.tensor([0, 2]))
    torch.testing.assert_close(cross_entropy(logits, target), torch.tensor([math.log(2), math.log(4)]))


@steady
@given(case=drawn)
def test_mix_is_half_of_each_cross_entropy(case):
    torch.testing.assert_close(mix(*case), (soft_cross_entropy(*case) + cross_entropy(*case)) / 2)


@steady
@given(case=drawn)
def test_auto_asks_each_row_how_its_request_decodes(case):
    soft, token = soft_cross_entropy(*case), cross_entropy(*case)
    greedy = GREEDY_TOKEN_SHARE * token + (1 - GREEDY_TOKEN_SHARE) * soft
    torch.testing.assert_close(auto(*case), torch.where(case[1].temperatures_N == 0, greedy, soft))


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 2.0])
def test_auto_does_not_ask_how_warm_sampling_is(temperature):
    logits, target = rows(1)
    target = target._replace(temperatures_N=torch.full((len(logits),), temperature))
    torch.testing.assert_close(auto(logits, target), soft_cross_entropy(logits, target))


# What all of them keep to


@pytest.mark.parametrize("axes", [(1,), (3,), (2, 3)])
def test_stacked_sets_of_weights_have_the_results_that_each_has_alone(loss, axes):
    logits, target = rows(4)
    stacked = torch.stack([scale * logits for scale in torch.linspace(0.5, 2, math.prod(axes))])
    alone = torch.stack([loss(each, target) for each in stacked])
    torch.testing.assert_close(loss(stacked.view(*axes, *logits.shape), target), alone.view(*axes, len(logits)))


def test_stacked_sets_of_weights_have_the_gradients_that_each_has_alone(loss):
    logits, target = rows(4)
    alone, stacked = logits.clone().requires_grad_(), torch.stack([logits, -logits]).requires_grad_()
    loss(alone, target).sum().backward()
    loss(stacked, target).sum().backward()
    torch.testing.assert_close(stacked.grad[0], alone.grad)


def test_no_row_minds_its_neighbours(loss):
    logits, target = rows(3)
    alone = torch.cat([loss(logits[i : i + 1], at(target, slice(i, i + 1))) for i in range(len(logits))])
    torch.testing.assert_close(loss(logits, target), alone)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    torch.testing.assert_close(loss(logits[order], at(target, order)), alone[order])


def test_impossible_tokens_and_extreme_logits_stay_finite(loss):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    target = certain(0, 0, 1, 2)._replace(temperatures_N=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    losses = loss(logits, target)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(loss, dtype):
    logits, target = rows(2)
    losses = loss(logits.to(dtype), target)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, loss(logits.to(dtype).float(), target), rtol=0, atol=0)


def test_the_targets_rows_are_left_as_they_were(loss):
    logits, target = rows(5)
    before = target.probs_NV.clone()
    loss(logits, target)
    assert torch.equal(target.probs_NV, before)


def test_an_unknown_loss_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match='unknown loss "hinge"; known: ') as raised:
        resolve(LOSSES, "hinge", "loss")
    assert ", ".join(sorted(LOSSES)) in str(raised.value)
