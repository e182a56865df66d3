"""The folder for results: checked before the work starts, and never one that holds results already."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_results_folder(out: Path) -> None:
    """Checks that results can be written to a folder without overwriting any. Creates nothing.

    Raises:
        ValueError: if the folder can't be written to or holds results already.
    """
    lines, report = out / "requests.jsonl", out / "report.json"
    if lines.stat().st_size if lines.exists() else report.exists():  # an empty file: a run without a finished request
        raise ValueError(
            f"{out} holds results already, and a run that was stopped is not continued; "
            "choose another --out, or move them away"
        )
    if reason := why_not_writable(out):
        raise ValueError(f"results can't be written to {out}: {reason}; choose another --out")


def why_not_writable(folder: Path) -> str:
    """Returns why no file can be created in a folder, which may not exist yet; empty if one can. Creates nothing."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".onlinespec-", dir=existing):
            return ""
    except OSError as error:
        return f"{existing}: {error.strerror}"


def claim(out: Path) -> None:
    """Checks the folder, and creates it with an empty requests.jsonl.

    Raises:
        ValueError: as `check_results_folder`.
    """
    check_results_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "requests.jsonl").touch()
