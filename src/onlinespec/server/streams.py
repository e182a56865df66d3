"""Answer streams to a client that may disconnect at any time: merging, cancelling, and server-sent events."""

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
    """The client has disconnected."""


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yields (index of the answer, piece) of several answers in order of arrival, until all are complete."""
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
    """Runs `work` and returns its result; cancels it if the client disconnects first.

    Args:
        receive: Of the request, whose body must have been read.

    Raises:
        ClientGone: if the client disconnected.
    """
    async with _both(work, _left(receive)) as (working, _):
        if not working.done():
            raise ClientGone
        return working.result()


class EventStream(Response):
    """A response of server-sent events. The generator is closed as soon as the client disconnects, even while idle.

    Args:
        events: The encoded events.
        on_end: Called once the response is over, however it ended. Clean up here, not in a `finally` of the generator,
            which never runs if the generator is closed or its reader cancelled before the first event.
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
    """Encodes a server-sent event. The data must have no line breaks."""
    return (b"event: %b\n" % name if name else b"") + b"data: %b\n\n" % data


async def _send_to_client(send: Send, message: Message) -> None:
    """Sends a message. Since version 2.4 of ASGI's HTTP specification, OSError means that the client disconnected.

    Raises:
        ClientGone: if it did.
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
    """Runs two coroutines until one ends, and gives both tasks; the other is cancelled and awaited after the block."""
    tasks = asyncio.create_task(first), asyncio.create_task(second)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
