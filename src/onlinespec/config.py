"""What a caller may set, as frozen dataclasses, checked once where they are made."""

from __future__ import annotations

from dataclasses import dataclass

MAX_DRAFT_TOKENS = 16


def _check(is_fine: bool, name: str, value: object, allowed: str) -> None:
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
        _check(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or a positive number")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive count")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        _check(
            0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            self.repetition_penalty,
            "positive; 1 is off",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "between -2 and 2; 0 is off")

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
    seed: int = 0  # one per request: while the drafter learns, requests that share one are not independent draws

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(
            0 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS,
            "num_draft_tokens",
            self.num_draft_tokens,
            f"between 0 (plain decoding) and {MAX_DRAFT_TOKENS}",
        )
        _check(all(self.stop_strings), "stop_strings", self.stop_strings, "non-empty strings")


@dataclass(frozen=True)
class LearnConfig:
    """How a drafter learns inline. Rows are verified positions; a round trains each of its rows once."""

    step_size: float = 1e-3  # for drafters of about a million parameters
    geometry: str = "diagonal"  # or "euclidean"
    clip_norm: float = 1.0
    min_interval: int = 24  # steps between rounds while the loss falls ...
    max_interval: int = 96  # ... and once it is flat
    max_rows: int = 64  # newest rows a round trains; bounds what a long answer can cost

    def __post_init__(self) -> None:
        _check(0 <= self.step_size < float("inf"), "step_size", self.step_size, "0 or a positive number")
        _check(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")
        _check(self.min_interval >= 1, "min_interval", self.min_interval, "at least 1")
        _check(
            self.max_interval >= self.min_interval,
            "max_interval",
            self.max_interval,
            f"at least min_interval ({self.min_interval})",
        )
        _check(self.max_rows >= 1, "max_rows", self.max_rows, "at least 1")
