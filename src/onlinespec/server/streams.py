"""Answers on their way to a client that may leave at any time: merged, watched, and sent as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from onlinespec.server.engine import Answer, Piece

A = TypeVar("A")
B = TypeVar("B")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, each with its answer's place."""
    pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    async def forward(index: int, answer: Answer) -> None:
        async for piece in answer:
            pieces.put_nowait((index, piece))

    tasks = [asyncio.create_task(forward(i, answer)) for i, answer in enumerate(answers)]
    try:
        num_left = len(answers)
        while num_left:
            index, piece = await pieces.get()
            num_left -= piece.finish_reason is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, A]) -> A:
    """Works as long as the client is there; its request's body must have been read.

    Raises:
        ClientGone: if it leaves before the work is done, which is cancelled.
    """
    async with _both(work, _left(receive)) as (working, _):
        if not working.done():
            raise ClientGone
        return working.result()


class EventStream(Response):
    """Server-sent events. The generator is closed at once when the client leaves, even while nothing is sent.

    Args:
        on_end: Called once the response is over, however it ended. An asynchronous generator that was closed, or whose
            reader was cancelled, before its first event never runs its own `finally`: what must not go on without a
            reader is to be stopped here.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with _both(self._send(send), _left(receive)) as (sending, _):
                if sending.done():
                    with suppress(ClientGone):
                        sending.result()
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        async with aclosing(self._events) as events:
            await _send_to_client(send, head)
            async for event in events:
                await _send_to_client(send, {"type": "http.response.body", "body": event, "more_body": True})
            await _send_to_client(send, {"type": "http.response.body", "body": b""})


def event(data: bytes, name: bytes = b"") -> bytes:
    """A server-sent event; the data has no line breaks."""
    return (b"event: %b\n" % name if name else b"") + b"data: %b\n\n" % data


async def _send_to_client(send: Send, message: Message) -> None:
    """Sends a message; an OSError says, since version 2.4 of ASGI's HTTP specification, that the client has left.

    Raises:
        ClientGone: if it has.
    """
    try:
        await send(message)
    except OSError as error:
        raise ClientGone from error


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def _both(
    first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]
) -> AsyncIterator[tuple[asyncio.Task[A], asyncio.Task[B]]]:
    """Runs two things until one of them is over; the other is cancelled behind the block, and waited for."""
    tasks = asyncio.create_task(first), asyncio.create_task(second)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
