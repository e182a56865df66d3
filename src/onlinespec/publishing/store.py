"""The store of drafter versions on disk, each with the state of the learner that made it.

`layout.py` shows how the folder is laid out. A version is written to a temporary folder, flushed to disk and renamed
into place, so it is complete or absent. Events in history.jsonl stay even when the version's own folder is removed. A
folder has one writer at a time, which holds its lock file. Readers need no lock.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator
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
from onlinespec.publishing.durable import files_in, flush, flush_all, sha256_of
from onlinespec.publishing.history import History, rolled_back_by
from onlinespec.publishing.layout import DIGITS, HISTORY, LOCK, RECORD, STATE, TENSORS, VERSIONS, number_of, record_of
from onlinespec.publishing.protocol import Event, VersionRecord
from onlinespec.publishing.state_io import flattened, rebuilt

log = logging.getLogger(__name__)

_READABLE = 0o644  # safetensors creates files that only their owner can read
# How long to wait for the lock. A learning process whose server was killed first finishes its round or save.
_HANDOVER_SECONDS = 5.0


class NotSaved(OSError):
    """A version or a history event could not be written. Everything written before is unchanged."""


class FolderLocked(ValueError):
    """The versions folder is locked by another writer."""


class Versions:
    """The versions in one folder. Creating the object writes nothing.

    The first write takes the folder's lock (`hold`), which is kept until `close`, the end of a `with` block, or the end
    of the process. Any thread may write, but only one at a time.

    Args:
        keep: How many of the newest versions to keep (at least 1). The oldest version on disk and the one that a
            restart would load are kept as well.

    Raises:
        ValueError: if `keep` is less than 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 5) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1")
        self.folder, self.keep = Path(folder), keep
        self._place, self._history = self.folder / VERSIONS, self.folder / HISTORY
        self._lock: FileLock | None = None  # None while the folder is not locked
        self._kept_history: History | None = None  # parsed history.jsonl, cached only while we hold the lock
        self._warned: set[str] = set()  # warnings that were logged already

    def __enter__(self) -> Versions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing ------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Locks the folder for writing, unless it is locked by this object already. Creates it if it is missing.

        Raises:
            FolderLocked: if another writer holds the lock and does not release it within 5 seconds.
            OSError: if the folder can't be written to.
        """
        if self._lock:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, thread_local=False)
        try:
            lock.acquire(timeout=_HANDOVER_SECONDS)
        except Timeout as error:
            raise FolderLocked(
                f"another one keeps its versions in {self.folder}, and a folder has one writer: give each its own "
                "(--versions DIR), or stop the other first"
            ) from error
        self._lock, self._kept_history = lock, None

    def close(self) -> None:
        """Releases the folder's lock, so that others can write to it."""
        if self._lock:
            self._lock.release()
        self._lock = self._kept_history = None

    def save(
        self,
        drafter: Drafter,
        weights: DrafterWeights,
        event: Event,
        target_fingerprint: str,
        learner: str = "",
        state: Any = None,
    ) -> VersionRecord:
        """Writes a version, adds its event to the history, and removes versions that need not be kept.

        Args:
            drafter: Defines the file format. Its own weights are not touched, and it may go on drafting.
            weights: The weights to save, and their version number.
            event: How the version came to be served; it must carry the same version number.
            learner: The learner spec that trained it, as `parse_learner` takes it.
            state: The learner's state, if there is one.

        Returns:
            The record as written to version.json.

        Raises:
            NotSaved: if the disk is full or can't be written to, or the drafter or the learner's state can't be saved.
                No partial version is left and all others are unchanged, so saving it again later is possible.
            ValueError: if that version exists already, or the event has another version number.
            FolderLocked: if another writer holds the folder.
        """
        if event.version != weights.version:
            raise ValueError(f"the event is of version {event.version}, the weights are version {weights.version}")
        folder = self.folder_of(weights.version)
        if folder.exists():
            raise ValueError(
                f"{folder} exists; a version is never written twice: the next number is {self.next_version}"
            )
        twin = copy.copy(drafter)  # to save these weights in the drafter's format without disturbing the original
        twin.weights = weights
        with self._guarded(f"version {weights.version}"):
            self.hold()
            tensors, tree = flattened({"params": weights.params, "state": state})
            self._note(event)
            self._sweep()
            partial = folder.with_name(f".{folder.name}.tmp")
            twin.save(partial)
            save_file(tensors, partial / TENSORS)
            (partial / TENSORS).chmod(_READABLE)
            (partial / STATE).write_text(json.dumps(tree), encoding="utf-8")
            record = VersionRecord(
                version=weights.version,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                target_fingerprint=target_fingerprint,
                learner=learner,
                event=event,
                files={name: sha256_of(partial / name) for name in files_in(partial)},
            )
            (partial / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
            flush_all(partial)
            os.rename(partial, folder)
            try:
                flush(self._place)
                flush(self.folder)
            except BaseException:
                os.rename(folder, partial)
                raise
        self._prune()
        return record

    def note(self, event: Event) -> None:
        """Adds an event to the history.

        Raises:
            NotSaved: if it can't be written.
            FolderLocked: if another writer holds the folder.
        """
        with self._guarded(f'the note "{event.summary}"'):
            self.hold()
            self._note(event)

    def reset(self) -> Path | None:
        """Moves all versions aside, so that learning restarts from scratch.

        Version numbers are not reused: the next version saved is `next_version`.

        Returns:
            The folder that the versions were moved to; None if there were none.

        Raises:
            FolderLocked: if another writer holds the folder.
            OSError: if the folder can't be written to; `NotSaved` if only the history event can't be written.
        """
        if not self._place.is_dir():
            return None
        self.hold()
        last, numbers = self.next_version - 1, self.numbers()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        names = (f"{VERSIONS}.reset-{stamp}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
        aside = next(path for name in names if not (path := self.folder / name).exists())
        os.rename(self._place, aside)
        flush(self.folder)
        reason = f"{len(numbers)} versions were moved to {aside.name}"
        self.note(Event(kind="reset", at=datetime.now(UTC).isoformat(timespec="seconds"), version=last, reason=reason))
        return aside

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def next_version(self) -> int:
        """The smallest unused version number; 0 in a new folder. Numbers of versions that are gone count as used."""
        places = [self._place, *self.folder.glob(f"{VERSIONS}.reset-*")]
        written = [number_of(path) for place in places if place.is_dir() for path in place.iterdir()]
        return 1 + max([n for n in written if n is not None] + [self._noted().newest_version])

    def latest_good(self, target_fingerprint: str | None) -> VersionRecord | None:
        """Returns the version to load after a restart: the newest that is intact and was not rolled back, or None.

        Each damaged version is logged once and skipped.

        Args:
            target_fingerprint: Fingerprint of the served target; None accepts a version made for any target.

        Raises:
            ValueError: if that version was learned for another target.
        """
        rolled_back = self._rolled_back()
        for number in reversed(self.numbers()):
            if number in rolled_back:
                continue
            try:
                version = self.read(number)
            except ValueError as error:
                self._warn_once(f"{error}; an older version is looked for")
                continue
            if target_fingerprint not in (None, version.target_fingerprint):
                raise ValueError(
                    f"{self.folder_of(number)} was learned for target {version.target_fingerprint}, this target is "
                    f"{target_fingerprint}; give --reset-drafter to begin anew (the old versions are kept beside), "
                    "or another folder"
                )
            return version
        return None

    def weights(self, number: int, device: torch.device | str = "cpu") -> DrafterWeights:
        """Returns a version's weights at the precision they were learned in, whatever dtype its drafter files have."""
        return DrafterWeights(self._learned(number, torch.device(device))["params"], number)

    def resume(self, record: VersionRecord, drafter: Drafter, learner: str = "") -> Any | None:
        """Loads a version's full-precision weights into a drafter that was read from the version's folder.

        Args:
            learner: The learner spec that will continue; see `parse_learner`.

        Returns:
            The saved learner state; None if none was saved, or a different learner spec saved it.

        Raises:
            ValueError: if the drafter's trainable tensors have other names or shapes, or the files can't be read by
                this release of onlinespec.
        """
        device = next((p.device for p in drafter.weights.params.values()), torch.device("cpu"))
        saved, folder = self._learned(record.version, device), self.folder_of(record.version)
        ours, theirs = ({n: tuple(p.shape) for n, p in w.items()} for w in (drafter.weights.params, saved["params"]))
        if ours != theirs:
            name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"{name} is {theirs.get(name, 'no tensor that learns')} in {folder} and "
                f"{ours.get(name, 'no tensor that learns')} in the drafter; give the --drafter and --tune that "
                "it was learned with, another folder, or --reset-drafter to begin anew (old versions are kept beside)"
            )
        if drafter.is_trainable:
            drafter.swap(DrafterWeights(saved["params"], record.version))
        if saved["state"] is None or record.learner == learner:
            return saved["state"]
        log.warning(
            'version %d was learned by "%s", now "%s" learns: it begins anew from these weights',
            record.version, record.learner, learner,
        )  # fmt: skip
        return None

    def folder_of(self, number: int) -> Path:
        """The folder of a version, whether or not it exists. It holds a drafter in its published format."""
        return self._place / f"{number:0{DIGITS}d}"

    def numbers(self) -> list[int]:
        """The numbers of all versions on disk, ascending, damaged ones included."""
        names = [path.name for path in self._place.iterdir()] if self._place.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def canary_reference(self, version: VersionRecord) -> DrafterWeights | None:
        """Returns the weights that a version's canary test, resumed after a restart, compares it with.

        These are the weights served before it. None if the version was not promoted, is confirmed already, or the older
        weights are missing or damaged.
        """
        event = version.event
        if event.kind != "promoted" or event.parent is None or version.version in self._noted().confirmed:
            return None
        try:
            return self.weights(self.read(event.parent).version)
        except ValueError as error:
            self._warn_once(f"{error}; version {version.version} is served without a canary test")
            return None

    def read(self, number: int) -> VersionRecord:
        """Returns a version's record, after checking the SHA-256 of every file.

        Raises:
            ValueError: naming the files that are missing or changed.
        """
        folder = self.folder_of(number)
        try:
            record = msgspec.json.decode((folder / RECORD).read_bytes(), type=VersionRecord)
            wrong = [name for name, expected in record.files.items() if sha256_of(folder / name) != expected]
        except (OSError, msgspec.DecodeError) as error:
            raise ValueError(f"{folder} is not whole ({error})") from error
        if wrong:
            raise ValueError(f"{folder} is not whole ({', '.join(wrong)}: other content than was written)")
        if record.version != number:
            raise ValueError(f"{folder} holds version {record.version}; folders are not to be renamed")
        return record

    def history(self) -> list[Event]:
        """All events, oldest first. Unreadable lines (cut off by a crash, for instance) are skipped and logged once."""
        return list(self._noted().events)

    # --- internals ----------------------------------------------------------------------------------------------

    def _learned(self, number: int, device: torch.device) -> Any:
        folder = self.folder_of(number)
        tree = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return rebuilt(read_tensors(folder / TENSORS, device, dtype=None), tree)

    def _noted(self) -> History:
        """The history. It is read from disk each time unless this object holds the lock: others may add to it."""
        if self._kept_history:
            return self._kept_history
        history = History(self._history, self._warn_once)
        if self._lock:
            self._kept_history = history
        return history

    def _rolled_back(self) -> set[int]:
        """Versions that were rolled back, from the history and, in case its line is lost, from the version records."""
        records = (record_of(self.folder_of(number)) for number in self.numbers())
        own = (rolled_back_by(record.event) for record in records if record)
        return self._noted().rolled_back.union(*own)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except FolderLocked:
            raise
        except Exception as error:  # third-party drafters and learners report a full disk in their own way
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
        try:
            self._noted().append(event)
        except BaseException:
            self._kept_history = None  # the file may have changed, so read it again
            raise

    def _sweep(self) -> None:
        """Removes temporary folders of interrupted saves. Does nothing unless this object holds the lock."""
        if not self._lock:
            return
        with contextlib.suppress(OSError):
            for path in self._place.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Removes surplus versions. Each is renamed first, so that an interrupted removal leaves no half version."""
        with contextlib.suppress(OSError):
            numbers, rolled_back = self.numbers(), self._rolled_back()
            good = [number for number in numbers if number not in rolled_back]
            for number in set(numbers) - {numbers[0], *numbers[-self.keep :], *good[-1:]}:
                folder = self.folder_of(number)
                gone = folder.with_name(f".{folder.name}.gone")
                os.rename(folder, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)
