"""A stream recorded once, and drafters that learn on it without the target: many methods for the price of one.

The target's text does not depend on who drafts it, so it can be kept, with the hidden states that verification would
have left. Greedy: a draft is kept exactly where it says what the text says, as in decoding; counts and learned weights
are those of a real run (tests/test_recording.py). Sampled: given the text y, verification would have kept a drafted
position with probability min(1, draft(y) / target(y)), whatever was drafted; a seeded coin decides, so that counts
follow the same law as in decoding. Time is what can't be had from it.

Axis letters: S positions, D hidden size, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats, Feedback, Trace, Verdict
from onlinespec.decode import ContextOverflow, DecodeLoop, Learning, step_stats
from onlinespec.drafters.base import Drafter
from onlinespec.models.loading import Target
from onlinespec.sampling import process_logits
from onlinespec.workloads import Prompt


@dataclass(frozen=True)
class Recorded:
    """One answered prompt: its text, the target's states along it, and how it was decoded."""

    id: str
    domain: str
    token_ids: tuple[int, ...]  # prompt and answer
    num_prompt_tokens: int
    hidden_states_SD: Tensor  # of all tokens but the last
    max_tokens: int  # the request could have come to
    sampling: SamplingParams
    target_fingerprint: str


def record(target: Target, prompts: Iterable[Prompt], params: GenerationParams, seed: int = 0) -> Iterator[Recorded]:
    """Answers prompts by plain decoding; those longer than the context are left out."""
    loop = DecodeLoop(target)
    for i, prompt in enumerate(prompts):
        own = GenerationParams(params.max_new_tokens, 0, params.sampling, seed=seed * 1_000_003 + i)
        try:
            request = loop.complete(target.encode(prompt.text), own)
        except ContextOverflow:
            continue
        yield Recorded(
            id=prompt.id,
            domain=prompt.domain,
            token_ids=tuple(request.trace.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            hidden_states_SD=request.trace.hidden_states_SD[: request.trace.num_features].clone(),
            max_tokens=request.max_tokens,
            sampling=params.sampling,
            target_fingerprint=target.fingerprint,
        )


class Replaying:
    """Drafts along recorded answers, one after the other, and lets learning see what decoding would have shown it.

    Args:
        seed: Of the coins that decide on sampled drafts.
    """

    def __init__(
        self, target: Target, drafter: Drafter, learning: Learning | None, num_draft_tokens: int, seed: int = 0
    ) -> None:
        self._target, self._drafter, self._learning = target, drafter, learning
        self._num_draft_tokens = num_draft_tokens
        self._rng = Random(f"coins/{seed}")

    def replay(self, recorded: Recorded) -> DecodeStats:
        """The counts of one request; no times.

        Raises:
            ValueError: if another target answered it.
        """
        if recorded.target_fingerprint != self._target.fingerprint:
            raise ValueError(
                f"{recorded.id} was recorded with target {recorded.target_fingerprint}, "
                f"this target is {self._target.fingerprint}; record it again"
            )
        n, states = recorded.num_prompt_tokens, recorded.hidden_states_SD
        trace = Trace(list(recorded.token_ids), states, len(states), recorded.max_tokens)
        self._drafter.start(0, recorded.token_ids[:n], states[: n - 1], recorded.max_tokens)
        self._drafter.hear(recorded.token_ids[:n], is_start=True)
        anchor, stats = n - 1, DecodeStats(requests=1)
        while anchor < len(recorded.token_ids) - 1:
            anchor, counted = self._step(recorded, trace, anchor)
            stats += counted
        self._drafter.release(0)
        return stats

    def _step(self, recorded: Recorded, trace: Trace, anchor: int) -> tuple[int, DecodeStats]:
        """One draft behind the anchor, judged by the text; the next anchor, and the step's counts."""
        following = recorded.token_ids[anchor + 1 :]
        wanted = max(0, min(self._num_draft_tokens, recorded.max_tokens - anchor - 2))
        version = self._drafter.weights.version
        drafted, accepted = self._judged(recorded, anchor, wanted, following) if wanted else (0, 0)
        num_rows = min(accepted + 1, len(following))
        is_last = num_rows == len(following)
        if not is_last:
            verdict = Verdict(torch.tensor([accepted]), torch.tensor([following[: accepted + 1]]))
            self._drafter.observe([0], verdict, [recorded.hidden_states_SD[anchor : anchor + num_rows]])
            self._drafter.hear(following[:num_rows], is_start=False)
        if self._learning:
            self._learning.offer(
                [
                    Feedback(
                        trace=trace,
                        start=anchor,
                        num_rows=num_rows,
                        num_draft_tokens=drafted,
                        num_accepted=accepted,
                        weights_version=version,
                        request_id=recorded.id,
                        domain=recorded.domain,
                        target_fingerprint=recorded.target_fingerprint,
                        temperature=recorded.sampling.temperature,
                        is_last=is_last,
                    )
                ]
            )
        return anchor + num_rows, step_stats(num_rows, drafted)

    def _judged(self, recorded: Recorded, anchor: int, wanted: int, following: Sequence[int]) -> tuple[int, int]:
        """How many tokens were drafted, and how many of them kept."""
        if not recorded.sampling.is_greedy:
            return self._judged_by_coins(recorded, anchor, wanted, following)
        uniforms_BK = torch.full((1, wanted), 0.5, dtype=torch.float64)
        draft = self._drafter.propose([0], [recorded.token_ids[anchor]], [wanted], [recorded.sampling], uniforms_BK)
        drafted = draft.token_ids_BK[0, : int(draft.num_draft_tokens_B)].tolist()
        accepted = 0
        while accepted < min(len(drafted), len(following)) and drafted[accepted] == following[accepted]:
            accepted += 1
        return len(drafted), accepted

    def _judged_by_coins(
        self, recorded: Recorded, anchor: int, wanted: int, following: Sequence[int]
    ) -> tuple[int, int]:
        """Draws the text's own tokens from the drafter, one depth more as long as the coins keep them."""
        uniforms_BK = torch.full((1, wanted), 0.5, dtype=torch.float64)
        for depth in range(min(wanted, len(following))):
            draft = self._drafter.propose(
                [0], [recorded.token_ids[anchor]], [depth + 1], [recorded.sampling], uniforms_BK[:, : depth + 1]
            )
            if int(draft.num_draft_tokens_B) <= depth:
                return int(draft.num_draft_tokens_B), depth
            token_id = following[depth]
            if self._rng.random() * self._target_prob(recorded, anchor + depth) >= _prob(
                draft.probs_BKV, draft.token_ids_BK, depth, token_id
            ):
                return wanted, depth
            if draft.probs_BKV is not None:
                uniforms_BK[0, depth] = _uniform_that_draws(token_id, draft.probs_BKV[0, depth])
        return wanted, min(wanted, len(following))

    def _target_prob(self, recorded: Recorded, position: int) -> float:
        """Of the token that followed a position, as verification would have processed it."""
        logits_1V = self._target.decoder.head(recorded.hidden_states_SD[position : position + 1])
        return float(process_logits(logits_1V, recorded.sampling)[0, recorded.token_ids[position + 1]])


def _prob(probs_BKV: Tensor | None, token_ids_BK: Tensor, depth: int, token_id: int) -> float:
    """Of drafting a token; a point mass where the drafter has no rows."""
    if probs_BKV is None:
        return float(int(token_ids_BK[0, depth]) == token_id)
    return float(probs_BKV[0, depth, token_id])


def _uniform_that_draws(token_id: int, row_V: Tensor) -> float:
    """The middle of a token's share of the inverse distribution function."""
    cdf = row_V.double().cumsum(-1)
    return float((cdf[token_id] - row_V[token_id].double() / 2) / cdf[-1])
