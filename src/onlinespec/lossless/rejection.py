"""The rejection-sampling rule of the speculative decoding papers, for comparisons. Serving uses `verify.Coupled`.

A drafted token is accepted with probability min(1, target / draft); otherwise a token is drawn from the residual. The
bounds of OnlineSpec and Online Speculative Decoding are stated for this rule. It preserves the target's distribution,
but the same seed can give another text if the drafts differ. It is correct only with a single drafter, and only if the
draft length does not depend on the drafted tokens.

Axis letters: B requests, K drafted tokens, L = K + 1 rows the target scored, V vocabulary.
Reference: Leviathan et al., arXiv:2211.17192, algorithm 1 (their p is our target); Chen et al., arXiv:2302.01318.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.core import Draft, Verdict
from onlinespec.lossless.noise import Noise
from onlinespec.lossless.sampling import probs_of
from onlinespec.lossless.verify import ScoredRows, check_shape

ACCEPT, LAST = range(2)  # columns of uniforms: one accepts a drafted token, one draws the recovered or bonus token

_STREAM = 1 << 128  # counter offset that keeps these numbers independent of those of `noise.py`, which drew the draft
_WORDS_PER_COUNTER = 4  # number of 64-bit words that Philox generates per counter value


class Rejection:
    """Accepts by the ratio of target to draft probability. Drafts without `probs_BKV` are taken as point masses."""

    needs_probs = True

    def judge(self, draft: Draft, rows: Sequence[ScoredRows]) -> Verdict:
        """See `Rule.judge` and `verify_by_rejection`.

        Raises:
            FloatingPointError: if the logits of a request are not finite.
        """
        L, device = draft.token_ids_BK.shape[1] + 1, draft.token_ids_BK.device
        target_probs_BLV = torch.stack([_padded(probs_of(one.scores_LV, one.sampling), L) for one in rows])
        uniforms_BL2 = torch.stack([uniforms(one.noise, one.position, L) for one in rows]).to(device)
        return verify_by_rejection(draft, target_probs_BLV, uniforms_BL2)


def uniforms(noise: Noise | None, position: int, count: int) -> Tensor:
    """Returns numbers in [0, 1), float64 [count, 2], one row for each token from `position` on.

    They are a function of the request's seed and choice and the row's position. Greedy requests get 0.5 everywhere.
    """
    if noise is None:
        return torch.full((count, 2), 0.5, dtype=torch.float64)
    stream = np.random.Philox(key=noise.key, counter=_STREAM + position)
    words = stream.random_raw(count * _WORDS_PER_COUNTER).reshape(count, _WORDS_PER_COUNTER)
    return torch.from_numpy((words[:, :2] >> 11) * 2.0**-53)


def verify_by_rejection(draft: Draft, target_probs_BLV: Tensor, uniforms_BL2: Tensor) -> Verdict:
    """Accepts a prefix of each draft such that the committed tokens follow the target's distribution.

    Token k is accepted with probability min(1, target_k / draft_k). The first rejected token is replaced by a
    *recovered* token, drawn from the normalised residual max(0, target - draft). If all tokens are accepted, a *bonus*
    token is drawn from the target's row after the last drafted token. Without `draft.probs_BKV`, drafts are point
    masses: their draft probability is 1, and the residual is the target's row without the rejected token. In greedy
    decoding the target's rows are one-hot.

    The rule is lossless under two conditions. With `probs_BKV`, each token must have been sampled from its row (a token
    that is the argmax of a soft row is a point mass). And whether a token is drafted must not depend on its value or
    on later tokens.

    Args:
        draft: Tokens of a row beyond its `num_draft_tokens_B` are ignored.
        target_probs_BLV: The target's probabilities after all sampling settings.
        uniforms_BL2: Columns ACCEPT and LAST for each position, independent of the numbers that drew the draft.

    Raises:
        ValueError: if shapes do not match, or a row to draw from has NaN or no probability.

    >>> draft = Draft.by_one(torch.tensor([[1, 2]]), torch.tensor([2]), weights_version=0)
    >>> target_probs = torch.eye(3)[None, [1, 0, 2]]  # greedy: 1, then 0 where the draft has 2
    >>> verdict = verify_by_rejection(draft, target_probs, torch.full((1, 3, 2), 0.5))
    >>> verdict.num_accepted_B.tolist(), verdict.token_ids_BL.tolist()
    ([1], [[1, 0, -1]])
    """
    _check_shapes(draft, target_probs_BLV, uniforms_BL2)
    (B, K), device = draft.token_ids_BK.shape, target_probs_BLV.device
    requests_B = torch.arange(B, device=device)
    is_drafted_BK = torch.arange(K, device=device) < draft.num_draft_tokens_B[:, None]
    draft = draft._replace(token_ids_BK=draft.token_ids_BK.masked_fill(~is_drafted_BK, 0))

    is_accepted_BK = _accepts(draft, target_probs_BLV, uniforms_BL2[:, :K, ACCEPT])
    num_accepted_B = (is_accepted_BK & is_drafted_BK).long().cumprod(-1).sum(-1)
    is_refused_B = (is_drafted_BK & ~is_accepted_BK).any(-1)

    last_BV = target_probs_BLV[requests_B, num_accepted_B]
    if is_refused_B.any():
        last_BV = torch.where(is_refused_B[:, None], _excess(draft, last_BV, num_accepted_B), last_BV)
    last_ids_B = sample_rows(last_BV, uniforms_BL2[requests_B, num_accepted_B, LAST])
    is_finite_B = torch.ones(B, dtype=torch.bool, device=device)
    return Verdict(num_accepted_B, _committed(draft.token_ids_BK, num_accepted_B, last_ids_B), is_finite_B)


def sample_rows(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Samples one token per row, int64 [N], by inverse transform sampling: inverts the row's cumulative sum in float64.

    Rows need not sum to one. Tokens with probability zero are never returned.

    Raises:
        ValueError: if shapes do not match, or a row has NaN or no probability above zero.

    >>> sample_rows(torch.tensor([[0.0, 0.5, 0.5]]).expand(3, 3), torch.tensor([0.0, 0.49, 1.0])).tolist()
    [1, 1, 2]
    """
    if uniforms_N.shape != probs_NV.shape[:1]:
        raise ValueError(f"uniforms of shape {tuple(uniforms_N.shape)} for {len(probs_NV)} rows; expected one each")
    cdf_NV = probs_NV.cumsum(-1, dtype=torch.float64).masked_fill_(probs_NV <= 0, 0)
    total_N = cdf_NV.amax(-1)
    if not (total_N > 0).all():
        raise ValueError("a row has NaN or no probability at all; there is nothing to draw")
    below_total_N = total_N.nextafter(torch.zeros_like(total_N))  # because the product may round up to the total
    threshold_N = torch.minimum(uniforms_N.double() * total_N, below_total_N)
    return (cdf_NV > threshold_N[:, None]).byte().argmax(-1)


def _accepts(draft: Draft, target_probs_BLV: Tensor, uniforms_BK: Tensor) -> Tensor:
    """Whether uniform < target / draft, for each token; multiplied out to avoid a division by zero."""
    ids_BK1 = draft.token_ids_BK[..., None]
    target_BK = target_probs_BLV[:, :-1].gather(-1, ids_BK1).squeeze(-1)
    if draft.probs_BKV is None:
        return uniforms_BK < target_BK
    return uniforms_BK * draft.probs_BKV.gather(-1, ids_BK1).squeeze(-1) < target_BK


def _excess(draft: Draft, target_probs_BV: Tensor, num_accepted_B: Tensor) -> Tensor:
    """The residual max(0, target - draft), float64 [B, V], at each request's first rejected position.

    Where rounding leaves no residual, the target's row. Rows of requests without a rejection are meaningless.
    """
    B, K = draft.token_ids_BK.shape
    refused = torch.arange(B, device=target_probs_BV.device), num_accepted_B.clamp(max=K - 1)
    if draft.probs_BKV is None:
        excess_BV = target_probs_BV.double().scatter_(-1, draft.token_ids_BK[refused][:, None], 0)
    else:
        excess_BV = (target_probs_BV.double() - draft.probs_BKV[refused]).clamp_min_(0)
    return torch.where(excess_BV.amax(-1, keepdim=True) > 0, excess_BV, target_probs_BV)


def _committed(draft_ids_BK: Tensor, num_accepted_B: Tensor, last_ids_B: Tensor) -> Tensor:
    token_ids_BL = F.pad(draft_ids_BK, (0, 1))
    token_ids_BL.scatter_(-1, num_accepted_B[:, None], last_ids_B[:, None])
    positions_L = torch.arange(token_ids_BL.shape[1], device=token_ids_BL.device)
    return token_ids_BL.masked_fill_(positions_L > num_accepted_B[:, None], -1)


def _padded(probs_NV: Tensor, length: int) -> Tensor:
    """Pads with rows of zeros, on which no result depends."""
    return F.pad(probs_NV, (0, 0, 0, length - len(probs_NV)))


def _check_shapes(draft: Draft, target_probs_BLV: Tensor, uniforms_BL2: Tensor) -> None:
    (B, K), V = draft.token_ids_BK.shape, target_probs_BLV.shape[-1]
    check_shape("num_draft_tokens_B", draft.num_draft_tokens_B, (B,), "one count a request")
    check_shape("target_probs_BLV", target_probs_BLV, (B, K + 1, V), f"{K} drafted tokens need {K + 1} target rows")
    check_shape("uniforms_BL2", uniforms_BL2, (B, K + 1, 2), "a row of (accept, last) for each target row")
    if draft.probs_BKV is not None:
        check_shape("draft.probs_BKV", draft.probs_BKV, (B, K, V), f"a row over the target's {V} tokens for each draft")
