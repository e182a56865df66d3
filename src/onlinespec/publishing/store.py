"""Versions of a drafter on disk, with the state of the learner that made them.

    FOLDER/versions/000012/    a version: the drafter in its published format, so that --drafter takes it as it is
        learner.safetensors    the exact weights and the learner's state, each tensor once ...
        learner.json           ... and how they hang together
        version.json           number, origin, target, and a checksum of every other file
    FOLDER/history.jsonl       what happened, a line each, never rewritten

    FOLDER/.lock               held by the one that writes

A version is written aside, flushed to the disk and renamed into place: it is there whole or not at all. What was noted
in history.jsonl stays, whatever becomes of the version's own folder. A folder has one writer at a time, which holds its
lock; reading needs none.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from onlinespec.core import DrafterWeights
from onlinespec.drafters.contract import Drafter
from onlinespec.models.checkpoint import read_tensors
from onlinespec.publishing.protocol import Event, VersionRecord
from onlinespec.publishing.state_io import flattened, rebuilt

log = logging.getLogger(__name__)

_RECORD = "version.json"
_TENSORS, _STATE = "learner.safetensors", "learner.json"
_VERSIONS, _HISTORY, _LOCK = "versions", "history.jsonl", ".lock"
_DIGITS = 6
_READABLE = 0o644  # safetensors' own files are their owner's alone
_HANDOVER_SECONDS = 5.0  # to wait for a lock: a learning process whose server was killed ends with its round or save


class NotSaved(OSError):
    """A version or a note that could not be written. What was there before is as it was."""


class FolderTaken(ValueError):
    """A folder for versions that another one writes to."""


@dataclass(frozen=True)
class Version:
    """A version that is whole on disk."""

    folder: Path
    record: VersionRecord

    @property
    def number(self) -> int:
        return self.record.version

    def weights(self, device: torch.device | str = "cpu") -> DrafterWeights:
        """The exact ones, whatever dtype they are published in."""
        return DrafterWeights(self._learned(torch.device(device))["params"], self.number)

    def resume(self, drafter: Drafter, learner: str = "") -> Any | None:
        """Gives a drafter that was loaded from here its exact weights.

        Args:
            learner: The line of the learner that goes on; see `methods.parse`.

        Returns:
            The learner's state, which plays these very weights if it did when it was saved; None if there is none, or
            it is another learner's.

        Raises:
            ValueError: if the drafter learns something else, or the files are not what this version of ours can read.
        """
        device = next((p.device for p in drafter.weights.params.values()), torch.device("cpu"))
        saved = self._learned(device)
        ours, theirs = ({n: tuple(p.shape) for n, p in w.items()} for w in (drafter.weights.params, saved["params"]))
        if ours != theirs:
            name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"{name} is {theirs.get(name, 'no tensor that learns')} in {self.folder} and "
                f"{ours.get(name, 'no tensor that learns')} in the drafter; give the --drafter and --tune that "
                "it was learned with, another folder, or --reset-drafter to begin anew (old versions are kept beside)"
            )
        if drafter.is_trainable:
            drafter.swap(DrafterWeights(saved["params"], self.number))
        if saved["state"] is None or self.record.learner == learner:
            return saved["state"]
        log.warning(
            'version %d was learned by "%s", now "%s" learns: it begins anew from these weights',
            self.number, self.record.learner, learner,
        )  # fmt: skip
        return None

    def _learned(self, device: torch.device) -> Any:
        nodes = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        return rebuilt(read_tensors(self.folder / _TENSORS, device, dtype=None), nodes)


class Versions:
    """The versions in a folder; nothing is written before something is saved.

    What writes takes the folder's lock (`hold`) and keeps it until `close`, the end of a `with` block, or the end of
    the process. Any thread may write, one at a time.

    Args:
        keep: The newest so many stay, beside the first one and the one that a restart would begin with.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 5) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1")
        self.folder, self.keep = Path(folder), keep
        self._place, self._history = self.folder / _VERSIONS, self.folder / _HISTORY
        self._lock: FileLock | None = None  # while it is held
        self._notes: _Notes | None = None  # all of history.jsonl, while no one else can add to it
        self._told: set[str] = set()  # complaints that were logged

    def __enter__(self) -> Versions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing ------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Takes the folder to write to, if that was not done yet; it is made if there is none.

        Raises:
            FolderTaken: if another one writes to it, and does not end within a few seconds.
            OSError: if the folder can't be written to.
        """
        if self._lock:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK, thread_local=False)
        try:
            lock.acquire(timeout=_HANDOVER_SECONDS)
        except Timeout as error:
            raise FolderTaken(
                f"another one keeps its versions in {self.folder}, and a folder has one writer: give each its own "
                "(--versions DIR), or stop the other first"
            ) from error
        self._lock, self._notes = lock, None

    def close(self) -> None:
        """Lets others write to the folder."""
        if self._lock:
            self._lock.release()
        self._lock = self._notes = None

    def save(
        self,
        drafter: Drafter,
        weights: DrafterWeights,
        event: Event,
        target_fingerprint: str,
        learner: str = "",
        state: Any = None,
    ) -> Version:
        """Writes a version, notes how it came to be, and removes the versions that need not be kept.

        Args:
            drafter: Gives the format; its own weights are left alone, and it may go on drafting.
            state: The learner's, if any.

        Raises:
            NotSaved: if the disk is full, or can't be written to, or the drafter or the learner's state can't be saved.
                Nothing of the version is left, all others are as they were; saving it again later is fine.
            ValueError: if there is such a version, or the event is of another.
            FolderTaken: if another one writes to the folder.
        """
        if event.version != weights.version:
            raise ValueError(f"the event is of version {event.version}, the weights are version {weights.version}")
        folder = self._folder_of(weights.version)
        if folder.exists():
            raise ValueError(
                f"{folder} exists; a version is never written twice: the next number is {self.next_version}"
            )
        twin = copy.copy(drafter)  # saves other weights in the same format, while the original goes on
        twin.weights = weights
        with self._guarded(f"version {weights.version}"):
            self.hold()
            tensors, nodes = flattened({"params": weights.params, "state": state})
            self._note(event)
            self._sweep()
            partial = folder.with_name(f".{folder.name}.tmp")
            twin.save(partial)
            save_file(tensors, partial / _TENSORS)
            (partial / _TENSORS).chmod(_READABLE)
            (partial / _STATE).write_text(json.dumps(nodes), encoding="utf-8")
            record = VersionRecord(
                version=weights.version,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                target_fingerprint=target_fingerprint,
                learner=learner,
                event=event,
                files={name: _checksum(partial / name) for name in _files_in(partial)},
            )
            (partial / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
            _flush_all(partial)
            os.rename(partial, folder)
            try:
                _flush(self._place)
                _flush(self.folder)
            except BaseException:
                os.rename(folder, partial)
                raise
        self._prune()
        return Version(folder, record)

    def note(self, event: Event) -> None:
        """Adds a line to the history.

        Raises:
            NotSaved, FolderTaken: as `save`.
        """
        with self._guarded(f'the note "{event.told}"'):
            self.hold()
            self._note(event)

    def reset(self) -> Path | None:
        """Back to the beginning: moves all versions aside, and says where to; None if there are none.

        Numbers are not begun anew: the first version from now on is `next_version`.

        Raises:
            FolderTaken, OSError: as `hold`.
        """
        if not self._place.is_dir():
            return None
        self.hold()
        last, numbers = self.next_version - 1, self.numbers()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        names = (f"{_VERSIONS}.reset-{stamp}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
        aside = next(path for name in names if not (path := self.folder / name).exists())
        os.rename(self._place, aside)
        _flush(self.folder)
        reason = f"{len(numbers)} versions were moved to {aside.name}"
        self.note(Event(kind="reset", at=datetime.now(UTC).isoformat(timespec="seconds"), version=last, reason=reason))
        return aside

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def next_version(self) -> int:
        """The first number that was never used here, not even for what was lost since; 0 in a new folder."""
        places = [self._place, *self.folder.glob(f"{_VERSIONS}.reset-*")]
        written = [_number_of(path) for place in places if place.is_dir() for path in place.iterdir()]
        return 1 + max([n for n in written if n is not None] + [self._noted().newest_version])

    def latest_good(self, target_fingerprint: str | None) -> Version | None:
        """What a restart begins with: the newest version that is whole and was not rolled back; None if there is none.

        Each that is not whole is logged, once.

        Args:
            target_fingerprint: Of the target that is served; None if any will do.

        Raises:
            ValueError: if it was learned for another target.
        """
        rolled_back = self._rolled_back()
        for number in reversed(self.numbers()):
            if number in rolled_back:
                continue
            try:
                version = self.read(number)
            except ValueError as error:
                self._complain(f"{error}; an older version is looked for")
                continue
            if target_fingerprint not in (None, version.record.target_fingerprint):
                raise ValueError(
                    f"{version.folder} was learned for target {version.record.target_fingerprint}, this target is "
                    f"{target_fingerprint}; give --reset-drafter to begin anew (the old versions are kept beside), "
                    "or another folder"
                )
            return version
        return None

    def numbers(self) -> list[int]:
        """Of the versions on disk, whole or not."""
        names = [path.name for path in self._place.iterdir()] if self._place.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def watched(self, version: Version) -> DrafterWeights | None:
        """The weights that a version is still to be watched beside, after a restart: those served before it.

        None if it was not promoted, or is confirmed, or they are not here any more.
        """
        event = version.record.event
        if event.kind != "promoted" or event.parent is None or version.number in self._noted().confirmed:
            return None
        try:
            return self.read(event.parent).weights()
        except ValueError as error:
            self._complain(f"{error}; version {version.number} is not watched any more")
            return None

    def read(self, number: int) -> Version:
        """One version, every file checked.

        Raises:
            ValueError: naming what is missing or changed.
        """
        folder = self._folder_of(number)
        try:
            record = msgspec.json.decode((folder / _RECORD).read_bytes(), type=VersionRecord)
            wrong = [name for name, expected in record.files.items() if _checksum(folder / name) != expected]
        except (OSError, msgspec.DecodeError) as error:
            raise ValueError(f"{folder} is not whole ({error})") from error
        if wrong:
            raise ValueError(f"{folder} is not whole ({', '.join(wrong)}: other content than was written)")
        if record.version != number:
            raise ValueError(f"{folder} holds version {record.version}; folders are not to be renamed")
        return Version(folder, record)

    def history(self) -> list[Event]:
        """What was noted, the oldest first. A line that can't be read (torn, say) is left out and told once."""
        return list(self._noted().events)

    # --- inside -------------------------------------------------------------------------------------------------

    def _folder_of(self, number: int) -> Path:
        return self._place / f"{number:0{_DIGITS}d}"

    def _noted(self) -> _Notes:
        """The history; read anew each time by one that does not hold the folder."""
        if self._notes:
            return self._notes
        notes = _Notes()
        try:
            content = self._history.read_bytes()
        except FileNotFoundError:
            content = b""
        for i, line in enumerate(content.splitlines(), start=1):
            try:
                if line.strip():
                    notes.add(msgspec.json.decode(line, type=Event))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._complain(f"line {i} of {self._history} can't be read and is left out ({error})")
        notes.is_torn = content[-1:] not in (b"", b"\n")
        if self._lock:
            self._notes = notes
        return notes

    def _rolled_back(self) -> set[int]:
        """By what was noted, or by what a version itself says of how it came to be, should the note be lost."""
        records = (record_of(self._folder_of(number)) for number in self.numbers())
        own = (_rolled_back_by(record.event) for record in records if record)
        return self._noted().rolled_back.union(*own)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except FolderTaken:
            raise
        except Exception as error:  # drafters and learners may be anyone's code, and tell a full disk in their own way
            self._sweep()
            reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise NotSaved(
                f"{what} could not be saved to {self.folder} ({reason}); what was saved before is as it was: "
                "make room, or give another folder"
            ) from error
        except BaseException:
            self._sweep()
            raise

    def _note(self, event: Event) -> None:
        notes = self._noted()
        if event in notes:  # noted by a save that could not be finished
            return
        is_new = not self._history.exists()
        with self._history.open("ab", buffering=0) as file:  # else closing it would try once more
            size = file.tell()
            line = memoryview(b"\n" * notes.is_torn + msgspec.json.encode(event) + b"\n")
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except BaseException:
                self._notes = None  # what is there now is to be read again
                with contextlib.suppress(OSError):
                    os.truncate(self._history, size)
                raise
        notes.add(event)
        if is_new:
            _flush(self.folder)

    def _sweep(self) -> None:
        """Removes what a save that was cut short has left; only the one that holds the folder may."""
        if not self._lock:
            return
        with contextlib.suppress(OSError):
            for path in self._place.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Removes what need not be kept, if it can; a version that goes is no version from the first moment on."""
        with contextlib.suppress(OSError):
            numbers, rolled_back = self.numbers(), self._rolled_back()
            good = [number for number in numbers if number not in rolled_back]
            for number in set(numbers) - {numbers[0], *numbers[-self.keep :], *good[-1:]}:
                folder = self._folder_of(number)
                gone = folder.with_name(f".{folder.name}.gone")
                os.rename(folder, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _complain(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


class _Notes:
    """The lines of a history, and what is asked of them, kept as they are added: a line more costs the same always."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rolled_back: set[int] = set()
        self.confirmed: set[int] = set()
        self.newest_version = -1  # the largest number that occurs
        self.is_torn = False  # whether the last line is not whole
        self._all: set[Event] = set()

    def __contains__(self, event: Event) -> bool:
        return event in self._all

    def add(self, event: Event) -> None:
        self.events.append(event)
        self._all.add(event)
        self.is_torn = False
        numbers = (event.version, event.parent, event.restores)
        self.newest_version = max(self.newest_version, *(n for n in numbers if n is not None))
        if event.kind == "confirmed":
            self.confirmed.add(event.version)
        self.rolled_back |= _rolled_back_by(event)


def _rolled_back_by(event: Event) -> set[int]:
    return {event.parent} if event.kind == "rolled back" and event.parent is not None else set()


def is_in(folder: Path) -> bool:
    """Whether a directory holds versions, or their history."""
    return (folder / _VERSIONS).is_dir() or (folder / _HISTORY).is_file()


def record_of(folder: Path) -> VersionRecord | None:
    """What a version's own directory says of it, unchecked; None for any other directory."""
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=VersionRecord)
    except (OSError, msgspec.DecodeError):
        return None


def _number_of(path: Path) -> int | None:
    digits = re.match(r"\.*(\d+)", path.name, re.ASCII)
    return int(digits[1]) if digits else None


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """To the disk itself; a directory's entries too, where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
