"""Sampling: turns the target's logits into scores, and scores into tokens.

Scores are logits after penalties, temperature and cuts (top-k, top-p, min-p); a token removed by a cut has score -inf.
The chosen token is the argmax of scores plus the Gumbel noise of its position (`noise.py`). For greedy requests the
noise is 0, so greedy and sampled requests share one code path. The order is the same as in transformers: penalties,
temperature, top-k, top-p, min-p. Each row is processed independently, so its bits do not depend on the other rows.

Axis letters: K drafted tokens, L = K + 1 rows of a verification step, N any rows, S tokens left by a cut, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.core import TokenLogprobs
from onlinespec.host import to_device
from onlinespec.lossless.noise import gumbel

_FEW = 8  # if cuts leave at most 1 token in 8, only those get noise, which saves two logarithms per removed token
_FLOAT32 = torch.finfo(torch.float32)


class TokenCounts(NamedTuple):
    """How often each token occurs in the text before each row. Penalties are computed from it."""

    is_seen_NV: Tensor  # bool: whether the token occurs in the prompt or the output
    num_output_NV: Tensor  # float32: number of occurrences in the output


class Choice(NamedTuple):
    """The chosen tokens of N rows."""

    token_ids_N: Tensor  # int64; arbitrary for a row that is not finite
    is_finite_N: Tensor  # bool: False if the row's best score is NaN or infinite


def choose(scores_NV: Tensor, uniforms_NV: Tensor | None = None) -> Choice:
    """Returns one token per row: the argmax of its scores, plus Gumbel noise if uniforms are given.

    Args:
        scores_NV: From `process_scores`.
        uniforms_NV: From `Noise.rows`, float64; None for greedy requests.

    >>> choose(torch.tensor([[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0]])).is_finite_N.tolist()
    [True, False]
    """
    if uniforms_NV is None:
        best_N, token_ids_N = scores_NV.max(dim=-1)
        return Choice(token_ids_N, best_N.isfinite())
    if scores_NV.device.type == "cpu":  # on a GPU, reading `num_left` would wait for the device
        num_left = int((scores_NV > -torch.inf).sum(-1).max())
        if 0 < num_left * _FEW <= scores_NV.shape[-1]:
            scores_NS, token_ids_NS = scores_NV.topk(num_left)
            best_N, at_N = _noisy(scores_NS, uniforms_NV.gather(-1, token_ids_NS))
            return Choice(token_ids_NS.gather(-1, at_N[:, None])[:, 0], best_N.isfinite())
    best_N, token_ids_N = _noisy(scores_NV, uniforms_NV)
    return Choice(token_ids_N, best_N.isfinite())


def _noisy(scores_NV: Tensor, uniforms_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The best noisy score per row and its index, in float64: float32 noise would repeat within a vocabulary."""
    best_N, at_N = gumbel(uniforms_NV).add_(scores_NV).max(dim=-1)
    return best_N, at_N


def process_step(
    logits_LV: Tensor,
    sampling: SamplingParams,
    history_ids: Sequence[int],
    num_prompt_tokens: int,
    draft_ids_K: Tensor,
) -> Tensor:
    """Returns the scores, float32 [L, V], of one request's rows in a step.

    Row j scores the token that follows the history and the first j drafted tokens.

    Args:
        logits_LV: The target's logits.
        history_ids: Prompt and committed tokens, including the anchor (the last one). Used only if there are penalties.
        num_prompt_tokens: How many tokens at the start of the history are the prompt.
        draft_ids_K: The drafted tokens, on the device of the logits.

    Raises:
        ValueError: if the number of rows is not the number of drafted tokens plus one.

    >>> logits = torch.tensor([[2.0, 1.5, 0.0], [2.0, 1.5, 0.0]])
    >>> once = SamplingParams(presence_penalty=1.0)
    >>> draft = torch.tensor([1])
    >>> process_step(logits, once, history_ids=[2, 0], num_prompt_tokens=1, draft_ids_K=draft).argmax(-1).tolist()
    [1, 0]
    """
    if len(logits_LV) != len(draft_ids_K) + 1:
        raise ValueError(
            f"{len(logits_LV)} rows of logits for {len(draft_ids_K)} drafted tokens; expected one row more"
        )
    if not sampling.has_penalties:
        return process_scores(logits_LV, sampling)
    counts = count_tokens(history_ids, num_prompt_tokens, draft_ids_K, logits_LV.shape[-1])
    return process_scores(logits_LV, sampling, counts)


def count_tokens(
    history_ids: Sequence[int], num_prompt_tokens: int, draft_ids_K: Tensor, vocab_size: int
) -> TokenCounts:
    """Counts the tokens before each row of a step; the fields are [L, V]. History ids >= `vocab_size` are ignored.

    >>> count_tokens([2, 0], num_prompt_tokens=1, draft_ids_K=torch.tensor([1]), vocab_size=3).num_output_NV.tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """
    device, num_drafted = draft_ids_K.device, len(draft_ids_K)
    num_prompt_V = _bincount(history_ids[:num_prompt_tokens], vocab_size, device)
    num_output_V = _bincount(history_ids[num_prompt_tokens:], vocab_size, device)
    drafted_KV = torch.zeros(num_drafted, vocab_size, device=device).scatter_(-1, draft_ids_K[:, None], 1.0)
    num_output_LV = torch.cat([num_output_V[None], num_output_V + drafted_KV.cumsum(0)])
    return TokenCounts((num_prompt_V + num_output_LV) > 0, num_output_LV)


def process_scores(logits_NV: Tensor, sampling: SamplingParams, token_counts: TokenCounts | None = None) -> Tensor:
    """Returns scores, float32 [N, V]. A sampled request's next token is distributed as their softmax.

    Tokens removed by a cut have score -inf. For greedy requests, scores are the logits after penalties. If a row of
    logits has NaN or +inf, or only -inf, its best score is not finite; `choose` then reports `is_finite_N` as False.

    Raises:
        ValueError: if there are penalties but no `token_counts`.

    >>> process_scores(torch.tensor([[0.0, 1.0, -9.0]]), SamplingParams(temperature=0.5, top_k=2))
    tensor([[-2.,  0., -inf]])
    """
    logits_NV = logits_NV.float()
    if sampling.has_penalties:
        logits_NV = _penalize(logits_NV, sampling, token_counts)
    if sampling.is_greedy:
        return logits_NV
    scores_NV = _scale(logits_NV - logits_NV.amax(-1, keepdim=True), sampling.temperature)
    if sampling.top_k:
        scores_NV = _keep_top_k(scores_NV, sampling.top_k)
    if sampling.top_p < 1:
        scores_NV = _keep_top_p(scores_NV, sampling.top_p)
    if sampling.min_p:
        scores_NV = _keep_min_p(scores_NV, sampling.min_p)
    return scores_NV


def probs_of(scores_NV: Tensor, sampling: SamplingParams) -> Tensor:
    """Returns the distribution of the token that `choose` picks, float32 [N, V]; one-hot rows if greedy.

    Raises:
        FloatingPointError: if a row's best score is not finite.

    >>> probs_of(torch.tensor([[1.0, 3.0, 3.0]]), SamplingParams())
    tensor([[0., 1., 0.]])
    """
    best_N, top_ids_N = scores_NV.max(dim=-1)
    _check_finite(best_N)
    if sampling.is_greedy:
        return torch.zeros_like(scores_NV).scatter_(-1, top_ids_N[:, None], 1.0)
    return scores_NV.softmax(-1)


def process_logits(logits_NV: Tensor, sampling: SamplingParams, token_counts: TokenCounts | None = None) -> Tensor:
    """Returns the distribution of the next token, float32 [N, V], from logits.

    Raises:
        FloatingPointError: if a row's best score is not finite.
        ValueError: if there are penalties but no `token_counts`.

    >>> process_logits(torch.tensor([[0.0, 0.0, -9.0]]), SamplingParams(temperature=0.7, top_k=2))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    return probs_of(process_scores(logits_NV, sampling, token_counts), sampling)


class Logprobs(NamedTuple):
    """Natural log-probabilities of N rows, at temperature 1 and without penalties or cuts. Fields: tensors or lists."""

    chosen_N: Any  # log-probability of the row's committed token
    top_ids_NT: Any  # ids of the T most likely tokens, most likely first ...
    top_NT: Any  # ... and their log-probabilities


def logprobs_of(logits_NV: Tensor, token_ids_N: Tensor, num_top: int) -> Logprobs:
    """Returns the log-probabilities of given tokens and of the `num_top` most likely ones.

    Rows whose token id is -1 (padding) get an arbitrary value in `chosen_N`.
    """
    logprobs_NV = logits_NV.float().log_softmax(-1)
    top = logprobs_NV.topk(min(num_top, logprobs_NV.shape[-1]))
    chosen_N1 = logprobs_NV.gather(-1, token_ids_N.clamp_min(0)[:, None])
    return Logprobs(chosen_N1[:, 0], top.indices, top.values)


def token_logprobs(token_ids: Sequence[int], logprobs: Logprobs) -> list[TokenLogprobs]:
    """Converts log-probabilities, given as lists, to one object per token, for the first len(token_ids) rows.

    >>> rows = logprobs_of(torch.tensor([[0.0, 0.0, -9.9e9]]), torch.tensor([1]), num_top=1)
    >>> (one,) = token_logprobs([1], Logprobs(*(part.tolist() for part in rows)))
    >>> one.token_id, round(one.logprob, 4), one.top[0][0]
    (1, -0.6931, 0)
    """
    rows = zip(token_ids, logprobs.chosen_N, logprobs.top_ids_NT, logprobs.top_NT, strict=False)
    return [TokenLogprobs(i, chosen, tuple(zip(ids, top, strict=True))) for i, chosen, ids, top in rows]


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
    """Divides by the temperature, clamped to float32's range. The best score is 0, so no division makes it infinite."""
    return scores_NV / min(max(temperature, _FLOAT32.tiny), _FLOAT32.max)


def _keep_top_k(scores_NV: Tensor, top_k: int) -> Tensor:
    """Keeps the k largest scores, and all that tie with the k-th."""
    kth_N1 = scores_NV.topk(min(top_k, scores_NV.shape[-1])).values[:, -1:]
    return scores_NV.masked_fill(scores_NV < kth_N1, -torch.inf)


def _keep_top_p(scores_NV: Tensor, top_p: float) -> Tensor:
    """Removes the least likely tokens of total probability 1 - top_p or less. The most likely token always stays."""
    ascending_NV, order_NV = scores_NV.sort(dim=-1)
    is_tail_NV = ascending_NV.softmax(-1).cumsum(-1) <= 1 - top_p
    is_tail_NV[:, -1] = False
    return scores_NV.masked_fill(is_tail_NV.scatter(-1, order_NV, is_tail_NV), -torch.inf)


def _keep_min_p(scores_NV: Tensor, min_p: float) -> Tensor:
    """Removes tokens whose probability is below min_p times that of the most likely one."""
    probs_NV = scores_NV.softmax(-1)
    return scores_NV.masked_fill(probs_NV < min_p * probs_NV.amax(-1, keepdim=True), -torch.inf)


def _bincount(token_ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    ids = to_device([i for i in token_ids if i < vocab_size], device, torch.int64)
    return torch.zeros(vocab_size, device=device).index_add_(0, ids, torch.ones(len(ids), device=device))
