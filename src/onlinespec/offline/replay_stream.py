"""Recorded streams: the target answers a stream once, then drafters and learners are replayed on it without the target.

The target's text, greedy or sampled, does not depend on the drafter. So it is recorded once, with the hidden states
that verification would have produced. In a replay a drafted token is accepted exactly if it equals the recorded one, as
in decoding. Acceptance counts and learned weights equal those of a real run (tests/test_recording.py). Only times can't
be measured this way.

Axis letters: S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats, Features, Feedback, RequestInfo, Trace
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.request import UnfitPrompt
from onlinespec.engine.step import DecodeLoop, Learning, step_stats
from onlinespec.host import to_host
from onlinespec.lossless.noise import Noise, StepNoise
from onlinespec.models.loading import Target
from onlinespec.workloads import Prompt


@dataclass(frozen=True)
class Recorded:
    """One answered prompt: its tokens, the target's hidden states for them, and the sampling settings."""

    id: str
    domain: str
    token_ids: tuple[int, ...]  # prompt and answer
    num_prompt_tokens: int
    features: Features  # [S, D] per layer, for all tokens but the last
    max_tokens: int  # the most tokens, prompt included, that the request could have reached
    sampling: SamplingParams
    target_fingerprint: str
    seed: int = 0  # with `choice`: seed of the Gumbel noise that the tokens were sampled with
    choice: int = 0

    @property
    def info(self) -> RequestInfo:
        """The RequestInfo to pass to a drafter's `start`."""
        return RequestInfo(
            self.id,
            domain=self.domain,
            capacity=self.max_tokens,
            sampling=self.sampling,
            seed=self.seed,
            choice=self.choice,
        )

    def noise(self, target: Target) -> Noise | None:
        """The noise that the tokens were sampled with; None if decoding was greedy."""
        if self.sampling.is_greedy:
            return None
        return Noise(self.seed, self.choice, target.decoder.config.vocab_size, target.decoder.device)


def record(
    target: Target,
    prompts: Iterable[Prompt],
    params: GenerationParams,
    seed: int = 0,
    aux_layer_ids: Collection[int] = (),
) -> Iterator[Recorded]:
    """Answers prompts by plain decoding and yields each with its states. Prompts that don't fit the target are skipped.

    Args:
        params: Maximum answer length and sampling settings.
        seed: Combined with a prompt's index to the seed of its sampling noise.
        aux_layer_ids: Layers whose states are recorded besides the final ones: the `aux_layer_ids` of the drafter that
            is to be replayed.
    """
    loop = DecodeLoop(target, aux_layer_ids=aux_layer_ids)
    for i, prompt in enumerate(prompts):
        own = GenerationParams(params.max_new_tokens, 0, params.sampling, seed=seed * 1_000_003 + i)
        try:
            request = loop.complete(target.encode(prompt.text), own)
        except UnfitPrompt:
            continue
        yield Recorded(
            id=prompt.id,
            domain=prompt.domain,
            token_ids=tuple(request.trace.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            features=request.trace.features[: request.trace.num_features].map(Tensor.clone),
            max_tokens=request.max_tokens,
            sampling=params.sampling,
            target_fingerprint=target.fingerprint,
            seed=own.seed,
        )


class Replaying:
    """Replays recorded answers one at a time with a drafter, and gives learning the Feedback that decoding would give.

    Args:
        target: The target that the answers were recorded with.
        learning: Takes the Feedback of every step; None for a frozen drafter.
        num_draft_tokens: Tokens drafted per step.
    """

    def __init__(self, target: Target, drafter: Drafter, learning: Learning | None, num_draft_tokens: int) -> None:
        self._target, self._drafter, self._learning = target, drafter, learning
        self._num_draft_tokens = num_draft_tokens

    def replay(self, recorded: Recorded) -> DecodeStats:
        """Replays one request and returns its counts, without times.

        Raises:
            ValueError: if it was recorded with another target.
        """
        if recorded.target_fingerprint != self._target.fingerprint:
            raise ValueError(
                f"{recorded.id} was recorded with target {recorded.target_fingerprint}, "
                f"this target is {self._target.fingerprint}; record it again"
            )
        n, features = recorded.num_prompt_tokens, recorded.features
        trace = Trace(list(recorded.token_ids), features, len(features), recorded.max_tokens)
        self._drafter.start(0, recorded.info, recorded.token_ids[:n], features[: n - 1])
        anchor, stats, noise = n - 1, DecodeStats(requests=1), recorded.noise(self._target)
        while anchor < len(recorded.token_ids) - 1:
            anchor, counted = self._step(recorded, trace, anchor, noise)
            stats += counted
        self._drafter.release(0, is_finished=True)
        return stats

    def _step(self, recorded: Recorded, trace: Trace, anchor: int, noise: Noise | None) -> tuple[int, DecodeStats]:
        """Replays one step from an anchor position. Returns the next anchor and the step's counts."""
        following = recorded.token_ids[anchor + 1 :]
        wanted = max(0, min(self._num_draft_tokens, recorded.max_tokens - anchor - 2))
        version = self._drafter.weights.version
        drafted, accepted = self._judged(recorded, anchor, wanted, noise) if wanted else (0, 0)
        num_rows = min(accepted + 1, len(following))
        is_last = num_rows == len(following)
        if not is_last:
            self._drafter.observe([0], [following[:num_rows]], [recorded.features[anchor : anchor + num_rows]])
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
                        seed=recorded.seed,
                        choice=recorded.choice,
                        is_last=is_last,
                    )
                ]
            )
        return anchor + num_rows, step_stats(num_rows, drafted)

    def _judged(self, recorded: Recorded, anchor: int, wanted: int, noise: Noise | None) -> tuple[int, int]:
        """Drafts up to `wanted` tokens. Returns how many were drafted, and how many of them accepted."""
        following = recorded.token_ids[anchor + 1 :]
        step_noise = StepNoise([noise], [anchor + 1])
        draft = self._drafter.propose([0], [recorded.token_ids[anchor]], [wanted], [recorded.sampling], step_noise)
        if noise:
            noise.forget_before(anchor + 1)
        (ids,), (count,) = to_host(draft.token_ids_BK, draft.num_draft_tokens_B)
        drafted, accepted = ids[:count], 0
        while accepted < min(len(drafted), len(following)) and drafted[accepted] == following[accepted]:
            accepted += 1
        return len(drafted), accepted
