"""Filters Feedback: leaves out texts from the first hidden state on that is not finite."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch

from onlinespec.core import Feedback
from onlinespec.host import to_host

log = logging.getLogger(__name__)


class FiniteTexts:
    """Leaves out the records of a text from the first hidden state on that is NaN or infinite.

    One such row would make the loss and all gradients of a round NaN, and later rows attend to it. Earlier rows of the
    text are not affected. Each state is checked once.
    """

    def __init__(self) -> None:
        self.num_left_out = 0  # records so far
        self._num_checked: dict[int, int] = {}  # checked states by id of the trace, which others keep alive
        self._broken: set[int] = set()  # ids of traces with a state that is not finite

    def of(self, records: Sequence[Feedback]) -> list[Feedback]:
        """Returns the records that can be learned from, in order. The first that can't is logged."""
        if not records:
            return []
        (flags,) = to_host(torch.stack([self._are_finite(record) for record in records]))
        kept = []
        for record, is_finite in zip(records, flags, strict=True):
            if not is_finite:
                self._broken.add(id(record.trace))
            if id(record.trace) in self._broken:
                self._leave_out(record)
            else:
                kept.append(record)
        return kept

    def _are_finite(self, record: Feedback) -> torch.Tensor:
        """Whether the states up to this record's last that were not checked before are finite; a bool tensor."""
        trace, end = record.trace, record.start + record.num_rows
        if id(trace) not in self._num_checked:
            weakref.finalize(trace, self._forget, id(trace)).atexit = False
        first = self._num_checked.get(id(trace), 0)
        self._num_checked[id(trace)] = max(first, end)
        layers = trace.features[first:end].layers
        return torch.stack([rows_SD.isfinite().all() for rows_SD in layers]).all()

    def _leave_out(self, record: Feedback) -> None:
        if not self.num_left_out:
            log.warning(
                'a hidden state of request "%s" is not finite: learning goes on without its text from there on, and '
                "without others like it; this is said once",
                record.request_id,
            )
        self.num_left_out += 1

    def _forget(self, trace_id: int) -> None:
        self._num_checked.pop(trace_id, None)
        self._broken.discard(trace_id)
