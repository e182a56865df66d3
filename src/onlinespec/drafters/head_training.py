"""The base class of trainable drafters that produce hidden states and turn them into tokens with an LM head.

Verified rows become training rows. The drafter's hidden states of these rows are computed with a gradient, the head
turns them into logits, and a loss compares the logits with the target's rows. Embedding and head are frozen unless a
subclass trains them.

Axis letters: M, N rows, D hidden size, S tokens of the draft vocabulary, V vocabulary, E sets of weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from onlinespec.core import Feedback, Params
from onlinespec.drafters.agreement import agrees
from onlinespec.drafters.contract import Drafter, Loss
from onlinespec.drafters.draft_vocab import DraftTokens, DraftVocab
from onlinespec.drafters.training_rows import Layout, Span, TrainingRows, spans_of
from onlinespec.host import to_device, to_host
from onlinespec.learners.losses import RowLoss, TargetRows, soft_cross_entropy
from onlinespec.models.base import Model
from onlinespec.models.loading import Target

Head = Callable[[Tensor], Tensor]  # states [..., D] to logits over the vocabulary, or over some of its tokens


class HeadTraining(Drafter):
    """Batches and losses for drafters with an LM head. Subclasses set `draft_vocab` and implement `_depths`."""

    is_trainable = True
    unroll = 1  # number of drafting depths that each training row goes through
    num_before = 0  # number of first tokens without a row; 1 if a row needs the target's features of the token before
    reads_features = False  # whether the target's features are an input of the rows
    max_context: int | None = None  # maximum number of context rows per span, the most recent ones; None for all
    draft_vocab: DraftVocab

    def __init__(self, target: Target) -> None:
        self._decoder = target.decoder
        self._fingerprint = target.fingerprint
        self._draft_dtype = draft_dtype_for(self._decoder)

    def batch(
        self, feedback: Sequence[Feedback], replayed: Sequence[Feedback] = (), rejected_only: bool = False
    ) -> TrainingRows:
        fresh = TrainingRows(self._spans(feedback, rejected_only, is_fresh=True), self._label, self.draft_vocab)
        if not fresh.has_rows:
            return TrainingRows([], self._label)
        fresh += self._spans(replayed, rejected_only, is_fresh=False)
        return fresh

    def losses(
        self, candidates: Sequence[Params], batch: TrainingRows, row_loss: RowLoss = soft_cross_entropy
    ) -> list[Loss]:
        if not batch.has_rows:
            raise ValueError("a batch without verified rows has no loss")
        params, head = stacked(candidates), self._learn_head(stacked(candidates), batch.tokens)
        counts_N = batch.layout.counts_N.float()
        num_rows, agreed_E = counts_N.sum(), counts_N.new_zeros(len(candidates))
        weights_EN: list[Tensor] = []
        for at_M, states_EMD in self._depths(params, batch.layout, self.unroll):
            rows, logits = batch.target.take(at_M), head(states_EMD)
            if not weights_EN:  # the first depth, which has every row
                agreed_E = _num_agreed(logits.detach(), rows, batch)
            weights_EN.append(row_loss(logits, rows).view(len(candidates), -1) * counts_N[at_M])
        totals_E = torch.stack([weighted.sum(-1) for weighted in weights_EN]).sum(0) / num_rows
        fresh_M = to_device(batch.layout.fresh, counts_N.device)
        fresh_E = weights_EN[0].detach()[:, fresh_M].sum(-1) / len(fresh_M)
        counted, fresh, agreed = to_host(num_rows, fresh_E, agreed_E)
        scored = zip(totals_E, fresh, agreed, strict=True)
        num_fresh = len(batch.fresh_places)
        return [Loss(total, loss, int(counted), int(right), num_fresh) for total, loss, right in scored]

    @torch.no_grad()
    def rows(
        self, candidates: Sequence[Params], batch: TrainingRows, num_depths: int = 1
    ) -> list[tuple[Tensor, TargetRows]]:
        fresh, params = batch.fresh, stacked(candidates)
        head, depths = self._learn_head(params, None), []
        for at_M, states_MD in self._depths(params, fresh.layout, num_depths):
            logits = head(states_MD).view(len(candidates), len(at_M), -1)
            depths.append((logits, fresh.target.take(at_M)))
        return depths

    @abstractmethod
    def _depths(self, params: Params, rows: Layout, num_depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for each drafting depth the indices of the M training rows that it predicts, and their states [M, D].

        The first depth predicts all N rows. With stacked params, the states are [E, M, D].
        """

    def _spans(self, feedback: Sequence[Feedback], rejected_only: bool, is_fresh: bool) -> list[Span]:
        """Makes spans of training rows. A row doesn't count if its committed token has no row in the drafter's head."""
        return spans_of(
            feedback,
            self.num_before,
            rejected_only,
            is_fresh,
            self.reads_features,
            self.max_context,
            self.draft_vocab.has_row,
        )

    def _learn_head(self, params: Params, tokens: DraftTokens | None) -> Head:
        """Returns the head for learning, over `tokens` or the whole vocabulary. It is frozen unless overridden."""
        product = tokens.head if tokens else self.draft_vocab.whole

        def head(states: Tensor) -> Tensor:
            return self._logits(states.flatten(0, -2), product).view(*states.shape[:-1], -1)

        return head

    def _logits(self, states_ND: Tensor, head: Head) -> Tensor:
        return head(states_ND.to(self.draft_vocab.dtype)).float()

    def _label(self, layout: Layout, tokens: DraftTokens | None) -> TargetRows:
        """Returns the labels: the target's head applied to the hidden states stored at verification, then softmax."""
        places = tokens.target_to_draft(layout.token_ids) if tokens else None
        if tokens is None or places is None:
            probs_NV = self.draft_vocab.narrowed(self._decoder.head(layout.target_states_ND).softmax(-1))
            return TargetRows(probs_NV, layout.token_ids_N, layout.temperatures_N, layout.noise_keys_N3)
        places_N = to_device(places, layout.token_ids_N.device)
        logits_NS = self._target_logits(tokens, layout.target_states_ND)
        return TargetRows(logits_NS.softmax(-1), places_N, layout.temperatures_N, layout.noise_keys_N3)

    def _target_logits(self, tokens: DraftTokens, states_ND: Tensor) -> Tensor:
        """Returns the target's logits [N, S] for some tokens.

        If the target's head is a plain matrix product, only the rows of these tokens are multiplied.
        """
        if self._decoder.has_plain_head:
            return tokens.target_logits(states_ND)
        return self._decoder.head(states_ND)[:, tokens.draft_to_target_S]


def _num_agreed(logits: Tensor, target: TargetRows, batch: TrainingRows) -> Tensor:
    """Returns for each set of weights how many fresh rows it would have drafted the committed token for, [E]."""
    fresh_M = to_device(batch.fresh_places, logits.device)
    logits_ENS = logits.view(-1, *target.probs_NV.shape)
    return agrees(logits_ENS[:, fresh_M], target.take(fresh_M)).sum(-1)


def draft_dtype_for(target: Model[Any]) -> torch.dtype:
    """Returns the dtype for drafting: float32 on a CPU (weights may be packed as bfloat16), else the target's dtype."""
    return torch.float32 if target.device.type == "cpu" else target.dtype


def stacked(candidates: Sequence[Params]) -> Params:
    """Stacks several sets of weights along a new first axis, for batched products. Returns a single set unchanged."""
    if len(candidates) == 1:
        return candidates[0]
    return {name: torch.stack([params[name] for params in candidates]) for name in candidates[0]}
