"""Settings of a request, and how settings are checked.

Each room's own settings are frozen dataclasses in its `settings.py`, checked when they are constructed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
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
    """Checks that the fields of a frozen dataclass have the annotated types: numbers, strings, and tuples of them.

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
            is_truth = isinstance(one, bool) and kinds not in (bool, object)  # because bool is a subclass of int
            check_that(is_left_out or (isinstance(one, kinds) and not is_truth), name, repr(one), words)


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def check_that(is_fine: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError unless `is_fine`, naming the setting, its value and what is allowed."""
    if not is_fine:
        raise ValueError(f"{name} is {value}; it must be {allowed}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the target's logits. The defaults are greedy, without cuts or penalties.

    >>> SamplingParams(temperature=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: temperature is -1.0; it must be 0 (greedy) or a positive number
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers; 1: off
    presence_penalty: float = 0.0  # over the output only, as in OpenAI's API; 0: off
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
        """Whether the temperature is 0, so that each token is the argmax of its scores."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty is on, so that scores depend on earlier tokens."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class GenerationParams:
    """Settings of one request: length, drafts, sampling, stops, seed."""

    max_new_tokens: int = 96
    num_draft_tokens: int = 4  # K; 0 is plain decoding
    sampling: SamplingParams = SamplingParams()
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # beside the target's own end tokens
    ignore_end_tokens: bool = False  # for benchmarks of a fixed length
    num_logprobs: int | None = None  # most likely tokens to report with each committed one; None reports no logprobs
    seed: int = 0  # sampling noise is a function of (seed, choice, position)
    choice: int = 0  # index among several answers to one prompt

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
