"""Helpers for files that must survive a crash: fsync, file listing and checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def files_in(folder: Path) -> list[str]:
    """Returns the relative paths of all files below a directory, sorted, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_all(folder: Path) -> None:
    """Flushes a directory and everything below it to disk (fsync)."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Flushes a file or a directory's entries to disk (fsync). Directories are skipped where that isn't POSIX."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
