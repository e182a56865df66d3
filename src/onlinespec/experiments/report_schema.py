"""The types of report.json and of the lines of requests.jsonl, with functions to read and write a report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from onlinespec.learning.rounds import TelemetrySummary


class Window(Struct, frozen=True, kw_only=True):
    """Statistics of a few consecutive requests of a segment: one point of a plot."""

    requests: int
    acceptance_length: float
    tokens_per_second: float


class Totals(Struct, frozen=True, kw_only=True):
    """Statistics over some requests; `core.DecodeStats` defines the ratios."""

    requests: int
    skipped: int  # prompts that don't fit the target, mostly too long; not counted in requests
    tokens: int
    steps: int
    acceptance_length: float
    acceptance_rate: float
    acceptance_by_position: tuple[float, ...]
    decode_seconds: float  # prefill included
    learn_seconds: float
    diagnostic_seconds: float = 0.0  # spent on telemetry; not contained in any other field
    tokens_per_second: float  # over decode_seconds + learn_seconds
    speedup_vs_none: float | None  # ratio of tokens_per_second; None without such a run
    speedup_vs_frozen: float | None
    identical_to_plain: bool | None  # false if a request differs that is no tie; None if not compared
    ties: int  # requests whose first difference from plain decoding is at a near-tie of the target; see `ties.py`

    @property
    def learning_share(self) -> float:
        """Learning time divided by decoding time; 0 without decoding time."""
        return self.learn_seconds / self.decode_seconds if self.decode_seconds else 0.0


class Segment(Totals, frozen=True, kw_only=True):
    """Statistics of a part of the stream with one source. The same source may return with another index."""

    index: int  # position in the stream, from 0
    data: str  # name of the source
    windows: tuple[Window, ...]


class Run(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One learner's run over the whole stream."""

    learner: str
    temperature: float
    seed: int
    repeat: int  # from 0
    totals: Totals
    segments: tuple[Segment, ...]
    telemetry: TelemetrySummary | None = None  # None unless it was asked for


class Report(Struct, frozen=True, kw_only=True):
    """The content of report.json.

    Provenance holds command, version, git commit if known, python, torch, transformers, platform, processor,
    num_threads, started, target, drafter, fingerprint, settings, and losses and costs of learning. `partial` is true if
    the stream was interrupted, `cut_short` if a time limit ended a segment early.
    """

    schema: Literal[1] = 1
    provenance: dict[str, Any]  # values of JSON: strings, numbers, lists and dicts
    runs: tuple[Run, ...]


class RequestRecord(Struct, frozen=True, kw_only=True):
    """A line of requests.jsonl: one request in one run."""

    learner: str
    temperature: float
    repeat: int
    index: int  # of the request in the stream, from 0
    segment: int
    data: str
    id: str
    prompt_tokens: int
    tokens: int
    steps: int
    accepted: int
    drafted: int
    decode_seconds: float
    learn_seconds: float
    finish_reason: str
    identical_to_plain: bool | None
    weights_version: int
    text: str


def read_report(path: str | os.PathLike[str]) -> Report:
    """Reads a report.json.

    Raises:
        ValueError: naming the file and the field, if this version can't read it.
        OSError: if the file can't be read.
    """
    return _decode(Path(path).read_bytes(), f"{path} is not a report.json that this version can read")


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes a report.json atomically.

    Raises:
        ValueError: if it could not be read back, such as with a NaN; the file is unchanged then.
    """
    encoded = msgspec.json.encode(report)
    _decode(encoded, "this report would not be readable again")
    write_atomically(path, msgspec.json.format(encoded, indent=2) + b"\n")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces a file in one step, so that readers never see half of it. Creates its folder if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _decode(encoded: bytes, complaint: str) -> Report:
    try:
        return msgspec.json.decode(encoded, type=Report)
    except msgspec.DecodeError as error:
        raise ValueError(f"{complaint}: {error}") from error
