"""Helpers for files in a work folder: atomic writes, digests of content, and removal."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from onlinespec.offline.target_answers import written


def digest(pieces: Iterable[bytes | memoryview]) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of all pieces, joined."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def bytes_of(weights: Tensor) -> memoryview:
    """A tensor's bytes, in CPU memory."""
    return weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, text: str) -> None:
    """Writes a text file atomically. Raises OSError as `written`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def discard(folder: Path) -> None:
    """Removes a folder, if it exists. It is renamed first, so an interrupted removal leaves no half-empty folder."""
    if folder.exists():
        folder.rename(removed(folder))
        shutil.rmtree(removed(folder), ignore_errors=True)


def removed(folder: Path) -> Path:
    """The name that `discard` gives a folder before it deletes it."""
    return folder.with_name(f".{folder.name}.removed")
