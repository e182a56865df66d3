"""The nouns everyone passes: what a step drafts, what the target decides, what is left to learn from.

Frozen, no I/O. Axis letters: B requests in a batch, K drafted tokens,
L = K + 1 rows the target scored, V vocabulary, D hidden size, S positions of a request.
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
    """The target's hidden states at consecutive positions of a text, a row for each.

    Carried as one from the target's forward to whoever drafts and learns, whichever layers are in it. Which ones a
    drafter reads it says itself (`Drafter.aux_layer_ids`).
    """

    final_SD: Tensor  # after the final norm: the target's head turns a row into its logits
    aux: dict[int, Tensor] = field(
        default_factory=dict
    )  # [S, D] by layer id: the state after so many layers; 0 is the embedding

    @classmethod
    def empty(
        cls, num_rows: int, hidden_size: int, aux_layer_ids: Collection[int], dtype: torch.dtype, device: torch.device
    ) -> Features:
        """Room for so many rows, whose numbers are yet to be written."""

        def room() -> Tensor:
            return torch.empty(num_rows, hidden_size, dtype=dtype, device=device)

        return cls(room(), {layer: room() for layer in aux_layer_ids})

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """The rows of all parts, one after the other; all have the layers of the first."""
        aux = {layer: torch.cat([part.aux[layer] for part in parts]) for layer in parts[0].aux}
        return cls(torch.cat([part.final_SD for part in parts]), aux)

    def __len__(self) -> int:
        return len(self.final_SD)

    def __getitem__(self, at: slice) -> Features:
        """Some of the rows, in the same memory."""
        return self.map(lambda rows_SD: rows_SD[at])

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """The same of every layer's rows."""
        return Features(change(self.final_SD), {layer: change(rows_SD) for layer, rows_SD in self.aux.items()})

    def split(self, counts: Sequence[int]) -> list[Features]:
        """Consecutive parts of so many rows each, in the same memory."""
        ends = list(accumulate(counts))
        return [self[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def write(self, start: int, rows: Features) -> None:
        """Copies rows to the positions from `start` on."""
        at = slice(start, start + len(rows))
        self.final_SD[at] = rows.final_SD
        for layer, rows_SD in self.aux.items():
            rows_SD[at] = rows.aux[layer]

    @property
    def layers(self) -> list[Tensor]:
        """The rows of every layer, the final ones first."""
        return [self.final_SD, *self.aux.values()]

    @property
    def num_bytes(self) -> int:
        return sum(rows_SD.numel() * rows_SD.element_size() for rows_SD in self.layers)


@dataclass(frozen=True)
class RequestInfo:
    """What is known of a request when it starts: what a drafter is told, and what its Feedback says."""

    request_id: str = ""
    tenant: str = ""
    domain: str = ""
    may_learn: bool = True  # whether anything of it may be learned from, or remembered
    capacity: int = 0  # most tokens it can come to have, the prompt's among them
    sampling: SamplingParams = SamplingParams()
    seed: int = 0  # with `choice`, of the noise that its tokens are chosen with
    choice: int = 0


class Draft(NamedTuple):
    """What a drafter proposes for the requests of one step."""

    token_ids_BK: Tensor  # int64, on the target's device; a row's tail beyond its num_draft_tokens is padding
    num_draft_tokens_B: Tensor  # int64, on the same device, 0..K: how many of the row's tokens are meant
    member_B: tuple[int, ...]  # which drafter of several drafted the row; 0 where there is one
    weights_version_B: tuple[int, ...]  # of the weights that drafted the row
    probs_BKV: Tensor | None = (
        None  # under the rejection rule alone: what each token was drawn from; None: a point mass
    )

    @classmethod
    def by_one(
        cls, token_ids_BK: Tensor, num_draft_tokens_B: Tensor, weights_version: int, probs_BKV: Tensor | None = None
    ) -> Draft:
        """A draft of a single drafter, with the same weights for all requests."""
        B = len(token_ids_BK)
        return cls(token_ids_BK, num_draft_tokens_B, (0,) * B, (weights_version,) * B, probs_BKV)


class Verdict(NamedTuple):
    """What one verification decided, for every request of a step; on the target's device."""

    num_accepted_B: Tensor  # int64, 0..num_draft_tokens; the last committed token is not counted
    token_ids_BL: Tensor  # int64, the committed tokens: kept drafts, then one token of the target's own; -1 after
    is_finite_B: Tensor  # bool; false where the target's first row has NaN or infinity, so that nothing is committed


class TokenLogprobs(NamedTuple):
    """How likely the target found a committed token, before any sampling setting: natural logarithms."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, if asked for, likeliest first


@dataclass(frozen=True)
class DrafterWeights:
    """One version of what learns in a drafter. Swapped between steps only."""

    params: Params
    version: int


@dataclass
class Trace:
    """The tokens of one request and the target's features for them, as verification left them.

    Rows 0..num_features-1 of `features` are valid; the last committed token (the anchor) has none yet. Grown in place
    by the engine; Feedback points into it and never copies it.
    """

    token_ids: list[int]
    features: Features
    num_features: int = 0
    max_tokens: int = 0  # the request can come to have; 0 for a text that is complete

    def append(self, rows: Features) -> None:
        """Writes rows behind the last valid one."""
        self.features.write(self.num_features, rows)
        self.num_features += len(rows)


@dataclass(frozen=True)
class Feedback:
    """The verified rows of one step: row i is the target's state after token start + i.

    The target's logits for the token at start + i + 1 are its head applied to that row's hidden state,
    so they are rebuilt exactly and never stored. Rows behind the first rejection are not part of it:
    their context was never committed.
    """

    trace: Trace
    start: int  # position of the anchor, whose row judged the first drafted token
    num_rows: int  # num_accepted + 1, bonus and undrafted steps included; fewer if a stop cut the step
    num_draft_tokens: int
    num_accepted: int  # as verified, before any stop
    weights_version: int
    member: int = 0  # which drafter of several drafted; 0 where there is one
    request_id: str = ""
    domain: str = ""
    tenant: str = ""
    target_fingerprint: str = ""
    temperature: float = 0.0
    seed: int = 0  # with `choice`, of the noise that the request's tokens were chosen with: see `lossless/noise.py`
    choice: int = 0
    is_last: bool = False  # the request ended with this step

    @property
    def is_rejection(self) -> bool:
        """Whether the last row refused a drafted token; else it is a bonus, undrafted, or behind a stop."""
        return self.num_accepted < self.num_draft_tokens and self.num_rows == self.num_accepted + 1


@dataclass(frozen=True)
class DecodeStats:
    """Counts of finished work; every ratio is a property, so no two files can average it differently.

    >>> stats = DecodeStats(tokens=6, steps=2, drafted=8, accepted=4, accepted_by_position=(2, 1, 1, 0))
    >>> stats.acceptance_length, stats.acceptance_rate, stats.acceptance_by_position
    (3.0, 0.5, (1.0, 0.5, 0.5, 0.0))
    """

    requests: int = 0
    skipped: int = 0
    tokens: int = 0  # that the user received
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: tuple[int, ...] = field(default=())
    decode_seconds: float = 0.0  # prefill included
    learn_seconds: float = 0.0
    diagnostic_seconds: float = 0.0  # spent on measuring learning; part of no other figure
    ties: int = 0  # requests whose first difference from plain decoding is a near-tie of the target

    @property
    def acceptance_length(self) -> float:
        """Mean committed tokens per step, 1 + accepted / steps; 0 before the first step."""
        return 1 + self.accepted / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of steps in which drafted position i was kept."""
        return tuple(count / self.steps for count in self.accepted_by_position) if self.steps else ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens over decoding *and* learning time; 0 before any time was spent."""
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
