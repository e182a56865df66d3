"""What became of versions and candidates, a line each, never rewritten: history.jsonl in memory and on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from onlinespec.publishing.durable import flush
from onlinespec.publishing.protocol import Event


class History:
    """The events of a file, and what is asked of them, kept as they are added: one more costs the same always.

    Args:
        complain: Told of every line that can't be read (torn, say); it is left out.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self._path = path
        self.events: list[Event] = []  # the oldest first
        self.rolled_back: set[int] = set()
        self.confirmed: set[int] = set()
        self.newest_version = -1  # the largest number that occurs
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
        """Adds an event to the file, all of its line or nothing; one that is there already is not added again.

        Raises:
            OSError: if it can't be written. What was there before is as it was.
        """
        if event in self._all:  # noted by a save that could not be finished
            return
        is_new = not self._path.exists()
        with self._path.open("ab", buffering=0) as file:  # else closing it would try once more
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
    """The version that an event took back, if it did."""
    return {event.parent} if event.kind == "rolled back" and event.parent is not None else set()
