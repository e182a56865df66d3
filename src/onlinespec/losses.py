"""Losses between drafted and target rows: pure functions, in nats, one number per row.

Axis letters: N rows, V vocabulary. Target rows are raw and at temperature 1, whatever the request's sampling.
"""

from __future__ import annotations

from torch import Tensor


def soft_cross_entropy(draft_logits_NV: Tensor, target_probs_NV: Tensor) -> Tensor:
    """-sum_v target(v) log draft(v): forward KL up to the target's own entropy, which has no gradient.

    Its gradient in the logits is draft - target, so no row can pull harder than a distance between distributions.

    >>> import torch
    >>> logits = torch.zeros(1, 4)
    >>> soft_cross_entropy(logits, torch.tensor([[0.5, 0.5, 0.0, 0.0]])).exp()
    tensor([4.0000])

    Reference: OnlineSpec, arXiv:2603.12617 (their f_t); Online Speculative Decoding, arXiv:2310.07177.
    """
    return -(target_probs_NV * draft_logits_NV.float().log_softmax(-1)).sum(-1)
