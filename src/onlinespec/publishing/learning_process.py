"""Learning in a process of its own: records cross to it, versions come back, and neither end waits for the other."""

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
from onlinespec.publishing.workers import NO_FIGURES, BackgroundLearning, TrainerSpec

_REPORT_SECONDS = 1.0


_GATHER_SECONDS = 0.1


class ProcessLearning(BackgroundLearning):
    """Learns in a process of its own, which has the target's embedding and head and nothing else of it.

    Raises:
        ValueError: if the target's labels need more than its head.
    """

    def __init__(
        self,
        target: Target,
        spec: TrainerSpec,
        serving: DrafterWeights,
        publish: Callable[[DrafterWeights], None],
        most_waiting: int = 4096,
    ) -> None:
        super().__init__(serving, publish, most_waiting)
        self._versions = spec.versions
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._theirs = theirs
        arguments = theirs, EmbeddingAndHead.of(target), spec, encode(Publish.of(serving))
        self.process = context.Process(target=_learn, args=arguments, name="onlinespec-learning", daemon=True)
        self._settings: deque[SetShare] = deque()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._send, "onlinespec-records"), (self._receive, "onlinespec-versions"))
        ]

    def start(self) -> None:
        """Begins to learn.

        Raises:
            FolderTaken: if another one keeps its versions in the spec's folder.
        """
        if self._versions:  # refused here, where someone hears of it; the process itself holds the folder then
            with Versions(self._versions) as versions, contextlib.suppress(OSError):
                versions.hold()
        self.process.start()
        atexit.register(self.stop)  # before multiprocessing's own, which would wait for a process that hears no SIGTERM
        self._theirs.close()  # so that the end of the process is the end of the pipe
        for thread in self._threads:
            thread.start()

    def set_share(self, share: float) -> None:
        self._settings.append(SetShare(share))

    def stop(self, seconds: float = 10.0) -> None:
        atexit.unregister(self.stop)
        self._end()
        self._threads[0].join(seconds)  # which says goodbye
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
                time.sleep(_GATHER_SECONDS)  # each turn of this thread interrupts the one that decodes
                with self._changed:
                    records += self._waiting
                    self._waiting.clear()
                self._connection.send_bytes(encode(outgoing.batch(records)))
                while self._settings:
                    self._connection.send_bytes(encode(self._settings.popleft()))
            self._connection.send_bytes(b"")
        except OSError:
            pass  # its process has ended, which the other thread says

    def _receive(self) -> None:
        try:
            while True:
                match decode(self._connection.recv_bytes()):
                    case Publish() as published:
                        self._offer_version(published.checked())
                    case Report(figures):
                        self._figures = figures
                        if reason := figures.get("failure"):
                            self._fail(reason)
                    case LogLine(logger, level, text):
                        logging.getLogger(logger).log(level, "%s", text)
        except (EOFError, OSError):
            self.process.join(1.0)
            self._fail(f"its process has ended, exit code {self.process.exitcode}")
        except Exception as error:  # a message that can't be read: learning ends with a word, serving goes on
            self._fail(f"{type(error).__name__}: {error}")


def _learn(connection: Connection, ends: EmbeddingAndHead, spec: TrainerSpec, serving: bytes) -> None:
    """The process's whole life: records in, versions out, until the other end is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever serves decides when it is over
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def send(message: Message) -> None:
        connection.send_bytes(encode(message))

    logging.basicConfig(level=logging.INFO, handlers=[_Forwarding(send)])
    published = decode(serving)
    assert isinstance(published, Publish)
    figures = NO_FIGURES | {"published": published.weights.version}
    try:
        budget = Budget(spec.share, ClockMeter())
        trainer = spec.trainer(ends.target(), published.checked(), budget)
        with contextlib.suppress(OSError, AttributeError):
            os.nice(spec.niceness)
        budget.begin()
        _answer(connection, send, spec, trainer, budget)
        figures = trainer.statistics() | {"share_spent": budget.share_spent}
    except Exception as error:  # as in a thread: it is said by who serves
        figures |= {"failure": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):
        send(Report(figures))


def _answer(
    connection: Connection, send: Callable[[Message], None], spec: TrainerSpec, trainer: Trainer, budget: Budget
) -> None:
    """Takes what comes, until that is the end, or the other end is gone, or nothing is learned any more."""
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
                    for record in incoming.records(batch):  # one by one: each may bring a round
                        if version := trainer.offer([record]):
                            send(Publish.of(version))
                case SetShare(share):
                    resting_share = share
            is_resting = trainer.learning.schedule.is_resting
            budget.set_share(min(spec.share, resting_share) if is_resting else spec.share)


class _Forwarding(logging.Handler):
    """Log lines go to whoever serves."""

    def __init__(self, send: Any) -> None:
        super().__init__()
        self._to = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._to(LogLine(record.name, record.levelno, record.getMessage()))
