"""The messages between serving and a learning process: Feedback in one direction, weight versions in the other.

Messages are msgpack with raw tensor bytes inside. Decoding one can't run code, so either end may be another process or
another machine. A text is one request's Trace: its tokens and hidden states are sent once, piece by piece as it grows,
and both ends refer to it by a number.

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
    """A tensor as bytes with shape and dtype."""

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
        """Returns a copy as a tensor on the CPU."""
        dtype = getattr(torch, self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)


class Rows(Struct, frozen=True, tag=True):
    """One Feedback record, with the part of its text that was not sent before."""

    text: int  # number of the text
    first_token: int  # position of the first new token
    token_ids: list[int]  # the new tokens
    first_state: int  # position of the first new hidden state
    features: Features  # the new hidden states, [S, D] per layer
    max_tokens: int  # as in Trace: the most tokens that the request can have
    record: dict[str, Any]  # the fields of Feedback, without its trace


class Forget(Struct, frozen=True, tag=True):
    """No more records of a text will follow, so the receiver can drop it."""

    text: int


class Batch(Struct, frozen=True, tag=True):
    """Several messages sent as one, because the sending thread gets the interpreter lock only now and then."""

    messages: list[Rows | Forget]


class Publish(Struct, frozen=True, tag=True):
    """A new version of the drafter's weights to serve from now on."""

    weights: DrafterWeights
    checksum: int  # CRC-32 of all names and tensor bytes, in order of the names

    @classmethod
    def of(cls, weights: DrafterWeights) -> Publish:
        return cls(weights, _checksum(weights))

    def checked(self) -> DrafterWeights:
        """Returns the weights. Raises ValueError if the checksum doesn't match."""
        if (found := _checksum(self.weights)) != self.checksum:
            raise ValueError(f"weights version {self.weights.version} came with checksum {found}, not {self.checksum}")
        return self.weights


class Report(Struct, frozen=True, tag=True):
    """Statistics of learning, for the live page and the metrics; see `Trainer.statistics`."""

    statistics: dict[str, Any]


class LogLine(Struct, frozen=True, tag=True):
    """One log record of the learning process, to be logged by the serving process."""

    logger: str
    level: int
    text: str


class SetShare(Struct, frozen=True, tag=True):
    """Caps the share of time that learning may take while updates don't help; see `BackgroundLearning.set_share`."""

    share: float  # of elapsed time


Message = Batch | Publish | Report | LogLine | SetShare


def _plain(tensor: object) -> Blob:
    assert isinstance(tensor, Tensor)
    return Blob.of(tensor)


def _tensor(kind: type, content: object) -> Tensor:
    return msgspec.convert(content, Blob).tensor()


_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message, dec_hook=_tensor)
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode(message: Message) -> bytes:
    """Encodes a message."""
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Decodes a message. Raises ValueError if the bytes are not a valid message."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"this is no message between serving and learning: {error}") from error


class Outgoing:
    """The sending end of Feedback. Remembers how much of each text was sent."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int, int]] = {}  # by id(trace): text number, tokens sent, states sent
        self._numbers = itertools.count()
        self._gone: deque[Forget] = deque()

    def batch(self, records: Sequence[Feedback]) -> Batch:
        """Packs records into a message, after a Forget for each text that ended.

        Records may be omitted (dropped by a queue, for instance), but those of one text must stay in order.
        """
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
        """Called when a trace is garbage-collected, by whichever thread does it: no record of it can follow."""
        self._gone.append(Forget(self._sent.pop(trace_id)[0]))


class Incoming:
    """The receiving end of Feedback. Rebuilds each text as it grows."""

    def __init__(self) -> None:
        self._traces: dict[int, Trace] = {}

    def __len__(self) -> int:
        return len(self._traces)

    def records(self, batch: Batch) -> list[Feedback]:
        """Returns the Feedback records of a message, pointing into this end's own copies of the texts.

        Raises:
            ValueError: if a part of a text is missing.
        """
        return [record for message in batch.messages if (record := self._take(message))]

    def _take(self, message: Rows | Forget) -> Feedback | None:
        if isinstance(message, Rows):
            return self._record(message)
        self._traces.pop(message.text, None)  # replay may still hold the trace
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
    """The result of a paired test: two sets of weights on the same rows of the same requests.

    Acceptance lengths are means over all positions of the texts, not over the steps that were served. They can be
    compared with each other, but not with acceptance lengths measured elsewhere.
    """

    num_requests: int
    num_anchors: int  # positions from which both drafted
    served_length: float  # acceptance_length of the served weights
    other_length: float  # acceptance_length of the other weights: a candidate, the version before, or the origin
    served_acceptance_prob: float  # of the first drafted token alone
    other_acceptance_prob: float
    difference: float  # other_length - served_length
    standard_error: float  # of the difference, with requests as independent samples
    level: float  # significance level of each one-sided test
    is_other_better: bool  # the difference is significantly above 0
    is_served_better: bool  # the difference is significantly below 0


EventKind = Literal["started", "promoted", "refused", "confirmed", "rolled back", "returned", "reset"]


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of history.jsonl: what happened to a version or a candidate."""

    kind: EventKind
    at: str  # UTC, ISO 8601
    version: int  # the version served after the event
    parent: int | None = None  # the version served before; None if the event did not change it
    restores: int | None = None  # after a rollback or a return: the older version with the same weights
    reason: str = ""
    paired: Paired | None = None  # the test result that led to the event, if one did

    @property
    def summary(self) -> str:
        """The event as one line of text, for the log."""
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
    """The content of a version's version.json."""

    schema: Literal[1] = 1
    version: int
    created: str  # UTC, ISO 8601
    target_fingerprint: str
    learner: str = ""  # the learner spec that trained it, as `parse_learner` takes it
    event: Event  # how it came to be served
    files: dict[str, str]  # SHA-256 of every other file, by its path in the version's folder
