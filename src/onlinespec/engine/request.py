"""A request: its settings, its state while it runs, and committing tokens to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from onlinespec.config import GenerationParams
from onlinespec.core import DecodeStats, Features, RequestInfo, TokenLogprobs, Trace
from onlinespec.engine.detokenizer import TextStream
from onlinespec.engine.prefix_cache import PromptText
from onlinespec.lossless.noise import Noise
from onlinespec.models.loading import Target

ERROR = "error"  # the finish reason of a request that failed
_OWN_ENDS = ("stop", "length", "context")  # finish reasons of a complete answer


class UnfitPrompt(ValueError):
    """This target can't answer this prompt. In a stream of prompts it is skipped and counted."""


class ContextOverflow(UnfitPrompt):
    """The prompt leaves no room for an answer in the target's context."""


class UnknownToken(UnfitPrompt):
    """The prompt has a token outside the model's vocabulary, which may be smaller than the tokenizer's."""


@dataclass(eq=False)
class Request:
    """One request: the engine's state of it, and the results that the caller reads."""

    params: GenerationParams
    info: RequestInfo
    trace: Trace
    num_prompt_tokens: int
    text: TextStream
    noise: Noise | None  # the sampling noise; None if greedy
    slot: int = -1
    finish_reason: str | None = None  # "stop" (end token or stop string), "length" (max_new_tokens), "context", "error"
    error: str = ""  # the reason, if it ended with an error
    stats: DecodeStats = field(default_factory=DecodeStats)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the answer's tokens, if requested
    num_cached: int = 0  # prompt tokens that were found in the prefix cache
    is_ready: bool = False  # the prompt is prefilled
    longest_drafted: int | None = None  # `Drafter.longest_text`: no drafts once the text is longer
    is_drafting: bool = False  # the drafter has state for this request
    is_plain: bool = False  # continues without a drafter, because drafting for it failed
    num_faults: int = 0  # consecutive steps with logits that are not finite; the step after one drafts nothing
    prompt_text: PromptText | None = None  # while the prompt is prefilled, if there is a prefix cache

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens, prompt and answer together."""
        return self.info.capacity

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far, an end token included."""
        return self.trace.token_ids[self.num_prompt_tokens :]

    @property
    def num_unprefilled(self) -> int:
        """Prompt tokens that still have to be prefilled; the last one is the first anchor and not counted."""
        return max(0, self.num_prompt_tokens - 1 - self.trace.num_features)

    @property
    def has_ended_by_itself(self) -> bool:
        """Whether the answer is complete: not cancelled and not failed."""
        return self.finish_reason in _OWN_ENDS

    @property
    def num_beyond_drafter(self) -> int:
        """Answer tokens beyond the longest text that the drafter drafts for; 0 if the request wants no drafts."""
        if not self._is_beyond_drafter or not self.params.num_draft_tokens:
            return 0
        return len(self.trace.token_ids) - max(self.longest_drafted or 0, self.num_prompt_tokens)

    @property
    def most_draft_tokens(self) -> int:
        """K, but not more than can still be generated, less the one token that every step commits.

        0 after a step with logits that are not finite, and beyond the longest text that the drafter drafts for.
        """
        left = self.max_tokens - len(self.trace.token_ids) - 1
        return 0 if self.num_faults or self._is_beyond_drafter else min(self.params.num_draft_tokens, left)

    @property
    def _is_beyond_drafter(self) -> bool:
        return self.longest_drafted is not None and len(self.trace.token_ids) > self.longest_drafted

    def commit(self, token_ids: Sequence[int], end_token_ids: Collection[int]) -> int:
        """Appends tokens until one of them ends the request. Returns how many were appended."""
        for taken, token_id in enumerate(token_ids, start=1):
            self.trace.token_ids.append(token_id)
            is_end = token_id in self.params.stop_token_ids or (
                token_id in end_token_ids and not self.params.ignore_end_tokens
            )
            if self.text.push(token_id, is_end) or is_end:
                self.finish_reason = "stop"
            elif len(self.trace.token_ids) >= self.max_tokens:
                used = self.max_tokens - self.num_prompt_tokens
                self.finish_reason = "length" if used >= self.params.max_new_tokens else "context"
            if self.finish_reason:
                self.text.close()
                return taken
        return len(token_ids)

    def note_fault(self) -> None:
        """Counts a step whose logits were not finite; a second one in a row ends the request.

        The second step has no drafts, so plain decoding would fail there as well.
        """
        self.num_faults += 1
        if self.num_faults > 1:
            at = len(self.trace.token_ids)
            self.finish_reason = ERROR
            self.error = f"the best logit for token {at} is not finite: the model's logits are broken"
            self.text.close()

    def charge(self, decode_seconds: float, learn_seconds: float = 0.0, diagnostic_seconds: float = 0.0) -> None:
        """Adds seconds to the request's statistics."""
        self.stats = replace(
            self.stats,
            decode_seconds=self.stats.decode_seconds + decode_seconds,
            learn_seconds=self.stats.learn_seconds + learn_seconds,
            diagnostic_seconds=self.stats.diagnostic_seconds + diagnostic_seconds,
        )


def open_request(
    target: Target,
    prompt_ids: Sequence[int],
    params: GenerationParams,
    longest_drafted: int | None = None,
    request_id: str = "",
    domain: str = "",
    tenant: str = "",
    may_learn: bool = True,
) -> Request:
    """Checks a prompt and makes a request of it, which takes no cache memory yet.

    Args:
        prompt_ids: Token ids of the prompt.
        longest_drafted: See `Drafter.longest_text`.
        request_id, domain, tenant, may_learn: See `RequestInfo`.

    Raises:
        ValueError: if the prompt is empty.
        ContextOverflow: if it leaves no room for a token in the target's context.
        UnknownToken: if it has a token outside the target's vocabulary.
    """
    _check_prompt(target, prompt_ids)
    decoder = target.decoder
    max_tokens = min(len(prompt_ids) + params.max_new_tokens, decoder.config.max_positions)
    noise = None
    if not params.sampling.is_greedy:
        noise = Noise(params.seed, params.choice, decoder.config.vocab_size, decoder.device)
    return Request(
        params=params,
        info=RequestInfo(
            request_id, tenant, domain, may_learn, max_tokens, params.sampling, params.seed, params.choice
        ),
        trace=Trace(list(prompt_ids), Features(torch.empty(0, 0)), max_tokens=max_tokens),
        num_prompt_tokens=len(prompt_ids),
        text=TextStream(target.tokenizer, params.stop_strings),
        noise=noise,
        stats=DecodeStats(requests=1),
        longest_drafted=longest_drafted,
    )


def _check_prompt(target: Target, prompt_ids: Sequence[int]) -> None:
    context, vocab_size = target.decoder.config.max_positions, target.decoder.config.vocab_size
    if not prompt_ids:
        raise ValueError("the prompt has no tokens; give at least one (a chat template or a begin token adds some)")
    if len(prompt_ids) >= context:
        raise ContextOverflow(
            f"the prompt has {len(prompt_ids)} tokens, the target's context {context}: "
            "no room for an answer; shorten it"
        )
    for i in prompt_ids:
        if not 0 <= i < vocab_size:
            name = f" ({target.tokens_beyond[i]!r})" if i in target.tokens_beyond else ""
            raise UnknownToken(
                f"the prompt has token {i}{name}, outside the model's vocabulary of {vocab_size}; leave it out"
            )
