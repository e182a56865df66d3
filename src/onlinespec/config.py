"""What a caller may set, as frozen dataclasses, checked once where they are made."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

MAX_DRAFT_TOKENS = 16
MAX_LOGPROBS = 20


_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}


def check_types(settings: Any) -> None:
    """Refuses fields that hold another type than a frozen dataclass says: numbers, texts, and tuples of them.

    Raises:
        ValueError: naming the field, its value, and what it must be.
    """
    for name, kind in _hints(cast(Hashable, type(settings))).items():
        given, is_tuple = getattr(settings, name), get_origin(kind) is tuple
        check_that(not is_tuple or isinstance(given, tuple), name, repr(given), "a tuple")
        choices = get_args(kind) if is_tuple or isinstance(kind, UnionType) else (kind,)
        kinds, words = next((_KINDS[choice] for choice in choices if choice in _KINDS), (object, ""))
        for one in given if is_tuple else (given,):
            is_left_out = one is None and type(None) in choices
            is_truth = isinstance(one, bool) and kinds not in (bool, object)  # Python's bools are ints
            check_that(is_left_out or (isinstance(one, kinds) and not is_truth), name, repr(one), words)


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def check_that(is_fine: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError, naming a setting, its value and what is allowed, unless it is fine."""
    if not is_fine:
        raise ValueError(f"{name} is {value}; it must be {allowed}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the target's logits; the defaults are greedy and change nothing.

    >>> SamplingParams(temperature=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: temperature is -1.0; it must be 0 (greedy) or a positive number
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers counts it
    presence_penalty: float = 0.0  # over the output only, as OpenAI counts it
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_that(
            0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or a positive number"
        )
        check_that(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive count")
        check_that(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        check_that(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        check_that(
            0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            self.repetition_penalty,
            "positive; 1 is off",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            check_that(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "between -2 and 2; 0 is off")

    @property
    def is_greedy(self) -> bool:
        """Whether every row becomes one-hot at its argmax."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether rows depend on which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class GenerationParams:
    """One request's limits: how long, where to stop, which random numbers."""

    max_new_tokens: int = 96
    num_draft_tokens: int = 4  # K; 0 is plain decoding
    sampling: SamplingParams = SamplingParams()
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # beside the target's own end tokens
    ignore_end_tokens: bool = False  # for benchmarks of a fixed length
    num_logprobs: int | None = None  # likeliest tokens reported beside each committed one; None reports nothing
    seed: int = 0  # one per request: two that share a seed and a choice draw with the same numbers
    choice: int = 0  # which of a request's n choices: noise is a function of (seed, choice, position)

    def __post_init__(self) -> None:
        check_types(self)
        check_that(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        check_that(
            0 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS,
            "num_draft_tokens",
            self.num_draft_tokens,
            f"between 0 (plain decoding) and {MAX_DRAFT_TOKENS}",
        )
        check_that(all(self.stop_strings), "stop_strings", self.stop_strings, "non-empty strings")
        if self.num_logprobs is not None:
            check_that(
                0 <= self.num_logprobs <= MAX_LOGPROBS,
                "num_logprobs",
                self.num_logprobs,
                f"between 0 (the committed token alone) and {MAX_LOGPROBS}",
            )
        check_that(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a number of 64 bits")
        check_that(0 <= self.choice < 2**63, "choice", self.choice, "0 or a count")


ROW_CHOICES = ("all", "rejected")


@dataclass(frozen=True)
class LearnConfig:
    """How a drafter learns inline. Rows are verified positions; a round trains each of its rows once."""

    learner: str = "online_gradient"
    step_size: float | None = None  # None: by how many weights learn, 1e-3 for a million (`learners/step_sizes.py`)
    geometry: str = "preconditioned"  # or "diagonal", "euclidean"
    clip_norm: float = 1.0
    full_loss: float | None = None  # loss of all drafting depths together below which the diagonal geometries' steps
    # shorten in proportion, and of the first depth alone below which rounds become rarer; 0 for never; None for 4 nats
    # with cross-entropies, and never with other losses
    options: Mapping[str, Any] = field(default_factory=dict)  # what this learner takes beside the three above
    loss: str = "auto"  # by how requests decode: mostly the committed token when greedy, the whole row when sampled
    rows: str = "all"  # or "rejected": count only rows that refused a drafted token
    min_interval: int = 16  # steps between rounds while they bring something ...
    max_interval: int = 128  # ... and once they don't; up to fourfold where the loss is small, equal ones stay fixed
    requests_per_round: int = 0  # rounds after so many finished requests instead of steps; 0 for steps
    least_gain: float = 0.004  # of the loss, per round; rounds that bring less become rarer
    max_rows: int = 64  # newest rows a round trains; bounds what a long answer can cost
    replay_every: int = 6  # every so many rounds rows of a stored request join; 0 for no memory
    replay_megabytes: float = 64.0  # of memory
    replay_minutes: float = float("inf")  # after which a request is forgotten
    budget: float = 0.08  # most of decoding time that learning may take; inf for no limit
    round_cost: float = 1.0  # what a round costs, in steps, whatever its rows: what the budget is counted in ...
    row_cost: float = 0.03  # ... and what each of its rows adds
    telemetry: bool = False  # measure regret, gradients and drift beside learning, timed apart

    def __post_init__(self) -> None:
        check_types(self)
        check_that(0 <= (self.step_size or 0) < float("inf"), "step_size", self.step_size, "0 or a positive number")
        check_that(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")
        check_that(0 <= (self.full_loss or 0) < float("inf"), "full_loss", self.full_loss, "0 or a positive number")
        check_that(self.rows in ROW_CHOICES, "rows", self.rows, f"one of {', '.join(ROW_CHOICES)}")
        check_that(self.min_interval >= 1, "min_interval", self.min_interval, "at least 1")
        check_that(
            self.max_interval >= self.min_interval,
            "max_interval",
            self.max_interval,
            f"at least min_interval ({self.min_interval})",
        )
        check_that(
            self.requests_per_round >= 0, "requests_per_round", self.requests_per_round, "0 (by steps) or a count"
        )
        check_that(self.max_rows >= 1, "max_rows", self.max_rows, "at least 1")
        check_that(self.least_gain >= 0, "least_gain", self.least_gain, "0 or a positive number")
        check_that(self.replay_every >= 0, "replay_every", self.replay_every, "0 (no memory) or a number of rounds")
        check_that(0 < self.replay_megabytes < float("inf"), "replay_megabytes", self.replay_megabytes, "positive")
        check_that(self.replay_minutes > 0, "replay_minutes", self.replay_minutes, "positive; inf for ever")
        check_that(self.budget > 0, "budget", self.budget, "positive; inf for no limit")
        check_that(0 <= self.round_cost < float("inf"), "round_cost", self.round_cost, "0 or a positive number")
        check_that(0 < self.row_cost < float("inf"), "row_cost", self.row_cost, "positive")


TUNINGS = ("layers", "all", "adapters")


@dataclass(frozen=True)
class Tuning:
    """What of a drafter learns, where it leaves a choice (`small_lm`)."""

    what: str = "layers"  # all but embedding and head; "all" of it; or low-rank "adapters" of the layers' products
    rank: int = 8  # of the adapters ...
    alpha: float = 16.0  # ... which count alpha / rank times

    def __post_init__(self) -> None:
        check_types(self)
        check_that(self.what in TUNINGS, "tuning", self.what, f"one of {', '.join(TUNINGS)}")
        check_that(self.rank >= 1, "adapter rank", self.rank, "at least 1")
        check_that(0 < self.alpha < float("inf"), "adapter alpha", self.alpha, "positive")


@dataclass(frozen=True)
class PublishConfig:
    """What decides which weights are served: on how many requests they are compared, and how sure that must be."""

    trial_looks: tuple[int, ...] = (4, 8, 16, 32)  # requests after which a candidate is looked at; the last decides
    watch_looks: tuple[int, ...] = (16, 32, 64)  # and a promoted version, against the one before
    most_pause: int = 64  # requests between a candidate that was refused and the next: 0, 8, 16, up to so many
    max_rows: int = 64  # of a request that weights are compared on; bounds what a long answer can cost
    megabytes: float = 64.0  # of requests that wait to be looked at
    num_draft_tokens: int = 4  # K that acceptance is compared at
    level: float = 0.05  # chance that one trial promotes, or one watch takes back, what makes no difference

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("trial_looks", "watch_looks"):
            looks = getattr(self, name)
            is_rising = list(looks) == sorted(set(looks)) and bool(looks)
            check_that(is_rising and looks[0] >= 4, name, looks, "rising, from at least 4 on; of fewer, chance decides")
        check_that(self.most_pause >= 0, "most_pause", self.most_pause, "0 or a count")
        check_that(self.max_rows >= 2, "max_rows", self.max_rows, "at least 2")
        check_that(0 < self.megabytes < float("inf"), "megabytes", self.megabytes, "positive")
        check_that(
            1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS,
            "num_draft_tokens",
            self.num_draft_tokens,
            f"between 1 and {MAX_DRAFT_TOKENS}",
        )
        check_that(0 < self.level < 0.5, "level", self.level, "above 0 and below 0.5")
