"""The step: draft, verify, commit, hand on what was learned. One loop for plain and speculative, greedy and sampled.

Plain decoding is K = 0 on the same path, so the comparison is fair and, on a CPU in float32, equal to the bit.
Axis letters: B requests, K drafted tokens, L = K + 1 rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams
from onlinespec.core import DecodeStats, Draft, Feedback, Trace, Verdict
from onlinespec.drafters.base import Drafter
from onlinespec.models.base import Output
from onlinespec.models.loading import Target
from onlinespec.randomness import DRAFT, uniforms
from onlinespec.sampling import process_step
from onlinespec.text import TextStream
from onlinespec.verify import verify

_ANY_UNIFORMS = torch.full((MAX_DRAFT_TOKENS + 1, 3), 0.5, dtype=torch.float64)
_PREFILL_TOKENS = 512  # per target forward, so that a long prompt needs no long scratch memory


class Learning(Protocol):
    """Where Feedback goes; `learn.py` has the inline one."""

    @property
    def diagnostic_seconds(self) -> float:
        """Time that `offer` has spent on measuring so far; charged to no request as learning."""

    def offer(self, feedback: Sequence[Feedback]) -> None: ...


class ContextOverflow(ValueError):
    """The prompt leaves no room in the target's context."""


@dataclass
class Request:
    """One request as it runs: the loop's own state, and what the caller reads."""

    params: GenerationParams
    trace: Trace
    num_prompt_tokens: int
    max_tokens: int  # prompt and answer together
    text: TextStream
    request_id: str = ""
    domain: str = ""
    tenant: str = ""
    slot: int = -1
    finish_reason: str | None = None  # "stop" (end token or stop string), "length" (max_new_tokens) or "context"
    stats: DecodeStats = field(default_factory=DecodeStats)

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far, an end token included."""
        return self.trace.token_ids[self.num_prompt_tokens :]


class DecodeLoop:
    """Runs requests over one target, drafter and learning; single-threaded.

    `generate` is one request as a stream of text. `start`, `step` and `finish` are its parts, for whoever
    schedules several: a step takes any requests that have started and not finished.
    """

    def __init__(self, target: Target, drafter: Drafter | None = None, learning: Learning | None = None) -> None:
        self.target, self.drafter, self.learning = target, drafter, learning
        self._cache = target.decoder.new_cache()
        self._free_slots = itertools.count()
        self._released: list[int] = []

    # --- a whole request ----------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: str) -> Iterator[Request]:
        """Yields the request after every step, its `text.take()` holding what the step made readable.

        Whoever stops early (a closed connection, Ctrl-C) closes the generator, and the request's memory is freed.
        """
        request = self.start(prompt_ids, params, **tags)
        try:
            while request.finish_reason is None:
                self.step([request])
                yield request
        finally:
            self.finish(request)

    def complete(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: str) -> Request:
        """Runs a request to its end."""
        *_, request = self.generate(prompt_ids, params, **tags)
        return request

    # --- its parts ----------------------------------------------------------------------------------------------

    def start(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        request_id: str = "",
        domain: str = "",
        tenant: str = "",
    ) -> Request:
        """Prefills all but the prompt's last token, which is the first anchor.

        Raises:
            ValueError: if the prompt is empty.
            ContextOverflow: if it leaves no room for a token in the target's context.
        """
        began = time.perf_counter()
        decoder, context = self.target.decoder, self.target.decoder.config.max_positions
        if not prompt_ids:
            raise ValueError("the prompt has no tokens; give at least one (a chat template or a begin token adds some)")
        if len(prompt_ids) >= context:
            raise ContextOverflow(
                f"the prompt has {len(prompt_ids)} tokens, the target's context {context}: "
                "no room for an answer; shorten it"
            )
        vocab_size = decoder.config.vocab_size
        if not all(0 <= i < vocab_size for i in prompt_ids):
            raise ValueError(f"the prompt has token ids outside the target's vocabulary of {vocab_size}")
        max_tokens = min(len(prompt_ids) + params.max_new_tokens, context)
        hidden = torch.empty(max_tokens, decoder.config.layer.hidden_size, dtype=decoder.dtype, device=decoder.device)
        request = Request(
            params=params,
            trace=Trace(list(prompt_ids), hidden, max_tokens=max_tokens),
            num_prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            text=TextStream(self.target.tokenizer, params.stop_strings),
            request_id=request_id,
            domain=domain,
            tenant=tenant,
            slot=self._released.pop() if self._released else next(self._free_slots),
        )
        self._cache.take(request.slot, max_tokens)
        try:
            self._prefill(request)
            if self.drafter:
                features = hidden[: request.trace.num_features]
                self.drafter.start(request.slot, request.trace.token_ids, features, max_tokens)
        except BaseException:
            self._cache.release(request.slot)
            self._released.append(request.slot)
            raise
        request.stats = DecodeStats(requests=1, decode_seconds=time.perf_counter() - began)
        return request

    def step(self, requests: Sequence[Request]) -> None:
        """One draft and one verification for every request given, then learning if a round is due."""
        began = time.perf_counter()
        wanted = [_num_draft_tokens(request) if self.drafter else 0 for request in requests]
        uniforms_BL3 = _uniforms(requests, 1 + max(wanted))
        draft = self._propose(requests, wanted, uniforms_BL3[..., DRAFT])
        counts = [1 + n for n in draft.num_draft_tokens_B.tolist()]
        output = self._score(requests, draft, counts)
        target_probs_BLV = self._target_probs(requests, draft, counts, output)
        verdict = verify(draft, target_probs_BLV, uniforms_BL3[:, : target_probs_BLV.shape[1]])
        feedback = self._commit(requests, draft, counts, verdict, output)
        decoded = time.perf_counter()
        learn_seconds, diagnostic_seconds = self._learn(feedback)
        self._charge(requests, decoded - began, learn_seconds, diagnostic_seconds)

    def finish(self, request: Request) -> None:
        """Frees what a request holds, finished or not."""
        if request.slot < 0:
            return
        self._cache.release(request.slot)
        if self.drafter:
            self.drafter.release(request.slot)
        self._released.append(request.slot)
        request.slot = -1

    # --- inside a step ------------------------------------------------------------------------------------------

    def _prefill(self, request: Request) -> None:
        trace, ids = request.trace, request.trace.token_ids[:-1]
        for first in range(0, len(ids), _PREFILL_TOKENS):
            piece = torch.tensor(ids[first : first + _PREFILL_TOKENS], device=self.target.decoder.device)
            output = self.target.decoder.forward(piece, [request.slot], [len(piece)], self._cache, num_logits=[0])
            _append_features(trace, output.hidden_states_ND)

    def _propose(self, requests: Sequence[Request], wanted: Sequence[int], uniforms_BL: Tensor) -> Draft:
        if not self.drafter or not any(wanted):
            none = torch.zeros(len(requests), 0, dtype=torch.int64)
            version = self.drafter.weights.version if self.drafter else 0
            return Draft(none, torch.zeros(len(requests), dtype=torch.int64), None, version)
        return self.drafter.propose(
            [request.slot for request in requests],
            [request.trace.token_ids[-1] for request in requests],
            wanted,
            [request.params.sampling for request in requests],
            uniforms_BL,
        )

    def _score(self, requests: Sequence[Request], draft: Draft, counts: Sequence[int]) -> Output:
        drafted = draft.token_ids_BK.tolist()
        ids = [
            token_id
            for request, row, count in zip(requests, drafted, counts, strict=True)
            for token_id in (request.trace.token_ids[-1], *row[: count - 1])
        ]
        decoder = self.target.decoder
        slots = [request.slot for request in requests]
        aux = self.drafter.aux_layer_ids if self.drafter else ()
        return decoder.forward(torch.tensor(ids, device=decoder.device), slots, counts, self._cache, aux_layer_ids=aux)

    def _target_probs(self, requests: Sequence[Request], draft: Draft, counts: Sequence[int], output: Output) -> Tensor:
        """Processed target rows [B, L, V]; rows behind a shorter draft are zero and never read."""
        drafted = draft.token_ids_BK.tolist()
        rows = [
            process_step(
                logits,
                request.params.sampling,
                request.trace.token_ids,
                request.num_prompt_tokens,
                row[: count - 1],
            )
            for request, logits, row, count in zip(
                requests, output.logits_MV.split(list(counts)), drafted, counts, strict=True
            )
        ]
        L = draft.token_ids_BK.shape[1] + 1
        if len(rows) == 1 and len(rows[0]) == L:
            return rows[0][None]
        padded = rows[0].new_zeros(len(rows), L, rows[0].shape[-1])
        for i, probs in enumerate(rows):
            padded[i, : len(probs)] = probs
        return padded

    def _commit(
        self, requests: Sequence[Request], draft: Draft, counts: Sequence[int], verdict: Verdict, output: Output
    ) -> list[Feedback]:
        features, feedback = [], []
        rows = zip(
            requests,
            verdict.token_ids_BL.tolist(),
            verdict.num_accepted_B.tolist(),
            counts,
            output.hidden_states_ND.split(list(counts)),
            strict=True,
        )
        for request, token_ids, num_accepted, count, hidden in rows:
            start = len(request.trace.token_ids) - 1
            num_rows = self._append(request, token_ids[: num_accepted + 1])
            self._cache.crop(request.slot, start + num_rows)
            features.append(hidden[:num_rows])
            _append_features(request.trace, features[-1])
            request.stats = request.stats + step_stats(num_rows, count - 1)
            feedback.append(
                Feedback(
                    trace=request.trace,
                    start=start,
                    num_rows=num_rows,
                    num_draft_tokens=count - 1,
                    num_accepted=num_accepted,
                    weights_version=draft.weights_version,
                    request_id=request.request_id,
                    domain=request.domain,
                    tenant=request.tenant,
                    target_fingerprint=self.target.fingerprint,
                    temperature=request.params.sampling.temperature,
                    is_last=request.finish_reason is not None,
                )
            )
        if self.drafter:
            running = [i for i, request in enumerate(requests) if request.finish_reason is None]
            kept = Verdict(verdict.num_accepted_B[running], verdict.token_ids_BL[running])
            self.drafter.observe([requests[i].slot for i in running], kept, [features[i] for i in running])
        return feedback

    def _append(self, request: Request, token_ids: Sequence[int]) -> int:
        """Commits tokens one by one until one of them ends the request; how many were taken."""
        for taken, token_id in enumerate(token_ids, start=1):
            request.trace.token_ids.append(token_id)
            is_end = token_id in request.params.stop_token_ids or (
                token_id in self.target.end_token_ids and not request.params.ignore_end_tokens
            )
            if request.text.push(token_id, is_end) or is_end:
                request.finish_reason = "stop"
            elif len(request.trace.token_ids) >= request.max_tokens:
                used = request.max_tokens - request.num_prompt_tokens
                request.finish_reason = "length" if used >= request.params.max_new_tokens else "context"
            if request.finish_reason:
                request.text.close()
                return taken
        return len(token_ids)

    def _learn(self, feedback: Sequence[Feedback]) -> tuple[float, float]:
        """Seconds of learning, and of measuring it."""
        if not self.learning:
            return 0.0, 0.0
        began, measured = time.perf_counter(), self.learning.diagnostic_seconds
        self.learning.offer(feedback)
        diagnostic_seconds = self.learning.diagnostic_seconds - measured
        return time.perf_counter() - began - diagnostic_seconds, diagnostic_seconds

    def _charge(
        self, requests: Sequence[Request], decode_seconds: float, learn_seconds: float, diagnostic_seconds: float
    ) -> None:
        share = 1 / len(requests)
        for request in requests:
            request.stats = replace(
                request.stats,
                decode_seconds=request.stats.decode_seconds + decode_seconds * share,
                learn_seconds=request.stats.learn_seconds + learn_seconds * share,
                diagnostic_seconds=request.stats.diagnostic_seconds + diagnostic_seconds * share,
            )


def _num_draft_tokens(request: Request) -> int:
    """K, or what is left to generate less the one token that every step commits anyway."""
    return min(request.params.num_draft_tokens, request.max_tokens - len(request.trace.token_ids) - 1)


def _uniforms(requests: Sequence[Request], count: int) -> Tensor:
    """[B, count, 3] for the positions behind each anchor. One-hot rows decide without them: any will do for greedy."""
    rows = [
        _ANY_UNIFORMS[:count]
        if request.params.sampling.is_greedy
        else uniforms(request.params.seed, len(request.trace.token_ids), count)
        for request in requests
    ]
    return torch.stack(rows)


def _append_features(trace: Trace, rows_ND: Tensor) -> None:
    trace.hidden_states_SD[trace.num_features : trace.num_features + len(rows_ND)] = rows_ND
    trace.num_features += len(rows_ND)


def step_stats(num_rows: int, num_draft_tokens: int) -> DecodeStats:
    """The counts of one step that committed num_rows tokens."""
    accepted = num_rows - 1
    return DecodeStats(
        tokens=num_rows,
        steps=1,
        drafted=num_draft_tokens,
        accepted=accepted,
        accepted_by_position=(1,) * accepted + (0,) * (num_draft_tokens - accepted),
    )
