"""The step: draft, verify, commit, hand on what was learned. One loop for plain and speculative, greedy and sampled.

Plain decoding is K = 0 on the same path, so the comparison is fair and, on a CPU in float32, equal to the bit.
Axis letters: B requests, K drafted tokens, L = K + 1 rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams
from onlinespec.core import DecodeStats, Draft, Feedback, TokenLogprobs, Trace, Verdict
from onlinespec.drafters.base import Drafter
from onlinespec.models.base import Output
from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.loading import Target
from onlinespec.models.prefix_cache import PrefixCache, PromptText
from onlinespec.randomness import DRAFT, uniforms
from onlinespec.sampling import process_step, token_logprobs
from onlinespec.text import TextStream
from onlinespec.verify import verify

_ANY_UNIFORMS = torch.full((MAX_DRAFT_TOKENS + 1, 3), 0.5, dtype=torch.float64)
_PREFILL_TOKENS = 512  # per target forward, so that a long prompt needs no long scratch memory


class Learning(Protocol):
    """Where Feedback goes; `learn.py` has the inline one."""

    @property
    def diagnostic_seconds(self) -> float:
        """Time that `offer` has spent on measuring so far; charged to no request as learning."""

    @property
    def num_published(self) -> int:
        """Versions taken over so far that had been found to draft better; 0 where that is not asked."""

    def offer(self, feedback: Sequence[Feedback]) -> None: ...

    def set_share(self, share: float) -> None:
        """Learning may take this share of time from now on."""


class ContextOverflow(ValueError):
    """The prompt leaves no room in the target's context."""


@dataclass(eq=False)
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
    learns: bool = True  # whether the drafter may learn from it
    slot: int = -1
    finish_reason: str | None = None  # "stop" (end token or stop string), "length" (max_new_tokens) or "context"
    error: str = ""  # what went wrong, where a scheduler ended it for that
    stats: DecodeStats = field(default_factory=DecodeStats)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the answer's tokens, if they were asked for
    num_known: int = 0  # of the prompt's tokens, how many were read for an earlier request
    is_ready: bool = False  # its prompt is read
    is_drafting: bool = False  # the drafter follows it
    is_plain: bool = False  # goes on without a drafter, because something failed

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far, an end token included."""
        return self.trace.token_ids[self.num_prompt_tokens :]

    @property
    def num_unread(self) -> int:
        """Prompt tokens that the target has yet to read before the first step."""
        return max(0, self.num_prompt_tokens - 1 - self.trace.num_features)

    @property
    def most_draft_tokens(self) -> int:
        """K, or what is left to generate less the one token that every step commits anyway."""
        return min(self.params.num_draft_tokens, self.max_tokens - len(self.trace.token_ids) - 1)


class Step(NamedTuple):
    """What one step left, and what it cost."""

    feedback: list[Feedback]  # a record for each request, in order
    draft_seconds: float
    verify_seconds: float  # the target's forward, verification and commit
    learn_seconds: float


class DecodeLoop:
    """Runs requests over one target, drafter and learning; single-threaded.

    `generate` is one request as a stream of text. `start`, `step` and `finish` are its parts, for whoever
    schedules several: a step takes any requests that have started and not finished. `start` in turn is `open`, `admit`
    and `read`, for who would read prompts piece by piece.

    Args:
        prefixes: What is kept of prompts that were read, for later ones that begin alike.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        learning: Learning | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.target, self.drafter, self.learning, self.prefixes = target, drafter, learning, prefixes
        self._cache = target.decoder.new_cache()
        if prefixes and not isinstance(self._cache, KVCache):
            raise ValueError(
                f"{target.name} runs through transformers, whose caches can't be shared: leave prefixes out"
            )
        self._free_slots = itertools.count()
        self._released: list[int] = []

    # --- a whole request ----------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Iterator[Request]:
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

    def complete(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Request:
        """Runs a request to its end."""
        *_, request = self.generate(prompt_ids, params, **tags)
        return request

    # --- its parts ----------------------------------------------------------------------------------------------

    def start(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Request:
        """Prefills all but the prompt's last token, which is the first anchor.

        Raises:
            ValueError: if the prompt is empty.
            ContextOverflow: if it leaves no room for a token in the target's context.
        """
        request = self.open(prompt_ids, params, **tags)
        try:
            self.admit(request)
            while not request.is_ready:
                self.read([request], _PREFILL_TOKENS)
        except BaseException:
            self.finish(request)
            raise
        return request

    def open(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        request_id: str = "",
        domain: str = "",
        tenant: str = "",
        learns: bool = True,
    ) -> Request:
        """A request that takes no memory yet; of all methods the one that any thread may call.

        Raises:
            ValueError, ContextOverflow: as `start`.
        """
        config = self.target.decoder.config
        context, vocab_size = config.max_positions, config.vocab_size
        if not prompt_ids:
            raise ValueError("the prompt has no tokens; give at least one (a chat template or a begin token adds some)")
        if len(prompt_ids) >= context:
            raise ContextOverflow(
                f"the prompt has {len(prompt_ids)} tokens, the target's context {context}: "
                "no room for an answer; shorten it"
            )
        if not all(0 <= i < vocab_size for i in prompt_ids):
            raise ValueError(f"the prompt has token ids outside the target's vocabulary of {vocab_size}")
        max_tokens = min(len(prompt_ids) + params.max_new_tokens, context)
        return Request(
            params=params,
            trace=Trace(list(prompt_ids), torch.empty(0, 0), max_tokens=max_tokens),
            num_prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            text=TextStream(self.target.tokenizer, params.stop_strings),
            request_id=request_id,
            domain=domain,
            tenant=tenant,
            learns=learns,
            stats=DecodeStats(requests=1),
        )

    def num_bytes(self, request: Request) -> int:
        """Memory that a request holds from `admit` to `finish`: keys, values and final hidden states."""
        decoder = self.target.decoder
        states = decoder.config.layer.hidden_size * decoder.dtype.itemsize
        drafting = self.drafter.bytes_per_token if self.drafter else 0
        return request.max_tokens * (self._cache.bytes_per_token + states + drafting)

    def admit(self, request: Request) -> None:
        """Takes a request's memory."""
        decoder = self.target.decoder
        shape = request.max_tokens, decoder.config.layer.hidden_size
        request.trace.hidden_states_SD = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
        slot = self._released.pop() if self._released else next(self._free_slots)
        try:
            self._cache.take(slot, request.max_tokens)
        except BaseException:
            self._released.append(slot)
            raise
        request.slot = slot

    def read(self, requests: Sequence[Request], max_tokens: int) -> None:
        """Reads on in the prompts of admitted requests, up to max_tokens tokens in all, the first request's first.

        One that goes on like a request before it waits, to take over what that one leaves.

        Args:
            max_tokens: At least 32. Pieces end between blocks of so many positions, where their end costs no bit.
        """
        began = time.perf_counter()
        pieces = self._pieces(requests, max_tokens)
        ids = [i for request, count in pieces for i in _unread(request, count)]
        if ids:
            self._read(pieces, ids)
        for request, _ in pieces:
            self._remember(request)
            if not request.num_unread:
                self._begin_drafting(request)
                request.is_ready = True
        seconds = time.perf_counter() - began
        for request, count in pieces:
            request.stats = _with_seconds(request.stats, seconds * (count / len(ids) if ids else 1 / len(pieces)))

    def step(self, requests: Sequence[Request], num_draft_tokens: Sequence[int] | None = None) -> Step:
        """One draft and one verification for every request given, then learning if a round is due.

        Args:
            num_draft_tokens: For each request; by default what its own settings say. Never more than that.
        """
        began = time.perf_counter()
        wanted = self._wanted(requests, num_draft_tokens)
        uniforms_BL3 = _uniforms(requests, 1 + max(wanted))
        draft = self._propose(requests, wanted, uniforms_BL3[..., DRAFT])
        drafted = time.perf_counter()
        counts = [1 + n for n in draft.num_draft_tokens_B.tolist()]
        output = self._score(requests, draft, counts)
        target_probs_BLV = self._target_probs(requests, draft, counts, output)
        verdict = verify(draft, target_probs_BLV, uniforms_BL3[:, : target_probs_BLV.shape[1]])
        feedback = self._commit(requests, draft, counts, verdict, output)
        decoded = time.perf_counter()
        learn_seconds, diagnostic_seconds = self._learn(requests, feedback)
        self._charge(requests, decoded - began, learn_seconds, diagnostic_seconds)
        return Step(feedback, drafted - began, decoded - drafted, learn_seconds)

    def take_back(self, request: Request) -> None:
        """After a step or a reading that failed: forgets what it left half done, and goes on without the drafter.

        Raises:
            RuntimeError: if it failed in the middle of committing, so that nothing can go on.
        """
        trace = request.trace
        if not request.num_unread and trace.num_features != len(trace.token_ids) - 1:
            raise RuntimeError(f"{len(trace.token_ids)} tokens are committed, the states of {trace.num_features} known")
        request.is_plain = True
        self._end_drafting(request)
        self._cache.crop(request.slot, trace.num_features)

    def finish(self, request: Request) -> None:
        """Frees what a request holds, finished or not."""
        if request.slot < 0:
            return
        self._cache.release(request.slot)
        self._end_drafting(request)
        self._released.append(request.slot)
        request.slot = -1

    # --- around prompts -----------------------------------------------------------------------------------------

    def _pieces(self, requests: Sequence[Request], max_tokens: int) -> list[tuple[Request, int]]:
        """How much of each prompt is read now; nothing of one that is known to its end."""
        pieces: list[tuple[Request, int]] = []
        nexts: set[PromptText] = set()
        for request in requests:
            self._recall(request)
            following = self._next_block(request)
            if following and following in nexts:
                continue
            count = _piece(request, max_tokens)
            if count or not request.num_unread:
                pieces.append((request, count))
                max_tokens -= count
                nexts |= {following} if following else set()
        return pieces

    def _read(self, pieces: Sequence[tuple[Request, int]], token_ids: Sequence[int]) -> None:
        decoder = self.target.decoder
        read = [(request, count) for request, count in pieces if count]
        slots, counts = [request.slot for request, _ in read], [count for _, count in read]
        ids_N = torch.tensor(token_ids, device=decoder.device)
        output = decoder.forward(ids_N, slots, counts, self._cache, num_logits=[0] * len(slots))
        for (request, _), rows_ND in zip(read, output.hidden_states_ND.split(counts), strict=True):
            _append_features(request.trace, rows_ND)

    def _next_block(self, request: Request) -> PromptText | None:
        """What others could take over, once it is read; None for less than a block."""
        if not self.prefixes or request.num_unread < PAD:
            return None
        whole = self._text_of(request)
        return PromptText(whole.token_ids[: request.trace.num_features + PAD], whole.scope)

    def _text_of(self, request: Request) -> PromptText:
        length = self.target.decoder.config.layer.rope.length_of(request.max_tokens)
        ids = tuple(request.trace.token_ids[: request.num_prompt_tokens - 1])
        return PromptText(ids, (request.tenant, length))

    def _recall(self, request: Request) -> None:
        """Takes over what is known of the rest of a prompt."""
        if self.prefixes and request.num_unread:
            trace = request.trace
            known = self.prefixes.restore(self._text_of(request), self._cache, request.slot, trace.hidden_states_SD)
            trace.num_features += known
            request.num_known += known

    def _remember(self, request: Request) -> None:
        if self.prefixes:
            trace = request.trace
            self.prefixes.store(self._text_of(request), self._cache, request.slot, trace.hidden_states_SD)

    def _begin_drafting(self, request: Request) -> None:
        if not self.drafter or request.is_plain:
            return
        trace = request.trace
        features = trace.hidden_states_SD[: trace.num_features]
        try:
            self.drafter.start(request.slot, trace.token_ids, features, request.max_tokens)
        except BaseException:
            with suppress(Exception):  # what it took before it failed
                self.drafter.release(request.slot)
            raise
        request.is_drafting = True
        if request.learns:
            self.drafter.hear(trace.token_ids, is_start=True)

    def _end_drafting(self, request: Request) -> None:
        if self.drafter and request.is_drafting:
            request.is_drafting = False
            self.drafter.release(request.slot)

    # --- inside a step ------------------------------------------------------------------------------------------

    def _wanted(self, requests: Sequence[Request], num_draft_tokens: Sequence[int] | None) -> list[int]:
        most = [request.most_draft_tokens if request.is_drafting else 0 for request in requests]
        return most if num_draft_tokens is None else [min(pair) for pair in zip(most, num_draft_tokens, strict=True)]

    def _propose(self, requests: Sequence[Request], wanted: Sequence[int], uniforms_BL: Tensor) -> Draft:
        if not self.drafter or not any(wanted):
            none = torch.zeros(len(requests), 0, dtype=torch.int64)
            version = self.drafter.weights.version if self.drafter else 0
            return Draft(none, torch.zeros(len(requests), dtype=torch.int64), None, version)
        drafting = [i for i, request in enumerate(requests) if request.is_drafting]
        draft = self.drafter.propose(
            [requests[i].slot for i in drafting],
            [requests[i].trace.token_ids[-1] for i in drafting],
            [wanted[i] for i in drafting],
            [requests[i].params.sampling for i in drafting],
            uniforms_BL[drafting],
        )
        return draft if len(drafting) == len(requests) else _spread(draft, drafting, len(requests))

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
            output.logits_MV.split(list(counts)),
            strict=True,
        )
        for request, token_ids, num_accepted, count, hidden, logits in rows:
            start = len(request.trace.token_ids) - 1
            num_rows = self._append(request, token_ids[: num_accepted + 1])
            self._cache.crop(request.slot, start + num_rows)
            features.append(hidden[:num_rows])
            _append_features(request.trace, features[-1])
            request.stats = request.stats + step_stats(num_rows, count - 1)
            if request.params.num_logprobs is not None:
                new_ids = request.trace.token_ids[start + 1 :]
                request.logprobs += token_logprobs(logits[:num_rows], new_ids, request.params.num_logprobs)
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
            self._tell(self.drafter, requests, verdict, features)
        return feedback

    def _tell(
        self, drafter: Drafter, requests: Sequence[Request], verdict: Verdict, features: Sequence[Tensor]
    ) -> None:
        """What became of the drafts of requests that go on."""
        running = [i for i, request in enumerate(requests) if request.finish_reason is None and request.is_drafting]
        if len(running) < len(requests):
            verdict = Verdict(verdict.num_accepted_B[running], verdict.token_ids_BL[running])
        drafter.observe([requests[i].slot for i in running], verdict, [features[i] for i in running])
        for i in running:
            if requests[i].learns:
                drafter.hear(requests[i].trace.token_ids[-len(features[i]) :], is_start=False)

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

    def _learn(self, requests: Sequence[Request], feedback: Sequence[Feedback]) -> tuple[float, float]:
        """Seconds of learning, and of measuring it."""
        if not self.learning:
            return 0.0, 0.0
        began, measured = time.perf_counter(), self.learning.diagnostic_seconds
        self.learning.offer([record for request, record in zip(requests, feedback, strict=True) if request.learns])
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


def _piece(request: Request, max_tokens: int) -> int:
    """How many of its unread tokens a request may read: all, or as many as end with a block."""
    if request.num_unread <= max_tokens:
        return request.num_unread
    first = request.trace.num_features
    return max(0, (first + max_tokens) // PAD * PAD - first)


def _unread(request: Request, count: int) -> list[int]:
    """The next tokens of its prompt."""
    return request.trace.token_ids[request.trace.num_features :][:count]


def _spread(draft: Draft, places: Sequence[int], size: int) -> Draft:
    """The same draft for `size` requests, of which only those at `places` drafted."""
    K = draft.token_ids_BK.shape[1]
    token_ids_BK = draft.token_ids_BK.new_zeros(size, K)
    counts_B = draft.num_draft_tokens_B.new_zeros(size)
    token_ids_BK[places], counts_B[places] = draft.token_ids_BK, draft.num_draft_tokens_B
    probs_BKV = None
    if draft.probs_BKV is not None:
        probs_BKV = draft.probs_BKV.new_zeros(size, K, draft.probs_BKV.shape[-1])
        probs_BKV[places] = draft.probs_BKV
    return Draft(token_ids_BK, counts_B, probs_BKV, draft.weights_version)


def _with_seconds(stats: DecodeStats, seconds: float) -> DecodeStats:
    return replace(stats, decode_seconds=stats.decode_seconds + seconds)


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
