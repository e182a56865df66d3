"""Losses between drafted and target rows: pure functions, in nats (total variation aside), one number per row.

Axis letters: N rows, V vocabulary; drafted logits may have more axes in front, one set of weights each. Target rows are
raw and at temperature 1, whatever the request's sampling. With draft = softmax(logits) and p the target's row:

    loss                  gradient in logit v
    soft_cross_entropy    draft_v - p_v
    reverse_kl            draft_v (log(draft_v / p_v) - KL(draft || p))
    jsd                   draft_v (log(draft_v / m_v) - KL(draft || m)) / 2,  m the mean of both
    total_variation       -draft_v (1[draft_v < p_v] - sum_u draft_u 1[draft_u < p_u])
    cross_entropy         draft_v - 1[v is the token that was committed]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_TOKEN_SHARE = 0.75  # of the committed token's own cross-entropy in `auto`, where requests are greedy


class TargetRows(NamedTuple):
    """The target's rows at N verified positions: the labels."""

    probs_NV: Tensor  # float32: the target's raw distribution, at temperature 1
    token_ids_N: Tensor  # int64: the committed tokens, which the target chose
    temperatures_N: Tensor  # of the request; 0 is greedy
    noise_keys_N3: Tensor | None = None  # int64 (seed, choice, position) of the noise that chose each token

    def take(self, at_M: Tensor) -> TargetRows:
        """Returns the rows with these indices."""
        keys_N3 = self.noise_keys_N3
        rows = self.probs_NV[at_M], self.token_ids_N[at_M], self.temperatures_N[at_M]
        return TargetRows(*rows, None if keys_N3 is None else keys_N3[at_M])


RowLoss = Callable[[Tensor, TargetRows], Tensor]


def soft_cross_entropy(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """-sum_v target(v) log draft(v): forward KL up to the target's entropy, which has no gradient.

    The gradient in a row's logits is a difference of two distributions, so it is bounded.

    >>> rows = TargetRows(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([0]), torch.tensor([1.0]))
    >>> soft_cross_entropy(torch.zeros(1, 4), rows).exp()
    tensor([4.0000])

    Reference: OnlineSpec, arXiv:2603.12617 (their f_t); Online Speculative Decoding, arXiv:2310.07177.
    """
    return -(target.probs_NV * _log_probs(draft_logits_NV)).sum(-1)


def reverse_kl(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """KL(draft || target), which is mode-seeking.

    Reference: Online Speculative Decoding, arXiv:2310.07177.
    """
    log_draft = _log_probs(draft_logits_NV)
    return (log_draft.exp() * (log_draft - _log(target.probs_NV))).sum(-1)


def jsd(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """Jensen-Shannon divergence: the mean KL to the mixture of both, at most log 2.

    Reference: generalised JSD with beta 1/2, arXiv:2306.13649.
    """
    log_draft, p = _log_probs(draft_logits_NV), target.probs_NV
    draft = log_draft.exp()
    log_mean = _log((draft + p) / 2)
    return (torch.special.xlogy(p, p) - p * log_mean + draft * (log_draft - log_mean)).sum(-1) / 2


def total_variation(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """Half the absolute difference: 1 - acceptance_prob of a sampled draft under the rejection rule."""
    return (_log_probs(draft_logits_NV).exp() - target.probs_NV).abs().sum(-1) / 2


def cross_entropy(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """-log draft(committed token). For greedy requests, acceptance depends on that token only."""
    log_draft = _log_probs(draft_logits_NV)
    ids = target.token_ids_N.expand(log_draft.shape[:-1]).unsqueeze(-1)
    return -log_draft.gather(-1, ids).squeeze(-1)


def mix(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """Half soft cross-entropy, half cross-entropy of the committed token."""
    return _mixed(draft_logits_NV, target, torch.full_like(target.token_ids_N, 0.5, dtype=torch.float32))


def auto(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """Greedy rows: 75 % cross-entropy of the committed token, 25 % soft cross-entropy; sampled rows: the latter."""
    return _mixed(draft_logits_NV, target, GREEDY_TOKEN_SHARE * (target.temperatures_N == 0))


def _mixed(draft_logits_NV: Tensor, target: TargetRows, token_share_N: Tensor) -> Tensor:
    """Both cross-entropies by shares: one cross-entropy with mixed labels."""
    labels_NV = target.probs_NV * (1 - token_share_N)[:, None]
    labels_NV = labels_NV.scatter_add(-1, target.token_ids_N[:, None], token_share_N[:, None])
    return -(labels_NV * _log_probs(draft_logits_NV)).sum(-1)


def kl(draft_logits_NV: Tensor, target: TargetRows) -> Tensor:
    """KL(target || draft), at least 0. The bounds of `learning/bounds.py` are stated in it."""
    return soft_cross_entropy(draft_logits_NV, target) + torch.special.xlogy(target.probs_NV, target.probs_NV).sum(-1)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _log(probs: Tensor) -> Tensor:
    """The logarithm, but finite where a probability is 0."""
    return probs.clamp_min(torch.finfo(torch.float32).tiny).log()


def describe_loss(name: str, temperature: float) -> str:
    """Describes a loss in words; for `auto`, what it is at a temperature.

    >>> describe_loss("auto", 0.0)
    'auto (greedy: 75 % the committed token, 25 % the whole row)'
    """
    if name != "auto":
        return name
    share = f"{GREEDY_TOKEN_SHARE:.0%}".replace("%", " %"), f"{1 - GREEDY_TOKEN_SHARE:.0%}".replace("%", " %")
    chosen = (
        f"greedy: {share[0]} the committed token, {share[1]} the whole row"
        if temperature == 0
        else "sampled: the whole row"
    )
    return f"auto ({chosen})"
