"""What runs leave on disk: the types of report.json and of the lines of requests.jsonl."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from onlinespec.learning.rounds import TelemetrySummary


class Window(Struct, frozen=True, kw_only=True):
    """A few requests in a row of one segment: one point of a plot."""

    requests: int
    acceptance_length: float
    tokens_per_second: float


class Totals(Struct, frozen=True, kw_only=True):
    """What was counted over some requests; `core.DecodeStats` says how the ratios are formed."""

    requests: int
    skipped: int  # prompts that do not fit the target, mostly longer than its context; not among the requests
    tokens: int
    steps: int
    acceptance_length: float
    acceptance_rate: float
    acceptance_by_position: tuple[float, ...]
    decode_seconds: float  # prefill included
    learn_seconds: float
    diagnostic_seconds: float = 0.0  # measuring regret, gradients and drift; in no other figure
    tokens_per_second: float  # over decode_seconds + learn_seconds
    speedup_vs_none: float | None  # of tokens_per_second; None where there is no such run
    speedup_vs_frozen: float | None
    identical_to_plain: bool | None  # greedy: no request differs but those in ties; None when sampling, or unchecked
    ties: int  # requests that first differ from plain decoding at a near-tie of the target

    @property
    def learning_share(self) -> float:
        """Learning time over decoding time; 0 before any time was spent."""
        return self.learn_seconds / self.decode_seconds if self.decode_seconds else 0.0


class Segment(Totals, frozen=True, kw_only=True):
    """A stretch of the stream with one kind of data. The same data may come again, under another index."""

    index: int  # place in the stream, from 0
    data: str
    windows: tuple[Window, ...]


class Run(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One learner over the whole stream, once."""

    learner: str
    temperature: float
    seed: int
    repeat: int
    totals: Totals
    segments: tuple[Segment, ...]
    telemetry: TelemetrySummary | None = None  # if it was asked for


class Report(Struct, frozen=True, kw_only=True):
    """All of report.json.

    Provenance holds command, version, git commit if known, python, torch, platform, processor,
    num_threads, started, target, drafter, fingerprint and settings; `partial: true` says that the
    stream was interrupted.
    """

    schema: Literal[1] = 1
    provenance: dict[str, Any]  # strings, numbers, lists and dicts of them
    runs: tuple[Run, ...]


class RequestRecord(Struct, frozen=True, kw_only=True):
    """One line of requests.jsonl: one request in one run."""

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
    """Raises ValueError, naming the file and the field, if it is not a report this version can read."""
    return _decode(Path(path).read_bytes(), f"{path} is not a report.json that this version can read")


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Replaces the file in one move, unless it could not be read back (a NaN, say): then ValueError, and no change."""
    encoded = msgspec.json.encode(report)
    _decode(encoded, "this report would not be readable again")
    write_atomically(path, msgspec.json.format(encoded, indent=2) + b"\n")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Readers see the old file or the new one, never half of it. Makes the folder if need be."""
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
