"""The decoding step: draft, score, verify, commit, then pass Feedback to learning.

One loop serves plain and speculative decoding, greedy and sampled. Plain decoding is K = 0 on the same path, so that
the comparison is fair and, on a CPU in float32, equal to the bit.
Axis letters: B requests, K drafted tokens, L = K + 1 rows, N rows of all requests, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams
from onlinespec.core import DecodeStats, Draft, Features, Feedback, Verdict
from onlinespec.drafters.contract import Drafter
from onlinespec.engine.drafting import Drafting
from onlinespec.engine.prefill import Prefill
from onlinespec.engine.prefix_cache import PrefixCache
from onlinespec.engine.request import Request, open_request
from onlinespec.host import to_device, to_host
from onlinespec.lossless.sampling import Logprobs, logprobs_of, process_step, token_logprobs
from onlinespec.lossless.verify import Coupled, Rule, ScoredRows
from onlinespec.models.base import Output
from onlinespec.models.clock import clock_for
from onlinespec.models.loading import Target

_PREFILL_TOKENS = 512  # prompt tokens per forward pass; bounds the scratch memory of a long prompt


class Learning(Protocol):
    """What the loop needs of learning: `InlineLearning`, or learning in a thread or process (`BackgroundLearning`)."""

    @property
    def diagnostic_seconds(self) -> float:
        """Seconds that `offer` has spent on telemetry so far. They are not counted as learning."""

    @property
    def num_published(self) -> int:
        """Number of versions taken over so far that passed the gate; 0 if there is no gate."""

    def offer(self, feedback: Sequence[Feedback]) -> None:
        """Takes the Feedback of one step."""

    def set_share(self, share: float) -> None:
        """Sets the share of time that learning may take from now on."""


class Step(NamedTuple):
    """The results of one step, and its time."""

    requests: list[Request]  # those that committed tokens, in order; the others had logits that were not finite
    feedback: list[Feedback]  # one record for each of them
    draft_seconds: float
    verify_seconds: float  # the target's forward pass, verification and commit
    learn_seconds: float


class _Outcome(NamedTuple):
    """One request's verdict, copied to the host."""

    num_accepted: int
    token_ids: list[int]  # verified tokens, before a stop is looked for; none if the logits were not finite
    num_draft_tokens: int
    is_finite: bool
    logprobs: Logprobs | None


class DecodeLoop:
    """Decodes requests with one target, drafter and learning. Single-threaded.

    `generate` runs one request and streams its text. `start`, `step` and `finish` are its parts, to schedule several
    requests: a step takes any that have started and not finished. `start` consists of `open`, `admit` and `prefill`, to
    prefill a prompt in pieces between steps.

    Args:
        drafter: None for plain decoding.
        learning: None learns nothing.
        prefixes: The prefix cache; None for none.
        rule: The acceptance rule; by default `Coupled`. Others are for comparisons (`rejection`).
        aux_layer_ids: Layers to keep the hidden states of, beside those that the drafter reads.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        learning: Learning | None = None,
        prefixes: PrefixCache | None = None,
        rule: Rule | None = None,
        aux_layer_ids: Collection[int] = (),
    ) -> None:
        self.target, self.drafter, self.learning, self.prefixes = target, drafter, learning, prefixes
        self.clock = clock_for(target.decoder.device)
        self._rule = rule or Coupled()
        self._cache = target.decoder.new_cache()
        self._aux_layer_ids = sorted({*aux_layer_ids, *(drafter.aux_layer_ids if drafter else ())})
        self._prefill = Prefill(target, self._cache, prefixes, self._aux_layer_ids)
        self._drafting = Drafting(target, drafter, self._rule.needs_probs)
        self._free_slots = itertools.count()
        self._released: list[int] = []

    # --- a whole request ----------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Iterator[Request]:
        """Runs one request and yields it after every step; `request.text.take()` returns the new text.

        Closing the generator early (a closed connection, Ctrl-C) frees the request's memory.

        Raises:
            FloatingPointError: if the target's logits are NaN or infinite twice at the same position.
            ValueError, ContextOverflow, UnknownToken: from `open_request`.
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
        """Runs a request to its end and returns it. Raises as `generate`."""
        *_, request = self.generate(prompt_ids, params, **tags)
        return request

    # --- its parts ----------------------------------------------------------------------------------------------

    def start(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Request:
        """Opens a request and prefills its whole prompt, except the last token, which is the first anchor.

        Args:
            tags: Further arguments of `open_request`: request_id, domain, tenant, may_learn.

        Raises:
            ValueError, ContextOverflow, UnknownToken: from `open_request`.
        """
        request = self.open(prompt_ids, params, **tags)
        try:
            self.admit(request)
            while not request.is_ready:
                self.prefill([request], _PREFILL_TOKENS)
        except BaseException:
            self.finish(request)
            raise
        return request

    def open(self, prompt_ids: Sequence[int], params: GenerationParams, **tags: Any) -> Request:
        """Makes a request that takes no cache memory yet, as `open_request`. Any thread may call this method."""
        longest_drafted = self.drafter.longest_text if self.drafter else None
        return open_request(self.target, prompt_ids, params, longest_drafted, **tags)

    def num_bytes(self, request: Request) -> int:
        """Bytes that a request holds from `admit` to `finish`: keys, values and features, also the drafter's."""
        decoder = self.target.decoder
        a_state = decoder.config.layer.hidden_size * decoder.dtype.itemsize
        drafting = self.drafter.bytes_per_token if self.drafter else 0
        per_token = self._cache.bytes_per_token + (1 + len(self._aux_layer_ids)) * a_state + drafting
        return request.max_tokens * per_token

    def admit(self, request: Request) -> None:
        """Reserves a cache slot and feature memory for the longest answer that the request may get."""
        decoder = self.target.decoder
        hidden_size = decoder.config.layer.hidden_size
        request.trace.features = Features.empty(
            request.max_tokens, hidden_size, self._aux_layer_ids, decoder.dtype, decoder.device
        )
        slot = self._released.pop() if self._released else next(self._free_slots)
        try:
            self._cache.take(slot, request.max_tokens)
        except BaseException:
            self._released.append(slot)
            raise
        request.slot = slot

    def prefill(self, requests: Sequence[Request], max_tokens: int) -> None:
        """Prefills up to max_tokens more tokens of admitted requests' prompts (`Prefill.read`), at least 32.

        A request whose prompt is done is started in the drafter and `is_ready` for steps.
        """
        began = self.clock.mark()
        pieces = self._prefill.read(requests, max_tokens)
        for request, _ in pieces:
            if not request.num_unprefilled:
                self._drafting.follow(request)
                request.is_ready = True
        seconds, num_read = self.clock.seconds(began, self.clock.mark()), sum(count for _, count in pieces)
        for request, count in pieces:
            request.charge(seconds * (count / num_read if num_read else 1 / len(pieces)))

    def step(self, requests: Sequence[Request], num_draft_tokens: Sequence[int] | None = None) -> Step:
        """Runs one draft and one verification for all given requests, then learning if a round is due.

        A request whose logits are not finite commits nothing, and drafts nothing in its next step; if that fails too,
        it ends with an error. Other requests are not affected. (Under the rejection rule the step raises instead.)

        Args:
            num_draft_tokens: Tokens to draft for each request, at most what its settings allow; None takes the maximum.
        """
        began = self.clock.mark()
        wanted = self._drafting.counts(requests, num_draft_tokens)
        draft = self._drafting.propose(requests, wanted)
        drafted = self.clock.mark()
        counts = self._num_rows(draft, wanted)
        output = self._score(requests, draft, counts)
        logits = output.logits_MV.split(counts)
        verdict = self._rule.judge(draft, _scored_rows(requests, draft, counts, logits))
        outcomes = _outcomes(requests, draft, verdict, logits)
        feedback = self._commit(requests, draft, outcomes, output.features.split(counts))
        decoded = self.clock.mark()
        committed = [one for one, outcome in zip(requests, outcomes, strict=True) if outcome.is_finite]
        learn_seconds, diagnostic_seconds = self._learn(committed, feedback)
        draft_seconds, verify_seconds = self.clock.seconds(began, drafted), self.clock.seconds(drafted, decoded)
        share = 1 / len(requests)
        for request in requests:
            request.charge((draft_seconds + verify_seconds) * share, learn_seconds * share, diagnostic_seconds * share)
        return Step(committed, feedback, draft_seconds, verify_seconds, learn_seconds)

    def undo_step(self, request: Request) -> None:
        """Restores a request after a step or prefill that raised: crops its cache and restarts it in the drafter.

        If the drafter fails again, the request continues without drafts.

        Raises:
            RuntimeError: if the step failed while committing, so that text and features do not match.
        """
        trace = request.trace
        if not request.num_unprefilled and trace.num_features != len(trace.token_ids) - 1:
            raise RuntimeError(f"{len(trace.token_ids)} tokens are committed, the states of {trace.num_features} known")
        self._cache.crop(request.slot, trace.num_features)
        was_drafting = request.is_drafting
        self._drafting.leave(request)
        if was_drafting and not request.is_plain:
            try:
                self._drafting.follow(request)
            except Exception:  # whatever failed, the request can continue without drafts
                request.is_plain = True

    def finish(self, request: Request) -> None:
        """Frees a request's memory here and in the drafter, whether it has ended or not."""
        if request.slot < 0:
            return
        self._cache.release(request.slot)
        self._drafting.leave(request)
        if request.noise:
            request.noise.forget_before(request.max_tokens + MAX_DRAFT_TOKENS)
        self._released.append(request.slot)
        request.slot = -1

    # --- inside a step ------------------------------------------------------------------------------------------

    def _num_rows(self, draft: Draft, wanted: Sequence[int]) -> list[int]:
        """Number of rows that the target scores for each request: the anchor and the drafted tokens.

        On a CPU a further row costs time and reading a count is free. On an accelerator it is the reverse, so all
        positions that were asked for are scored, whether they were drafted or not.
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
        return decoder.forward(ids_N, slots, counts, self._cache, aux_layer_ids=self._aux_layer_ids)

    def _commit(
        self, requests: Sequence[Request], draft: Draft, outcomes: Sequence[_Outcome], features: Sequence[Features]
    ) -> list[Feedback]:
        """Appends the verified tokens to each request and informs the drafter. Returns a record for each that grew."""
        kept, feedback = [], []
        for i, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
            start = len(request.trace.token_ids) - 1
            num_rows = request.commit(outcome.token_ids, self.target.end_token_ids)
            self._cache.crop(request.slot, start + num_rows)
            kept.append(features[i][:num_rows])
            request.trace.append(kept[-1])
            if not outcome.is_finite:
                request.note_fault()
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
                    weights_version=draft.weights_version_B[i],
                    member=draft.member_B[i],
                    request_id=request.info.request_id,
                    domain=request.info.domain,
                    tenant=request.info.tenant,
                    target_fingerprint=self.target.fingerprint,
                    temperature=request.info.sampling.temperature,
                    seed=request.info.seed,
                    choice=request.info.choice,
                    is_last=request.finish_reason is not None,
                )
            )
        self._drafting.observe(requests, [outcome.token_ids for outcome in outcomes], kept)
        return feedback

    def _learn(self, requests: Sequence[Request], feedback: Sequence[Feedback]) -> tuple[float, float]:
        """Passes Feedback to learning. Returns the seconds of learning and of telemetry."""
        if not self.learning:
            return 0.0, 0.0
        began, measured = self.clock.mark(), self.learning.diagnostic_seconds
        pairs = zip(requests, feedback, strict=True)
        self.learning.offer([record for request, record in pairs if request.info.may_learn])
        diagnostic_seconds = self.learning.diagnostic_seconds - measured
        return self.clock.seconds(began, self.clock.mark()) - diagnostic_seconds, diagnostic_seconds


def _scored_rows(
    requests: Sequence[Request], draft: Draft, counts: Sequence[int], logits: Sequence[Tensor]
) -> list[ScoredRows]:
    """Each request's rows as scores, after its penalties, temperature and cuts."""
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
        for request, logits_LV, draft_ids_K, count in zip(requests, logits, draft.token_ids_BK, counts, strict=True)
    ]


def _outcomes(requests: Sequence[Request], draft: Draft, verdict: Verdict, logits: Sequence[Tensor]) -> list[_Outcome]:
    """Copies the results of a step to the host, in the step's only read of the device."""
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


def step_stats(num_rows: int, num_draft_tokens: int) -> DecodeStats:
    """Returns the counters of one step that committed num_rows tokens of one request."""
    accepted = num_rows - 1
    return DecodeStats(
        tokens=num_rows,
        steps=1,
        drafted=num_draft_tokens,
        accepted=accepted,
        accepted_by_position=(1,) * accepted + (0,) * (num_draft_tokens - accepted),
    )
