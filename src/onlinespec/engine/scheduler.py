"""Continuous batching: requests join and leave a running batch between steps.

Prompts are prefilled in pieces between the steps of running requests, so that a long prompt does not stall them. When a
request is admitted, memory is reserved for the longest answer that it may get, so a running request is never preempted;
what does not fit waits, first come, first served.

`submit`, `cancel` and `wait` may be called by any thread, `step` by one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import Protocol

from onlinespec.control.chooser import StepRecord
from onlinespec.engine.request import ERROR, Request
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop, Learning, Step

log = logging.getLogger(__name__)

CANCELLED = "cancelled"  # a finish reason, beside those of the decode loop
_MOST_COMPLAINTS = 100  # error messages that are remembered, so that each is logged once


@dataclass
class StepCounters:
    """Counters over all steps so far; they only grow."""

    batches: int = 0  # steps of the whole batch
    steps: int = 0  # the same, counted once per request
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    learn_seconds: float = 0.0  # in the decoding thread: inline rounds, or handing records over and taking versions in
    prefill_seconds: float = 0.0
    plain_tokens: int = 0  # tokens of steps in which no request drafted ...
    plain_seconds: float = 0.0  # ... and the time of these steps, learning not included

    def add(self, step: Step) -> None:
        """Adds the counts and times of a step."""
        tokens, drafted = (sum(getattr(r, name) for r in step.feedback) for name in ("num_rows", "num_draft_tokens"))
        self.batches += 1
        self.steps += len(step.feedback)
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += tokens - len(step.feedback)
        self.draft_seconds += step.draft_seconds
        self.verify_seconds += step.verify_seconds
        self.learn_seconds += step.learn_seconds
        if not drafted:
            self.plain_tokens += tokens
            self.plain_seconds += step.draft_seconds + step.verify_seconds

    @property
    def decode_seconds(self) -> float:
        """Seconds spent in steps, without prefill and learning."""
        return self.draft_seconds + self.verify_seconds


class Control(Protocol):
    """What the scheduler needs of a controller of draft lengths (`control/chooser.py`)."""

    @property
    def learn_share(self) -> float:
        """Share of time that learning may take now."""

    def choose(self, request_ids: Sequence[Hashable], limits_B: Sequence[int]) -> list[int]: ...
    def observe(self, record: StepRecord) -> None: ...
    def on_new_weights(self) -> None: ...
    def forget(self, request_id: Hashable) -> None: ...


class Busy(RuntimeError):
    """The queue is full."""


class TooLarge(ValueError):
    """The request does not fit even into an empty cache."""


class Scheduler:
    """Runs submitted requests on one decode loop, as many at once as its limits allow.

    `waiting`, `prefilling` and `running` may be read from outside; only `submit` and `step` change them.
    """

    def __init__(self, loop: DecodeLoop, limits: Limits | None = None, control: Control | None = None) -> None:
        self.loop, self.limits, self.control = loop, limits or Limits(), control
        self.counters = StepCounters()
        self._learn_share = -1.0  # the last share passed to learning
        self._num_published = 0  # the last number of versions that control knows of
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []  # admitted, but their prompts are not done
        self.running: list[Request] = []
        self._given_up: list[Request] = []
        self._changed = Condition()  # guards waiting and _given_up
        self._num_bytes = 0
        self._complaints: set[str] = set()

    # --- for any thread -----------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> None:
        """Queues requests from `DecodeLoop.open`: all of them or none.

        Raises:
            TooLarge: if a request does not fit into the memory of an empty scheduler.
            Busy: if the queue is too full for them.
        """
        for request in requests:
            self._check_size(request)
        with self._changed:
            num_free = max(0, self.limits.max_running - len(self.prefilling) - len(self.running))
            if len(self.waiting) + len(requests) > self.limits.max_waiting + num_free:
                raise Busy(f"{len(self.waiting)} requests are waiting, of at most {self.limits.max_waiting}")
            self.waiting.extend(requests)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Cancels a request; the next step frees its memory. A request that has ended is not changed."""
        with self._changed:
            self._given_up.append(request)
            self._changed.notify_all()

    @property
    def has_work(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self.waiting or self.prefilling or self.running or self._given_up)

    def wait(self, seconds: float) -> bool:
        """Sleeps until there is work, at most this long. Returns whether there is work."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_work, seconds)

    # --- for one thread -----------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Frees cancelled requests, admits waiting ones, prefills some tokens, and runs one step of all running ones.

        If a request fails, it alone ends, with the finish reason "error".

        Returns:
            The requests that got tokens or ended. Those that ended hold no memory any more.
        """
        ended = self._drop()
        self._admit()
        self._prefill()
        stepped = list(self.running)
        if stepped:
            self._together(self._decode, stepped, alone=self._decode_freely)
        over = [request for request in (*self.prefilling, *self.running) if request.finish_reason is not None]
        for request in over:
            self._leave(request)
        return [*ended, *over, *(request for request in stepped if request.finish_reason is None)]

    def _check_size(self, request: Request) -> None:
        needed, most = self.loop.num_bytes(request) / 1e6, self.limits.cache_megabytes
        if needed > most:
            raise TooLarge(
                f"a request of up to {request.max_tokens} tokens takes {needed:.1f} MB, and all that run together may "
                f"take {most:g} MB; ask for fewer tokens"
            )

    def _drop(self) -> list[Request]:
        """Ends cancelled requests and returns them."""
        with self._changed:
            dropped = [request for request in self._given_up if request.finish_reason is None]
            self._given_up.clear()
            for request in dropped:
                request.finish_reason = CANCELLED
            self.waiting = deque(request for request in self.waiting if request.finish_reason is None)
        for request in dropped:
            self._leave(request)
        return dropped

    def _admit(self) -> None:
        while self.waiting and self._has_room_for(self.waiting[0]):
            with self._changed:
                request = self.waiting.popleft()
                self.prefilling.append(request)
            self._num_bytes += self.loop.num_bytes(request)
            with self._answering_for(request):
                self.loop.admit(request)

    def _has_room_for(self, request: Request) -> bool:
        has_slot = len(self.prefilling) + len(self.running) < self.limits.max_running
        return has_slot and self._num_bytes + self.loop.num_bytes(request) <= self.limits.cache_megabytes * 1e6

    def _prefill(self) -> None:
        """Prefills some tokens, in the order of arrival. Requests whose prompts are done join the running ones."""
        if unread := [request for request in self.prefilling if request.finish_reason is None]:
            most = self.limits.prefill_tokens if self.running else self.limits.prefill_alone
            began = self.loop.clock.mark()
            self._together(partial(self.loop.prefill, max_tokens=most), unread)
            self.counters.prefill_seconds += self.loop.clock.seconds(began, self.loop.clock.mark())
        ready = [request for request in unread if request.is_ready and request.finish_reason is None]
        self.running += ready
        self.prefilling = [request for request in self.prefilling if request not in ready]

    def _decode(self, requests: list[Request]) -> None:
        """Runs a step with the draft lengths that control chooses, or without control those that requests ask for."""
        if not self.control:
            self._decode_freely(requests)
            return
        limits = [request.most_draft_tokens if request.is_drafting else 0 for request in requests]
        step = self.loop.step(requests, self.control.choose(requests, limits))
        self.counters.add(step)
        self.control.observe(
            StepRecord(
                request_ids=step.requests,
                num_draft_tokens_B=[record.num_draft_tokens for record in step.feedback],
                num_accepted_B=[record.num_accepted for record in step.feedback],
                draft_seconds=step.draft_seconds,
                verify_seconds=step.verify_seconds,
            )
        )
        if self.loop.learning:
            self._consult(self.control, self.loop.learning)

    def _decode_freely(self, requests: list[Request]) -> None:
        """Runs a step with the draft lengths that requests ask for, without control."""
        self.counters.add(self.loop.step(requests))

    def _consult(self, control: Control, learning: Learning) -> None:
        """Tells control of new weights, and learning of its share of time."""
        if learning.num_published != self._num_published:
            self._num_published = learning.num_published
            control.on_new_weights()
        if control.learn_share != self._learn_share:
            self._learn_share = control.learn_share
            learning.set_share(self._learn_share)

    def _together(
        self,
        work: Callable[[list[Request]], object],
        requests: list[Request],
        alone: Callable[[list[Request]], object] | None = None,
    ) -> None:
        """Works on all requests at once; if that raises, on each alone, so that only those at fault are affected.

        Args:
            alone: The work on a single request, if it differs: the controller may be what failed.
        """
        try:
            work(requests)
        except Exception as error:
            self._say_once(f"work on {len(requests)} requests failed; each is tried alone", error)
            for request in requests:
                if request.finish_reason is None:
                    with self._answering_for(request):
                        self._try_alone(alone or work, request)

    def _try_alone(self, work: Callable[[list[Request]], object], request: Request) -> None:
        """Tries a request alone; if that fails too, once more and from now on without drafts."""
        self.loop.undo_step(request)
        try:
            work([request])
        except Exception as error:
            self._say_once("a request goes on without drafts", error)
            request.is_plain = True
            self.loop.undo_step(request)
            work([request])

    @contextmanager
    def _answering_for(self, request: Request) -> Iterator[None]:
        """Turns an exception inside the block into the end of this request."""
        try:
            yield
        except Exception as error:
            request.finish_reason, request.error = ERROR, f"{type(error).__name__}: {error}"
            self._say_once("a request was ended", error)

    def _leave(self, request: Request) -> None:
        """Frees the memory of a request that has ended, whatever state it was in."""
        request.text.close()
        if self.control:
            self.control.forget(request)
        if any(request is one for one in (*self.prefilling, *self.running)):
            self._num_bytes -= self.loop.num_bytes(request)
            self.prefilling = [one for one in self.prefilling if one is not request]
            self.running = [one for one in self.running if one is not request]
            self.loop.finish(request)

    def _say_once(self, what: str, error: Exception) -> None:
        """Logs an error with its traceback, once for each message."""
        kind = f"{type(error).__name__}: {error}"
        if kind not in self._complaints:
            if len(self._complaints) >= _MOST_COMPLAINTS:  # messages may contain values that differ each time
                self._complaints.clear()
            self._complaints.add(kind)
            log.error("%s (%s); this is said once", what, kind, exc_info=error)
