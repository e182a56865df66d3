"""The step: draft, verify, commit, hand on what was learned. One loop for plain and speculative, greedy and sampled.

Plain decoding is K = 0 on the same path, so the comparison is fair and, on a CPU in float32, equal to the bit.
Axis letters: B requests, K drafted tokens, L = K + 1 rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams
from onlinespec.core import DecodeStats, Draft, Feedback, TokenLogprobs, Trace, Verdict
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.detokenizer import TextStream
from onlinespec.engine.prefix_cache import PrefixCache, PromptText
from onlinespec.host import to_device, to_host
from onlinespec.lossless.noise import Noise, StepNoise
from onlinespec.lossless.sampling import Logprobs, logprobs_of, process_step, token_logprobs
from onlinespec.lossless.verify import Coupled, Rule, ScoredRows
from onlinespec.models.base import Output
from onlinespec.models.clock import clock_for
from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.loading import Target

log = logging.getLogger(__name__)

ERROR = "error"  # the finish reason of a request that failed
_PREFILL_TOKENS = 512  # per target forward, so that a long prompt needs no long scratch memory


class Learning(Protocol):
    """Where Feedback goes; `learning/update.py` has the inline one."""

    @property
    def diagnostic_seconds(self) -> float:
        """Time that `offer` has spent on measuring so far; charged to no request as learning."""

    @property
    def num_published(self) -> int:
        """Versions taken over so far that had been found to draft better; 0 where that is not asked."""

    def offer(self, feedback: Sequence[Feedback]) -> None: ...

    def set_share(self, share: float) -> None:
        """Learning may take this share of time from now on."""


class UnfitPrompt(ValueError):
    """A prompt that this target can't answer, though it can others: a stream of prompts leaves it out."""


class ContextOverflow(UnfitPrompt):
    """The prompt leaves no room in the target's context."""


class UnknownToken(UnfitPrompt):
    """The prompt has a token that the model has no row for: its tokenizer may have more tokens than it."""


@dataclass(eq=False)
class Request:
    """One request as it runs: the loop's own state, and what the caller reads."""

    params: GenerationParams
    trace: Trace
    num_prompt_tokens: int
    max_tokens: int  # prompt and answer together
    text: TextStream
    noise: Noise | None  # what its tokens are chosen with; None where greedy
    request_id: str = ""
    domain: str = ""
    tenant: str = ""
    learns: bool = True  # whether the drafter may learn from it
    slot: int = -1
    finish_reason: str | None = None  # "stop" (end token or stop string), "length" (max_new_tokens), "context", "error"
    error: str = ""  # what went wrong, where that ended it
    stats: DecodeStats = field(default_factory=DecodeStats)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the answer's tokens, if they were asked for
    num_known: int = 0  # of the prompt's tokens, how many were read for an earlier request
    is_ready: bool = False  # its prompt is read
    longest_drafted: int | None = None  # tokens: its drafter drafts nothing behind a text that is longer
    is_drafting: bool = False  # the drafter follows it
    is_plain: bool = False  # goes on without a drafter, because drafting for it failed
    num_faults: int = 0  # steps in a row whose logits were broken; after one, the next drafts nothing
    prompt_text: PromptText | None = None  # of a prompt that is being read, where prefixes are kept

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far, an end token included."""
        return self.trace.token_ids[self.num_prompt_tokens :]

    @property
    def num_unread(self) -> int:
        """Prompt tokens that the target has yet to read before the first step."""
        return max(0, self.num_prompt_tokens - 1 - self.trace.num_features)

    @property
    def num_beyond_drafter(self) -> int:
        """The answer's tokens behind the longest text that its drafter drafts for; 0 if it asked for no drafts."""
        if not self._is_beyond_drafter or not self.params.num_draft_tokens:
            return 0
        return len(self.trace.token_ids) - max(self.longest_drafted or 0, self.num_prompt_tokens)

    @property
    def _is_beyond_drafter(self) -> bool:
        return self.longest_drafted is not None and len(self.trace.token_ids) > self.longest_drafted

    @property
    def most_draft_tokens(self) -> int:
        """K, or what is left to generate less the one token that every step commits anyway; none after a fault or
        behind the longest text that its drafter drafts for.
        """
        left = self.max_tokens - len(self.trace.token_ids) - 1
        return 0 if self.num_faults or self._is_beyond_drafter else min(self.params.num_draft_tokens, left)


class Step(NamedTuple):
    """What one step left, and what it cost."""

    requests: list[Request]  # those that committed something, in order; the others' logits were broken
    feedback: list[Feedback]  # a record for each of them
    draft_seconds: float
    verify_seconds: float  # the target's forward, verification and commit
    learn_seconds: float


class _Outcome(NamedTuple):
    """What a step brought one request, in numbers that Python has."""

    num_accepted: int
    token_ids: list[int]  # committed, before any stop; none where the logits are broken
    num_draft_tokens: int
    is_finite: bool
    logprobs: Logprobs | None


class DecodeLoop:
    """Runs requests over one target, drafter and learning; single-threaded.

    `generate` is one request as a stream of text. `start`, `step` and `finish` are its parts, for whoever
    schedules several: a step takes any requests that have started and not finished. `start` in turn is `open`, `admit`
    and `read`, for who would read prompts piece by piece.

    Args:
        prefixes: What is kept of prompts that were read, for later ones that begin alike.
        rule: How drafts are judged. Another rule than the default is for comparisons (`rejection`).
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        learning: Learning | None = None,
        prefixes: PrefixCache | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.target, self.drafter, self.learning, self.prefixes = target, drafter, learning, prefixes
        self.clock = clock_for(target.decoder.device)
        self._rule = rule or Coupled()
        if drafter:
            drafter.gives_probs = self._rule.needs_probs
        self._cache = target.decoder.new_cache()
        if prefixes and not isinstance(self._cache, KVCache):
            raise ValueError(
                f"{target.name} runs through transformers, whose caches can't be shared: leave prefixes out"
            )
        self._free_slots = itertools.count()
        self._released: list[int] = []
        self._has_said_where_drafts_end = False

    # --- a whole request ----------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Iterator[Request]:
        """Yields the request after every step, its `text.take()` holding what the step made readable.

        Whoever stops early (a closed connection, Ctrl-C) closes the generator, and the request's memory is freed.

        Raises:
            FloatingPointError: if the target's logits are broken: NaN or infinite, twice at the same position.
        """
        request = self.start(prompt_ids, params, **tags)
        try:
            while request.finish_reason is None:
                self.step([request])
                if request.error:
                    raise FloatingPointError(request.error)
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
            UnknownToken: if it has a token outside the target's vocabulary.
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
            ValueError, ContextOverflow, UnknownToken: as `start`.
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
        for i in prompt_ids:
            if not 0 <= i < vocab_size:
                name = f" ({self.target.tokens_beyond[i]!r})" if i in self.target.tokens_beyond else ""
                raise UnknownToken(
                    f"the prompt has token {i}{name}, outside the model's vocabulary of {vocab_size}; leave it out"
                )
        max_tokens = min(len(prompt_ids) + params.max_new_tokens, context)
        return Request(
            params=params,
            trace=Trace(list(prompt_ids), torch.empty(0, 0), max_tokens=max_tokens),
            num_prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            text=TextStream(self.target.tokenizer, params.stop_strings),
            noise=self._noise(params),
            request_id=request_id,
            domain=domain,
            tenant=tenant,
            learns=learns,
            stats=DecodeStats(requests=1),
            longest_drafted=self.drafter.longest_text if self.drafter else None,
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
        began = self.clock.mark()
        pieces = self._pieces(requests, max_tokens)
        ids = [i for request, count in pieces for i in _unread(request, count)]
        if ids:
            self._read(pieces, ids)
        for request, _ in pieces:
            self._remember(request)
            if not request.num_unread:
                self._begin_drafting(request)
                request.is_ready = True
        seconds = self.clock.seconds(began, self.clock.mark())
        for request, count in pieces:
            request.stats = _with_seconds(request.stats, seconds * (count / len(ids) if ids else 1 / len(pieces)))

    def step(self, requests: Sequence[Request], num_draft_tokens: Sequence[int] | None = None) -> Step:
        """One draft and one verification for every request given, then learning if a round is due.

        A request whose logits are broken commits nothing, and drafts nothing in its next step; if they are broken then
        too, it ends with an error. The others do not notice. (Under the rejection rule the step raises instead.)

        Args:
            num_draft_tokens: For each request; by default what its own settings say. Never more than that.
        """
        began = self.clock.mark()
        wanted = self._wanted(requests, num_draft_tokens)
        draft = self._propose(requests, wanted)
        drafted = self.clock.mark()
        counts = self._counts(draft, wanted)
        output = self._score(requests, draft, counts)
        rows = self._rows(requests, draft, counts, output)
        verdict = self._rule.judge(draft, rows)
        outcomes = self._outcomes(requests, draft, verdict, output.logits_MV.split(counts))
        feedback = self._commit(requests, outcomes, draft.weights_version, output.hidden_states_ND.split(counts))
        self._say_where_drafts_end(requests)
        decoded = self.clock.mark()
        committed = [one for one, outcome in zip(requests, outcomes, strict=True) if outcome.is_finite]
        learn_seconds, diagnostic_seconds = self._learn(committed, feedback)
        draft_seconds, verify_seconds = self.clock.seconds(began, drafted), self.clock.seconds(drafted, decoded)
        self._charge(requests, draft_seconds + verify_seconds, learn_seconds, diagnostic_seconds)
        return Step(committed, feedback, draft_seconds, verify_seconds, learn_seconds)

    def undo_step(self, request: Request) -> None:
        """After a step or a prefill that failed: forgets what it left half done.

        The drafter follows the request anew from its text; if that fails too, the request goes on without it.

        Raises:
            RuntimeError: if it failed in the middle of committing, so that nothing can go on.
        """
        trace = request.trace
        if not request.num_unread and trace.num_features != len(trace.token_ids) - 1:
            raise RuntimeError(f"{len(trace.token_ids)} tokens are committed, the states of {trace.num_features} known")
        self._cache.crop(request.slot, trace.num_features)
        was_drafting = request.is_drafting
        self._end_drafting(request)
        if was_drafting and not request.is_plain:
            try:
                self._follow(request)
            except Exception:  # whatever it is, the request can do without
                request.is_plain = True

    def finish(self, request: Request) -> None:
        """Frees what a request holds, finished or not."""
        if request.slot < 0:
            return
        self._cache.release(request.slot)
        self._end_drafting(request)
        if request.noise:
            request.noise.forget_before(request.max_tokens + MAX_DRAFT_TOKENS)
        self._released.append(request.slot)
        request.slot = -1

    # --- around prompts -----------------------------------------------------------------------------------------

    def _pieces(self, requests: Sequence[Request], max_tokens: int) -> list[tuple[Request, int]]:
        """How much of each prompt is read now; nothing of one that is known to its end."""
        pieces: list[tuple[Request, int]] = []
        nexts: set[Hashable] = set()
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
        ids_N = to_device(token_ids, decoder.device)
        output = decoder.forward(ids_N, slots, counts, self._cache, num_logits=[0] * len(slots))
        for (request, _), rows_ND in zip(read, output.hidden_states_ND.split(counts), strict=True):
            _append_features(request.trace, rows_ND)

    def _next_block(self, request: Request) -> Hashable | None:
        """The key of what others could take over, once it is read; None for less than a block."""
        if not self.prefixes or request.num_unread < PAD:
            return None
        return self._text_of(request).key(request.trace.num_features // PAD)

    def _text_of(self, request: Request) -> PromptText:
        """What of a prompt can be shared; made when it is first asked for, and kept while the prompt is read."""
        if request.prompt_text is None:
            length = self.target.decoder.config.layer.rope.length_of(request.max_tokens)
            ids = request.trace.token_ids[: request.num_prompt_tokens - 1]
            request.prompt_text = PromptText(ids, (request.tenant, length))
        return request.prompt_text

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
            if not request.num_unread:
                request.prompt_text = None

    def _begin_drafting(self, request: Request) -> None:
        if not self.drafter or request.is_plain:
            return
        self._follow(request)
        if request.learns:
            self.drafter.hear(request.trace.token_ids, is_start=True)

    def _follow(self, request: Request) -> None:
        """The drafter reads a request's text so far, and follows it from now on."""
        assert self.drafter
        trace = request.trace
        features = trace.hidden_states_SD[: trace.num_features]
        try:
            self.drafter.start(request.slot, trace.token_ids, features, request.max_tokens)
        except BaseException:
            with suppress(Exception):  # what it took before it failed
                self.drafter.release(request.slot)
            raise
        request.is_drafting = True

    def _end_drafting(self, request: Request) -> None:
        if self.drafter and request.is_drafting:
            request.is_drafting = False
            self.drafter.release(request.slot)

    # --- inside a step ------------------------------------------------------------------------------------------

    def _wanted(self, requests: Sequence[Request], num_draft_tokens: Sequence[int] | None) -> list[int]:
        most = [request.most_draft_tokens if request.is_drafting else 0 for request in requests]
        return most if num_draft_tokens is None else [min(pair) for pair in zip(most, num_draft_tokens, strict=True)]

    def _noise(self, params: GenerationParams) -> Noise | None:
        if params.sampling.is_greedy:
            return None
        decoder = self.target.decoder
        return Noise(params.seed, params.choice, decoder.config.vocab_size, decoder.device)

    def _propose(self, requests: Sequence[Request], wanted: Sequence[int]) -> Draft:
        device = self.target.decoder.device
        if not self.drafter or not any(wanted):
            none = torch.zeros(len(requests), 0, dtype=torch.int64, device=device)
            version = self.drafter.weights.version if self.drafter else 0
            return Draft(none, torch.zeros(len(requests), dtype=torch.int64, device=device), None, version)
        drafting = [i for i, request in enumerate(requests) if request.is_drafting]
        chosen = [requests[i] for i in drafting]
        draft = self.drafter.propose(
            [request.slot for request in chosen],
            [request.trace.token_ids[-1] for request in chosen],
            [wanted[i] for i in drafting],
            [request.params.sampling for request in chosen],
            StepNoise([request.noise for request in chosen], [len(request.trace.token_ids) for request in chosen]),
        )
        return draft if len(drafting) == len(requests) else _spread(draft, drafting, len(requests))

    def _counts(self, draft: Draft, wanted: Sequence[int]) -> list[int]:
        """Rows that the target scores for each request: of its anchor and its drafted tokens.

        On a CPU a row costs and reading a number is free; elsewhere it is the other way round, so that rows are scored
        for all tokens that were asked for, drafted or not.
        """
        if self.target.decoder.device.type == "cpu":
            wanted = draft.num_draft_tokens_B.tolist()
        return [1 + min(count, draft.token_ids_BK.shape[1]) for count in wanted]

    def _score(self, requests: Sequence[Request], draft: Draft, counts: Sequence[int]) -> Output:
        decoder = self.target.decoder
        anchors_B1 = to_device([[request.trace.token_ids[-1]] for request in requests], decoder.device)
        ids_BL = torch.cat([anchors_B1, draft.token_ids_BK], dim=1)
        ids_N = torch.cat([ids_L[:count] for ids_L, count in zip(ids_BL, counts, strict=True)])
        slots = [request.slot for request in requests]
        aux = self.drafter.aux_layer_ids if self.drafter else ()
        return decoder.forward(ids_N, slots, counts, self._cache, aux_layer_ids=aux)

    def _rows(
        self, requests: Sequence[Request], draft: Draft, counts: Sequence[int], output: Output
    ) -> list[ScoredRows]:
        """What the target said of each request's tokens, as the request would have them chosen."""
        return [
            ScoredRows(
                process_step(
                    logits_LV,
                    request.params.sampling,
                    request.trace.token_ids,
                    request.num_prompt_tokens,
                    draft_ids_K[: count - 1],
                ),
                request.params.sampling,
                request.noise,
                len(request.trace.token_ids),
            )
            for request, logits_LV, draft_ids_K, count in zip(
                requests, output.logits_MV.split(list(counts)), draft.token_ids_BK, counts, strict=True
            )
        ]

    def _outcomes(
        self, requests: Sequence[Request], draft: Draft, verdict: Verdict, logits: Sequence[Tensor]
    ) -> list[_Outcome]:
        """What a step brought, on the host: its one read of the device."""
        asked = {i: n for i, one in enumerate(requests) if (n := one.params.num_logprobs) is not None}
        logprobs = [logprobs_of(logits[i], verdict.token_ids_BL[i, : len(logits[i])], n) for i, n in asked.items()]
        accepted, ids, drafted, finite, *numbers = to_host(
            verdict.num_accepted_B,
            verdict.token_ids_BL,
            draft.num_draft_tokens_B,
            verdict.is_finite_B,
            *(tensor for one in logprobs for tensor in one),
        )
        read = dict(zip(asked, map(Logprobs, *[iter(numbers)] * 3), strict=True))
        return [
            _Outcome(accepted[i], ids[i][: (accepted[i] + 1) * finite[i]], drafted[i], finite[i], read.get(i))
            for i in range(len(requests))
        ]

    def _commit(
        self,
        requests: Sequence[Request],
        outcomes: Sequence[_Outcome],
        weights_version: int,
        features: Sequence[Tensor],
    ) -> list[Feedback]:
        kept, feedback = [], []
        for request, outcome, rows_LD in zip(requests, outcomes, features, strict=True):
            start = len(request.trace.token_ids) - 1
            num_rows = self._append(request, outcome.token_ids)
            self._cache.crop(request.slot, start + num_rows)
            kept.append(rows_LD[:num_rows])
            _append_features(request.trace, kept[-1])
            if not outcome.is_finite:
                _note_fault(request)
                continue
            request.num_faults = 0
            if request.noise:
                request.noise.forget_before(len(request.trace.token_ids))
            request.stats = request.stats + step_stats(num_rows, outcome.num_draft_tokens)
            if outcome.logprobs is not None:
                request.logprobs += token_logprobs(request.trace.token_ids[start + 1 :], outcome.logprobs)
            feedback.append(
                Feedback(
                    trace=request.trace,
                    start=start,
                    num_rows=num_rows,
                    num_draft_tokens=outcome.num_draft_tokens,
                    num_accepted=outcome.num_accepted,
                    weights_version=weights_version,
                    request_id=request.request_id,
                    domain=request.domain,
                    tenant=request.tenant,
                    target_fingerprint=self.target.fingerprint,
                    temperature=request.params.sampling.temperature,
                    seed=request.params.seed,
                    choice=request.params.choice,
                    is_last=request.finish_reason is not None,
                )
            )
        if self.drafter:
            self._tell(self.drafter, requests, outcomes, kept)
        return feedback

    def _tell(
        self, drafter: Drafter, requests: Sequence[Request], outcomes: Sequence[_Outcome], features: Sequence[Tensor]
    ) -> None:
        """What became of the drafts of requests that go on."""
        running = [
            i
            for i, request in enumerate(requests)
            if request.finish_reason is None and request.is_drafting and outcomes[i].is_finite
        ]
        slots, token_ids = [requests[i].slot for i in running], [outcomes[i].token_ids for i in running]
        drafter.observe(slots, token_ids, [features[i] for i in running])
        for i in running:
            if requests[i].learns:
                drafter.hear(outcomes[i].token_ids, is_start=False)

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

    def _say_where_drafts_end(self, requests: Sequence[Request]) -> None:
        """Logs, once, that an answer goes on without drafts because the drafter's context has ended."""
        if not self._has_said_where_drafts_end and any(request.num_beyond_drafter for request in requests):
            self._has_said_where_drafts_end = True
            log.warning(
                "the drafter drafts for texts of up to %d tokens, the target takes %d: what is longer goes on without "
                "drafts, exact as ever (this is said once)",
                requests[0].longest_drafted,
                self.target.decoder.config.max_positions,
            )

    def _learn(self, requests: Sequence[Request], feedback: Sequence[Feedback]) -> tuple[float, float]:
        """Seconds of learning, and of measuring it."""
        if not self.learning:
            return 0.0, 0.0
        began, measured = self.clock.mark(), self.learning.diagnostic_seconds
        self.learning.offer([record for request, record in zip(requests, feedback, strict=True) if request.learns])
        diagnostic_seconds = self.learning.diagnostic_seconds - measured
        return self.clock.seconds(began, self.clock.mark()) - diagnostic_seconds, diagnostic_seconds

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
    first = request.trace.num_features
    return request.trace.token_ids[first : first + count]


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


def _note_fault(request: Request) -> None:
    """Its logits are broken: what a step without drafts meets twice, plain decoding would meet, too."""
    request.num_faults += 1
    if request.num_faults > 1:
        at = len(request.trace.token_ids)
        request.finish_reason = ERROR
        request.error = f"the best logit for token {at} is not finite: the model's logits are broken"
        request.text.close()


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
