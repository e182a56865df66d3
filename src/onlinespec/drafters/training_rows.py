"""Verified rows as a drafter trains on them: spans of requests, side by side, with what the target said of them.

A drafter has a row for every token but the first `num_before` of a request (those before it has anything to read); the
row reads its token, and maybe the target's state before it, and is to say what the target said behind that token.

Axis letters: S rows of a request, N rows the loss is on, C rows of context, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS
from onlinespec.core import Feedback
from onlinespec.drafters.draft_vocab import DraftTokens, DraftVocab
from onlinespec.host import to_device
from onlinespec.learners.losses import TargetRows

Ints = NDArray[np.int64]


class Span(NamedTuple):
    """Consecutive verified rows of one request, as a drafter sees them."""

    read_ids_S: Tensor  # read by each row; the last rows are what the loss is on
    features_SD: Tensor  # float32; the target's state before each row's token; empty for who does not read it
    target_states_ND: Tensor  # the target's state at each trained row's token: its head rows are the labels
    token_ids: list[int]  # what came behind each trained row's token ...
    token_ids_N: Tensor  # ... and on the device
    counts: list[bool]  # which of the rows the loss counts ...
    counts_N: Tensor  # ... and on the device
    noise_keys_N3: Tensor  # int64 (seed, choice, position): what the token of each trained row was chosen with
    temperature: float  # at which the request decodes
    is_fresh: bool  # of this round, not replayed
    capacity: int  # tokens of its request that drafters hold, at most
    first_position: int = 0  # of its first row; rows before it are left out

    @property
    def num_context(self) -> int:
        """Rows that the loss is not on; they come first."""
        return len(self.read_ids_S) - len(self.target_states_ND)


class Layout(NamedTuple):
    """Spans side by side: the loss is on N rows, the other C are context."""

    context_ids_C: Tensor
    context_positions_C: Tensor  # inside the request
    context_features_CD: Tensor
    read_ids_N: Tensor  # a span's rows follow each other
    positions_N: Tensor
    left: Ints  # on the host: rows of the span from each one on, itself included
    features_ND: Tensor
    target_states_ND: Tensor
    token_ids: list[int]  # what came behind each of the N rows, on the host ...
    token_ids_N: Tensor  # ... and on the device
    counts_N: Tensor
    fresh: Ints  # on the host: which of the rows are fresh and count
    noise_keys_N3: Tensor
    temperatures_N: Tensor
    capacities: Ints  # on the host: of each row's request, as `Span.capacity`
    context_capacities: Ints
    context_sizes: tuple[int, ...]  # by span
    is_visible_NC: Tensor  # of the same span
    is_visible_NN: Tensor  # of the same span and no later


class TrainingRows(list[Span]):
    """The spans of a round. Laid out once, and labelled once, however many sets of weights are evaluated on them.

    Args:
        vocab: What the loss chooses its tokens from; None for the whole vocabulary.
        label: The target's rows, over the tokens of a layout if some are given.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        label: Callable[[Layout, DraftTokens | None], TargetRows],
        vocab: DraftVocab | None = None,
    ) -> None:
        super().__init__(spans)
        self._label, self._vocab = label, vocab

    @property
    def has_rows(self) -> bool:
        """Whether there is a row that counts."""
        return any(any(span.counts) for span in self)

    @cached_property
    def layout(self) -> Layout:
        return lay_out(self)

    @cached_property
    def tokens(self) -> DraftTokens | None:
        """What greedy drafts choose from, with the spans' own tokens in it; None for the whole vocabulary.

        That is what a sampled request learns over. Chosen when a loss first asks: rows that are only measured must not
        decide what is drafted from.
        """
        if self._vocab is None or any(span.temperature for span in self):
            return None
        tokens = self._vocab.holding(self.layout.token_ids)
        return tokens if tokens.target_to_draft(self.layout.token_ids) is not None else None

    @cached_property
    def target(self) -> TargetRows:
        """What the target said at every row, over `tokens`."""
        return self._label(self.layout, self.tokens)

    @cached_property
    def fresh(self) -> TrainingRows:
        """The spans of this round alone, over the whole vocabulary: what diagnostics and comparisons measure."""
        return TrainingRows([span for span in self if span.is_fresh], self._label)

    @cached_property
    def fresh_places(self) -> Ints:
        """On the host: places of the rows of this round, counted or not."""
        return np.flatnonzero(np.repeat([span.is_fresh for span in self], [len(span.token_ids) for span in self]))


def spans_of(
    feedback: Sequence[Feedback],
    num_before: int,
    rejected_only: bool,
    is_fresh: bool,
    has_features: bool,
    max_context: int | None = None,
    has_row: Callable[[int], bool] = lambda token_id: True,
) -> list[Span]:
    """A span for every run of records that continue each other side by side and have a row to learn from.

    Args:
        max_context: Newest rows of context that are kept; None for all.
        has_row: Whether the drafter has a row for a token; rows whose token it lacks don't count.
    """
    spans = [
        _span(run, num_before, rejected_only, is_fresh, has_features, has_row)
        for run in _runs(feedback)
        if run[-1].start + run[-1].num_rows > max(num_before, run[0].start)
    ]
    return spans if max_context is None else [_shortened(span, max_context) for span in spans]


def lay_out(spans: Sequence[Span]) -> Layout:
    """Puts spans side by side."""
    device = spans[0].read_ids_S.device
    contexts = [span.num_context for span in spans]
    sizes = [len(span.target_states_ND) for span in spans]
    starts = [span.first_position for span in spans]
    ends = [s + c + n for s, c, n in zip(starts, contexts, sizes, strict=True)]
    positions_C = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, contexts, strict=True)])
    positions_N = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, sizes, strict=True)])
    span_C, span_N = (np.repeat(np.arange(len(spans)), counts) for counts in (contexts, sizes))
    is_fresh = np.repeat([span.is_fresh for span in spans], sizes)
    return Layout(
        context_ids_C=torch.cat([span.read_ids_S[: span.num_context] for span in spans]),
        context_positions_C=to_device(positions_C, device),
        context_features_CD=torch.cat([span.features_SD[: span.num_context] for span in spans]),
        read_ids_N=torch.cat([span.read_ids_S[span.num_context :] for span in spans]),
        positions_N=to_device(positions_N, device),
        left=np.repeat(ends, sizes) - positions_N,
        features_ND=torch.cat([span.features_SD[span.num_context :] for span in spans]),
        target_states_ND=torch.cat([span.target_states_ND for span in spans]),
        token_ids=[i for span in spans for i in span.token_ids],
        token_ids_N=torch.cat([span.token_ids_N for span in spans]),
        counts_N=torch.cat([span.counts_N for span in spans]),
        noise_keys_N3=torch.cat([span.noise_keys_N3 for span in spans]),
        fresh=np.flatnonzero(is_fresh & np.concatenate([span.counts for span in spans])),
        temperatures_N=to_device(np.repeat([span.temperature for span in spans], sizes), device, torch.float32),
        capacities=np.repeat([span.capacity for span in spans], sizes),
        context_capacities=np.repeat([span.capacity for span in spans], contexts),
        context_sizes=tuple(contexts),
        is_visible_NC=to_device(span_N[:, None] == span_C, device),
        is_visible_NN=to_device((span_N[:, None] == span_N) & (positions_N[:, None] >= positions_N), device),
    )


def _runs(feedback: Sequence[Feedback]) -> list[list[Feedback]]:
    runs: list[list[Feedback]] = []
    for record in feedback:
        newest = runs[-1][-1] if runs else None
        if newest and newest.trace is record.trace and newest.start + newest.num_rows == record.start:
            runs[-1].append(record)
        else:
            runs.append([record])
    return runs


def _span(
    records: Sequence[Feedback],
    num_before: int,
    rejected_only: bool,
    is_fresh: bool,
    has_features: bool,
    has_row: Callable[[int], bool],
) -> Span:
    trace, first = records[0].trace, max(num_before, records[0].start)
    last = records[-1].start + records[-1].num_rows
    states = trace.features.final_SD
    ids = to_device(trace.token_ids[num_before : last + 1], states.device)
    counts = [
        (not rejected_only or (record.is_rejection and i == record.num_rows - 1))
        and has_row(trace.token_ids[record.start + i + 1])
        for record in records
        for i in range(record.num_rows)
    ][first - records[0].start :]
    return Span(
        read_ids_S=ids[:-1],
        features_SD=states[: last - num_before].float() if has_features else states.new_zeros(last - num_before, 0),
        target_states_ND=states[first:last].clone(),
        token_ids=trace.token_ids[first + 1 : last + 1],
        token_ids_N=ids[first - num_before + 1 :],
        counts=counts,
        counts_N=to_device(counts, states.device),
        noise_keys_N3=to_device(
            [(records[0].seed, records[0].choice, at + 1) for at in range(first, last)], states.device
        ),
        temperature=records[0].temperature,
        is_fresh=is_fresh,
        capacity=(trace.max_tokens or len(trace.token_ids)) + MAX_DRAFT_TOKENS,
    )


def _shortened(span: Span, max_context: int) -> Span:
    left_out = max(0, span.num_context - max_context)
    return span._replace(
        read_ids_S=span.read_ids_S[left_out:],
        features_SD=span.features_SD[left_out:],
        first_position=span.first_position + left_out,
    )
