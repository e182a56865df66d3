"""The types that all rooms pass to each other: features, drafts, verdicts, feedback, weights, statistics.

Mostly frozen, and without I/O. Axis letters: B requests in a batch, K drafted tokens, L = K + 1 rows that the target
scored, V vocabulary, D hidden size, S positions of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from onlinespec.config import SamplingParams

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Features:
    """The target's hidden states at consecutive positions of a text, one row per position.

    The final states are always there; the aux layers are those that the drafter asks for in `Drafter.aux_layer_ids`.
    """

    final_SD: Tensor  # after the final norm; the target's head applied to a row gives its logits
    aux: dict[int, Tensor] = field(
        default_factory=dict
    )  # [S, D] by layer id: layer id n is the state after n layers, 0 the embedding

    @classmethod
    def empty(
        cls, num_rows: int, hidden_size: int, aux_layer_ids: Collection[int], dtype: torch.dtype, device: torch.device
    ) -> Features:
        """Returns uninitialised features with this many rows."""

        def room() -> Tensor:
            return torch.empty(num_rows, hidden_size, dtype=dtype, device=device)

        return cls(room(), {layer: room() for layer in aux_layer_ids})

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """Concatenates the rows of all parts, which must have the layers of the first."""
        aux = {layer: torch.cat([part.aux[layer] for part in parts]) for layer in parts[0].aux}
        return cls(torch.cat([part.final_SD for part in parts]), aux)

    def __len__(self) -> int:
        return len(self.final_SD)

    def __getitem__(self, at: slice) -> Features:
        """Returns a view of some rows."""
        return self.map(lambda rows_SD: rows_SD[at])

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Applies a function to every layer's rows."""
        return Features(change(self.final_SD), {layer: change(rows_SD) for layer, rows_SD in self.aux.items()})

    def split(self, counts: Sequence[int]) -> list[Features]:
        """Returns views of consecutive parts with `counts[i]` rows each."""
        ends = list(accumulate(counts))
        return [self[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def write(self, start: int, rows: Features) -> None:
        """Copies rows into the positions from `start` on."""
        at = slice(start, start + len(rows))
        self.final_SD[at] = rows.final_SD
        for layer, rows_SD in self.aux.items():
            rows_SD[at] = rows.aux[layer]

    @property
    def layers(self) -> list[Tensor]:
        """The tensors of all layers, the final states first."""
        return [self.final_SD, *self.aux.values()]

    @property
    def num_bytes(self) -> int:
        return sum(rows_SD.numel() * rows_SD.element_size() for rows_SD in self.layers)


@dataclass(frozen=True)
class RequestInfo:
    """Facts about a request that are known when it starts. Drafters get it, and Feedback repeats most of it."""

    request_id: str = ""
    tenant: str = ""
    domain: str = ""
    may_learn: bool = True  # False: nothing of this request may be learned from or kept
    capacity: int = 0  # maximum number of tokens, prompt included
    sampling: SamplingParams = SamplingParams()
    seed: int = 0  # `seed` and `choice` determine the noise that chooses its tokens
    choice: int = 0  # which of several answers to one prompt


class Draft(NamedTuple):
    """The tokens that a drafter proposes for the requests of one step."""

    token_ids_BK: Tensor  # int64, on the target's device; padded beyond the row's num_draft_tokens
    num_draft_tokens_B: Tensor  # int64, on the target's device: how many tokens of the row are drafts, 0..K
    member_B: tuple[int, ...]  # index of the drafter that drafted the row, if there are several; else 0
    weights_version_B: tuple[int, ...]  # version of the weights that drafted the row
    probs_BKV: Tensor | None = (
        None  # for the rejection rule only: the distribution of each drafted token; None: a point mass
    )

    @classmethod
    def by_one(
        cls, token_ids_BK: Tensor, num_draft_tokens_B: Tensor, weights_version: int, probs_BKV: Tensor | None = None
    ) -> Draft:
        """Returns a draft that a single drafter made with one version of weights for all requests."""
        B = len(token_ids_BK)
        return cls(token_ids_BK, num_draft_tokens_B, (0,) * B, (weights_version,) * B, probs_BKV)


class Verdict(NamedTuple):
    """The result of one verification, for every request of a step. The tensors are on the target's device."""

    num_accepted_B: Tensor  # int64: drafted tokens that are kept, 0..num_draft_tokens
    token_ids_BL: Tensor  # int64: the committed tokens, which are the kept drafts and one of the target's own; then -1
    is_finite_B: Tensor  # bool: False if the target's first row has NaN or infinity; nothing is committed then


class TokenLogprobs(NamedTuple):
    """Log-probability (natural logarithm) of a committed token under the target, before any sampling setting."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob) of the most likely tokens, if asked for, in order


@dataclass(frozen=True)
class DrafterWeights:
    """One version of a drafter's trainable weights. Swapped between steps only."""

    params: Params
    version: int


@dataclass
class Trace:
    """The tokens of one request, and the target's features for them as prefill and verification computed them.

    Rows 0..num_features-1 of `features` are valid; the last committed token (the anchor) has no row yet. The engine
    appends in place; Feedback refers to a trace and never copies it.
    """

    token_ids: list[int]
    features: Features
    num_features: int = 0
    max_tokens: int = 0  # maximum number of tokens of the request; 0 if the text is complete

    def append(self, rows: Features) -> None:
        """Writes rows after the last valid one."""
        self.features.write(self.num_features, rows)
        self.num_features += len(rows)


@dataclass(frozen=True)
class Feedback:
    """The verified rows of one request in one step. Row i is the target's state after the token at start + i.

    The target's head applied to that state gives exactly the logits for the token at start + i + 1, so logits are not
    stored. Rows after the first rejection are left out, because their context was never committed.
    """

    trace: Trace
    start: int  # position of the anchor, whose row decides the first drafted token
    num_rows: int  # num_accepted + 1, also in steps without a draft; fewer if the request ended inside the step
    num_draft_tokens: int
    num_accepted: int  # as verified, before a stop is looked for
    weights_version: int
    member: int = 0  # index of the drafter that drafted, if there are several; else 0
    request_id: str = ""
    domain: str = ""
    tenant: str = ""
    target_fingerprint: str = ""
    temperature: float = 0.0
    seed: int = 0  # `seed` and `choice` determine the noise that chose the request's tokens: see `lossless/noise.py`
    choice: int = 0
    is_last: bool = False  # the request ended with this step

    @property
    def is_rejection(self) -> bool:
        """Whether the last row rejected a drafted token; False for a bonus token, without a draft, or after a stop."""
        return self.num_accepted < self.num_draft_tokens and self.num_rows == self.num_accepted + 1


@dataclass(frozen=True)
class DecodeStats:
    """Counters of finished work. Ratios are properties, so that they are formed in one way everywhere.

    >>> stats = DecodeStats(tokens=6, steps=2, drafted=8, accepted=4, accepted_by_position=(2, 1, 1, 0))
    >>> stats.acceptance_length, stats.acceptance_rate, stats.acceptance_by_position
    (3.0, 0.5, (1.0, 0.5, 0.5, 0.0))
    """

    requests: int = 0
    skipped: int = 0
    tokens: int = 0  # tokens that the user received
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: tuple[int, ...] = field(default=())
    decode_seconds: float = 0.0  # prefill included
    learn_seconds: float = 0.0
    diagnostic_seconds: float = 0.0  # spent on telemetry; not part of any other time
    ties: int = 0  # requests whose first difference from plain decoding is a near-tie of the target's logits

    @property
    def acceptance_length(self) -> float:
        """Mean committed tokens per step, 1 + accepted / steps; 0 before the first step."""
        return 1 + self.accepted / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """For each drafted position, the share of steps in which it was kept."""
        return tuple(count / self.steps for count in self.accepted_by_position) if self.steps else ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding and learning time; 0 before any time was spent."""
        seconds = self.decode_seconds + self.learn_seconds
        return self.tokens / seconds if seconds else 0.0

    def __add__(self, other: DecodeStats) -> DecodeStats:
        width = max(len(self.accepted_by_position), len(other.accepted_by_position))
        by_position = tuple(
            sum(counts[i] for counts in (self.accepted_by_position, other.accepted_by_position) if i < len(counts))
            for i in range(width)
        )
        names = (name for name in self.__dataclass_fields__ if name != "accepted_by_position")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return DecodeStats(**sums, accepted_by_position=by_position)
