"""What drafters share whose layers end in a state, and whose states a head turns into tokens.

A request's rows wait until the next draft, are read together, and the last one's state is where drafting starts; each
drafted token is read in turn, and the cache is cropped to the rows that are real. Learning goes over the same rows
through the plain layers. A subclass says how rows are read (`_read`), how states are computed with a gradient
(`_depths`), and which head is whose.

Axis letters: B requests, R of them that draft, K drafted tokens, N rows of a call, S positions, D hidden size,
V vocabulary, E sets of weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS, SamplingParams
from onlinespec.core import Draft, Feedback, Params
from onlinespec.drafters.agreement import agrees
from onlinespec.drafters.contract import Drafter, Loss
from onlinespec.drafters.draft_vocab import Listed, Shortlist
from onlinespec.drafters.training_rows import Layout, Span, lay_out, spans_of
from onlinespec.host import to_device, to_host
from onlinespec.learners.losses import RowLoss, TargetRows, soft_cross_entropy
from onlinespec.lossless.noise import StepNoise
from onlinespec.lossless.sampling import process_logits
from onlinespec.models.base import Cache, Model
from onlinespec.models.loading import Target

Head = Callable[[Tensor], Tensor]  # states [..., D] to logits over the vocabulary, or a list of its tokens


@dataclass
class _Slot:
    """What is known of a request but not yet in the drafter's cache: tokens, each with the feature before it."""

    read_ids: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    state_1D: Tensor | None = None  # of the last row that is in the cache; drafting starts there


class Batch(list[Span]):
    """The spans of a round, and the list of tokens that they are learned over.

    The list is chosen when a loss first asks: rows that are only measured must not decide what is drafted from.
    """

    def __init__(self, spans: Sequence[Span], shortlist: Shortlist) -> None:
        super().__init__(spans)
        self._shortlist = shortlist

    @cached_property
    def listed(self) -> Listed | None:
        """It holds the spans' own tokens; None for the whole vocabulary, where a request among them is sampled."""
        if any(span.temperature for span in self):
            return None
        return self._shortlist.holding([i for span in self for i in span.token_ids])


class Headed(Drafter):
    """A drafter whose states go through a head.

    Subclasses set `_cache` and `_shortlist`, and call `__init__` first.
    """

    is_trainable = True
    unroll = 1  # drafting depths a training row goes through
    num_before = 0  # tokens of a request before the first that has a row; 1 where a row needs the state before it
    reads_features = False  # whether rows read the target's states
    max_context: int | None = None  # newest rows of context that learning sees; None for all
    _cache: Cache
    _shortlist: Shortlist

    def __init__(self, target: Target) -> None:
        self._decoder = target.decoder
        self._fingerprint = target.fingerprint
        self._draft_dtype = draft_dtype_for(self._decoder)
        self._slots: dict[int, _Slot] = {}

    # --- drafting -----------------------------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> int:
        return self._cache.bytes_per_token

    def start(self, slot: int, token_ids: Sequence[int], features_SD: Tensor, capacity: int) -> None:
        self._cache.take(slot, capacity + MAX_DRAFT_TOKENS)  # a batch drafts as deep as its longest draft
        features = [features_SD] if self.reads_features and len(features_SD) else []
        self._slots[slot] = _Slot(list(token_ids[self.num_before :]), features)

    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]], features: Sequence[Tensor]) -> None:
        for slot, committed, rows_ND in zip(slots, token_ids, features, strict=True):
            self._slots[slot].read_ids.extend(committed)
            if self.reads_features:
                self._slots[slot].features.append(rows_ND)

    def hear(self, token_ids: Sequence[int], is_start: bool) -> None:
        if is_start:
            self._shortlist.begin(token_ids)
        else:
            self._shortlist.note(token_ids)

    def release(self, slot: int) -> None:
        self._cache.release(slot)
        self._shortlist.settle()
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
        B, device = len(slots), self._decoder.device
        wanted = zip(slots, num_draft_tokens_B, strict=True)
        ready = [i for i, (slot, count) in enumerate(wanted) if count and self._can_draft(slot)]
        counts = [num_draft_tokens_B[i] if i in ready else 0 for i in range(B)]
        K = max(counts, default=0)
        token_ids_BK, probs_BKV = torch.zeros(B, K, dtype=torch.int64, device=device), None
        if ready:
            chosen, at_R = [slots[i] for i in ready], to_device(ready, device)
            ids_RK, probs_RKV = self._chain(chosen, K, [sampling[i] for i in ready], noise.take(ready))
            token_ids_BK[at_R] = ids_RK
            if probs_RKV is not None:
                probs_BKV = torch.zeros(B, K, probs_RKV.shape[-1], device=device)
                probs_BKV[at_R] = probs_RKV
        counts_B = to_device(counts, device)
        return Draft(token_ids_BK, counts_B, probs_BKV, self.weights.version)

    def _can_draft(self, slot: int) -> bool:
        """Whether there is a row to start from: one that reads states has none in a prompt of one token."""
        return bool(self._slots[slot].read_ids) or self._slots[slot].state_1D is not None

    def _chain(
        self, slots: Sequence[int], num_draft_tokens: int, sampling: Sequence[SamplingParams], noise: StepNoise
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids [R, K] for R requests, and the rows they were drawn from where those are asked for; the cache ends
        with the real rows."""
        state_RD, drafted, rows = self._absorb(slots), [], []
        lengths = [self._cache.lengths[slot] for slot in slots]
        for k in range(num_draft_tokens):
            ids_R, probs_RV = self._draw(state_RD, sampling, noise, k)
            drafted.append(ids_R)
            if probs_RV is not None:
                rows.append(probs_RV)
            if k + 1 < num_draft_tokens:
                state_RD = self._read(ids_R, state_RD, slots, [1] * len(slots))
        for slot, length in zip(slots, lengths, strict=True):
            self._cache.crop(slot, length)
        return torch.stack(drafted, 1), torch.stack(rows, 1) if rows else None

    def _absorb(self, slots: Sequence[int]) -> Tensor:
        """Reads the rows that became real since the last draft; the last of each request is where drafting starts."""
        if pending := [slot for slot in slots if self._slots[slot].read_ids]:
            for slot in pending:
                self._remember(slot)
            waiting = [self._slots[slot] for slot in pending]
            counts = [len(state.read_ids) for state in waiting]
            read_ids = to_device([i for state in waiting for i in state.read_ids], self._decoder.device)
            features = [rows for state in waiting for rows in state.features]
            features_ND = (
                torch.cat(features) if self.reads_features else self._decoder.embedding_VD.new_empty(len(read_ids), 0)
            )
            out_ND = self._read(read_ids, features_ND, pending, counts)
            for slot, rows_ND in zip(pending, out_ND.split(counts), strict=True):
                self._slots[slot] = _Slot(state_1D=rows_ND[-1:])
        states = [state for slot in slots if (state := self._slots[slot].state_1D) is not None]
        return states[0] if len(states) == 1 else torch.cat(states)

    def _remember(self, slot: int) -> None:
        """Reads all but the last of many rows, a prompt's, whose states no one needs; few are left for `_read`."""

    @abstractmethod
    def _read(self, read_ids_N: Tensor, features_ND: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """States [N, D] of `counts[i]` new rows of `slots[i]`, which are in the cache from now on.

        Args:
            features_ND: Of who reads the target's states; while drafting, the own states stand in for them.
        """

    def _draw(
        self, states_RD: Tensor, sampling: Sequence[SamplingParams], noise: StepNoise, depth: int
    ) -> tuple[Tensor, Tensor | None]:
        """A token per state, the best of scores / temperature + noise, and the rows it was drawn from if drafts carry
        them.

        Among the tokens of the list where all are greedy, among all while the list has seen little, or noise may lift
        a rare token: on prose at temperature 0.6 the demo's acceptance length was 2.43 with the list, 2.49 without.
        """
        is_greedy = all(params.is_greedy for params in sampling)
        if self.gives_probs and not is_greedy:
            return self._draw_with_probs(states_RD, sampling, noise, depth)
        listed = self._shortlist.now if is_greedy and not self._shortlist.is_cold else None
        token_ids_S = listed.token_ids_S if listed else None
        scores_RS = self._logits(states_RD, listed.head if listed else self._shortlist.whole)
        noise_RS = noise.at(depth, token_ids_S)
        if noise_RS is not None:
            tiny = torch.finfo(torch.float32).tiny  # a lower temperature would be 0 there
            temperatures = [max(params.temperature, tiny) if params.temperature else 1.0 for params in sampling]
            scores_RS = scores_RS - scores_RS.amax(-1, keepdim=True)  # so that no temperature can overflow the best
            scores_RS = scores_RS / to_device(temperatures, scores_RS.device, torch.float32)[:, None] + noise_RS
        best_R = scores_RS.argmax(-1)
        return best_R if token_ids_S is None else token_ids_S[best_R], None

    def _draw_with_probs(
        self, states_RD: Tensor, sampling: Sequence[SamplingParams], noise: StepNoise, depth: int
    ) -> tuple[Tensor, Tensor]:
        """For the rejection rule: over the whole vocabulary, cut as the target's rows are, so that more is kept."""
        logits_RV = self._logits(states_RD, self._shortlist.whole)
        logits_RV = logits_RV.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4)  # weights that blew up may still draft
        plain = [SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p) for s in sampling]
        probs_RV = torch.cat([process_logits(row[None], one) for row, one in zip(logits_RV, plain, strict=True)])
        noise_RV = noise.at(depth)
        assert noise_RV is not None
        return (probs_RV.double().log() + noise_RV).argmax(-1), probs_RV

    def _logits(self, states_ND: Tensor, head: Head) -> Tensor:
        return head(states_ND.to(self._shortlist.dtype)).float()

    # --- learning -----------------------------------------------------------------------------------------------

    def batch(
        self, feedback: Sequence[Feedback], replayed: Sequence[Feedback] = (), rejected_only: bool = False
    ) -> list[Span]:
        fresh = self._spans(feedback, rejected_only, is_fresh=True)
        if not any(any(span.counts) for span in fresh):
            return []
        return Batch(fresh + self._spans(replayed, rejected_only, is_fresh=False), self._shortlist)

    def _spans(self, feedback: Sequence[Feedback], rejected_only: bool, is_fresh: bool) -> list[Span]:
        return spans_of(feedback, self.num_before, rejected_only, is_fresh, self.reads_features, self.max_context)

    def losses(
        self, candidates: Sequence[Params], batch: Sequence[Span], row_loss: RowLoss = soft_cross_entropy
    ) -> list[Loss]:
        if not any(any(span.counts) for span in batch):
            raise ValueError("a batch without verified rows has no loss")
        layout, params = lay_out(batch), stacked(candidates)
        listed, target = self._scope(batch, layout)
        head, counts_N = self._learn_head(params, listed), layout.counts_N.float()
        num_rows, agreed_E = counts_N.sum(), counts_N.new_zeros(len(candidates))
        weights_EN: list[Tensor] = []
        for at_M, states_EMD in self._depths(params, layout, self.unroll):
            rows, logits = target.take(at_M), head(states_EMD)
            if not weights_EN:  # the first depth, which every row reaches
                agreed_E = self._num_agreed(logits.detach(), rows, batch)
            weights_EN.append(row_loss(logits, rows).view(len(candidates), -1) * counts_N[at_M])
        totals_E = torch.stack([weighted.sum(-1) for weighted in weights_EN]).sum(0) / num_rows
        fresh_M = to_device(layout.fresh, counts_N.device)
        fresh_E = weights_EN[0].detach()[:, fresh_M].sum(-1) / len(fresh_M)
        num_fresh = sum(len(span.token_ids_N) for span in batch if span.is_fresh)
        counted, fresh, agreed = to_host(num_rows, fresh_E, agreed_E)
        scored = zip(totals_E, fresh, agreed, strict=True)
        return [Loss(total, loss, int(counted), int(right), num_fresh) for total, loss, right in scored]

    def _num_agreed(self, logits: Tensor, target: TargetRows, batch: Sequence[Span]) -> Tensor:
        """Of the fresh rows, in how many a first draft would have been the committed token, for each set of weights."""
        is_fresh = [span.is_fresh for span in batch for _ in range(len(span.token_ids_N))]
        fresh_M = to_device([i for i, is_one in enumerate(is_fresh) if is_one], logits.device)
        logits_ENS = logits.view(-1, len(is_fresh), logits.shape[-1])
        return agrees(logits_ENS[:, fresh_M], target.take(fresh_M)).sum(-1)

    @torch.no_grad()
    def rows(
        self, candidates: Sequence[Params], batch: Sequence[Span], num_depths: int = 1
    ) -> list[tuple[Tensor, TargetRows]]:
        layout, params = lay_out([span for span in batch if span.is_fresh]), stacked(candidates)
        target, head, depths = self._target_rows(layout), self._learn_head(params, None), []
        for at_M, states_MD in self._depths(params, layout, num_depths):
            logits = head(states_MD).view(len(candidates), len(at_M), -1)
            depths.append((logits, target.take(at_M)))
        return depths

    @abstractmethod
    def _depths(self, params: Params, rows: Layout, num_depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each drafting depth, which trained rows it reaches, and the states [M, D] drafted there.

        Stacked params give states with an axis of sets in front.
        """

    def _learn_head(self, params: Params, listed: Listed | None) -> Head:
        """The head that learning goes through; by default one that never learns."""
        product = listed.head if listed else self._shortlist.whole

        def head(states: Tensor) -> Tensor:
            return self._logits(states.flatten(0, -2), product).view(*states.shape[:-1], -1)

        return head

    def _scope(self, batch: Sequence[Span], layout: Layout) -> tuple[Listed | None, TargetRows]:
        """The list to learn over, and the target's rows over its tokens: greedy rows learn what greedy drafts choose
        from, if their own tokens are all there."""
        listed = batch.listed if isinstance(batch, Batch) else None
        columns = listed.columns([i for span in batch for i in span.token_ids]) if listed else None
        if listed is None or columns is None:
            return None, self._target_rows(layout)
        columns_N = to_device(columns, layout.token_ids_N.device)
        logits_NS = self._target_logits(listed, layout.target_states_ND)
        return listed, TargetRows(logits_NS.softmax(-1), columns_N, layout.temperatures_N, layout.noise_keys_N3)

    def _target_logits(self, listed: Listed, states_ND: Tensor) -> Tensor:
        """The target's own, of the listed tokens: the short product will do where its head is nothing else."""
        if self._decoder.has_plain_head:
            return listed.target_logits(states_ND)
        return self._decoder.head(states_ND)[:, listed.token_ids_S]

    def _target_rows(self, layout: Layout) -> TargetRows:
        probs_NV = self._decoder.head(layout.target_states_ND).softmax(-1)
        return TargetRows(probs_NV, layout.token_ids_N, layout.temperatures_N, layout.noise_keys_N3)


def draft_dtype_for(target: Model[Any]) -> torch.dtype:
    """What drafts are computed in: on a CPU float32, or products packed from it; on an accelerator the target's own."""
    return torch.float32 if target.device.type == "cpu" else target.dtype


def stacked(candidates: Sequence[Params]) -> Params:
    """One set of weights as it is; several with an axis in front, for one product instead of several."""
    if len(candidates) == 1:
        return candidates[0]
    return {name: torch.stack([params[name] for params in candidates]) for name in candidates[0]}
