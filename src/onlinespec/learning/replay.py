"""Replay memory: finished requests, bounded in bytes. A ring holds the newest, a reservoir samples all older ones.

Only finished requests are stored, because their features are complete. Tokens and features are kept, so that labels are
rebuilt exactly as for fresh rows.
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

_RING_SHARE = 0.25  # share of the bytes for the newest requests
_NO_TRACE = Trace([], Features(torch.empty(0, 0)))


@dataclass(frozen=True)
class Stored:
    """The Feedback of a finished request, with its own copy of the trace."""

    records: tuple[Feedback, ...]
    num_bytes: int
    at: float = 0.0  # time of storing, in seconds of the buffer's clock

    @property
    def domain(self) -> str:
        return self.records[0].domain


class Unfinished:
    """Collects the records of requests until they end. Those of a cancelled request are dropped with its trace."""

    def __init__(self) -> None:
        self._open: dict[int, list[Feedback]] = {}  # by the id of a trace that others keep alive

    def ended(self, records: Sequence[Feedback]) -> list[tuple[Trace, list[Feedback]]]:
        """Returns (trace, all records) of each request that ends with these records."""
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
    """Stores finished requests, and draws rows of them for replay.

    The newest requests are in a ring. A request that leaves the ring gets a random number, and the reservoir keeps
    those with the smallest numbers that fit: each has the same chance, whatever its size or age. `draw` chooses a
    domain evenly among those stored, so that small domains are not forgotten, then a request of it, then consecutive
    rows.

    Args:
        max_bytes: Of features and token ids together, in ring and reservoir.
        seed: Of all random choices.
        max_seconds: Age at which a request is dropped; inf for never, and then no clock is read.
        clock: Returns seconds.

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
        self._reservoir: list[tuple[float, Stored]] = []  # sorted by the random number
        self._too_large = 1.0  # the smallest number that was ever dropped; newcomers must be below it
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ring) + len(self._reservoir)

    def offer(self, records: Sequence[Feedback]) -> None:
        """Takes the records of a step, and stores the requests that end with them."""
        self._forget_old()
        for trace, seen in self._unfinished.ended(records):
            self._store(trace, seen)

    def draw(self, max_rows: int) -> list[Feedback]:
        """Draws records of one stored request with up to max_rows consecutive rows; empty if nothing is stored."""
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
        while self.num_bytes > self.max_bytes:  # the ring alone never exceeds max_bytes
            self._too_large, dropped = self._reservoir.pop()
            self.num_bytes -= dropped.num_bytes
        if not self._reservoir:  # one long request displaced everything: start sampling anew
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
    """Copies a request's trace, with no more memory than its rows need, and returns its records on the copy."""
    features = whole.features[: whole.num_features].map(Tensor.clone)
    trace = Trace(list(whole.token_ids), features, whole.num_features, whole.max_tokens)
    num_bytes = features.num_bytes + 8 * len(trace.token_ids)
    return Stored(tuple(replace(record, trace=trace) for record in records), num_bytes)


def run_around(records: Sequence[Feedback], first: int, max_rows: int) -> list[Feedback]:
    """Returns consecutive records around `first` with up to max_rows rows: first those after it, then those before."""
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
