"""Verification: decides which drafted tokens are kept, for all requests of a step at once.

`Coupled` is the rule used for serving. `rejection.py` has the papers' rejection rule, with the same interface.

Axis letters: B requests, K drafted tokens, L = K + 1 rows the target scored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.core import Draft, Verdict
from onlinespec.lossless.noise import Noise
from onlinespec.lossless.sampling import Choice, choose


class ScoredRows(NamedTuple):
    """The target's scores for one request in a step: one row for its anchor and one for each drafted token."""

    scores_LV: Tensor  # from `sampling.process_step`; fewer than L rows if fewer than K tokens were drafted
    sampling: SamplingParams
    noise: Noise | None  # None for a greedy request
    position: int  # of the token after the anchor (the last committed token); the first row decides this token


class Rule(Protocol):
    """Interface of an acceptance rule."""

    needs_probs: bool  # whether sampled drafts must carry their distributions (`Draft.probs_BKV`)

    def judge(self, draft: Draft, rows: Sequence[ScoredRows]) -> Verdict:
        """Returns how many drafted tokens are kept, and the tokens to commit; `rows` has one item per request."""


class Coupled:
    """Coupled sampling: a drafted token is kept if it equals the token that plain decoding would commit there."""

    needs_probs = False

    def judge(self, draft: Draft, rows: Sequence[ScoredRows]) -> Verdict:
        """See `Rule.judge` and `verify`."""
        L = draft.token_ids_BK.shape[1] + 1
        choices = [_chosen(one, L) for one in rows]
        return verify(draft, Choice(*(torch.stack(parts) for parts in zip(*choices, strict=True))))


def verify(draft: Draft, choice_BL: Choice) -> Verdict:
    """Keeps the longest prefix of each draft that equals the target's tokens, then commits the target's next token.

    The target's token at a position is the argmax of its processed scores plus the position's noise: the token that
    plain decoding commits there. So the output text does not depend on the drafts. If the scores of a position are not
    finite, the step ends before it; if it is the first position, nothing is committed.

    Args:
        draft: Tokens of a row beyond its `num_draft_tokens_B` are ignored.
        choice_BL: The target's token at each position, from `sampling.choose`; all fields are [B, L]. Position 0
            follows the anchor, position k the k-th drafted token.

    Raises:
        ValueError: if a shape does not match, for instance if the target did not score exactly K + 1 positions.

    >>> draft = Draft.by_one(torch.tensor([[1, 2]]), torch.tensor([2]), weights_version=0)
    >>> verdict = verify(draft, Choice(torch.tensor([[1, 0, 2]]), torch.ones(1, 3, dtype=torch.bool)))
    >>> verdict.num_accepted_B.tolist(), verdict.token_ids_BL.tolist()
    ([1], [[1, 0, -1]])

    Reference: Daliri et al., arXiv:2408.07978 (drafter-invariant speculative decoding).
    """
    (B, K), token_ids_BL = draft.token_ids_BK.shape, choice_BL.token_ids_N
    check_shape("num_draft_tokens_B", draft.num_draft_tokens_B, (B,), "one count a request")
    check_shape("token_ids of the target", token_ids_BL, (B, K + 1), f"{K} drafted tokens need {K + 1} target rows")
    at_L = torch.arange(K + 1, device=token_ids_BL.device)
    is_same_BK = (draft.token_ids_BK == token_ids_BL[:, :-1]) & (at_L[:-1] < draft.num_draft_tokens_B[:, None])
    num_accepted_B = (is_same_BK & choice_BL.is_finite_N[:, 1:]).long().cumprod(-1).sum(-1)
    is_finite_B = choice_BL.is_finite_N[:, 0]
    is_committed_BL = (at_L <= num_accepted_B[:, None]) & is_finite_B[:, None]
    return Verdict(num_accepted_B * is_finite_B, token_ids_BL.masked_fill(~is_committed_BL, -1), is_finite_B)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Raises a ValueError with the name, both shapes and the reason if a tensor does not have the expected shape."""
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}: {why}")


def _chosen(rows: ScoredRows, length: int) -> Choice:
    """Chooses the target's tokens for one request, and pads them to `length` positions, which are never committed."""
    count = len(rows.scores_LV)
    chosen = choose(rows.scores_LV, rows.noise.rows(rows.position, count) if rows.noise else None)
    if count == length:
        return chosen
    token_ids_L = chosen.token_ids_N.new_zeros(length)
    is_finite_L = chosen.is_finite_N.new_ones(length)
    token_ids_L[:count], is_finite_L[:count] = chosen
    return Choice(token_ids_L, is_finite_L)
