"""Lossless acceptance of a drafted chain of tokens, for all requests of a step at once.

Axis letters: B requests, K drafted tokens, L = K + 1 rows the target scored, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinespec.core import Draft, Verdict
from onlinespec.randomness import ACCEPT, LAST
from onlinespec.sampling import sample_rows


def verify(draft: Draft, target_probs_BLV: Tensor, uniforms_BL3: Tensor) -> Verdict:
    """Keeps the longest prefix of each draft that leaves the target's distribution intact.

    Token k survives with probability min(1, target_k / draft_k). The first casualty gives way to a *recovered*
    token, drawn from what the target has in excess of the draft; with no casualty, a *bonus* token comes from the
    target's row behind the last drafted token. A point mass (`draft.probs_BKV` is None) is a draft of probability
    one, so its excess is the target without the refused token. Greedy is the same code with one-hot rows.

    Lossless under two conditions on how tokens were chosen. With `probs_BKV`, each was drawn from exactly its row, by
    the draft column of its own position; the argmax of a soft row is a point mass. And whether a token is drafted at
    all must not depend on what it, or a token behind it, turned out to be: stop drafting *after* a doubtful token.

    Args:
        draft: A row's tokens beyond its `num_draft_tokens_B` are never looked at.
        uniforms_BL3: From `randomness.uniforms`, at the absolute positions of the L tokens.

    >>> draft = Draft(torch.tensor([[1, 2]]), torch.tensor([2]), probs_BKV=None, weights_version=0)
    >>> target_probs = torch.eye(3)[None, [1, 0, 2]]  # greedy: 1, then 0 where the draft has 2
    >>> num_accepted, token_ids = verify(draft, target_probs, torch.full((1, 3, 3), 0.5))
    >>> num_accepted.tolist(), token_ids.tolist()
    ([1], [[1, 0, -1]])

    Reference: Leviathan et al., arXiv:2211.17192, algorithm 1 (their p is our target); Chen et al., arXiv:2302.01318.
    """
    _check_shapes(draft, target_probs_BLV, uniforms_BL3)
    uniforms_BL3 = uniforms_BL3.to(target_probs_BLV.device)
    (B, K), device = draft.token_ids_BK.shape, target_probs_BLV.device
    requests_B = torch.arange(B, device=device)
    is_drafted_BK = torch.arange(K, device=device) < draft.num_draft_tokens_B[:, None]
    draft = draft._replace(token_ids_BK=draft.token_ids_BK.masked_fill(~is_drafted_BK, 0))

    is_accepted_BK = _accepts(draft, target_probs_BLV, uniforms_BL3[:, :K, ACCEPT])
    num_accepted_B = (is_accepted_BK & is_drafted_BK).cumprod(-1).sum(-1)
    is_refused_B = (is_drafted_BK & ~is_accepted_BK).any(-1)

    last_BV = target_probs_BLV[requests_B, num_accepted_B]
    if is_refused_B.any():
        last_BV = torch.where(is_refused_B[:, None], _excess(draft, last_BV, num_accepted_B), last_BV)
    last_ids_B = sample_rows(last_BV, uniforms_BL3[requests_B, num_accepted_B, LAST])
    return Verdict(num_accepted_B, _committed(draft.token_ids_BK, num_accepted_B, last_ids_B))


def _accepts(draft: Draft, target_probs_BLV: Tensor, uniforms_BK: Tensor) -> Tensor:
    """Whether uniform < target / draft, multiplied out so that no draft probability is divided by."""
    ids_BK1 = draft.token_ids_BK[..., None]
    target_BK = target_probs_BLV[:, :-1].gather(-1, ids_BK1).squeeze(-1)
    if draft.probs_BKV is None:
        return uniforms_BK < target_BK
    return uniforms_BK * draft.probs_BKV.gather(-1, ids_BK1).squeeze(-1) < target_BK


def _excess(draft: Draft, target_probs_BV: Tensor, num_accepted_B: Tensor) -> Tensor:
    """What the target has above the draft at each request's first refused position, in float64; the target's row where
    rounding leaves nothing. Requests without a refusal get rows that mean nothing."""
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


def _check_shapes(draft: Draft, target_probs_BLV: Tensor, uniforms_BL3: Tensor) -> None:
    (B, K), V = draft.token_ids_BK.shape, target_probs_BLV.shape[-1]
    _check_shape("num_draft_tokens_B", draft.num_draft_tokens_B, (B,), "one count a request")
    _check_shape("target_probs_BLV", target_probs_BLV, (B, K + 1, V), f"{K} drafted tokens need {K + 1} target rows")
    _check_shape("uniforms_BL3", uniforms_BL3, (B, K + 1, 3), "a row of (draft, accept, last) for each target row")
    if draft.probs_BKV is not None:
        _check_shape(
            "draft.probs_BKV", draft.probs_BKV, (B, K, V), f"a row over the target's {V} tokens for each draft"
        )


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}: {why}")
