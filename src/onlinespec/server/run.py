"""Runs the app under uvicorn until a signal: running requests are finished first, new ones are refused."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from onlinespec.server.engine import Engine

log = logging.getLogger(__name__)

_LEAST_SECONDS = 1.0  # for clients to receive the last bytes, however short the grace period


def listening(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Clients can connect at once and are answered when the app runs.

    Args:
        port: 0 picks a free one.

    Raises:
        OSError: if the host can't be resolved, or the address is in use or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"host {host} can't be found ({error.strerror}); give another --host") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
    except OSError as error:
        opened.close()
        raise OSError(f"can't listen on {host}:{port} ({error.strerror}); give another --port or --host") from error
    return opened


def run(
    app: FastAPI, engine: Engine, at: socket.socket, grace_seconds: float, on_start: Callable[[], None]
) -> signal.Signals | None:
    """Serves until SIGTERM or SIGINT, then finishes running requests.

    A second signal cuts them off, a third ends the process at once.

    Args:
        at: A listening socket, from `listening`.
        grace_seconds: That running requests have to finish.
        on_start: Called when the app accepts requests.

    Returns:
        The first signal; None if the app ended without one.

    Raises:
        RuntimeError: if the app did not start.
    """
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, log_level="warning")
    server = _Server(config, engine, grace_seconds, on_start)
    server.run(sockets=[at])
    if not server.started:
        raise RuntimeError("the server did not start")
    return server.signal


class _Server(uvicorn.Server):
    """Uvicorn stops listening at the first signal. This one listens until running requests end, to answer 503."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, grace_seconds: float, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.signal: signal.Signals | None = None
        self._engine, self._grace_seconds, self._on_start = engine, grace_seconds, on_start
        self._num_signals = 0
        self._stops: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._num_signals == 2:  # a decode step that hangs would block a clean shutdown
            os._exit(128 + sig)
        self._num_signals += 1
        self.signal = self.signal or signal.Signals(sig)
        seconds = self._grace_seconds if self._num_signals == 1 else 0.0
        asyncio.get_running_loop().call_soon_threadsafe(self._stop, seconds)

    def _stop(self, seconds: float) -> None:
        self._stops.add(asyncio.create_task(self._finish(seconds)))

    async def _finish(self, seconds: float) -> None:
        began, num_answering = time.monotonic(), self._engine.num_answering
        if num_answering and self._num_signals == 1:
            log.warning("stopping: %d answers have %g seconds to end", num_answering, seconds)
        if num_given_up := await self._engine.stop(seconds):
            log.warning("%d answers were cut off", num_given_up)
        left = max(_LEAST_SECONDS, seconds - (time.monotonic() - began))
        self.config.timeout_graceful_shutdown = min(left, self.config.timeout_graceful_shutdown or left)  # type: ignore[assignment]
        self.should_exit = True
