"""Files that survive a crash: flushed to the disk itself, and told apart by their content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def files_in(folder: Path) -> list[str]:
    """All files below a directory, by their paths from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_all(folder: Path) -> None:
    """A directory and everything below it, to the disk itself."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """To the disk itself; a directory's entries too, where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
