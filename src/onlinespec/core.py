"""The nouns everyone passes: what a step drafts, what the target decides, what is left to learn from.

Frozen, no I/O, nothing of ours imported. Axis letters: B requests in a batch, K drafted tokens,
L = K + 1 rows the target scored, V vocabulary, D hidden size, S positions of a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Params = dict[str, Tensor]


class Draft(NamedTuple):
    """What a drafter proposes for the requests of one step."""

    token_ids_BK: Tensor  # int64, on the target's device; a row's tail beyond its num_draft_tokens is padding
    num_draft_tokens_B: Tensor  # int64, on the same device, 0..K: how many of the row's tokens are meant
    probs_BKV: Tensor | None  # under the rejection rule alone: what each token was drawn from; None says a point mass
    weights_version: int  # of the weights that drafted


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
    """The tokens of one request and the target's final hidden states for them, as verification left them.

    Rows 0..num_features-1 of hidden_states_SD are valid; the last committed token (the anchor) has none
    yet. Grown in place by `engine/step.py`; Feedback points into it and never copies it.
    """

    token_ids: list[int]
    hidden_states_SD: Tensor
    num_features: int = 0
    max_tokens: int = 0  # the request can come to have; 0 for a text that is complete


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
    request_id: str = ""
    domain: str = ""
    tenant: str = ""
    target_fingerprint: str = ""
    temperature: float = 0.0
    seed: int = 0  # with `choice`, of the noise that the request's tokens were chosen with: see `randomness`
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
