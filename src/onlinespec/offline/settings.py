"""What to distil, on what. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, SamplingParams, check_types
from onlinespec.drafters.settings import Tuning
from onlinespec.registry import LOSSES, resolve


@dataclass(frozen=True)
class Distillation:
    """What to train, on what."""

    drafter: str
    """Name of a fresh drafter, or a saved one to go on from."""
    data: tuple[str, ...]
    """Prompts to have answered, as `load_workload` takes them."""
    num_requests: tuple[int, ...] = (400,)
    """Prompts of each data, one number for all or one for each; 0 takes all of a file."""
    temperature: float | None = None
    """At which the target answers; None: every other prompt greedy, the others at 1."""
    max_new_tokens: int = 112
    """Longest answer, in tokens."""
    num_draft_tokens: int = 4
    """Tokens drafted per step where acceptance is measured."""
    holdout: int = 20
    """One answer in so many is left out of training and measures what it brought; never fewer than 8 answers."""
    epochs: int = 4
    """Passes over the answers; the step size falls to zero over the last two fifths."""
    patience: int = 2
    """Epochs without longer acceptance after which it stops; the best weights are kept."""
    batch_requests: int = 4
    """Answers per training step."""
    step_size: float | None = None
    """Rate of learning; None: by the drafter's size, 2e-3 for a million weights, 3e-4 for a hundred."""
    loss: str = "soft_cross_entropy"
    """What is learned: soft_cross_entropy, auto, cross_entropy, mix, reverse_kl, jsd, total_variation."""
    minutes: float = 0.0
    """Time for the whole, about; a slower machine answers fewer prompts and trains less on them, the step size still
    falling to zero. 0 is no limit."""
    tuning: Tuning | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if not self.data:
            raise ValueError("no data given; name at least one")
        if len(self.num_requests) not in (1, len(self.data)):
            raise ValueError(
                f"num_requests has {len(self.num_requests)} numbers for {len(self.data)} data; "
                "give one for all or one for each"
            )
        least = {
            "max_new_tokens": 1,
            "num_draft_tokens": 1,
            "holdout": 2,
            "epochs": 1,
            "patience": 1,
            "batch_requests": 1,
        }
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {at_least}")
        if self.num_draft_tokens > MAX_DRAFT_TOKENS:
            raise ValueError(f"num_draft_tokens is {self.num_draft_tokens}; it must be at most {MAX_DRAFT_TOKENS}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size is {self.step_size}; it must be positive")
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes is {self.minutes}; it must be 0 (no limit) or a positive number")
        if min(self.num_requests) < 0:
            raise ValueError(f"num_requests is {min(self.num_requests)}; it must be at least 0")
        if self.loss not in LOSSES:
            resolve(LOSSES, self.loss, "loss")
        self.params_of(0), self.params_of(1)

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(data, number of requests) of each data."""
        counts = self.num_requests * len(self.data) if len(self.num_requests) == 1 else self.num_requests
        return list(zip(self.data, counts, strict=True))

    def params_of(self, index: int) -> GenerationParams:
        """How the prompt at a place of the stream is answered."""
        temperature = float(index % 2) if self.temperature is None else self.temperature
        seed = self.seed * 1_000_003 + index
        return GenerationParams(self.max_new_tokens, 0, SamplingParams(temperature), seed=seed)
