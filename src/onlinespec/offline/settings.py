"""Settings of a distillation. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onlinespec.config import MAX_DRAFT_TOKENS, GenerationParams, SamplingParams, check_types
from onlinespec.drafters.settings import Tuning
from onlinespec.registry import LOSSES, resolve


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation: which drafter to train, on which prompts, and how."""

    drafter: str
    """Name of a drafter to train from scratch, or path or Hub id of a saved one to continue from."""
    data: tuple[str, ...]
    """Sources of prompts for the target to answer, as `load_workload` takes them."""
    num_requests: tuple[int, ...] = (400,)
    """Prompts to take from each source: one number for all, or one per source. 0 takes all of a file."""
    temperature: float | None = None
    """Sampling temperature of the target's answers; 0 is greedy. None answers every other prompt greedily, the rest at
    temperature 1."""
    max_new_tokens: int = 112
    """Maximum length of an answer, in tokens."""
    num_draft_tokens: int = 4
    """Tokens drafted per step when acceptance length is measured on the held-out answers."""
    holdout: int = 20
    """One answer in this many is held out of training, to measure acceptance length on; at least 8 answers are."""
    epochs: int = 4
    """Passes over the training answers. The step size falls linearly to zero over the last two fifths."""
    patience: int = 2
    """Stop after this many epochs in a row without a better score. The best weights are saved."""
    batch_requests: int = 4
    """Answers per training step."""
    step_size: float | None = None
    """Step size (learning rate). None chooses it by the number of trainable weights: 2e-3 up to 2 million, 3e-4 for 100
    million."""
    loss: str = "soft_cross_entropy"
    """Training loss: soft_cross_entropy, auto, cross_entropy, mix, reverse_kl, jsd or total_variation."""
    minutes: float = 0.0
    """Approximate time limit for the whole run, in minutes. A slower machine answers fewer prompts and trains for fewer
    steps; the step size still falls to zero. 0 is no limit."""
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
        """(source, number of prompts) for each entry of `data`."""
        counts = self.num_requests * len(self.data) if len(self.num_requests) == 1 else self.num_requests
        return list(zip(self.data, counts, strict=True))

    def params_of(self, index: int) -> GenerationParams:
        """Generation settings for the prompt at an index of the stream, with a seed of its own."""
        temperature = float(index % 2) if self.temperature is None else self.temperature
        seed = self.seed * 1_000_003 + index
        return GenerationParams(self.max_new_tokens, 0, SamplingParams(temperature), seed=seed)
