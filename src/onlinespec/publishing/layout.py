"""File and folder names of a versions folder.

FOLDER/versions/000012/    a version: the drafter in its published format, so that --drafter can load it directly
    learner.safetensors    full-precision weights and tensors of the learner's state, each tensor stored once
    learner.json           the structure of that state, with tensors referred to by number
    version.json           version number, origin, target fingerprint, and a checksum of every other file
FOLDER/history.jsonl       one event per line, append-only

FOLDER/.lock               lock file of the writer
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from onlinespec.publishing.protocol import VersionRecord

TENSORS, STATE = "learner.safetensors", "learner.json"
VERSIONS, HISTORY, LOCK = "versions", "history.jsonl", ".lock"

RECORD = "version.json"


DIGITS = 6


def is_in(folder: Path) -> bool:
    """Whether a directory holds drafter versions or their history."""
    return (folder / VERSIONS).is_dir() or (folder / HISTORY).is_file()


def record_of(folder: Path) -> VersionRecord | None:
    """Returns the record in a version's directory, without checking the files; None for any other directory."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=VersionRecord)
    except (OSError, msgspec.DecodeError):
        return None


def number_of(path: Path) -> int | None:
    """Returns the version number in a folder's name, temporary names included; None if there is no number."""
    digits = re.match(r"\.*(\d+)", path.name, re.ASCII)
    return int(digits[1]) if digits else None
