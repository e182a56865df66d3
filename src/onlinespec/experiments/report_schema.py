"""What runs leave on disk: the types of report.json and of the lines of requests.jsonl. Nothing of ours imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct


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


class Round(Struct, frozen=True, kw_only=True):
    """One update of the drafter, as telemetry saw it: on all rows served since the one before, with the weights that
    drafted them."""

    step: int  # decoded so far
    request: int  # finished so far
    data: str
    interval: float  # steps to the next round, as the cadence has it
    loss: float | None  # the one that is trained, on the round's fresh rows, before the update; None without one
    kl: float  # KL(target || draft) of raw rows, nats
    token_loss: float  # cross-entropy of the committed tokens, nats
    acceptance_prob: float  # 1 - total variation of raw rows
    frozen_kl: float  # the same of the drafter as it started
    frozen_acceptance_prob: float
    acceptance_length_bound: float  # what the losses at all drafting depths guarantee, see metrics.py
    distance: float  # of the weights from the start
    num_rows: int = 0  # that it stands for; 0 in files that are older than this count
    is_update: bool = True  # False: at the end of a run, the rows for which no update came any more
    gradient_cosine: float | None = None  # of what was descended and what the round before descended
    moved: float | None = None  # of the weights, since some rounds ago
    function_moved: float | None = None  # mean total variation on fixed rows, since some rounds ago
    agreement: float | None = None  # share of the fresh rows whose first draft would have been the committed token
    is_undoing: bool = False  # whether it took back the round before, whose weights scored worse than those before it
    learner: dict[str, Any] = {}  # what the learner itself reports: hint errors, meta weights


class Telemetry(Struct, frozen=True, kw_only=True):
    """How a drafter learned, over a run. Regrets are in nats.

    Sums over rounds are what the theory bounds; they grow with the number of rounds, so learners that had different
    numbers of them compare by the figures per row alone: means over the rounds, each by its `num_rows`.
    """

    regret_upper: float  # against any comparator: the sum of kl
    regret_vs_frozen: float
    regret_vs_best_expert: float | None = None  # in the loss that is trained
    num_rows: int = 0  # that the rounds stand for
    token_loss_per_row: float | None = None  # None where no rows were counted
    kl_per_row: float | None = None  # regret_upper by the row
    regret_vs_frozen_per_row: float | None = None
    regret_vs_best_expert_per_row: float | None = None  # the best by the row
    hint_error_ratio: float | None = None  # below 1, the hints were better than none
    direction_hint_error_ratio: float | None = None  # the same in the learner's geometry
    gradient_cosine: float | None = None  # mean over the rounds that have one
    acceptance_length_bound: float | None  # mean over the steps; None where none were counted
    rounds: tuple[Round, ...]


class Run(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One learner over the whole stream, once."""

    learner: str
    temperature: float
    seed: int
    repeat: int
    totals: Totals
    segments: tuple[Segment, ...]
    telemetry: Telemetry | None = None  # if it was asked for


class Paired(Struct, frozen=True, kw_only=True):
    """Two sets of weights on the same rows of the same requests, by the drafts that a step would keep.

    Acceptance lengths are means over all positions of the texts, not over the steps that were served: they compare
    with each other, and with no other figure.
    """

    num_requests: int
    num_anchors: int  # positions from which both drafted
    served_length: float  # acceptance_length of the weights that serve ...
    other_length: float  # ... and of those they are compared with: a candidate, or the version before
    served_acceptance_prob: float  # of the first draft alone
    other_acceptance_prob: float
    difference: float  # other - served
    standard_error: float  # of the difference, requests being independent
    level: float  # chance at which the difference was judged
    is_other_better: bool  # the difference is above 0 by more than that chance explains
    is_served_better: bool  # below 0


EventKind = Literal["started", "promoted", "refused", "confirmed", "rolled back", "returned", "reset"]


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of history.jsonl: what became of a version, or of a candidate for one."""

    kind: EventKind
    at: str  # UTC
    version: int  # served from here on
    parent: int | None = None  # served until then; None where nothing changed
    restores: int | None = None  # whose weights these are, after a rollback or a return
    reason: str = ""
    paired: Paired | None = None  # what it was judged by

    @property
    def told(self) -> str:
        """In one line, for a log."""
        what = {
            "started": f"version {self.version} is served",
            "promoted": f"version {self.version} is served, promoted after version {self.parent}",
            "refused": f"a candidate was refused; version {self.version} stays",
            "confirmed": f"version {self.version} is confirmed",
            "rolled back": f"version {self.parent} is rolled back: its successor {self.version} is version "
            f"{self.restores} again",
            "returned": f"version {self.parent} makes way for version {self.restores}, which learning began with, "
            f"now {self.version}",
            "reset": "back to the beginning",
        }[self.kind]
        return f"{what}: {self.reason}" if self.reason else what


class VersionRecord(Struct, frozen=True, kw_only=True):
    """All of a version's version.json."""

    schema: Literal[1] = 1
    version: int
    created: str  # UTC
    target_fingerprint: str
    learner: str = ""  # the line that learned it, as `methods.parse` reads it
    event: Event  # how it came to be served
    files: dict[str, str]  # sha256 of every other file


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
