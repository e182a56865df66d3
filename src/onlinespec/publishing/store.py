"""Versions of a drafter on disk, with the state of the learner that made them.

`layout.py` has a picture of the folder. A version is written aside, flushed to the disk and renamed into place: it is
there whole or not at all. What was noted in history.jsonl stays, whatever becomes of the version's own folder. A folder
has one writer at a time, which holds its lock; reading needs none.
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

_READABLE = 0o644  # safetensors' own files are their owner's alone
_HANDOVER_SECONDS = 5.0  # to wait for a lock: a learning process whose server was killed ends with its round or save


class NotSaved(OSError):
    """A version or a note that could not be written. What was there before is as it was."""


class FolderTaken(ValueError):
    """A folder for versions that another one writes to."""


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
        self._place, self._history = self.folder / VERSIONS, self.folder / HISTORY
        self._lock: FileLock | None = None  # while it is held
        self._kept_history: History | None = None  # all of history.jsonl, while no one else can add to it
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
        lock = FileLock(self.folder / LOCK, thread_local=False)
        try:
            lock.acquire(timeout=_HANDOVER_SECONDS)
        except Timeout as error:
            raise FolderTaken(
                f"another one keeps its versions in {self.folder}, and a folder has one writer: give each its own "
                "(--versions DIR), or stop the other first"
            ) from error
        self._lock, self._kept_history = lock, None

    def close(self) -> None:
        """Lets others write to the folder."""
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
        folder = self.folder_of(weights.version)
        if folder.exists():
            raise ValueError(
                f"{folder} exists; a version is never written twice: the next number is {self.next_version}"
            )
        twin = copy.copy(drafter)  # saves other weights in the same format, while the original goes on
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
        """Adds a line to the history.

        Raises:
            NotSaved, FolderTaken: as `save`.
        """
        with self._guarded(f'the note "{event.summary}"'):
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
        """The first number that was never used here, not even for what was lost since; 0 in a new folder."""
        places = [self._place, *self.folder.glob(f"{VERSIONS}.reset-*")]
        written = [number_of(path) for place in places if place.is_dir() for path in place.iterdir()]
        return 1 + max([n for n in written if n is not None] + [self._noted().newest_version])

    def latest_good(self, target_fingerprint: str | None) -> VersionRecord | None:
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
            if target_fingerprint not in (None, version.target_fingerprint):
                raise ValueError(
                    f"{self.folder_of(number)} was learned for target {version.target_fingerprint}, this target is "
                    f"{target_fingerprint}; give --reset-drafter to begin anew (the old versions are kept beside), "
                    "or another folder"
                )
            return version
        return None

    def weights(self, number: int, device: torch.device | str = "cpu") -> DrafterWeights:
        """The exact ones of a version, whatever dtype they are published in."""
        return DrafterWeights(self._learned(number, torch.device(device))["params"], number)

    def resume(self, record: VersionRecord, drafter: Drafter, learner: str = "") -> Any | None:
        """Gives a drafter that was loaded from a version's folder its exact weights.

        Args:
            learner: The line of the learner that goes on; see `parse_learner`.

        Returns:
            The learner's state; None if there is none, or it is another learner's.

        Raises:
            ValueError: if the drafter learns something else, or the files are not what this version of ours can read.
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
        """Where a version lies, if there is one: a drafter in its published format."""
        return self._place / f"{number:0{DIGITS}d}"

    def numbers(self) -> list[int]:
        """Of the versions on disk, whole or not."""
        names = [path.name for path in self._place.iterdir()] if self._place.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def watched(self, version: VersionRecord) -> DrafterWeights | None:
        """The weights that a version is still to be watched beside, after a restart: those served before it.

        None if it was not promoted, or is confirmed, or they are not here any more.
        """
        event = version.event
        if event.kind != "promoted" or event.parent is None or version.version in self._noted().confirmed:
            return None
        try:
            return self.weights(self.read(event.parent).version)
        except ValueError as error:
            self._complain(f"{error}; version {version.version} is not watched any more")
            return None

    def read(self, number: int) -> VersionRecord:
        """One version, every file checked.

        Raises:
            ValueError: naming what is missing or changed.
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
        """What was noted, the oldest first. A line that can't be read (torn, say) is left out and told once."""
        return list(self._noted().events)

    # --- inside -------------------------------------------------------------------------------------------------

    def _learned(self, number: int, device: torch.device) -> Any:
        folder = self.folder_of(number)
        tree = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return rebuilt(read_tensors(folder / TENSORS, device, dtype=None), tree)

    def _noted(self) -> History:
        """The history; read anew each time by one that does not hold the folder."""
        if self._kept_history:
            return self._kept_history
        history = History(self._history, self._complain)
        if self._lock:
            self._kept_history = history
        return history

    def _rolled_back(self) -> set[int]:
        """By what was noted, or by what a version itself says of how it came to be, should the note be lost."""
        records = (record_of(self.folder_of(number)) for number in self.numbers())
        own = (rolled_back_by(record.event) for record in records if record)
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
        try:
            self._noted().append(event)
        except BaseException:
            self._kept_history = None  # what is there now is to be read again
            raise

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
                folder = self.folder_of(number)
                gone = folder.with_name(f".{folder.name}.gone")
                os.rename(folder, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _complain(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)
