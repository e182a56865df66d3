"""Files of work under way: written whole or not at all, told apart by their content, and cleared away."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from onlinespec.offline.target_answers import written


def digest(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def bytes_of(weights: Tensor) -> memoryview:
    return weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def discard(folder: Path) -> None:
    """Removes a folder. It is gone from its place at once, whatever stops the removal."""
    if folder.exists():
        folder.rename(removed(folder))
        shutil.rmtree(removed(folder), ignore_errors=True)


def removed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")
