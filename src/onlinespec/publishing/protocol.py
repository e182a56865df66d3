"""What serving and learning tell each other where they share no memory: records in, versions out.

Messages are msgpack with raw tensors inside: nothing in them can run code, and either end may be another process or
another machine. A text's states are sent once, in pieces as they grow; both ends keep the text under a number.

Axis letters: S positions of a request, D hidden size.
"""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from onlinespec.core import DrafterWeights, Features, Feedback, Trace

_RECORD_FIELDS = tuple(name for name in Feedback.__dataclass_fields__ if name != "trace")


class Blob(Struct, frozen=True, array_like=True):
    """A tensor's bytes."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Blob:
        plain = tensor.detach().cpu().contiguous()
        return cls(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            plain.flatten().view(torch.uint8).numpy().tobytes(),
        )

    def tensor(self) -> Tensor:
        """A tensor of its own, on the CPU."""
        dtype = getattr(torch, self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)


class Rows(Struct, frozen=True, tag=True):
    """A record of Feedback, and what of its text was not sent before."""

    text: int  # the number of the text
    first_token: int  # where the new tokens begin ...
    token_ids: list[int]
    first_state: int  # ... and where the new states do
    features: Features  # of these
    max_tokens: int
    record: dict[str, Any]  # Feedback without its trace


class Forget(Struct, frozen=True, tag=True):
    """Nothing more will come of a text."""

    text: int


class Batch(Struct, frozen=True, tag=True):
    """Several messages at once: a sender that shares an interpreter with others gets its turn only so often."""

    messages: list[Rows | Forget]


class Publish(Struct, frozen=True, tag=True):
    """Weights to draft with from now on."""

    weights: DrafterWeights
    checksum: int  # of all their bytes, in order of their names

    @classmethod
    def of(cls, weights: DrafterWeights) -> Publish:
        return cls(weights, _checksum(weights))

    def checked(self) -> DrafterWeights:
        """The weights. Raises ValueError if they are not what was sent."""
        if (found := _checksum(self.weights)) != self.checksum:
            raise ValueError(f"weights version {self.weights.version} came with checksum {found}, not {self.checksum}")
        return self.weights


class Report(Struct, frozen=True, tag=True):
    """How learning fares: figures for a page and for metrics."""

    figures: dict[str, Any]


class LogLine(Struct, frozen=True, tag=True):
    """A line of the log."""

    logger: str
    level: int
    text: str


class SetShare(Struct, frozen=True, tag=True):
    """Learning may take this share of time from now on."""

    share: float


Message = Batch | Publish | Report | LogLine | SetShare


def _plain(tensor: object) -> Blob:
    assert isinstance(tensor, Tensor)
    return Blob.of(tensor)


def _tensor(kind: type, content: object) -> Tensor:
    return msgspec.convert(content, Blob).tensor()


_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message, dec_hook=_tensor)
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode(message: Message) -> bytes:
    """One message."""
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Raises ValueError for what is none."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"this is no message between serving and learning: {error}") from error


class Outgoing:
    """The sending end of Feedback: remembers how much of each text was sent."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int, int]] = {}  # by the id of a trace: its number, tokens, states
        self._numbers = itertools.count()
        self._gone: deque[Forget] = deque()

    def batch(self, records: Sequence[Feedback]) -> Batch:
        """Records, behind what became of other texts. Records of a text may be left out, but keep their order."""
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        return Batch([*gone, *map(self._rows, records)])

    def _rows(self, record: Feedback) -> Rows:
        trace, end = record.trace, record.start + record.num_rows
        if id(trace) not in self._sent:
            self._sent[id(trace)] = next(self._numbers), 0, 0
            weakref.finalize(trace, self._forget, id(trace)).atexit = False
        number, num_tokens, num_states = self._sent[id(trace)]
        self._sent[id(trace)] = number, end + 1, end
        return Rows(
            text=number,
            first_token=num_tokens,
            token_ids=trace.token_ids[num_tokens : end + 1],
            first_state=num_states,
            features=trace.features[num_states:end],
            max_tokens=trace.max_tokens,
            record={name: getattr(record, name) for name in _RECORD_FIELDS},
        )

    def _forget(self, trace_id: int) -> None:
        """No one holds a text any more, so that no record of it is under way. Any thread may find that out."""
        self._gone.append(Forget(self._sent.pop(trace_id)[0]))


class Incoming:
    """The receiving end: texts grow as they grew at the other."""

    def __init__(self) -> None:
        self._traces: dict[int, Trace] = {}

    def __len__(self) -> int:
        return len(self._traces)

    def records(self, batch: Batch) -> list[Feedback]:
        """The records, over texts of this end's own.

        Raises:
            ValueError: if something of a text did not come.
        """
        return [record for message in batch.messages if (record := self._take(message))]

    def _take(self, message: Rows | Forget) -> Feedback | None:
        if isinstance(message, Rows):
            return self._record(message)
        self._traces.pop(message.text, None)  # learning may still hold it
        return None

    def _record(self, rows: Rows) -> Feedback:
        trace = self._traces.get(rows.text)
        if trace is None:
            room = rows.features.map(lambda rows_SD: rows_SD.new_empty(rows.max_tokens, rows_SD.shape[1]))
            trace = self._traces[rows.text] = Trace([], room, max_tokens=rows.max_tokens)
        if len(trace.token_ids) != rows.first_token or trace.num_features != rows.first_state:
            raise ValueError(
                f"text {rows.text} goes on at token {rows.first_token}, of it {len(trace.token_ids)} are known: "
                "a message is missing"
            )
        trace.token_ids.extend(rows.token_ids)
        trace.append(rows.features)
        return Feedback(trace=trace, **rows.record)


def _checksum(weights: DrafterWeights) -> int:
    total = 0
    for name in sorted(weights.params):
        total = zlib.crc32(Blob.of(weights.params[name]).data, zlib.crc32(name.encode(), total))
    return total


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
    def summary(self) -> str:
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
    learner: str = ""  # the line that learned it, as `parse_learner` reads it
    event: Event  # how it came to be served
    files: dict[str, str]  # sha256 of every other file
