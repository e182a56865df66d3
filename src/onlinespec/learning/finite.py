"""Which records can be learned from: those whose states are numbers, and those before them."""

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

    One such row would make the loss and all gradients of a round NaN, and the rows behind it attend to it. What came
    before it in the same text is whole. A state is looked at once.
    """

    def __init__(self) -> None:
        self.num_left_out = 0  # records so far
        self._num_checked: dict[int, int] = {}  # states of each text, by the id of a trace that others keep alive
        self._broken: set[int] = set()  # texts, by the same ids

    def of(self, records: Sequence[Feedback]) -> list[Feedback]:
        """The records that can be learned from, in their order. The first that can't is logged."""
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
        """Bool, of the states up to this record's last that were not looked at before."""
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
