"""The decoding thread, and its interface to an event loop: prompts in, pieces of answers out. No HTTP here.

Requests are submitted from the event loop's thread. The scheduler's steps run in the engine's own thread, so that
neither blocks the other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from onlinespec.config import GenerationParams
from onlinespec.core import DecodeStats, TokenLogprobs
from onlinespec.engine.request import ERROR, Request
from onlinespec.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5  # between two checks for a stop; new work wakes the thread at once


class Closed(RuntimeError):
    """The engine takes no more requests: it is stopping, or has failed."""


class Piece(NamedTuple):
    """The part of an answer that one decode step added."""

    text: str  # text that is final by now: may lag behind the tokens, or be empty
    token_ids: tuple[int, ...]
    is_drafted: tuple[bool, ...]  # per token: true for an accepted draft, false for the target's own
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None  # in the last piece only: see `Request` and `scheduler`
    error: str  # why the request failed; else empty
    stats: DecodeStats  # of the whole request so far


class Answer:
    """One request's answer: an asynchronous iterator over its pieces. `cancel` it if the rest is not needed."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self._engine = engine
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._num_sent = self._num_accepted = 0
        self._is_over = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while not self._is_over:
            piece = await self._pieces.get()
            self._is_over = piece.finish_reason is not None
            yield piece

    def cancel(self) -> None:
        """Cancels the request and frees its memory. No further piece arrives."""
        self._is_over = True
        self._engine.scheduler.cancel(self.request)

    def _next(self) -> Piece:
        """Returns what is new since the last piece. Called in the engine's thread."""
        request, first = self.request, self._num_sent
        ids = tuple(request.output_ids[first:])
        num_drafted = request.stats.accepted - self._num_accepted
        self._num_sent, self._num_accepted = first + len(ids), request.stats.accepted
        return Piece(
            text=request.text.take(),
            token_ids=ids,
            is_drafted=tuple(i < num_drafted for i in range(len(ids))),
            logprobs=tuple(request.logprobs[first:]),
            finish_reason=request.finish_reason,
            error=request.error,
            stats=request.stats,
        )


@dataclass
class Totals:
    """Counters of what was served since the start; they only grow."""

    stats: DecodeStats = field(default_factory=DecodeStats)  # summed over finished requests
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens: found in the prefix cache
    tokens_beyond_drafter: int = 0  # answer tokens beyond the drafter's maximum text length
    finished: Counter[str] = field(default_factory=Counter)  # requests, by finish reason


class Engine:
    """Decodes requests in its own thread.

    Call `start`, `submit` and `stop` from one event loop.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.totals = scheduler, Totals()
        self.failure: BaseException | None = None  # the exception that ended the thread
        self._answers: dict[Request, Answer] = {}
        self._guard = threading.Lock()  # guards _answers and _is_closed
        self._is_closed = self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="onlinespec-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- for the event loop -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread. Answers are delivered to the current event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, prompts: Sequence[tuple[Sequence[int], GenerationParams]], **tags: Any) -> list[Answer]:
        """Submits requests: all of them, or none if one can't be accepted.

        Args:
            prompts: (token ids, settings) of each request.
            tags: Further arguments of `DecodeLoop.open`.

        Returns:
            One answer per request.

        Raises:
            Closed: if the engine is stopping or has failed.
            ValueError, UnfitPrompt, TooLarge, Busy: from `DecodeLoop.open` and `Scheduler.submit`.
        """
        answers = [Answer(self, self.scheduler.loop.open(ids, params, **tags)) for ids, params in prompts]
        with self._guard:
            if self._is_closed:
                raise Closed("the server has failed" if self.failure else "the server is shutting down")
            self.scheduler.submit(*(answer.request for answer in answers))
            self._answers |= {answer.request: answer for answer in answers}
        return answers

    @property
    def num_answering(self) -> int:
        """Number of answers that are not complete."""
        return len(self._answers)

    async def stop(self, seconds: float = 30.0) -> int:
        """Takes no more requests, finishes the running ones, and cancels those that take longer than `seconds`.

        Returns:
            The number of answers that were cancelled.
        """
        with self._guard:
            self._is_closed = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._answers and self._thread.is_alive() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        left = list(self._answers)
        for request in left:
            self.scheduler.cancel(request)
        self._is_stopping = True
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        return len(left)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and has not failed."""
        return self._thread.is_alive() and self.failure is None

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self.is_alive and not self._is_closed

    # --- in its own thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.get_num_threads()  # sets OpenMP's thread count, which is per thread, for oneDNN in this thread
        try:
            while not (self._is_stopping and not self.scheduler.has_work):
                if self.scheduler.wait(_IDLE_SECONDS):
                    self._deliver(self.scheduler.step())
        except BaseException as error:
            log.exception("decoding has failed; no request is answered any more")
            self._fail(error)

    def _deliver(self, moved: Sequence[Request]) -> None:
        with self._guard:
            pieces = [(answer, answer._next()) for request in moved if (answer := self._answers.get(request))]
            for answer, piece in pieces:
                if piece.finish_reason is not None:
                    del self._answers[answer.request]
                    self._count(answer.request)
        self._post(pieces)

    def _post(self, pieces: Sequence[tuple[Answer, Piece]]) -> None:
        """Hands pieces to the event loop, all in one call."""
        if self._loop and pieces and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, pieces)

    def _count(self, request: Request) -> None:
        totals = self.totals
        totals.stats = totals.stats + request.stats
        totals.prompt_tokens += request.num_prompt_tokens
        totals.cached_tokens += request.num_cached
        totals.tokens_beyond_drafter += request.num_beyond_drafter
        totals.finished[request.finish_reason or ""] += 1

    def _fail(self, error: BaseException) -> None:
        """Ends every open answer with the error, so that no client waits for ever."""
        self.failure = error
        with self._guard:
            self._is_closed = True
            left, self._answers = list(self._answers.values()), {}
            for answer in left:
                answer.request.finish_reason = answer.request.finish_reason or ERROR
                answer.request.error = f"{type(error).__name__}: {error}"
                self._count(answer.request)
        self._post([(answer, answer._next()) for answer in left])


def _put(pieces: Sequence[tuple[Answer, Piece]]) -> None:
    for answer, piece in pieces:
        answer._pieces.put_nowait(piece)
