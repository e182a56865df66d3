"""Memory of finished requests, bounded in bytes: a ring of the newest, and a sample of all that left the ring.

Finished requests only: their states are whole and never change. What is kept is what Feedback points at, tokens and the
target's features, so that labels are rebuilt as exactly as for fresh rows.
"""

from __future__ import annotations

import math
import time
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from random import Random

import torch
from torch import Tensor

from onlinespec.core import Features, Feedback, Trace

_RING_SHARE = 0.25  # of the bytes: the newest requests, kept whatever they are
_NO_TRACE = Trace([], Features(torch.empty(0, 0)))


@dataclass(frozen=True)
class Stored:
    """A finished request's Feedback, over a trace of its own."""

    records: tuple[Feedback, ...]
    num_bytes: int
    at: float = 0.0  # when it was stored, in seconds

    @property
    def domain(self) -> str:
        return self.records[0].domain


class Unfinished:
    """Follows requests step by step until they end; one that is given up is forgotten with its trace."""

    def __init__(self) -> None:
        self._open: dict[int, list[Feedback]] = {}  # by the id of a trace that others keep alive

    def ended(self, records: Sequence[Feedback]) -> list[tuple[Trace, list[Feedback]]]:
        """The requests that end with these records, with all that was seen of each."""
        ended = []
        for record in records:
            trace = record.trace
            if id(trace) not in self._open:
                self._open[id(trace)] = []
                weakref.finalize(trace, self._open.pop, id(trace), None)
            self._open[id(trace)].append(replace(record, trace=_NO_TRACE))
            if record.is_last:
                ended.append((trace, self._open.pop(id(trace))))
        return ended


class ReplayBuffer:
    """Finished requests to learn from again.

    The newest lie in a ring. What leaves the ring draws a number; of all that ever left, the reservoir holds the
    smallest numbers, as far as the bytes reach: an even chance for each, whatever its size or age. A draw first
    chooses a domain, evenly among those held, so that a domain of few requests is not forgotten for its size; then a
    request, then a run of its rows.

    Args:
        max_bytes: Of features and token ids together, ring and reservoir.
        max_seconds: After which a request is forgotten; no clock is read where that is never.

    Reference: bottom-k sampling, Cohen and Kaplan (2007).
    """

    def __init__(
        self,
        max_bytes: int,
        seed: int = 0,
        max_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes, self._max_seconds, self._clock = max_bytes, max_seconds, clock
        self._rng = Random(f"replay/{seed}")
        self._unfinished = Unfinished()
        self._ring: deque[Stored] = deque()
        self._reservoir: list[tuple[float, Stored]] = []  # by the number drawn
        self._too_large = 1.0  # the least number that ever had to go: newcomers must be below it too
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ring) + len(self._reservoir)

    def offer(self, records: Sequence[Feedback]) -> None:
        """Follows requests step by step; one that ends is stored, one that is given up is forgotten with its trace."""
        self._forget_old()
        for trace, seen in self._unfinished.ended(records):
            self._store(trace, seen)

    def draw(self, max_rows: int) -> list[Feedback]:
        """Up to max_rows consecutive rows of one stored request; empty while nothing is stored."""
        self._forget_old()
        stored = [*self._ring, *(request for _, request in self._reservoir)]
        if not stored:
            return []
        domain = self._rng.choice(sorted({request.domain for request in stored}))
        records = self._rng.choice([request for request in stored if request.domain == domain]).records
        first = self._rng.randrange(len(records))
        return run_around(records, first, max_rows)

    def _store(self, trace: Trace, records: Sequence[Feedback]) -> None:
        request = replace(detached(trace, records), at=self._now)
        if request.num_bytes > self.max_bytes:
            return
        self._ring.append(request)
        self.num_bytes += request.num_bytes
        while len(self._ring) > 1 and sum(one.num_bytes for one in self._ring) > _RING_SHARE * self.max_bytes:
            self._sample(self._ring.popleft())
        while self.num_bytes > self.max_bytes:  # never the ring's alone
            self._too_large, dropped = self._reservoir.pop()
            self.num_bytes -= dropped.num_bytes
        if not self._reservoir:  # pushed out by one long request: begin again
            self._too_large = 1.0

    @property
    def _now(self) -> float:
        return 0.0 if math.isinf(self._max_seconds) else self._clock()

    def _forget_old(self) -> None:
        if math.isinf(self._max_seconds):
            return
        oldest = self._now - self._max_seconds
        self._ring = deque(one for one in self._ring if one.at >= oldest)
        self._reservoir = [pair for pair in self._reservoir if pair[1].at >= oldest]
        self.num_bytes = sum(one.num_bytes for one in (*self._ring, *(one for _, one in self._reservoir)))

    def _sample(self, request: Stored) -> None:
        number = self._rng.random()
        if number < self._too_large:
            insort(self._reservoir, (number, request), key=itemgetter(0))
        else:
            self.num_bytes -= request.num_bytes


def detached(whole: Trace, records: Sequence[Feedback]) -> Stored:
    """A request over a trace of its own: no memory beyond the rows it has, whatever becomes of the original."""
    features = whole.features[: whole.num_features].map(Tensor.clone)
    trace = Trace(list(whole.token_ids), features, whole.num_features, whole.max_tokens)
    num_bytes = features.num_bytes + 8 * len(trace.token_ids)
    return Stored(tuple(replace(record, trace=trace) for record in records), num_bytes)


def run_around(records: Sequence[Feedback], first: int, max_rows: int) -> list[Feedback]:
    """Consecutive records from `first` on, then before it, as long as their rows fit; at least one."""
    run, num_rows = [records[first]], records[first].num_rows
    for record in records[first + 1 :]:
        if num_rows + record.num_rows > max_rows:
            return run
        run.append(record)
        num_rows += record.num_rows
    for record in reversed(records[:first]):
        if num_rows + record.num_rows > max_rows:
            break
        run.insert(0, record)
        num_rows += record.num_rows
    return run
