"""Where the parts of a version lie in a folder for versions, and what a folder says of itself.

FOLDER/versions/000012/    a version: the drafter in its published format, so that --drafter takes it as it is
    learner.safetensors    the exact weights and the learner's state, each tensor once ...
    learner.json           ... and how they hang together
    version.json           number, origin, target, and a checksum of every other file
FOLDER/history.jsonl       what happened, a line each, never rewritten

FOLDER/.lock               held by the one that writes
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
    """Whether a directory holds versions, or their history."""
    return (folder / VERSIONS).is_dir() or (folder / HISTORY).is_file()


def record_of(folder: Path) -> VersionRecord | None:
    """What a version's own directory says of it, unchecked; None for any other directory."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=VersionRecord)
    except (OSError, msgspec.DecodeError):
        return None


def number_of(path: Path) -> int | None:
    digits = re.match(r"\.*(\d+)", path.name, re.ASCII)
    return int(digits[1]) if digits else None
