"""The history of versions and candidates: history.jsonl, an append-only file with one event per line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from onlinespec.publishing.durable import flush
from onlinespec.publishing.protocol import Event


class History:
    """The events of a history file, with indexes that are updated on append, so that appending takes constant time.

    Args:
        path: The file; it need not exist.
        complain: Called with a message for every line that can't be read (cut off by a crash, for instance). Such
            lines are skipped.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self._path = path
        self.events: list[Event] = []  # oldest first
        self.rolled_back: set[int] = set()  # version numbers
        self.confirmed: set[int] = set()  # version numbers
        self.newest_version = -1  # the largest version number in any event; -1 without events
        self._all: set[Event] = set()
        content = path.read_bytes() if path.exists() else b""
        for i, line in enumerate(content.splitlines(), start=1):
            try:
                if line.strip():
                    self._add(msgspec.json.decode(line, type=Event))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                complain(f"line {i} of {path} can't be read and is left out ({error})")
        self._is_torn = content[-1:] not in (b"", b"\n")

    def append(self, event: Event) -> None:
        """Appends an event to the file and flushes it to disk. Does nothing if the same event is there already.

        Raises:
            OSError: if it can't be written. The file then has its previous content.
        """
        if event in self._all:  # written by a save that failed later and is now repeated
            return
        is_new = not self._path.exists()
        with self._path.open("ab", buffering=0) as file:  # buffered, close would retry a failed write
            size = file.tell()
            line = memoryview(b"\n" * self._is_torn + msgspec.json.encode(event) + b"\n")
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)
                raise
        self._add(event)
        if is_new:
            flush(self._path.parent)

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self._all.add(event)
        self._is_torn = False
        numbers = (event.version, event.parent, event.restores)
        self.newest_version = max(self.newest_version, *(n for n in numbers if n is not None))
        if event.kind == "confirmed":
            self.confirmed.add(event.version)
        self.rolled_back |= rolled_back_by(event)


def rolled_back_by(event: Event) -> set[int]:
    """Returns the version number that an event rolled back, as a set; empty for other events."""
    return {event.parent} if event.kind == "rolled back" and event.parent is not None else set()
