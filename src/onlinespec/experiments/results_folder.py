"""Where results are written: found out before the work, and never over older ones."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_results_folder(out: Path) -> None:
    """Makes sure, without leaving a trace, that results can be written to a folder and that none are overwritten.

    Raises:
        ValueError: if the folder can't be written to or holds results already.
    """
    lines, report = out / "requests.jsonl", out / "report.json"
    if lines.stat().st_size if lines.exists() else report.exists():  # a run that finished no request holds nothing
        raise ValueError(
            f"{out} holds results already, and a run that was stopped is not continued; "
            "choose another --out, or move them away"
        )
    if reason := why_not_writable(out):
        raise ValueError(f"results can't be written to {out}: {reason}; choose another --out")


def why_not_writable(folder: Path) -> str:
    """Why no file can be made in a folder, which need not exist yet; empty if one can. Leaves nothing behind."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".onlinespec-", dir=existing):
            return ""
    except OSError as error:
        return f"{existing}: {error.strerror}"


def claim(out: Path) -> None:
    check_results_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "requests.jsonl").touch()
