"""The base class of drafters that draft token by token with a KV cache.

Committed tokens are queued until the next draft, and then processed in one forward pass. The drafter's hidden state of
the last one gives the first drafted token. Each drafted token is processed before the next is drafted; afterwards the
cache is cropped to the committed tokens. A subclass implements the forward pass, `_read`.

Axis letters: B requests, R of them that draft, K drafted tokens, N rows of a call, S tokens, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, SamplingParams
from onlinespec.core import Draft, Features, RequestInfo
from onlinespec.drafters.head_training import HeadTraining
from onlinespec.host import to_device
from onlinespec.lossless.noise import StepNoise
from onlinespec.lossless.sampling import process_logits
from onlinespec.models.base import Cache
from onlinespec.models.loading import Target


@dataclass
class Waiting:
    """A request's committed tokens that are not in the drafter's cache yet."""

    may_learn: bool = True  # whether the request's tokens are counted for the draft vocabulary
    token_ids: list[int] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)  # one row per token: the target's, at the token before
    state_1D: Tensor | None = None  # the drafter's state of the last processed token, from which drafting starts


class Autoregressive(HeadTraining):
    """Drafts token by token, in one batch for all requests of a step. Subclasses set `_cache` and `draft_vocab`."""

    _cache: Cache

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._slots: dict[int, Waiting] = {}

    @property
    def bytes_per_token(self) -> int:
        return self._cache.bytes_per_token

    def start(self, slot: int, info: RequestInfo, token_ids: Sequence[int], features: Features) -> None:
        self._cache.take(slot, self._capacity(info) + MAX_DRAFT_TOKENS)
        self._slots[slot] = Waiting(info.may_learn, list(token_ids[self.num_before :]))
        if self.reads_features and len(features):
            self._slots[slot].features.append(features)
        if info.may_learn:
            self.draft_vocab.begin_request(token_ids)

    def _capacity(self, info: RequestInfo) -> int:
        """Returns the maximum number of committed tokens of a request that the cache must hold."""
        return info.capacity

    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], features: Sequence[Features]) -> None:
        for slot, committed, rows in zip(slots, token_ids, features, strict=True):
            waiting = self._slots[slot]
            waiting.token_ids.extend(committed)
            if self.reads_features:
                waiting.features.append(rows)
            if waiting.may_learn:
                self.draft_vocab.observe_tokens(committed)

    def release(self, slot: int, is_finished: bool) -> None:
        self._cache.release(slot)
        self.draft_vocab.settle()
        del self._slots[slot]

    @torch.inference_mode()
    def propose(
        self,
        slots: Sequence[int],
        anchors: Sequence[int],
        num_draft_tokens_B: Sequence[int],
        sampling: Sequence[SamplingParams],
        noise: StepNoise,
    ) -> Draft:
        wanted = zip(slots, num_draft_tokens_B, strict=True)
        counts = [count if count and self._can_draft(slot) else 0 for slot, count in wanted]
        draft = _EmptyDraft(counts, self._decoder.device)
        drafting = [i for i, count in enumerate(counts) if count]
        if drafting:
            self._chain(draft, drafting, slots, sampling, noise)
        return Draft.by_one(draft.token_ids_BK, draft.counts_B, self.weights.version, draft.probs_BKV)

    def _can_draft(self, slot: int) -> bool:
        """Whether there is a token to start from. After a prompt of one token, a drafter with features has none yet."""
        return bool(self._slots[slot].token_ids) or self._slots[slot].state_1D is not None

    def _chain(
        self,
        draft: _EmptyDraft,
        active: list[int],
        slots: Sequence[int],
        sampling: Sequence[SamplingParams],
        noise: StepNoise,
    ) -> None:
        """Drafts depth by depth, then crops the cache. A request leaves the batch when its draft is long enough.

        Args:
            draft: Where the drafted tokens are written.
            active: Indices of the requests that draft at least one token.
        """
        state_RD, has_probs = self._process_waiting([slots[i] for i in active]), self._needs_probs(sampling)
        lengths = {slots[i]: self._cache.lengths[slots[i]] for i in active}
        for depth in range(max(draft.counts)):
            ids_R, probs_RV = self._draw(state_RD, [sampling[i] for i in active], noise.take(active), depth, has_probs)
            draft.fill(active, depth, ids_R, probs_RV)
            going_on = [row for row, i in enumerate(active) if draft.counts[i] > depth + 1]
            if not going_on:
                break
            if len(going_on) < len(active):
                at = to_device(going_on, state_RD.device)
                active, ids_R, state_RD = [active[row] for row in going_on], ids_R[at], state_RD[at]
            state_RD = self._read(ids_R, Features(state_RD), [slots[i] for i in active], [1] * len(active))
        for slot, length in lengths.items():
            self._cache.crop(slot, length)

    def _needs_probs(self, sampling: Sequence[SamplingParams]) -> bool:
        return self.gives_probs and not all(params.is_greedy for params in sampling)

    def _process_waiting(self, slots: Sequence[int]) -> Tensor:
        """Processes the tokens committed since the last draft. Returns the last state of each request, [R, D]."""
        if pending := [slot for slot in slots if self._slots[slot].token_ids]:
            for slot in pending:
                self._prefill_waiting(slot)
            waiting = [self._slots[slot] for slot in pending]
            counts = [len(one.token_ids) for one in waiting]
            token_ids = to_device([i for one in waiting for i in one.token_ids], self._decoder.device)
            features = [rows for one in waiting for rows in one.features]
            out_ND = self._read(token_ids, Features.cat(features) if features else None, pending, counts)
            for one, rows_ND in zip(waiting, out_ND.split(counts), strict=True):
                one.token_ids, one.features, one.state_1D = [], [], rows_ND[-1:]
        states = [state for slot in slots if (state := self._slots[slot].state_1D) is not None]
        return states[0] if len(states) == 1 else torch.cat(states)

    def _prefill_waiting(self, slot: int) -> None:
        """Called before `_read` gets a request's waiting tokens. Does nothing by default.

        Subclasses prefill long prompts here, in pieces or without attention. They may process all waiting tokens but
        the last, and then remove these from the waiting ones.
        """

    @abstractmethod
    def _read(
        self, token_ids_N: Tensor, features: Features | None, slots: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """Runs the drafter on `counts[i]` tokens of `slots[i]` and extends its cache. Returns their states, [N, D].

        Args:
            token_ids_N: The tokens of all slots, concatenated.
            features: For a drafter that reads features, a row for each token: the target's, at the token before. For
                drafted tokens, the final states in it are the drafter's own.
        """

    def _draw(
        self, states_RD: Tensor, sampling: Sequence[SamplingParams], noise: StepNoise, depth: int, has_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts one token per state, [R]: the argmax of scores / temperature + noise. Also returns `probs` if needed.

        The draft vocabulary is used if all requests are greedy and it has seen enough traffic. With sampling, the whole
        vocabulary is used, because noise may choose a rare token: with the draft vocabulary, the acceptance length of
        the demo's drafter on prose at temperature 0.6 was 2.43 instead of 2.49.
        """
        if has_probs:
            return self._draw_with_probs(states_RD, sampling, noise, depth)
        is_greedy = all(params.is_greedy for params in sampling)
        tokens = self.draft_vocab.now if is_greedy and not self.draft_vocab.is_cold else None
        draft_to_target_S = tokens.draft_to_target_S if tokens else None
        scores_RS = self._logits(states_RD, tokens.head if tokens else self.draft_vocab.whole)
        noise_RS = noise.at(depth, draft_to_target_S)
        if noise_RS is not None:
            tiny = torch.finfo(torch.float32).tiny  # a lower temperature would become 0
            temperatures = [max(params.temperature, tiny) if params.temperature else 1.0 for params in sampling]
            scores_RS = scores_RS - scores_RS.amax(-1, keepdim=True)  # so that a tiny temperature can't overflow
            scores_RS = scores_RS / to_device(temperatures, scores_RS.device, torch.float32)[:, None] + noise_RS
        best_R = scores_RS.argmax(-1)
        return best_R if draft_to_target_S is None else draft_to_target_S[best_R], None

    def _draw_with_probs(
        self, states_RD: Tensor, sampling: Sequence[SamplingParams], noise: StepNoise, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Drafts for the rejection rule, over the whole vocabulary; returns tokens [R] and distributions [R, V].

        The request's top-k, top-p and min-p are applied as for the target, so that more drafts are accepted.
        """
        logits_RV = self._logits(states_RD, self.draft_vocab.whole)
        logits_RV = logits_RV.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4)  # diverged weights must still give a draft
        plain = [SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p) for s in sampling]
        probs_RV = torch.cat([process_logits(row[None], one) for row, one in zip(logits_RV, plain, strict=True)])
        noise_RV, scores_RV = noise.at(depth), probs_RV.double().log()
        return (scores_RV if noise_RV is None else scores_RV + noise_RV).argmax(-1), probs_RV


class _EmptyDraft:
    """A draft that is filled in depth by depth. `counts` has the number of tokens to draft for each request."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts, self.counts_B = counts, to_device(counts, device)
        self.token_ids_BK = torch.zeros(len(counts), max(counts, default=0), dtype=torch.int64, device=device)
        self.probs_BKV: Tensor | None = None

    def fill(self, places: Sequence[int], depth: int, ids_R: Tensor, probs_RV: Tensor | None) -> None:
        """Sets the tokens [R] of the requests at these indices at a depth, and their distributions [R, V] if given."""
        at_R = to_device(places, ids_R.device)
        self.token_ids_BK[at_R, depth] = ids_R
        if probs_RV is not None:
            if self.probs_BKV is None:
                self.probs_BKV = torch.zeros(*self.token_ids_BK.shape, probs_RV.shape[-1], device=ids_R.device)
            self.probs_BKV[at_R, depth] = probs_RV
