"""Training rows: the verified rows of requests, concatenated into one batch, with the target's rows as labels.

A drafter has one row per token of a request, except for the first `num_before` tokens. The input of a row is its token,
and for some drafters also the target's hidden state at the token before. The label is the target's distribution of the
next token.

Axis letters: S rows of a span, N trained rows, C context rows (which have no loss), D hidden size.
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
    """Consecutive rows of one request. The last N of them are trained; those before are context."""

    read_ids_S: Tensor  # the input token of each row
    features_SD: Tensor  # float32: the target's state at the token before; [S, 0] if the drafter does not use it
    target_states_ND: Tensor  # the target's state at each trained row's token; its head turns them into labels
    token_ids: list[int]  # the committed token after each trained row's token ...
    token_ids_N: Tensor  # ... the same on the device
    counts: list[bool]  # whether each trained row counts in the loss ...
    counts_N: Tensor  # ... the same on the device
    noise_keys_N3: Tensor  # int64 (seed, choice, position) of the noise that chose each of `token_ids`
    temperature: float  # of the request
    is_fresh: bool  # whether the rows are of this round; False if replayed
    capacity: int  # maximum number of tokens of the request (of a complete text: its length), plus MAX_DRAFT_TOKENS
    first_position: int = 0  # the drafter's position of the first row; not 0 if earlier context was cut off

    @property
    def num_context(self) -> int:
        """Number of context rows, which come first."""
        return len(self.read_ids_S) - len(self.target_states_ND)


class Layout(NamedTuple):
    """The rows of all spans concatenated: N trained rows and C context rows. The rows of a span are consecutive."""

    context_ids_C: Tensor
    context_positions_C: Tensor  # the drafter's positions in the request
    context_features_CD: Tensor
    read_ids_N: Tensor
    positions_N: Tensor
    left: Ints  # on the host: number of rows from each row to the end of its span, itself included
    features_ND: Tensor
    target_states_ND: Tensor
    token_ids: list[int]  # on the host: the committed token after each of the N rows ...
    token_ids_N: Tensor  # ... the same on the device
    counts_N: Tensor
    fresh: Ints  # on the host: indices of the rows that are fresh and count
    noise_keys_N3: Tensor
    temperatures_N: Tensor  # float32
    capacities: Ints  # on the host: `Span.capacity` of each trained row
    context_capacities: Ints  # ... and of each context row
    context_sizes: tuple[int, ...]  # number of context rows of each span
    is_visible_NC: Tensor  # bool attention mask: context of the same span
    is_visible_NN: Tensor  # bool attention mask: same span and not later


class TrainingRows(list[Span]):
    """The batch of a learning round: a list of spans. It is empty if there is nothing to learn from.

    Layout and labels are computed once, however many sets of weights are evaluated.

    Args:
        label: Computes the labels (the target's rows) of a layout: over the given tokens, or, if they are None, over
            the whole vocabulary.
        vocab: The draft vocabulary that the loss may be restricted to; None for the whole vocabulary.
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
        """Whether any row counts in the loss."""
        return any(any(span.counts) for span in self)

    @cached_property
    def layout(self) -> Layout:
        """The rows of all spans, concatenated."""
        return lay_out(self)

    @cached_property
    def tokens(self) -> DraftTokens | None:
        """The tokens over which the loss is computed, including all committed tokens; None for the whole vocabulary.

        None if any request is sampled, or if the committed tokens do not all fit into the draft vocabulary. Computed
        when a loss first needs it, because it may choose the draft vocabulary anew. A batch that is only evaluated over
        the whole vocabulary must not do that.
        """
        if self._vocab is None or any(span.temperature for span in self):
            return None
        tokens = self._vocab.including(self.layout.token_ids)
        return tokens if tokens.target_to_draft(self.layout.token_ids) is not None else None

    @cached_property
    def target(self) -> TargetRows:
        """The target's rows (the labels), over `tokens`."""
        return self._label(self.layout, self.tokens)

    @cached_property
    def fresh(self) -> TrainingRows:
        """The spans of this round only, with labels over the whole vocabulary. For telemetry and the promotion gate."""
        return TrainingRows([span for span in self if span.is_fresh], self._label)

    @cached_property
    def fresh_places(self) -> Ints:
        """On the host: indices of all of this round's rows, including those that do not count."""
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
    """Makes one span of each run of consecutive records of a request. Runs that have no row to train are left out.

    Args:
        num_before: Number of tokens at the start of a request for which the drafter has no row.
        rejected_only: Only rows that rejected a drafted token count in the loss.
        is_fresh: Whether the records are of this round, not replayed.
        has_features: Whether the drafter uses the target's hidden states as input.
        max_context: Maximum number of context rows per span; the most recent ones are kept. None for all.
        has_row: Whether the drafter's head has a row for a token. Rows whose committed token has none do not count.
    """
    spans = [
        _span(run, num_before, rejected_only, is_fresh, has_features, has_row)
        for run in _runs(feedback)
        if run[-1].start + run[-1].num_rows > max(num_before, run[0].start)
    ]
    return spans if max_context is None else [_shortened(span, max_context) for span in spans]


def lay_out(spans: Sequence[Span]) -> Layout:
    """Concatenates the rows of spans. There must be at least one span."""
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
