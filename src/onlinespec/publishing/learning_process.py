"""Background learning in a separate process: Feedback is sent to it and versions come back; neither end waits."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from onlinespec.core import DrafterWeights
from onlinespec.learning.budget import Budget, ClockMeter
from onlinespec.models.loading import Target
from onlinespec.publishing.label_head import EmbeddingAndHead
from onlinespec.publishing.protocol import (
    Batch,
    Incoming,
    LogLine,
    Message,
    Outgoing,
    Publish,
    Report,
    SetShare,
    decode,
    encode,
)
from onlinespec.publishing.store import Versions
from onlinespec.publishing.trainer import Trainer
from onlinespec.publishing.workers import NO_STATISTICS, BackgroundLearning, TrainerSpec

_REPORT_SECONDS = 1.0


_GATHER_SECONDS = 0.1


class ProcessLearning(BackgroundLearning):
    """Learning in a separate process, which holds only the target's embedding and LM head.

    Args:
        spec: How to create the trainer. For the rest see `BackgroundLearning`.

    Raises:
        ValueError: if labels can't be computed from the target's head alone.
    """

    def __init__(
        self,
        target: Target,
        spec: TrainerSpec,
        serving: DrafterWeights,
        publish: Callable[[DrafterWeights], None],
        queue_capacity: int = 4096,
    ) -> None:
        super().__init__(serving, publish, queue_capacity)
        self._versions = spec.versions
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._child_connection = theirs
        arguments = theirs, EmbeddingAndHead.of(target), spec, encode(Publish.of(serving))
        self.process = context.Process(target=_learn, args=arguments, name="onlinespec-learning", daemon=True)
        self._settings: deque[SetShare] = deque()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._send, "onlinespec-records"), (self._receive, "onlinespec-versions"))
        ]

    def start(self) -> None:
        """Starts the process.

        Raises:
            FolderLocked: if another writer holds the spec's versions folder.
        """
        if self._versions:  # check the lock here, where the caller gets the error; the process then takes it itself
            with Versions(self._versions) as versions, contextlib.suppress(OSError):
                versions.hold()
        self.process.start()
        atexit.register(self.stop)  # runs before multiprocessing's own, which would wait: the process ignores SIGTERM
        self._child_connection.close()  # so that the pipe closes when the process ends
        for thread in self._threads:
            thread.start()

    def set_share(self, share: float) -> None:
        self._settings.append(SetShare(share))

    def stop(self, seconds: float = 10.0) -> None:
        atexit.unregister(self.stop)
        self._end()
        self._threads[0].join(seconds)  # it sends the empty message that ends the process
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._threads[1].join(seconds)
        self._connection.close()

    def _send(self) -> None:
        outgoing = Outgoing()
        try:
            while records := self._take():
                time.sleep(_GATHER_SECONDS)  # send in batches: each wake-up of this thread interrupts decoding
                with self._changed:
                    records += self._waiting
                    self._waiting.clear()
                self._connection.send_bytes(encode(outgoing.batch(records)))
                while self._settings:
                    self._connection.send_bytes(encode(self._settings.popleft()))
            self._connection.send_bytes(b"")
        except OSError:
            pass  # the process has ended; the receiving thread reports it

    def _receive(self) -> None:
        try:
            while True:
                match decode(self._connection.recv_bytes()):
                    case Publish() as published:
                        self._offer_version(published.checked())
                    case Report(statistics):
                        self._statistics = statistics
                        if reason := statistics.get("failure"):
                            self._fail(reason)
                    case LogLine(logger, level, text):
                        logging.getLogger(logger).log(level, "%s", text)
        except (EOFError, OSError):
            self.process.join(1.0)
            self._fail(f"its process has ended, exit code {self.process.exitcode}")
        except Exception as error:  # an unreadable message stops learning, not serving
            self._fail(f"{type(error).__name__}: {error}")


def _learn(connection: Connection, ends: EmbeddingAndHead, spec: TrainerSpec, serving: bytes) -> None:
    """The main function of the process: takes records and sends versions until the serving process closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # only the serving process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def send(message: Message) -> None:
        connection.send_bytes(encode(message))

    logging.basicConfig(level=logging.INFO, handlers=[_Forwarding(send)])
    published = decode(serving)
    assert isinstance(published, Publish)
    statistics = NO_STATISTICS | {"published": published.weights.version}
    try:
        budget = Budget(spec.share, ClockMeter())
        trainer = spec.trainer(ends.target(), published.checked(), budget)
        with contextlib.suppress(OSError, AttributeError):
            os.nice(spec.niceness)
        budget.begin()
        _answer(connection, send, spec, trainer, budget)
        statistics = trainer.statistics() | {"share_spent": budget.share_spent}
    except Exception as error:  # the serving process logs it
        statistics |= {"failure": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):
        send(Report(statistics))


def _answer(
    connection: Connection, send: Callable[[Message], None], spec: TrainerSpec, trainer: Trainer, budget: Budget
) -> None:
    """Handles messages until the empty one arrives, the pipe is closed, or learning has failed."""
    incoming, reported, resting_share = Incoming(), -_REPORT_SECONDS, spec.share
    with contextlib.suppress(EOFError, OSError):
        while not trainer.failure:
            if time.monotonic() - reported > _REPORT_SECONDS:
                send(Report(trainer.statistics() | {"share_spent": budget.share_spent}))
                reported = time.monotonic()
            if not connection.poll(_REPORT_SECONDS):
                continue
            if not (data := connection.recv_bytes()):
                return
            match decode(data):
                case Batch() as batch:
                    for record in incoming.records(batch):  # one at a time: each may trigger a round
                        if version := trainer.offer([record]):
                            send(Publish.of(version))
                case SetShare(share):
                    resting_share = share
            is_resting = trainer.learning.schedule.is_resting
            budget.set_share(min(spec.share, resting_share) if is_resting else spec.share)


class _Forwarding(logging.Handler):
    """Forwards log records to the serving process."""

    def __init__(self, send: Any) -> None:
        super().__init__()
        self._to = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._to(LogLine(record.name, record.levelno, record.getMessage()))
