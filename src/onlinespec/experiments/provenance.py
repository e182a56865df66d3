"""The provenance of a report: versions, machine and settings."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from onlinespec import __version__


def provenance(command: str, target: str, drafter: str, fingerprint: str, settings: Any) -> dict[str, Any]:
    """Returns the record of what ran where, for report.json.

    Args:
        fingerprint: Of the target.
        settings: Of the comparison, as plain values; nested under "settings".
    """
    return {
        "command": command,
        "version": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "platform": platform.platform(),
        "processor": _processor(),
        "num_threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": target,
        "drafter": drafter,
        "fingerprint": fingerprint,
        "settings": settings,
    }


def _commit() -> str:
    """The git commit of the source tree, with `-dirty` if it has changes; empty if the package runs from elsewhere."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode:
            return ""
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return described.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
