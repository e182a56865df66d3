import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import steady

from onlinespec.losses import soft_cross_entropy


def rows(seed, num_rows=4, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    return logits, (3 * torch.randn(num_rows, vocab, generator=generator)).softmax(-1)


def test_a_row_against_a_certain_token_costs_minus_its_log_probability():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert math.isclose(float(soft_cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]))), math.log(4), rel_tol=1e-6)


@steady
@given(seed=st.integers(0, 1000))
def test_it_is_forward_kl_plus_the_targets_entropy(seed):
    logits, target = rows(seed)
    kl = (target * (target.log() - logits.log_softmax(-1))).sum(-1)
    entropy = -(target * target.log()).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(logits, target), kl + entropy)


@steady
@given(seed=st.integers(0, 1000))
def test_its_gradient_is_the_difference_of_the_distributions(seed):
    logits, target = rows(seed)
    logits.requires_grad_()
    soft_cross_entropy(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - target).detach())


def test_it_is_least_where_the_rows_agree_and_has_no_gradient_there():
    logits, target = rows(0)
    agreeing = target.log().requires_grad_()
    least = soft_cross_entropy(agreeing, target)
    least.sum().backward()
    assert (agreeing.grad.abs() < 1e-6).all()
    assert (least < soft_cross_entropy(logits, target)).all()


def test_the_gradient_is_right_to_second_order():
    logits, target = rows(1)
    assert torch.autograd.gradcheck(
        lambda x: soft_cross_entropy(x, target.double()), logits.double().requires_grad_(), atol=1e-3, eps=1e-3
    )


def test_impossible_tokens_and_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    loss = soft_cross_entropy(logits, target)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_compared_in_float32():
    logits, target = rows(2)
    loss = soft_cross_entropy(logits.bfloat16(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_cross_entropy(logits.bfloat16().float(), target))


def test_every_row_has_a_number_of_its_own():
    logits, target = rows(3)
    alone = torch.cat([soft_cross_entropy(logits[i : i + 1], target[i : i + 1]) for i in range(len(logits))])
    torch.testing.assert_close(soft_cross_entropy(logits, target), alone)
