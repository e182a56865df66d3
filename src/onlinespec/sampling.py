"""From logits to probabilities to a token.

Whatever the settings, the outcome is rows of probabilities, and greedy is the row that is one-hot at its argmax: what
follows (verification, drawing) has one path. Order and cuts are transformers': penalties, temperature, top-k, top-p,
min-p. Rows are processed independently, so a row's bits do not depend on the rows beside it.

Axis letters: K drafted tokens, L = K + 1 rows of a verification step, N any rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.core import TokenLogprobs

_FLOAT32 = torch.finfo(torch.float32)


class TokenCounts(NamedTuple):
    """Which tokens came before each row; what penalties are counted from."""

    is_seen_NV: Tensor  # bool: in the prompt or the output
    num_output_NV: Tensor  # float32: how often in the output


def process_step(
    logits_LV: Tensor,
    sampling: SamplingParams,
    history_ids: Sequence[int],
    num_prompt_tokens: int,
    draft_ids: Sequence[int],
) -> Tensor:
    """The rows of one request's verification step: row j stands behind the history and the first j drafted tokens.

    Args:
        history_ids: Prompt and committed tokens, the anchor included. Read only if there are penalties.

    >>> logits = torch.tensor([[2.0, 1.5, 0.0], [2.0, 1.5, 0.0]])
    >>> once = SamplingParams(presence_penalty=1.0)
    >>> process_step(logits, once, history_ids=[2, 0], num_prompt_tokens=1, draft_ids=[1]).argmax(-1).tolist()
    [1, 0]
    """
    if len(logits_LV) != len(draft_ids) + 1:
        raise ValueError(f"{len(logits_LV)} rows of logits for {len(draft_ids)} drafted tokens; expected one row more")
    if not sampling.has_penalties:
        return process_logits(logits_LV, sampling)
    counts = count_tokens(history_ids, num_prompt_tokens, draft_ids, logits_LV.shape[-1])
    return process_logits(logits_LV, sampling, TokenCounts(*(count.to(logits_LV.device) for count in counts)))


def count_tokens(
    history_ids: Sequence[int], num_prompt_tokens: int, draft_ids: Sequence[int], vocab_size: int
) -> TokenCounts:
    """What each of a step's rows has before it. History ids beyond the vocabulary are left out: none can be drawn.

    >>> count_tokens([2, 0], num_prompt_tokens=1, draft_ids=[1], vocab_size=3).num_output_NV.tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """
    num_prompt_V = _bincount(history_ids[:num_prompt_tokens], vocab_size)
    num_output_LV = _bincount(history_ids[num_prompt_tokens:], vocab_size).repeat(len(draft_ids) + 1, 1)
    for i, token_id in enumerate(draft_ids):
        num_output_LV[i + 1 :, token_id] += 1
    return TokenCounts((num_prompt_V + num_output_LV) > 0, num_output_LV)


def process_logits(
    logits_NV: Tensor,
    sampling: SamplingParams | Sequence[SamplingParams],
    token_counts: TokenCounts | None = None,
) -> Tensor:
    """Float32 rows that sum to one: what the next token is drawn from, under one setting for all rows or one each.

    Raises:
        FloatingPointError: if a row has NaN or +inf, or nothing but -inf.

    >>> process_logits(torch.tensor([[1.0, 3.0, 3.0]]), SamplingParams())
    tensor([[0., 1., 0.]])
    >>> process_logits(torch.tensor([[0.0, 0.0, -9.0]]), SamplingParams(temperature=0.7, top_k=2))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    if isinstance(sampling, SamplingParams):
        return _process_alike(logits_NV, sampling, token_counts)
    if len(sampling) != len(logits_NV):
        raise ValueError(f"{len(sampling)} sampling settings for {len(logits_NV)} rows of logits")
    probs_NV = torch.empty_like(logits_NV, dtype=torch.float32)
    for params in dict.fromkeys(sampling):
        rows = torch.tensor([i for i, other in enumerate(sampling) if other == params], device=logits_NV.device)
        counts = token_counts and TokenCounts(*(count[rows] for count in token_counts))
        probs_NV[rows] = _process_alike(logits_NV[rows], params, counts)
    return probs_NV


def sample_rows(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The token of each row at which the running sum of probabilities passes the uniform (inverse CDF, in float64).

    Rows need not sum to one. A token of probability zero is never returned.

    >>> sample_rows(torch.tensor([[0.0, 0.5, 0.5]]).expand(3, 3), torch.tensor([0.0, 0.49, 1.0])).tolist()
    [1, 1, 2]
    """
    if uniforms_N.shape != probs_NV.shape[:1]:
        raise ValueError(f"uniforms of shape {tuple(uniforms_N.shape)} for {len(probs_NV)} rows; expected one each")
    cdf_NV = probs_NV.cumsum(-1, dtype=torch.float64).masked_fill_(probs_NV <= 0, 0)
    total_N = cdf_NV.amax(-1)
    if not (total_N > 0).all():
        raise ValueError("a row has NaN or no probability at all; there is nothing to draw")
    below_total_N = total_N.nextafter(torch.zeros_like(total_N))  # the product may round up to the total
    threshold_N = torch.minimum(uniforms_N.double() * total_N, below_total_N)
    return (cdf_NV > threshold_N[:, None]).byte().argmax(-1)


def token_logprobs(logits_NV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens, and of the likeliest ones, under raw rows: temperature 1, nothing cut.

    >>> (one,) = token_logprobs(torch.tensor([[0.0, 0.0, -9.9e9]]), [1], num_top=1)
    >>> one.token_id, round(one.logprob, 4), one.top[0][0]
    (1, -0.6931, 0)
    """
    logprobs_NV = logits_NV.float().log_softmax(-1)
    chosen_N = logprobs_NV[torch.arange(len(token_ids)), torch.tensor(token_ids)].tolist()
    top = logprobs_NV.topk(min(num_top, logprobs_NV.shape[-1]))
    rows = zip(token_ids, chosen_N, top.indices.tolist(), top.values.tolist(), strict=True)
    return [TokenLogprobs(i, logprob, tuple(zip(ids, values, strict=True))) for i, logprob, ids, values in rows]


def _process_alike(logits_NV: Tensor, params: SamplingParams, token_counts: TokenCounts | None) -> Tensor:
    logits_NV = logits_NV.float()
    if params.has_penalties:
        logits_NV = _penalize(logits_NV, params, token_counts)
    top_N, top_ids_N = logits_NV.max(dim=-1)
    _check_finite(top_N)
    if params.is_greedy:
        return torch.zeros_like(logits_NV).scatter_(-1, top_ids_N[:, None], 1.0)
    scores_NV = _scale(logits_NV - top_N[:, None], params.temperature)
    if params.top_k:
        scores_NV = _keep_top_k(scores_NV, params.top_k)
    if params.top_p < 1:
        scores_NV = _keep_top_p(scores_NV, params.top_p)
    if params.min_p:
        scores_NV = _keep_min_p(scores_NV, params.min_p)
    return scores_NV.softmax(-1)


def _penalize(logits_NV: Tensor, params: SamplingParams, token_counts: TokenCounts | None) -> Tensor:
    if token_counts is None:
        raise ValueError(f"{params} has penalties; pass token_counts, or call process_step")
    is_seen_NV, num_output_NV = token_counts
    penalty = params.repetition_penalty
    repeated_NV = torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty)
    logits_NV = torch.where(is_seen_NV, repeated_NV, logits_NV)
    return logits_NV - params.frequency_penalty * num_output_NV - params.presence_penalty * (num_output_NV > 0)


def _check_finite(top_N: Tensor) -> None:
    if not top_N.isfinite().all():
        row = int((~top_N.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"the largest logit of row {row} is {float(top_N[row])}: the model's logits are broken"
        )


def _scale(scores_NV: Tensor, temperature: float) -> Tensor:
    """The scores' maximum is 0, so that no temperature, however small, can overflow it."""
    return scores_NV / min(max(temperature, _FLOAT32.tiny), _FLOAT32.max)


def _keep_top_k(scores_NV: Tensor, top_k: int) -> Tensor:
    """Ties with the k-th are kept."""
    kth_N1 = scores_NV.topk(min(top_k, scores_NV.shape[-1])).values[:, -1:]
    return scores_NV.masked_fill(scores_NV < kth_N1, -torch.inf)


def _keep_top_p(scores_NV: Tensor, top_p: float) -> Tensor:
    """Drops the tail that weighs 1 - top_p or less; the likeliest token stays, however small top_p."""
    ascending_NV, order_NV = scores_NV.sort(dim=-1)
    is_tail_NV = ascending_NV.softmax(-1).cumsum(-1) <= 1 - top_p
    is_tail_NV[:, -1] = False
    return scores_NV.masked_fill(is_tail_NV.scatter(-1, order_NV, is_tail_NV), -torch.inf)


def _keep_min_p(scores_NV: Tensor, min_p: float) -> Tensor:
    """Drops what is less likely than min_p times the likeliest token."""
    probs_NV = scores_NV.softmax(-1)
    return scores_NV.masked_fill(probs_NV < min_p * probs_NV.amax(-1, keepdim=True), -torch.inf)


def _bincount(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64).bincount(minlength=vocab_size)[:vocab_size].float()
